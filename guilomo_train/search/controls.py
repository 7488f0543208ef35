"""Controls: allocations made without a search, of the same type as a searched one.

    plain_lora         one expert everywhere
    uniform            as many experts of the same rank everywhere
    mola               layer-wise patterns of MoLA (Gao et al. 2024, arXiv 2402.08562)
    random_allocation  drawn by a seed, at a given number of parameters
    at_size            any of the first three with its ranks fitted to a number of parameters
    authors_allocation the files of the authors' release (arXiv 2506.14646)

A comparison is fair at equal size alone: `at_size` and `random_allocation` land within TOLERANCE of
the number of parameters they are given (routers included).

`linears` is, for the modules to adapt alone, {full module name: (out_features, in_features)}.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guilomo_train.errors import AllocationError, ConfigError
from guilomo_train.search.allocation import Allocation
from guilomo_train.search.selection import SearchSpace, SelectionVectors

Linears = Mapping[str, tuple[int, int]]

TOLERANCE = 0.01  # of the number of parameters that was asked for
MOLA_PATTERNS = ("2468", "8642", "5555")

_LAYER = re.compile(r"\.(\d+)\.")
_GOLDEN = (math.sqrt(5) - 1) / 2
_AUTHORS_RANK = re.compile(r"(.+)\.expertlora_E_vector_(\d+)")


def parameter_budget(value: str | float, base_parameters: int) -> int:
    """A budget as a number of parameters: a share (< 1) of the base's, or the number itself.

    Raises:
        ConfigError: it is neither.
    """
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ConfigError(
            f"budget is {value!r}, expected a share of the base's parameters (0.01) or a number "
            "of parameters (2000000)"
        )
    return round(number * base_parameters) if number < 1 else round(number)


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

    All ranks are q or q + 1, with the larger ones spread over modules. The scaling stays where
    ranks stay within `max_rank`; plain LoRA keeps PEFT's lora_alpha / rank.

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
    at = {module: i * _GOLDEN % 1 for i, module in enumerate(counts)}
    modules = sorted(counts, key=at.__getitem__)
    positions = [(m, e) for e in range(max(counts.values())) for m in modules if e < counts[m]]
    _repair(ranks, positions, allocation.top_k, linears, parameters, even + 1)
    largest = max(max(r) for r in ranks.values())
    is_lora = smallest.total_experts == len(counts)
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

    Counts of experts (`top_k` to `max_experts`) and ranks (1 to `max_rank`) are drawn as a search
    with this budget draws them before it has learned anything: of all distributions that expect
    this size, from the one nearest to uniform. Single rank rows then make up for what the draw
    missed.

    Raises:
        AllocationError: the search space has no allocation of that size.
    """
    _enough(max_experts, top_k)
    space = SearchSpace(linears, max_experts, max_rank, top_k)
    smallest, largest = space.parameters(top_k, 1), space.parameters(max_experts, max_rank)
    slack = TOLERANCE * parameters
    if not smallest - slack <= parameters <= largest + slack:
        raise AllocationError(
            f"{parameters:,} parameters cannot be reached: {top_k} to {max_experts} experts of "
            f"rank 1 to {max_rank} have {smallest:,} to {largest:,}"
        )
    p_experts, p_ranks = SelectionVectors(space, budget=parameters).probabilities()
    generator = random.Random(seed)
    ranks: dict[str, list[int]] = {}
    # All experts of a module have the same p of their ranks.
    for module, of_count, (of_rank, *_) in zip(
        linears, p_experts.tolist(), p_ranks.tolist(), strict=True
    ):
        (count,) = generator.choices(range(1, max_experts + 1), of_count)
        ranks[module] = generator.choices(range(1, max_rank + 1), of_rank, k=count)
    positions = [(m, e) for m, listed in ranks.items() for e in range(len(listed))]
    generator.shuffle(positions)
    _repair(ranks, positions, top_k, linears, parameters, max_rank)
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


def _repair(
    ranks: dict[str, list[int]],
    positions: Sequence[tuple[str, int]],
    top_k: int,
    linears: Linears,
    parameters: int,
    max_rank: int,
) -> None:
    """Adds or takes single rank rows, in the order of `positions`, until the size is met.

    Raises:
        AllocationError: it cannot come within TOLERANCE.
    """
    found = Allocation({m: tuple(r) for m, r in ranks.items()}, top_k, max_rank)
    missing = parameters - found.parameters(linears)
    changed = True
    while changed:
        changed = False
        for module, expert in positions:
            step = 1 if missing > 0 else -1
            row = step * sum(linears[module])
            fits = 1 <= ranks[module][expert] + step <= max_rank
            if fits and abs(missing - row) < abs(missing):
                ranks[module][expert] += step
                missing -= row
                changed = True
    if abs(missing) > TOLERANCE * parameters:
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
