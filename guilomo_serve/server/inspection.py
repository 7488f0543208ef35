"""What an adapter folder is and whether it fits the base, without the engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from vllm.config.lora import LoRAConfig
from vllm.lora.peft_helper import PEFTHelper

from guilomo_serve.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterError,
    BaseModel,
    is_guilomo_adapter,
    read_adapter,
    read_config,
)

_RANK = ".lora_A.weight"
# Of a module's five tensors in memory beside their numbers, 1.4 KB each where that was measured
# (torch 2.9, glibc), and its rows' scalings.
_MODULE_BYTES = 8 * 2**10


def inspect(folder: Path, base: BaseModel | None, lora_config: LoRAConfig) -> dict[str, Any]:
    """Reads and checks an adapter.

    Args:
        folder: the adapter folder.
        base: the served model; None leaves shapes to the engine.
        lora_config: vLLM's limits, for plain LoRAs.

    Returns:
        `kind` ("guilomo" or "lora"), `base`, `task`, and `allocation`: module -> its experts'
        ranks.

    Raises:
        AdapterError: it is malformed, not finite, or not for this base. The modules of a plain
            LoRA are checked by the engine alone.
    """
    if is_guilomo_adapter(folder):
        spec = read_adapter(folder, base).spec
        ranks = {module: [e.rank for e in experts] for module, experts in spec.experts.items()}
        return {
            "kind": "guilomo",
            "base": spec.base_model_name_or_path,
            "task": spec.task_type,
            "allocation": ranks,
        }
    config = read_config(folder / CONFIG_FILE)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else config
        raise AdapterError(
            f"{folder / CONFIG_FILE}: peft_type is {str(found)[:80]!r}, expected 'GUILOMO' or "
            "'LORA'"
        )
    try:
        PEFTHelper.from_local_dir(str(folder), None).validate_legal(lora_config)
        allocation = _ranks_of_plain(folder / WEIGHTS_FILE)
    except AdapterError:
        raise
    except (KeyError, OSError, SafetensorError, TypeError, ValueError) as e:
        raise AdapterError(f"{folder}: no adapter that can be served: {e}") from None
    return {
        "kind": "lora",
        "base": config.get("base_model_name_or_path"),
        "task": config.get("task_type"),
        "allocation": allocation,
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
            if not torch.isfinite(tensor).all():
                raise AdapterError(f"{path}: {name} has values that are not finite")
            if name.endswith(_RANK):
                module = name.removeprefix("base_model.model.").removesuffix(_RANK)
                ranks[module] = [tensor.shape[0]]
    return ranks
