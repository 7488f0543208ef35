"""What the finished runs of benchmarks/proof.py say: differences by seed, intervals, a picture.

All arms of a seed have the same rows and batches, so differences are taken seed by seed. `loss` is
the negative log-likelihood of a label's token in nats; `relative` is an arm's loss over that of
`searched`, less 1, and pooled over tasks the mean of a seed's tasks. Intervals are Student's t over
seeds, 95%. A positive difference speaks for `searched`.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from guilomo_train.pictures import save, subplots

PRIMARY = ("searched", "shuffled", "one-shot", "uniform")
TIGHT = (0.001, 0.003)  # budgets of the primary contrasts, as shares of the base
# What a picture may be drawn over.
AXES = {
    "parameters": "parameters of the adapter",
    "serving_us": "serving, microseconds of a step",
}
# What an arm is compared with, where it is not `searched`.
AGAINST = {"uniform-run": "run"}

Result = dict[str, Any]
Losses = dict[tuple[str, float, str], dict[int, float]]  # (arm, budget, task) -> by seed


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """The benchmark's result.

    `tasks` and `pooled` are of test rows; `pilot` is of dev rows, for the power calculation. Holm's
    correction is over the primary contrasts: `searched` against each of the others at each tight
    budget, pooled over tasks.
    """
    losses = losses_of(results, "test")
    found = {"tasks": by_task(losses, results), "pooled": pooled(losses)}
    primary = [
        found["pooled"][budget][arm]
        for budget in map(str, TIGHT)
        for arm in PRIMARY[1:]
        if "p" in found["pooled"].get(budget, {}).get(arm, {})
    ]
    for row, p in zip(primary, holm([row["p"] for row in primary]), strict=True):
        row["p_holm"] = round(p, 5)
    found["pilot"] = pooled(losses_of(results, "dev"))
    return found


def losses_of(results: Iterable[Result], pool: str) -> Losses:
    """Losses of runs with their arm's tuned settings; tuning runs have seeds of their own."""
    losses: Losses = defaultdict(dict)
    for result in results:
        if result["pool"] == pool and not result["tuning"]:
            losses[result["arm"], result["budget"], result["task"]][result["seed"]] = result["loss"]
    return losses


def by_task(losses: Losses, results: Sequence[Result]) -> dict[str, Any]:
    """task -> budget -> arm -> mean loss, and the difference to what the arm is compared with."""
    sizes, costs = defaultdict(list), defaultdict(list)
    for result in results:
        if math.isfinite(result["loss"]):  # what diverged has no adapter
            key = result["arm"], result["budget"], result["task"]
            sizes[key].append(result["parameters"])
            if "serving_us" in result:
                costs[key].append(result["serving_us"])
    found: dict[str, Any] = {}
    for (arm, budget, task), own in sorted(losses.items()):
        row: dict[str, Any] = {
            "loss": round(statistics.mean(own.values()), 5),
            "seeds": len(own),
            "parameters": round(statistics.mean(sizes[arm, budget, task] or [0])),
        }
        if costs[arm, budget, task]:
            row["serving_us"] = round(statistics.mean(costs[arm, budget, task]), 2)
        other = losses.get((against(arm), budget, task), {})
        shared = own.keys() & other.keys()
        if arm != against(arm) and shared:
            row |= interval([own[seed] - other[seed] for seed in sorted(shared)], "less")
            row["against"] = against(arm)
        found.setdefault(task, {}).setdefault(str(budget), {})[arm] = row
    return found


def pooled(losses: Losses) -> dict[str, Any]:
    """budget -> arm -> relative difference over tasks, of the seeds that have all its tasks."""
    found: dict[str, Any] = {}
    for arm, budget in sorted({(arm, budget) for arm, budget, _ in losses}):
        tasks = [task for a, b, task in losses if (a, b) == (arm, budget)]
        pairs = [(losses[arm, budget, t], losses.get((against(arm), budget, t), {})) for t in tasks]
        seeds = set.intersection(*(own.keys() & other.keys() for own, other in pairs))
        if arm == against(arm) or not seeds:
            continue
        differences = [
            statistics.mean(own[seed] / other[seed] - 1 for own, other in pairs)
            for seed in sorted(seeds)
        ]
        row = interval(differences, "relative") | {"against": against(arm), "tasks": len(tasks)}
        found.setdefault(str(budget), {})[arm] = row
    return found


def against(arm: str) -> str:
    return AGAINST.get(arm, "searched")


def interval(differences: Sequence[float], name: str) -> dict[str, Any]:
    """Mean, standard deviation, 95% interval and two-sided p of differences by seed."""
    count, mean = len(differences), statistics.mean(differences)
    found: dict[str, Any] = {name: round(mean, 5), "seeds": count}
    deviation = statistics.stdev(differences) if count > 1 and math.isfinite(mean) else 0.0
    if deviation > 0:
        error = deviation / math.sqrt(count)
        reach = t_quantile(0.05, count - 1) * error
        found["deviation"] = round(deviation, 5)
        found["interval"] = [round(mean - reach, 5), round(mean + reach, 5)]
        found["p"] = round(t_outside(abs(mean) / error, count - 1), 6)
    return found


def t_outside(t: float, freedom: int) -> float:
    """P(|T| > t) of Student's t: with T = sqrt(n) tan x, x has the density cos(x)^(n - 1)."""

    def mass(low: float, high: float) -> float:
        width = (high - low) / 4000  # midpoint rule
        return width * sum(math.cos(low + (i + 0.5) * width) ** (freedom - 1) for i in range(4000))

    angle = math.atan(t / math.sqrt(freedom))
    return mass(angle, math.pi / 2) / mass(0, math.pi / 2)


def t_quantile(outside: float, freedom: int) -> float:
    """The t with P(|T| > t) = outside."""
    low, high = 0.0, 1000.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if t_outside(middle, freedom) > outside else (low, middle)
    return high


def holm(values: Sequence[float]) -> list[float]:
    """p values, adjusted for being several (Holm 1979)."""
    adjusted, largest = [0.0] * len(values), 0.0
    for place, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - place) * values[index]))
        adjusted[index] = largest
    return adjusted


def print_table(found: dict[str, Any]) -> None:
    for task, budgets in found["tasks"].items():
        for budget, arms in budgets.items():
            print(f"\n{task}, {float(budget):.1%} of the base")
            for arm, row in arms.items():
                line = f"  {arm:>12}  loss {row['loss']:.4f}  {row['parameters']:>9,} parameters"
                if "serving_us" in row:
                    line += f"  {row['serving_us']:7.1f} us"
                print(line + compared(row, "less", "+.4f"))
    for pool, budgets in (("pooled", found["pooled"]), ("pilot, dev rows", found["pilot"])):
        for budget, arms in budgets.items():
            print(f"\n{pool}, {float(budget):.1%} of the base, relative to searched (or run)")
            for arm, row in arms.items():
                print(f"  {arm:>12}{compared(row, 'relative', '+.2%')}")


def compared(row: dict[str, Any], name: str, form: str) -> str:
    if name not in row:
        return f"  ({row['seeds']} seeds)"
    text = f"  {row[name]:{form}}"
    if "interval" in row:
        low, high = row["interval"]
        text += f" [{low:{form}}, {high:{form}}] deviation {row['deviation']:{form[1:]}}"
    if "p_holm" in row:
        text += f" p {row['p_holm']:.3f} (Holm)"
    return f"{text}  ({row['seeds']} seeds)"


def draw_picture(found: dict[str, Any], path: Path, over: str = "parameters") -> None:
    """Quality over parameters, or over the time of serving (`serving_us`), a panel a task, and last
    the difference pooled over tasks.

    Bars are the 95% intervals of an arm's difference by seed, not of its loss.
    """
    figure, axes = subplots(2, 3, width=12.6, height=7.0)
    *panels, last = axes.flatten()
    present = {
        arm for budgets in found["tasks"].values() for rows in budgets.values() for arm in rows
    }
    colours = {arm: f"C{i % 10}" for i, arm in enumerate(sorted(present))}
    for axis, (task, budgets) in zip(panels, found["tasks"].items(), strict=False):
        draw_arms(axis, budgets, colours, (over, "loss"))
        axis.set_title(task, fontsize=10)
        axis.set_xlabel(AXES[over], fontsize=9)
        axis.set_ylabel("NLL of the answer (nats a token)", fontsize=9)
    of_share = {
        budget: {
            arm: row | {"share": 100 * float(budget), "percent": 100 * row["relative"]}
            for arm, row in rows.items()
            if row["against"] == "searched"
        }
        for budget, rows in found["pooled"].items()
    }
    draw_arms(last, of_share, colours, ("share", "percent"), scale=100)
    last.axhline(0, color=colours.get("searched"), linewidth=1.4)
    last.set_title("all tasks: loss over searched", fontsize=10)
    last.set_xlabel("size, % of the base", fontsize=9)
    last.set_ylabel("difference, %", fontsize=9)
    panels[0].legend(fontsize=8)
    save(figure, path)


def draw_arms(
    axis: Any,
    budgets: dict[str, dict[str, Any]],
    colours: dict[str, str],
    names: tuple[str, str],
    scale: float = 1.0,
) -> None:
    """A line an arm over the budgets that it has; `names` are the rows' keys of x and y."""
    for arm, colour in colours.items():
        rows = [budgets[b][arm] for b in sorted(budgets, key=float) if arm in budgets[b]]
        ends = [row.get("interval", (0, 0)) for row in rows]
        if rows:
            axis.errorbar(
                *([row[name] for row in rows] for name in names),
                yerr=[scale * (high - low) / 2 for low, high in ends],
                label=arm, color=colour, marker="o", markersize=4, linewidth=1.4, capsize=2.5,
            )  # fmt: skip
    axis.set_xscale("log")
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
