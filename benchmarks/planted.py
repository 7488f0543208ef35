"""Does the search find what is there? Planted allocations, on a CPU, in minutes.

    .venv/bin/python benchmarks/planted.py

A frozen chain of linear layers and a teacher: the same chain with an adapter whose layers have 2
to 8 experts of rank 1 to 8. The student has the full search space (8 x 8 everywhere), the
teacher's outputs as data, and the teacher's number of parameters as its budget. Two beds:

    parallel  each layer has an output of its own in the loss, so the right allocation is the
              planted one. Measured: rank correlation of found and planted total rank over layers.
    deep      a residual chain, whose layers can stand in for one another. Measured: validation
              loss of students trained afresh from the found allocation, and from a random and a
              uniform one of the same size.

A rank row of the teacher carries the same energy in every layer, so that no layer is worth more
for its size alone. `by` repeats the parallel bed with other choices of the search. An online search
is meant for one pass over its rows; here it passes over few rows often, which is harder for it.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import random
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import report
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F

from guilomo_train.compare import spearman
from guilomo_train.lora_moe import LoraMoeConfig, LoraMoeLayer
from guilomo_train.search.allocation import Allocation
from guilomo_train.search.controls import at_size, random_allocation, uniform
from guilomo_train.search.estimators import Estimator
from guilomo_train.search.hypergradient import UnrolledStep, adam_scales
from guilomo_train.search.selection import Choice, Initial, SearchSpace, SelectionVectors
from guilomo_train.search.upper import UpperLevel

LAYERS, WIDTH = 8, 64
EXPERTS, RANK, TOP_K = 8, 8, 2
ALPHA = 16.0
ROWS, BATCH = 16384, 256  # half of the rows train, half validate
LEARNING_RATE = 1e-2
STEPS = {"parallel": 400, "deep": 800}
STUDENT_STEPS = 800
# Strength of the teacher's B: the deep chain must stay a task that a student can learn.
STRENGTH = {"parallel": 0.3, "deep": 0.05}


@dataclass(frozen=True)
class Variant:
    """A way to search; these are the defaults of `guilomo-train search --order first`."""

    estimator: Estimator = "marginal"
    order: str = "first"
    choice: Choice = "sample"
    initial: Initial = "uniform"
    budget: bool = True


VARIANTS = {
    "default": Variant(order="online"),
    "first order": Variant(),
    "second order": Variant(order="second"),
    "argmax choice": Variant(choice="argmax"),
    "initial random": Variant(initial="random"),
    "initial full": Variant(initial="full"),
    "no budget": Variant(budget=False),
    "cumulative": Variant("cumulative"),
    "cumulative, second order": Variant("cumulative", order="second"),
    "cumulative, initial random": Variant("cumulative", initial="random"),
    "cumulative, initial full": Variant("cumulative", initial="full"),
    "cumulative, argmax choice": Variant("cumulative", choice="argmax"),
    "cumulative, no budget": Variant("cumulative", budget=False),
    "argmax": Variant("argmax"),
    "as released": Variant("argmax", choice="argmax", initial="random", budget=False),
}
DEEP = ("default", "first order", "cumulative")


class Chain(nn.Module):
    """`layers.0` to `layers.7`; parallel gives `[B, LAYERS, WIDTH]`, deep `[B, WIDTH]`."""

    def __init__(self, deep: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        self.deep = deep

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.deep:
            return torch.stack([layer(x) for layer in self.layers], dim=1)
        for layer in self.layers:
            x = x + torch.tanh(layer(F.layer_norm(x, x.shape[-1:])))
        return x


LINEARS = {f"layers.{i}": (WIDTH, WIDTH) for i in range(LAYERS)}


class Bed:
    """A base, a planted allocation, and the teacher's data."""

    def __init__(self, kind: str, seed: int) -> None:
        self.kind, self.seed = kind, seed
        torch.manual_seed(1000 + seed)
        self.base = Chain(deep=kind == "deep")
        generator = random.Random(seed)
        self.planted = Allocation(
            {
                module: tuple(
                    generator.randint(1, RANK) for _ in range(generator.randint(TOP_K, EXPERTS))
                )
                for module in LINEARS
            },
            TOP_K,
            RANK,
        )
        self.parameters = self.planted.parameters(LINEARS)
        teacher, layers = self.adapted(self.planted)
        for layer in layers:
            experts = len(layer.experts["default"])
            nn.init.normal_(layer.lora_A["default"].weight, std=WIDTH**-0.5)
            # An expert works for top_k / experts of the inputs: stronger where there are more.
            strength = STRENGTH[kind] * (experts / TOP_K) ** 0.5
            nn.init.normal_(layer.lora_B["default"].weight, std=strength)
            nn.init.normal_(layer.router["default"].weight, std=3 * WIDTH**-0.5)
        self.inputs = torch.randn(ROWS, WIDTH)
        with torch.no_grad():
            self.targets = teacher(self.inputs)
            self.scale = F.mse_loss(self.base(self.inputs), self.targets)

    def adapted(self, allocation: Allocation) -> tuple[nn.Module, list[LoraMoeLayer]]:
        """The base with a fresh adapter of an allocation, and its adapted layers."""
        experts = {
            module: [{"rank": e.rank, "scaling": e.scaling} for e in listed]
            for module, listed in allocation.experts(ALPHA).items()
        }
        config = LoraMoeConfig(top_k=TOP_K, lora_alpha=ALPHA, experts=experts)
        model = get_peft_model(copy.deepcopy(self.base), config)
        return model, [m for m in model.modules() if isinstance(m, LoraMoeLayer)]

    def batch(self, validation: bool, generator: torch.Generator) -> torch.Tensor:
        half = ROWS // 2
        return torch.randint(0, half, (BATCH,), generator=generator) + half * validation

    def loss(self, model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        """Squared error as a share of the base's, which knows nothing of the teacher."""
        return F.mse_loss(model(self.inputs[rows]), self.targets[rows]) / self.scale

    def search(self, variant: Variant) -> Allocation:
        """The allocation that a search finds."""
        torch.manual_seed(self.seed)
        rows = torch.Generator().manual_seed(self.seed)
        model, layers = self.adapted(Allocation.uniform(tuple(LINEARS), EXPERTS, RANK, TOP_K))
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(weights, lr=LEARNING_RATE)
        budget = self.parameters if variant.budget else None
        selection = SelectionVectors(
            SearchSpace(LINEARS, EXPERTS, RANK, TOP_K), variant.choice, variant.initial, budget
        )
        steps = STEPS[self.kind]
        upper = UpperLevel(
            layers,
            selection,
            estimator=variant.estimator,
            steps=steps,
            learning_rate=0.1,
            seed=self.seed,
        )
        online = variant.order == "online"
        for _ in range(steps):
            upper.draw(online)
            train = self.batch(False, rows)
            optimizer.zero_grad()
            self.loss(model, train).backward()
            if online:
                upper.step_online()
            else:
                validation = self.batch(True, rows)
                lower = [w.grad for w in weights]
                unrolled = UnrolledStep(
                    LEARNING_RATE, lower, lambda lower=lower: adam_scales(optimizer, weights, lower)
                )
                upper.step(
                    lambda train=train: self.loss(model, train),
                    lambda validation=validation: self.loss(model, validation),
                    weights,
                    unrolled if variant.order == "second" else None,
                )
            optimizer.step()
        return selection.allocation()

    def student(self, allocation: Allocation) -> float:
        """Validation loss of an allocation, trained afresh."""
        torch.manual_seed(self.seed)
        rows = torch.Generator().manual_seed(self.seed)
        model, _ = self.adapted(allocation)
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(weights, lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STUDENT_STEPS)
        for _ in range(STUDENT_STEPS):
            optimizer.zero_grad()
            self.loss(model, self.batch(False, rows)).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            return self.loss(model, torch.arange(ROWS // 2, ROWS)).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of a search, instead of 400 and 800")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.steps is not None:
        STEPS.update(parallel=args.steps, deep=args.steps)
    torch.set_num_threads(1)  # the products are too small to share: a core takes a seed

    seeds = range(args.seeds)
    cores = len(os.sched_getaffinity(0))
    # Forked, so that each has the steps that were asked for.
    with ProcessPoolExecutor(cores, multiprocessing.get_context("fork")) as pool:
        by = {name: parallel(name, seeds, pool) for name in args.only}
        deep_by = deep([name for name in DEEP if name in args.only], seeds, pool)
    report({"by": by, "deep_by": deep_by}, args, args.out)


def parallel(name: str, seeds: range, pool: ProcessPoolExecutor) -> dict[str, float]:
    """Mean rank correlation and largest budget error of a variant, over seeds."""
    started = time.monotonic()
    measured = pool.map(partial(parallel_seed, VARIANTS[name]), seeds)
    correlations, errors = zip(*measured, strict=True)
    row = {
        "spearman": round(statistics.mean(correlations), 3),
        "spearman_least": round(min(correlations), 3),
        "budget_error": round(max(errors), 4),
    }
    print(
        f"parallel  {name:>27}  spearman {row['spearman']:.3f} (least {row['spearman_least']:.3f})"
        f"  budget error {row['budget_error']:.3f}  {time.monotonic() - started:.0f} s",
        flush=True,
    )
    return row


def parallel_seed(variant: Variant, seed: int) -> tuple[float, float]:
    """Rank correlation and budget error of one search."""
    bed = Bed("parallel", seed)
    found = bed.search(variant)
    error = abs(found.parameters(LINEARS) / bed.parameters - 1)
    return spearman(total_ranks(found), total_ranks(bed.planted)), error


def deep(names: list[str], seeds: range, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """How often students of the allocations found beat those of controls of the same size."""
    correlations: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    measured = pool.map(partial(deep_seed, names), seeds)
    for seed, of_seed in zip(seeds, measured, strict=True):
        for name, (correlation, students) in of_seed.items():
            correlations[name].append(correlation)
            for which, loss in students.items():
                losses[name].setdefault(which, []).append(loss)
            row = "  ".join(f"{which} {loss:.3f}" for which, loss in students.items())
            print(f"deep  {name:>12}  seed {seed}  {row}", flush=True)
    return {name: deep_result(correlations[name], losses[name]) for name in names}


def deep_seed(names: list[str], seed: int) -> dict[str, tuple[float, dict[str, float]]]:
    """Rank correlation of each search, and the losses of students of its size."""
    bed = Bed("deep", seed)
    allocations = {
        "random": random_allocation(LINEARS, bed.parameters, seed, EXPERTS, RANK, TOP_K),
        "uniform": at_size(uniform(LINEARS, 4, RANK, TOP_K), LINEARS, bed.parameters),
        "planted": bed.planted,
    }
    controls = {which: bed.student(allocation) for which, allocation in allocations.items()}
    measured = {}
    for name in names:
        found = bed.search(VARIANTS[name])
        correlation = spearman(total_ranks(found), total_ranks(bed.planted))
        measured[name] = correlation, {"found": bed.student(found), **controls}
    return measured


def deep_result(correlations: list[float], losses: dict[str, list[float]]) -> dict[str, Any]:
    """A variant's part of the benchmark's result, from its seeds."""

    def beats(control: str) -> float:
        pairs = zip(losses["found"], losses[control], strict=True)
        return sum(found < other for found, other in pairs) / len(correlations)

    return {
        "beats_random": beats("random"),
        "beats_uniform": beats("uniform"),
        "spearman": round(statistics.mean(correlations), 3),
        "loss": {which: [round(v, 4) for v in values] for which, values in losses.items()},
        "loss_mean": {which: round(statistics.mean(v), 4) for which, v in losses.items()},
    }


def total_ranks(allocation: Allocation) -> list[float]:
    return [float(sum(ranks)) for ranks in allocation.ranks.values()]


if __name__ == "__main__":
    main()
