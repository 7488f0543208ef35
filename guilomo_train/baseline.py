"""An allocation without a search: what `guilomo-train baseline` does."""

from __future__ import annotations

import sys
from pathlib import Path

from guilomo_train.base import sizes_of
from guilomo_train.config import BaselineConfig, targets_of
from guilomo_train.errors import AllocationError
from guilomo_train.search.allocation import Allocation
from guilomo_train.search.controls import (
    at_size,
    authors_allocation,
    mola,
    plain_lora,
    random_allocation,
    uniform,
)
from guilomo_train.search.space import parameter_budget


def baseline(config: BaselineConfig) -> Allocation:
    """Writes an allocation made without a search; `config` says which.

    Raises:
        TrainError: the base, a file or the size cannot be used; nothing is written then.
    """
    targets = targets_of(config.target_modules or "all-linear")
    sizes = sizes_of(config.base, targets, config.revision, config.trust_remote_code)
    modules, top_k, rank, parameters = sizes.adapted, config.top_k, config.rank, None
    if config.budget is not None:
        parameters = parameter_budget(config.budget, sizes.parameters)
    if config.like is not None:
        like = Allocation.load(Path(config.like))
        for module in like.ranks:
            if module not in sizes.linears:
                raise AllocationError(
                    f"{config.like}: {config.base} has no linear layer {module!r}"
                )
        top_k, rank, parameters = like.top_k, like.max_rank, like.parameters(sizes.linears)
        if config.target_modules is None:
            modules = tuple(like.ranks)
    linears = {module: sizes.linears[module] for module in modules}
    if config.kind == "authors":
        assert config.rank_file is not None
        assert config.expert_file is not None
        allocation = authors_allocation(
            Path(config.rank_file), Path(config.expert_file), linears, top_k
        )
    elif config.kind == "random":
        assert parameters is not None
        allocation = random_allocation(
            linears, parameters, config.seed, config.experts, rank, top_k
        )
    else:
        if config.kind == "lora":
            allocation = plain_lora(linears, rank)
        elif config.kind == "uniform":
            allocation = uniform(linears, config.experts, rank, top_k)
        else:
            allocation = mola(linears, config.kind.removeprefix("mola-"), rank, top_k)
        if parameters is not None:
            allocation = at_size(allocation, linears, parameters)
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    allocation.save(output)
    count = allocation.parameters(linears)
    print(
        f"{count:,} parameters, {count / sizes.parameters:.2%} of the base: {output}",
        file=sys.stderr,
    )
    return allocation
