"""The report page of a run: `report.md` and its pictures, made from the files that a run leaves
(run_files.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from guilomo_train.allocation_map import grid, heat_map
from guilomo_train.config import WITHOUT_EFFECT
from guilomo_train.errors import ConfigError
from guilomo_train.health import DEAD
from guilomo_train.limits import replace_file
from guilomo_train.model_card import finding
from guilomo_train.report_pictures import loss_picture, router_picture, search_picture
from guilomo_train.run_files import PAGE_FILE, RUN_FILE, Curve, FinishedRun
from guilomo_train.scoring import paired_error, unpaired_error


def write_page(folder: Path, control: Path | None = None) -> Path:
    """Writes the report page of a run.

    Args:
        folder: the run's output folder.
        control: that of another run on the same base, to compare with.

    Returns:
        The page's path; its pictures lie beside it.

    Raises:
        ConfigError, AllocationError, AdapterError: files of a run are missing or broken, or the
            control is of another base.
    """
    run = FinishedRun.read(folder)
    other = FinishedRun.read(control) if control is not None else None
    if other is not None:
        bases = [r.record["config"]["common"]["base"] for r in (run, other)]
        if bases[0] != bases[1]:
            raise ConfigError(
                f"--control {control}: trained on {bases[1]}, this run on {bases[0]}; expected "
                "the same base"
            )
    parts = [_head(run), _summary(run, other)]
    if other is not None:
        parts.append(_control(run, other))
    parts += [_losses(run, other), _search(run), _allocation(run), _routers(run)]
    page = folder / PAGE_FILE
    with replace_file(page) as partial:
        partial.write_text("\n\n".join(part for part in parts if part) + "\n")
    return page


def _head(run: FinishedRun) -> str:
    common = run.record["config"]["common"]
    return (
        f"# {run.name}\n\n"
        f"`guilomo-train {run.record['command']}` on {Path(common['base']).name}: "
        f"{', '.join(common['train'])}, {run.record['train_rows']:,} rows, seed {common['seed']}. "
        f"All settings and versions are in [{RUN_FILE}]({RUN_FILE})."
    )


def _summary(run: FinishedRun, other: FinishedRun | None) -> str:
    allocation, record = run.allocation, run.record
    parameters, whole = record["parameters"], record["uniform_parameters"]
    modules, adapted = len(allocation.ranks), len(allocation.adapted)
    layers = f"{adapted} of {modules}" if adapted < modules else f"{modules}"
    lines = [
        f"- **Size.** {allocation.total_experts:,} experts in {layers} linear "
        f"layers, total rank {allocation.total_rank:,}: {parameters:,} parameters, "
        f"{parameters / record['base_parameters']:.2%} of the base. That is "
        f"{_saved(parameters, whole)} than 8 experts of rank 8 in all {modules} "
        f"({whole:,})."
    ]
    seconds = run.seconds
    if "search" in seconds:
        share = seconds["search"] / sum(seconds.values())
        of = f", {share:.0%} of search and fine-tuning together" if len(seconds) > 1 else ""
        lines.append(f"- **Search.** {_duration(seconds['search'])}{of}.")
    else:
        lines.append("- **Search.** None in this run: the allocation was given.")
    if "fine-tuning" in seconds:
        lines.append(
            f"- **Fine-tuning.** {_duration(seconds['fine-tuning'])} from {run.start}; NLL at the "
            f"end {run.final_nll():.4f} a token on training rows."
        )
    if "scores" in record:
        scores = record["scores"]
        lines.append(
            f"- **Evaluation.** {scores['rows']} rows: exact match {scores['exact_match']:.3f}, "
            f"accuracy {scores['accuracy']:.3f} (most frequent answer alone "
            f"{scores['majority']:.3f})."
        )
    if other is None:
        lines.append(
            "- **Control.** None given, so this page cannot say what was gained or lost: "
            "`guilomo-train baseline --kind uniform --like allocation.json` makes one, "
            "`finetune` trains it, `guilomo-train report RUN --control FOLDER` compares."
        )
    return "\n".join(lines)


def _control(run: FinishedRun, other: FinishedRun) -> str:
    rows = [f"| | {run.name} | {other.name} (control) | gained or lost |", "|---|---|---|---|"]
    scores = [r.record["scores"] for r in (run, other) if "scores" in r.record]
    paired = _same_rows(run, other)
    if len(scores) == 2:
        for key, name in (("exact_match", "exact match"), ("accuracy", "accuracy")):
            a, b = (s[key] for s in scores)
            if paired:
                error = paired_error(*(r.history["eval"][key] for r in (run, other)))
            else:
                error = unpaired_error(*((s[key], s["rows"]) for s in scores))
            rows.append(f"| {name} | {a:.3f} | {b:.3f} | {a - b:+.3f} ± {error:.3f} |")
    final = [nll for nll in (run.final_nll(), other.final_nll()) if nll is not None]
    if len(final) == 2:
        rows.append(
            f"| NLL a token at the end, lower is better | {final[0]:.4f} | {final[1]:.4f} | "
            f"{final[0] - final[1]:+.4f} |"
        )
    a, b = (r.record["parameters"] for r in (run, other))
    rows.append(f"| parameters | {a:,} | {b:,} | {a / b - 1:+.2%} |")
    a, b = (sum(r.seconds.values()) for r in (run, other))
    rows.append(f"| search and fine-tuning | {_duration(a)} | {_duration(b)} | {a - b:+,.0f} s |")
    notes = []
    if len(scores) == 2:
        notes.append(
            "± is one standard error, "
            + (
                "from the rows that one of the two answered right and the other wrong"
                if paired
                else "from the number of rows asked, which were not the same"
            )
            + "; less than two of them is no difference that this evaluation can see. Other seeds "
            "would spread further."
        )
    else:
        notes.append("Scores cannot be compared: only runs with `--eval` have them.")
    different = _differences(run, other)
    if different:
        notes.append("The two runs differ in more than their allocation: " + different + ".")
    return "\n".join(["## Against the control", "", *rows, "", " ".join(notes)])


def _differences(run: FinishedRun, other: FinishedRun) -> str:
    """Settings of stages that both had, in which they differ."""
    found = []
    mine, theirs = run.record["config"], other.record["config"]
    for stage in ("common", "finetune", "eval"):
        for key, value in mine.get(stage, {}).items():
            there = theirs.get(stage, {}).get(key, value)
            if there != value and key not in WITHOUT_EFFECT:
                found.append(f"`{key}` is {value} here and {there} there")
    if run.start != other.start:
        found.append(f"fine-tuning began with {run.start} here and {other.start} there")
    return ", ".join(found)


def _losses(run: FinishedRun, other: FinishedRun | None) -> str:
    panels = {}
    for stage, title in (("search", "search"), ("finetune", "fine-tuning")):
        curves = {}
        for finished in (run, other):
            if finished is not None and len(finished.curve(stage, "nll").steps) > 0:
                curves[finished.name if finished is run else f"{finished.name} (control)"] = (
                    finished.curve(stage, "nll")
                )
        if curves:
            panels[title] = curves
    loss_picture(panels, run.folder / "loss.png")
    note = "On training rows, without the load-balance loss."
    return f"## Loss\n\n![NLL over the steps](loss.png)\n\n{note}"


def _search(run: FinishedRun) -> str:
    if "search" not in run.history:
        return ""
    modules = run.history["search"]["modules"]
    log = run.history["search"]["log"]
    # By step: the last one is logged twice, with the figures of the whole search.
    snapshots = list({e["step"]: e for e in log if "total_ranks" in e}.values())
    layers, kinds, cells = grid(modules)
    by_kind: dict[str, list[int]] = {kind: [] for kind in kinds}
    by_layer: dict[str, list[int]] = {layer: [] for layer in layers}
    place = {module: i for i, module in enumerate(modules)}
    for (layer, kind), module in cells.items():
        by_kind[kind].append(place[module])
        by_layer[layer].append(place[module])
    steps = tuple(e["step"] for e in snapshots)

    def over_time(groups: Mapping[str, list[int]]) -> dict[str, list[float]]:
        return {
            name: [sum(e["total_ranks"][i] for i in members) / len(members) for e in snapshots]
            for name, members in groups.items()
        }

    total = Curve(steps, tuple(float(sum(e["total_ranks"])) for e in snapshots))
    search_picture(
        {"expected": run.curve("search", "expected_rank"), "most likely": total},
        steps,
        over_time(by_kind),
        over_time(by_layer),
        run.folder / "search.png",
    )
    found = run.record["search"]
    facts = ", ".join(f"{key} {value}" for key, value in found.items())
    return (
        "## Search\n\n![The allocation over the steps of the search](search.png)\n\n"
        "*Most likely* is the allocation that the search would end in at that step, *expected* the "
        f"mean over what it may still draw. {finding(found)} Its record: {facts}."
    )


def _allocation(run: FinishedRun) -> str:
    heat_map(run.allocation, run.folder / "allocation.png")
    return "## Allocation\n\n![Experts and total rank of each layer](allocation.png)"


def _routers(run: FinishedRun) -> str:
    routers = run.history.get("finetune", {}).get("routers", {})
    if "finetune" not in run.history:
        return ""
    if not routers:
        return "## Routers\n\nNone: no layer has more than one expert."
    layers, kinds, cells = grid(run.allocation.ranks)
    router_picture(routers, layers, kinds, cells, run.folder / "routers.png")
    rows = ["| layer | routers | entropy | largest load | dead experts |", "|---|---|---|---|---|"]
    for layer in layers:
        found = [
            routers[cells[layer, kind]] for kind in kinds if cells.get((layer, kind)) in routers
        ]
        if found:
            dead, experts = (sum(len(f[key]) for f in found) for key in ("dead", "load"))
            rows.append(
                f"| {layer} | {len(found)} | {sum(f['entropy'] for f in found) / len(found):.3f} | "
                f"{max(max(f['load']) for f in found):.2f} | {dead} of {experts} |"
            )
    dead, experts = (sum(len(f[key]) for f in routers.values()) for key in ("dead", "load"))
    return "\n".join(
        [
            "## Routers",
            "",
            "![Load of each expert and entropy of each router](routers.png)",
            "",
            f"In the last steps of fine-tuning {dead} of {experts:,} experts were dead: chosen by "
            f"less than {DEAD:.0%} of the tokens. Load is over an even one (1); entropy is 1 where "
            "a router cannot tell its experts apart and 0 where it is always certain.",
            "",
            *rows,
        ]
    )


def _same_rows(run: FinishedRun, other: FinishedRun) -> bool:
    """Whether both were asked the same rows, and left what they made of each."""
    asked = [r.record["inputs"].get("rows of --eval") for r in (run, other)]
    return asked[0] == asked[1] and all("eval" in r.history for r in (run, other))


def _saved(parameters: int, whole: int) -> str:
    share = 1 - parameters / whole
    return f"{abs(share):.0%} {'fewer' if share >= 0 else 'more'}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
