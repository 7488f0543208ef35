"""Controls: allocations made without a search, of the same type as a searched one.

    plain_lora         one expert everywhere
    uniform            as many experts of the same rank everywhere
    mola               layer-wise patterns of MoLA (Gao et al. 2024, arXiv 2402.08562)
    random_allocation  drawn by a seed, at a given number of parameters
    at_size            any of the first three with its ranks fitted to a number of parameters
    authors_allocation the files of the authors' release (arXiv 2506.14646)
    shuffled           a found one, dealt out anew among modules of the same shape
    rescaled           a found one at another size

A comparison is fair at equal size alone: `at_size` and `random_allocation` land within TOLERANCE of
the number of parameters they are given (routers included).

`linears` is, for the modules to adapt alone, {full module name: (out_features, in_features)}.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from guilomo_train.errors import AllocationError
from guilomo_train.search.allocation import Allocation
from guilomo_train.search.fill import fill, row_costs, spread
from guilomo_train.search.selection import SelectionVectors
from guilomo_train.search.space import Linears, SearchSpace

TOLERANCE = 0.01  # of the number of parameters that was asked for, where a row is no more
DRAWS = 200  # of which a random allocation is one

_LAYER = re.compile(r"\.(\d+)\.")
_AUTHORS_RANK = re.compile(r"(.+)\.expertlora_E_vector_(\d+)")


def plain_lora(linears: Linears, rank: int) -> Allocation:
    """LoRA of a rank: one expert, no router, scaled by lora_alpha / rank as PEFT does."""
    return Allocation.uniform(tuple(linears), 1, rank, top_k=1)


def uniform(linears: Linears, experts: int, rank: int, top_k: int = 2) -> Allocation:
    """As many experts of the same rank in every module."""
    _enough(experts, top_k)
    return Allocation.uniform(tuple(linears), experts, rank, top_k)


def mola(linears: Linears, pattern: str, rank: int, top_k: int = 2) -> Allocation:
    """MoLA's pattern: the layers in four groups of equal size, so many experts in each.

    Args:
        linears: the modules; their layer is the first number in their names.
        pattern: a digit for each group, from the first layers to the last: "2468".
        rank: of each expert.
        top_k: experts that a token uses.

    Raises:
        AllocationError: a module is in no layer, or top_k is more than a group has.
    """
    experts = [int(digit) for digit in pattern]
    _enough(min(experts), top_k)
    layer_of = {module: _layer(module) for module in linears}
    layers = sorted(set(layer_of.values()))
    group = {layer: i * len(experts) // len(layers) for i, layer in enumerate(layers)}
    ranks = {module: (rank,) * experts[group[layer]] for module, layer in layer_of.items()}
    return Allocation(ranks, top_k, rank)


def at_size(allocation: Allocation, linears: Linears, parameters: int) -> Allocation:
    """The same experts with other ranks, as even as can be, at a number of parameters.

    All ranks are q or q + 1, with the larger ones spread over modules; a module without experts
    stays without. The scaling stays where ranks stay within `max_rank`; plain LoRA keeps PEFT's
    lora_alpha / rank.

    Raises:
        AllocationError: rank 1 everywhere is too large already, or single rank rows are too
            coarse for so few parameters.
    """
    counts = {module: len(ranks) for module, ranks in allocation.ranks.items()}
    smallest = Allocation({m: (1,) * n for m, n in counts.items()}, allocation.top_k, 1)
    row = sum(n * sum(linears[m]) for m, n in counts.items())  # one rank more everywhere
    spare = parameters - smallest.parameters(linears)
    if spare < -TOLERANCE * parameters:
        raise AllocationError(
            f"{parameters:,} parameters are too few for {smallest.total_experts} experts: with "
            f"rank 1 they have {smallest.parameters(linears):,}; give more, or fewer experts"
        )
    even = 1 + max(spare, 0) // row
    ranks = {module: [even] * n for module, n in counts.items()}
    # By expert, and the modules in golden-ratio steps: any first share of them is spread evenly.
    at = dict(zip(counts, spread(len(counts)), strict=True))
    modules = sorted(counts, key=at.__getitem__)
    positions = [(m, e) for e in range(max(counts.values())) for m in modules if e < counts[m]]
    _repair(ranks, positions, allocation.top_k, linears, parameters, (even, even + 1))
    largest = max(rank for listed in ranks.values() for rank in listed)
    is_lora = max(counts.values()) == 1
    max_rank = largest if is_lora else max(largest, allocation.max_rank)
    return Allocation({m: tuple(r) for m, r in ranks.items()}, allocation.top_k, max_rank)


def random_allocation(
    linears: Linears,
    parameters: int,
    seed: int,
    max_experts: int = 8,
    max_rank: int = 8,
    top_k: int = 2,
) -> Allocation:
    """A random point of the search space at a number of parameters.

    Counts of experts (0 to `max_experts`) and ranks (1 to `max_rank`) are drawn as a search with
    this budget draws them before it has learned anything: of all distributions that expect this
    size, from the one nearest to uniform. Sizes of draws are far apart, so the nearest of DRAWS is
    taken; single rank rows then make up for what it misses.

    Raises:
        AllocationError: the search space has no allocation of that size.
    """
    space = SearchSpace(linears, max_experts, max_rank, top_k)
    smallest, largest = float(space.sizes.row.min()), space.cost(max_experts, max_rank)
    slack = TOLERANCE * parameters
    if not smallest - slack <= parameters <= largest + slack:
        raise AllocationError(
            f"{parameters:,} parameters cannot be reached: one row in one module has "
            f"{smallest:,.0f}, and {max_experts} experts of rank {max_rank} in each {largest:,.0f}"
        )
    p_experts, p_ranks = SelectionVectors(space, budget=parameters).probabilities()
    generator = random.Random(seed)
    # All experts of a module have the same p of their ranks.
    vectors = list(zip(p_experts.tolist(), p_ranks[:, 0].tolist(), strict=True))

    def draw() -> list[list[int]]:
        counts = [generator.choices(range(max_experts + 1), p)[0] for p, _ in vectors]
        return [
            generator.choices(range(1, max_rank + 1), p, k=count)
            for count, (_, p) in zip(counts, vectors, strict=True)
        ]

    def distance(drawn: list[list[int]]) -> float:
        cost = space.sizes.cost(space.allocation(drawn))
        return abs(cost - parameters) if cost > 0 else math.inf  # without experts: no adapter

    drawn = min((draw() for _ in range(DRAWS)), key=distance)
    ranks = dict(zip(linears, drawn, strict=True))
    positions = [(m, e) for m, listed in ranks.items() for e in range(len(listed))]
    generator.shuffle(positions)
    _repair(ranks, positions, top_k, linears, parameters, (1, max_rank))
    return Allocation({m: tuple(r) for m, r in ranks.items()}, top_k, max_rank)


def authors_allocation(
    rank_file: Path, expert_file: Path, linears: Linears, top_k: int = 2
) -> Allocation:
    """Reads the pair of files that the authors' `save_rankandexp_num.py` writes.

    `expert.json` has the number of experts by full module name; `rank.json` the rank of each
    expert under `<module>.expertlora_E_vector_<i>`, also of those beyond the number of experts,
    which count for nothing.

    Args:
        rank_file, expert_file: the two files.
        linears: the modules of the base that may be adapted.
        top_k: experts that a token uses; the files do not say it.

    Raises:
        AllocationError: a file is malformed, or names a module that `linears` lacks.
    """
    experts = _read_counts(expert_file)
    max_rank = 1
    by_module: dict[str, dict[int, int]] = {}
    for key, rank in _read_counts(rank_file).items():
        found = _AUTHORS_RANK.fullmatch(key)
        if found is None:
            raise AllocationError(
                f"{rank_file}: the key {key!r} is not <module>.expertlora_E_vector_<number>"
            )
        by_module.setdefault(found.group(1), {})[int(found.group(2))] = rank
        max_rank = max(max_rank, rank)
    ranks = {}
    for module, count in experts.items():
        if module not in linears:
            raise AllocationError(f"{expert_file}: the base has no linear layer {module!r}")
        listed = by_module.get(module, {})
        missing = [i for i in range(count) if i not in listed]
        if missing:
            raise AllocationError(
                f"{rank_file}: {module}.expertlora_E_vector_{missing[0]} is missing; "
                f"{expert_file.name} gives this module {count} experts"
            )
        ranks[module] = tuple(listed[i] for i in range(count))
    return Allocation(ranks, top_k, max_rank)


def shuffled(allocation: Allocation, linears: Linears, seed: int) -> Allocation:
    """What each module has, dealt out at random among the modules of its shape.

    Size, counts and ranks stay; which layer has them is left to chance.
    """
    by_shape: dict[tuple[int, int], list[str]] = {}
    for module in allocation.ranks:
        by_shape.setdefault(linears[module], []).append(module)
    generator = random.Random(seed)
    ranks = dict(allocation.ranks)
    for modules in by_shape.values():
        dealt = generator.sample(modules, len(modules))
        for module, other in zip(modules, dealt, strict=True):
            ranks[module] = allocation.ranks[other]
    return Allocation(ranks, allocation.top_k, allocation.max_rank)


def rescaled(allocation: Allocation, space: SearchSpace, budget: float) -> Allocation:
    """An allocation at another cost: total ranks in the proportions of this one's, as near as whole
    rows come (D'Hondt's rule), and split into experts anew."""
    rows = torch.tensor([float(sum(allocation.ranks[module])) for module in space.linears])
    costs = row_costs(space)
    return fill(space, costs * rows[:, None] / torch.arange(1, costs.shape[-1] + 1), budget)


def _repair(
    ranks: dict[str, list[int]],
    positions: Sequence[tuple[str, int]],
    top_k: int,
    linears: Linears,
    parameters: int,
    bounds: tuple[int, int],
) -> None:
    """Adds or takes single rank rows, in the order of `positions`, until the size is met.

    Ranks stay within `bounds`.

    Raises:
        AllocationError: it cannot come within TOLERANCE.
    """
    least, most = bounds
    found = Allocation({m: tuple(r) for m, r in ranks.items()}, top_k, most)
    missing = parameters - found.parameters(linears)
    changed = True
    while changed:
        changed = False
        for module, expert in positions:
            step = 1 if missing > 0 else -1
            row = step * sum(linears[module])
            fits = least <= ranks[module][expert] + step <= most
            if fits and abs(missing - row) < abs(missing):
                ranks[module][expert] += step
                missing -= row
                changed = True
    if abs(missing) > max(TOLERANCE * parameters, min(map(sum, linears.values()))):
        raise AllocationError(
            f"{parameters:,} parameters cannot be met within {TOLERANCE:.0%}: with whole rank "
            f"rows {parameters - missing:,} is as near as it gets"
        )


def _layer(module: str) -> int:
    found = _LAYER.search(module)
    if found is None:
        raise AllocationError(f"{module} is in no numbered layer, so MoLA gives it no experts")
    return int(found.group(1))


def _enough(experts: int, top_k: int) -> None:
    if experts < top_k:
        raise AllocationError(f"{experts} experts are fewer than top_k ({top_k})")


def _read_counts(path: Path) -> dict[str, int]:
    """A JSON object of name -> integer >= 1."""
    try:
        value: Any = json.loads(path.read_text())
    except FileNotFoundError:
        raise AllocationError(f"{path}: no such file") from None
    except (OSError, ValueError) as e:
        raise AllocationError(f"{path}: not a JSON file ({e})") from None
    if not isinstance(value, dict) or not value:
        raise AllocationError(f"{path}: found {type(value).__name__}, expected a JSON object")
    for key, count in value.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise AllocationError(f"{path}: {key!r} is {count!r}, expected an integer >= 1")
    return value
