"""The report page: a run and a control as commands, and the page against their files."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from guilomo_serve.adapter import BaseModel
from guilomo_train.allocation_map import grid
from guilomo_train.cli import main
from guilomo_train.search.allocation import Allocation
from tests.train.test_cli import guilomo_train
from tests.train.tiny import tiny_llama


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "parity.jsonl"
    made = [{"prompt": f"number {i}", "completion": "odd" if i % 2 else "even"} for i in range(96)]
    path.write_text("\n".join(map(json.dumps, made)))
    return path


@pytest.fixture(scope="module")
def run(tiny_base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its page: 15 search steps, 24 of fine-tuning, an evaluation."""
    output = tmp_path_factory.mktemp("runs") / "searched"
    done = guilomo_train(
        "run", "--base", tiny_base, "--train", rows, "--eval", rows, "--output", output,
        "--max_experts", 4, "--max_rank", 3, "--search_epochs", 1.5, "--epochs", 2,
        "--eval_rows", 8, "--max_new_tokens", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"'router_entropy': '0\.\d+', 'max_load': '\d", done.stdout + done.stderr)
    for stage, steps in (("search", 15), ("finetune", 24)):  # how far, how long still, how fast
        line = rf"{stage}:[^\r\n]* \d+/{steps} \[\d\d:\d\d<[\d:?]+, [^\r\n]*, \d+ tokens/s\]"
        assert re.search(line, done.stderr)
    return output


@pytest.fixture(scope="module")
def control(run: Path, tiny_base: Path, rows: Path) -> Path:
    """A uniform control of the run, trained without balance loss."""
    allocation, output = run.parent / "uniform.json", run.parent / "uniform"
    for command in (
        ["baseline", "--kind", "uniform", "--experts", 3, "--like", run / "allocation.json",
         "--output", allocation],
        ["finetune", "--train", rows, "--allocation", allocation, "--epochs", 2,
         "--balance_coefficient", 0, "--output", output, "--eval", rows, "--eval_rows", 16,
         "--max_new_tokens", 2],
    ):  # fmt: skip
        assert main([*map(str, command), "--base", str(tiny_base)]) == 0
    return output


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def rewrite(path: Path, value: dict) -> None:
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def pictures(folder: Path) -> set[str]:
    """The pictures that the page shows; each is there, and whole."""
    shown = set(re.findall(r"!\[[^]]+\]\(([^)]+)\)", (folder / "report.md").read_text()))
    for name in shown:
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
    assert not list(folder.glob(".*")), "no half-written file is left"
    return shown


def test_the_history_holds_what_the_stages_did(run: Path) -> None:
    history, allocation = read(run / "history.json"), Allocation.load(run / "allocation.json")
    search, finetune = history["search"], history["finetune"]
    assert search["modules"] == list(allocation.ranks)
    snapshots = [e for e in search["log"] if "total_ranks" in e]
    assert [e["step"] for e in snapshots] == [10, 15]
    assert snapshots[-1]["total_ranks"] == [sum(r) for r in allocation.ranks.values()]
    assert {"nll", "balance", "expected_rank", "router_entropy"} <= snapshots[0].keys()

    assert [e["step"] for e in finetune["log"]] == [10, 20, 24]
    assert finetune["routers"].keys() == {m for m, r in allocation.ranks.items() if len(r) > 1}
    for module, figures in finetune["routers"].items():
        assert len(figures["load"]) == len(allocation.ranks[module])
        assert sum(figures["load"]) == pytest.approx(len(figures["load"]), abs=1e-2)
        assert 0 <= figures["entropy"] <= 1


def test_what_the_card_says_loads_the_adapter(run: Path, tiny_base: Path) -> None:
    card = (run / "adapter" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code += "\nprint(sum('lora_' in name for name in model.state_dict()))"
    command = [sys.executable, "-c", code.replace("THIS_FOLDER", str(run / "adapter"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) == len(
        load_file(run / "adapter" / "adapter_model.safetensors")
    )


def test_the_page_says_what_the_run_cost_and_saved(run: Path, tiny_base: Path) -> None:
    page, record = (run / "report.md").read_text(), read(run / "run.json")
    allocation = Allocation.load(run / "allocation.json")
    base = tiny_llama(49152)
    linears = BaseModel.from_module(base).linears
    parameters = allocation.parameters(linears)
    uniform = Allocation.uniform(tuple(allocation.ranks), 8, 8).parameters(linears)
    assert (
        f"total rank {allocation.total_rank}: {parameters:,} parameters, "
        f"{parameters / base.num_parameters():.2%} of the base. That is "
        f"{1 - parameters / uniform:.0%} fewer than 8 experts of rank 8 in all 14 "
        f"({uniform:,})."
    ) in page
    seconds = record["search"]["seconds"], record["finetune_seconds"]
    assert f"{seconds[0] / sum(seconds):.0%} of search and fine-tuning together" in page
    assert "**Evaluation.** 8 rows: exact match" in page
    assert re.search(r"\*\*Fine-tuning.\*\* \d+ s from the search's weights;", page)
    assert "**Control.** None given" in page
    for layer in grid(m for m, ranks in allocation.ranks.items() if len(ranks) > 1)[0]:
        assert re.search(rf"^\| {layer} \| \d+ \| 0\.\d+ \| \d", page, re.MULTILINE)
    assert pictures(run) == {"loss.png", "search.png", "allocation.png", "routers.png"}


def test_a_control_is_compared_in_what_both_have(
    run: Path, control: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (control / "report.md").read_text()
    assert "**Search.** None in this run: the allocation was given." in page
    assert pictures(control) == {"loss.png", "allocation.png", "routers.png"}

    assert main(["report", str(run), "--control", str(control)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.md")
    page = (run / "report.md").read_text()
    ours, theirs = read(run / "run.json"), read(control / "run.json")
    share = ours["parameters"] / theirs["parameters"] - 1
    assert abs(share) < 0.01
    assert (
        f"| parameters | {ours['parameters']:,} | {theirs['parameters']:,} | {share:+.2%} |" in page
    )
    assert "`balance_coefficient` is 0.01 here and 0.0 there" in page
    assert "fine-tuning began with the search's weights here and fresh weights there" in page
    assert "None given" not in page
    assert theirs["scores"]["rows"] == 16
    assert "`eval_rows` is 8 here and 16 there" in page

    # With other scores, and with none.
    mine, other = run.parent / "mine", run.parent / "other"
    for scores, line in (
        (
            {**theirs["scores"], "exact_match": 0.25},
            "| exact match | 0.500 | 0.250 | +0.250 ± 0.209 |",
        ),
        (None, "Scores cannot be compared"),
    ):
        shutil.copytree(control, other, dirs_exist_ok=True)
        shutil.copytree(run, mine, dirs_exist_ok=True)
        rewrite(other / "run.json", {**theirs, "scores": scores})
        rewrite(mine / "run.json", {**ours, "scores": {**ours["scores"], "exact_match": 0.5}})
        assert main(["report", str(mine), "--control", str(other)]) == 0
        assert line in (mine / "report.md").read_text()


def test_the_error_against_a_control_is_paired_where_both_were_asked_the_same_rows(
    run: Path, tmp_path: Path
) -> None:
    assert read(run / "run.json")["scores"]["exact_match"] == pytest.approx(
        sum(read(run / "history.json")["eval"]["exact_match"]) / 8
    )
    # Three rows gained and one lost of eight; and a score in which no row differs.
    by_row = {
        "mine": {"exact_match": [1, 1, 1, 1, 0, 0, 0, 0], "accuracy": [1, 0, 1, 0, 1, 0, 0, 0]},
        "other": {"exact_match": [1, 0, 0, 0, 1, 0, 0, 0], "accuracy": [1, 0, 1, 0, 1, 0, 0, 0]},
    }
    for name, hits in by_row.items():
        shutil.copytree(run, tmp_path / name)
        record, history = read(run / "run.json"), read(run / "history.json")
        record["scores"] |= {key: sum(row) / 8 for key, row in hits.items()}
        rewrite(tmp_path / name / "run.json", record)
        rewrite(tmp_path / name / "history.json", history | {"eval": hits})

    def page() -> str:
        assert main(["report", str(tmp_path / "mine"), "--control", str(tmp_path / "other")]) == 0
        return (tmp_path / "mine" / "report.md").read_text()

    # With one more gained and one more lost, of ten: sqrt((6/10 - (2/10)^2) / 8), and
    # sqrt(2/10 / 8). Unpaired it would be 0.240 and 0.245.
    paired = page()
    assert "| exact match | 0.500 | 0.250 | +0.250 ± 0.265 |" in paired
    assert "| accuracy | 0.375 | 0.375 | +0.000 ± 0.158 |" in paired
    assert "the rows that one of the two answered right and the other wrong" in paired

    record["inputs"]["rows of --eval"] = "8 rows, sha256 of others"
    rewrite(tmp_path / "other" / "run.json", record)
    unpaired = page()
    assert "| accuracy | 0.375 | 0.375 | +0.000 ± 0.245 |" in unpaired
    assert "the number of rows asked, which were not the same" in unpaired


def test_a_search_alone_has_a_page(run: Path, tmp_path: Path) -> None:
    for name in ("run.json", "history.json"):
        value = {k: v for k, v in read(run / name).items() if not k.startswith("finetune")}
        rewrite(tmp_path / name, value)
    shutil.copy(run / "allocation.json", tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    assert pictures(tmp_path) == {"loss.png", "search.png", "allocation.png"}


def test_files_that_are_missing_or_of_another_base_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path / 'run.json'}: no such file; guilomo-train search" in capsys.readouterr().err

    other = tmp_path / "other"
    shutil.copytree(run, other)
    record = read(run / "run.json")
    record["config"]["common"]["base"] = "elsewhere"
    rewrite(other / "run.json", record)
    assert main(["report", str(run), "--control", str(other)]) == 2
    assert "trained on elsewhere, this run on" in capsys.readouterr().err


def test_tensorboard_gets_the_figures(run: Path, tiny_base: Path, rows: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = run.parent / "with-tensorboard"
    command = ["finetune", "--base", tiny_base, "--train", rows, "--output", output]
    command += ["--allocation", run / "allocation.json", "--report_to", "tensorboard"]
    assert main([*map(str, command)]) == 0
    events = EventAccumulator(str(output / "logs" / "finetune"))
    events.Reload()
    wanted = {f"train/{name}" for name in ("nll", "router_entropy", "dead_experts", "max_load")}
    assert wanted <= set(events.Tags()["scalars"])


def test_without_tensorboard_the_setting_says_so(
    tiny_base: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as where it is not installed
    command = ["search", "--base", tiny_base, "--train", rows, "--output", tmp_path / "out"]
    assert main([*map(str, command), "--report_to", "tensorboard"]) == 2
    assert "pip install tensorboard" in capsys.readouterr().err
