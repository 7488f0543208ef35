"""What an adapter folder is and whether it fits the base, without the engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from guilomo_serve.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterError,
    BaseModel,
    is_finite,
    is_guilomo_adapter,
    read_adapter,
    read_config,
)
from guilomo_serve.runtime.loading import check_plain, tasks_of

_RANK = ".lora_A.weight"
# Of a module's five tensors in memory beside their numbers, 1.4 KB each where that was measured
# (torch 2.9, glibc), and its rows' scalings.
_MODULE_BYTES = 8 * 2**10


def inspect(folder: Path, base: BaseModel | None, served: Any) -> dict[str, Any]:
    """Reads and checks an adapter.

    Args:
        folder: the adapter folder.
        base: the served model; None leaves shapes to the engine.
        served: vLLM's `VllmConfig`, for its name of the base and its limits.

    Returns:
        `kind` ("guilomo" or "lora"), `base`, `task`, `allocation`: module -> its experts' ranks,
        and `warnings`: what cannot be known.

    Raises:
        AdapterError: it is malformed, not finite, or not for this base. The modules of a plain
            LoRA are checked by the engine alone.
    """
    if is_guilomo_adapter(folder):
        spec = read_adapter(folder, base).spec
        warnings = []
        if spec.base is None:
            warnings += _of_another_base(spec.base_model_name_or_path, served.model_config.model)
        return {
            "kind": "guilomo",
            "base": spec.base_model_name_or_path,
            "task": spec.task_type,
            "allocation": {m: [e.rank for e in experts] for m, experts in spec.experts.items()},
            "warnings": warnings,
        }
    warnings = check_plain(folder, served.lora_config, tasks_of(served.model_config))
    config = read_config(folder / CONFIG_FILE)
    try:
        allocation = _ranks_of_plain(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as e:
        raise AdapterError(f"{folder}: no adapter that can be served: {e}") from None
    named = config.get("base_model_name_or_path")
    return {
        "kind": "lora",
        "base": named,
        "task": config.get("task_type"),
        "allocation": allocation,
        "warnings": [*warnings, *_of_another_base(named, served.model_config.model)],
    }


def memory_of(folder: Path, itemsize: int) -> int:
    """About the most bytes of a worker's memory that an adapter takes.

    Args:
        folder: a copy that was checked.
        itemsize: bytes of a number in the served model.
    """
    total, modules = 0, set()
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            size = 4 if name.endswith("router.weight") else itemsize
            total += math.prod(file.get_slice(name).get_shape()) * size
            modules.add(name.rsplit(".", 2)[0])
    return total + _MODULE_BYTES * len(modules)


def _of_another_base(named: str | None, served: str) -> list[str]:
    """One base has many names, paths among them: told by the last part of each."""
    last = [Path(name).name.lower() for name in (named or "", served)]
    if not named:
        return ["its config does not name the base that it was made for"]
    if last[0] == last[1]:
        return []
    return [f"its config says that it was made for {named[:200]!r}; the base here is {served!r}"]


def summary(about: Mapping[str, Any]) -> dict[str, Any]:
    """Modules, experts and ranks of an allocation in numbers."""
    ranks = list(about["allocation"].values())
    return {
        "modules": len(ranks),
        "experts": sum(map(len, ranks)),
        "rank": sum(map(sum, ranks)),
        "per_module": {
            "experts": _spread([len(of_module) for of_module in ranks]),
            "rank": _spread([sum(of_module) for of_module in ranks]),
        },
    }


def _spread(counts: list[int]) -> dict[str, float]:
    mean = round(sum(counts) / max(len(counts), 1), 2)
    return {"min": min(counts, default=0), "mean": mean, "max": max(counts, default=0)}


def _ranks_of_plain(path: Path) -> dict[str, list[int]]:
    ranks = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            if not is_finite(tensor):
                raise AdapterError(f"{path}: {name} has values that are not finite")
            if name.endswith(_RANK):
                module = name.removeprefix("base_model.model.").removesuffix(_RANK)
                ranks[module] = [tensor.shape[0]]
    return ranks
