"""Does the search find what is there? Planted allocations, on a CPU, in minutes.

    .venv/bin/python benchmarks/planted.py

A frozen model of eight linear layers and a teacher: the same with an adapter of a known allocation
(beds.py). The student has the full search space (8 x 8 everywhere), the teacher's outputs as data,
and the teacher's number of parameters as its budget. Measured on every bed: the rank correlation of
found and planted total rank over layers, beside that of what one look at the base gives at the same
budget (saliency.py over all training rows; base loss: the error on each layer's own output).

    parallel      a layer's loss shows its size
    strong few    the more a layer shows, the less it needs
    equal energy  all layers show the same
    useless       three layers have by far the largest loss, which is noise, and need nothing
    opposite      what experts do to different inputs cancels in the mean gradient
    deep          a residual chain, whose layers can stand in for one another
    stand in      a chain in stages of one to four layers that can do each other's work

Beside these: `null_even`, the share of 100 searches that return the even allocation where modules
do not differ, for each kind of noise (null_beds.py); and `coverage`, how often credible intervals
of known worths have the truth in them.

On a chain planted ranks are not the only right ones, so there students are trained afresh from each
allocation and their validation losses are compared too. `by` repeats the parallel bed with other
choices of the search. An online search is meant for one pass over its rows; here it passes over few
rows often, which is harder for it.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from beds import BATCH, BEDS, EXPERTS, LEARNING_RATE, LINEARS, RANK, ROWS, SPACE, TOP_K, Bed
from common import report
from null_beds import NULL, coverage, is_even

from guilomo_train.compare import spearman
from guilomo_train.search.allocation import Allocation
from guilomo_train.search.controls import random_allocation
from guilomo_train.search.estimators import Estimator
from guilomo_train.search.fill import even, fill, shared
from guilomo_train.search.hypergradient import UnrolledStep, adam_scales
from guilomo_train.search.saliency import one_shot_worths, whitened_worths
from guilomo_train.search.selection import Choice, Initial, SelectionVectors
from guilomo_train.search.upper import UpperLevel


@dataclass(frozen=True)
class Variant:
    """A way to search; these are the defaults of `guilomo-train search --order first`."""

    estimator: Estimator = "marginal"
    order: str = "first"
    choice: Choice = "sample"
    initial: Initial = "uniform"
    budget: bool = True
    fewest_experts: int = 0


VARIANTS = {
    "default": Variant(order="online"),
    "first order": Variant(),
    "second order": Variant(order="second"),
    "argmax choice": Variant(choice="argmax"),
    "no budget": Variant(budget=False),
    "cumulative": Variant("cumulative"),
    "argmax": Variant("argmax"),
    "as released": Variant(
        "argmax", choice="argmax", initial="random", budget=False, fewest_experts=TOP_K
    ),
}
NULL_SEEDS = 100
# All of them on the parallel bed; on the others:
MAIN = ("default", "first order", "cumulative")


@dataclass(frozen=True)
class Measured:
    """A seed of a bed, by the names of searches, one-shot scores and controls.

    Attributes:
        searched, one_shot: rank correlations with the planted total ranks.
        budget_error: of each search, as a share.
        losses: validation losses of students; where each layer has its own output of the planted
            allocation alone.
        unlearnable: what no student's loss can be below, but for what it learns of the rest.
    """

    searched: dict[str, float]
    one_shot: dict[str, float]
    budget_error: dict[str, float]
    losses: dict[str, float]
    unlearnable: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of a search, instead of 400 (chains: 800)")
    parser.add_argument("--beds", nargs="+", choices=BEDS, default=list(BEDS))
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the products are too small to share: a core takes a seed

    cores = len(os.sched_getaffinity(0))
    results = {}
    with ProcessPoolExecutor(cores, multiprocessing.get_context("fork")) as pool:
        for bed in args.beds:
            started = time.monotonic()
            names = [name for name in args.only if name in MAIN or bed == "parallel"]
            measured = list(pool.map(partial(measure, bed, names, args.steps), range(args.seeds)))
            results[bed] = result(measured)
            show(bed, results[bed], time.monotonic() - started)
        null_even = {
            kind: statistics.mean(pool.map(partial(is_even, kind), range(NULL_SEEDS)))
            for kind in NULL
        }
    covered = coverage(range(NULL_SEEDS))
    print(f"even where nothing differs: {null_even}\ncredible intervals cover: {covered}")
    report({"beds": results, "null_even": null_even, "coverage": covered}, args, args.out)


def measure(kind: str, names: Sequence[str], steps: int | None, seed: int) -> Measured:
    """Searches, one-shot allocations and students of one seed."""
    bed = Bed(kind, seed)
    steps = steps or bed.plan.search_steps
    found = {name: search(bed, VARIANTS[name], steps) for name in names}
    one_shot = one_shot_allocations(bed)
    to_train = {"planted": bed.planted}
    if not bed.own_outputs:
        random = random_allocation(LINEARS, bed.parameters, seed, EXPERTS, RANK, TOP_K)
        to_train |= {"random": random, "even": even(SPACE, bed.parameters), **one_shot, **found}
    return Measured(
        searched={name: correlation(a, bed.planted) for name, a in found.items()},
        one_shot={name: correlation(a, bed.planted) for name, a in one_shot.items()},
        budget_error={
            name: abs(a.parameters(LINEARS) / bed.parameters - 1) for name, a in found.items()
        },
        losses={name: bed.student(allocation) for name, allocation in to_train.items()},
        unlearnable=bed.unlearnable,
    )


def search(bed: Bed, variant: Variant, steps: int) -> Allocation:
    """The allocation that a search finds."""
    torch.manual_seed(bed.seed)
    rows = torch.Generator().manual_seed(bed.seed)
    model, layers = bed.adapted(Allocation.uniform(tuple(LINEARS), EXPERTS, RANK, TOP_K))
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=LEARNING_RATE)
    budget = bed.parameters if variant.budget else None
    space = replace(SPACE, fewest_experts=variant.fewest_experts)
    selection = SelectionVectors(space, variant.choice, variant.initial, budget)
    upper = UpperLevel(
        layers,
        selection,
        estimator=variant.estimator,
        steps=steps,
        learning_rate=0.1,
        seed=bed.seed,
    )
    online = variant.order == "online"
    for _ in range(steps):
        upper.draw(online)
        train = bed.batch(False, rows)
        optimizer.zero_grad()
        bed.loss(model, train).backward()
        if online:
            upper.step_online()
        else:
            validation = bed.batch(True, rows)
            lower = [w.grad for w in weights]
            unrolled = UnrolledStep(
                LEARNING_RATE, lower, lambda lower=lower: adam_scales(optimizer, weights, lower)
            )
            upper.step(
                [lambda train=train: bed.loss(model, train)],
                [lambda validation=validation: bed.loss(model, validation)],
                weights,
                unrolled if variant.order == "second" else None,
            )
        optimizer.step()
    return upper.allocation()


def one_shot_allocations(bed: Bed) -> dict[str, Allocation]:
    """What one look at the base over all training rows gives, at the planted size."""
    batches = torch.arange(ROWS // 2).split(BATCH)
    losses = [partial(bed.loss, bed.base, rows) for rows in batches]
    worths: dict[str, torch.Tensor] = {**one_shot_worths(bed.base, SPACE, losses)}
    worths["whitened"] = whitened_worths(bed.base, SPACE, losses)
    if bed.own_outputs:
        worths["base loss"] = shared(bed.base_losses(), EXPERTS * RANK)
    return {name: fill(SPACE, worth, bed.parameters) for name, worth in worths.items()}


def correlation(found: Allocation, planted: Allocation) -> float:
    """Spearman's of total ranks over layers; 0 where all layers found are alike."""
    rho = spearman(*([float(sum(r)) for r in a.ranks.values()] for a in (found, planted)))
    return 0.0 if math.isnan(rho) else rho


def result(measured: Sequence[Measured]) -> dict[str, Any]:
    """A bed's part of the benchmark's result, from its seeds."""
    by = {}
    for name in measured[0].searched:
        above_all = sum(m.searched[name] > max(m.one_shot.values()) for m in measured)
        by[name] = {
            **over_seeds([m.searched[name] for m in measured]),
            "budget_error": round(max(m.budget_error[name] for m in measured), 4),
            "beats_baselines": above_all,
        }
        if name in measured[0].losses:
            others = [n for n in measured[0].losses if n not in measured[0].searched]
            by[name]["lower_loss_than"] = {
                other: sum(m.losses[name] < m.losses[other] for m in measured) for other in others
            }
    return {
        "seeds": len(measured),
        "by": by,
        "one_shot": {
            name: over_seeds([m.one_shot[name] for m in measured]) for name in measured[0].one_shot
        },
        "loss": {name: [round(m.losses[name], 4) for m in measured] for name in measured[0].losses},
        "loss_mean": {
            name: round(statistics.mean(m.losses[name] for m in measured), 4)
            for name in measured[0].losses
        },
        "unlearnable": round(statistics.mean(m.unlearnable for m in measured), 4),
    }


def over_seeds(correlations: Sequence[float]) -> dict[str, float]:
    return {
        "spearman": round(statistics.mean(correlations), 3),
        "spearman_least": round(min(correlations), 3),
    }


def show(bed: str, row: Mapping[str, Any], seconds: float) -> None:
    """Prints a bed's result as lines of a table."""
    print(f"{bed}  ({seconds:.0f} s)")
    for name, found in {**row["by"], **row["one_shot"]}.items():
        line = f"  {name:>27}  spearman {found['spearman']:6.3f}"
        line += f" (least {found['spearman_least']:6.3f})"
        if name in row["loss_mean"]:
            line += f"  loss {row['loss_mean'][name]:.3f}"
        if "beats_baselines" in found:
            line += f"  budget error {found['budget_error']:.3f}"
            line += f"  above all one-shot in {found['beats_baselines']} of {row['seeds']}"
        print(line)
    controls = [n for n in ("planted", "even", "random") if n in row["loss_mean"]]
    losses = "  ".join(f"{name} {row['loss_mean'][name]:.3f}" for name in controls)
    print(f"  losses: {losses}  (unlearnable {row['unlearnable']:.3f})", flush=True)


if __name__ == "__main__":
    main()
