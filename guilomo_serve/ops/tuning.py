"""Launch settings of the kernels: which ones by GPU and number of tokens, and where they are kept.

`benchmarks/kernels.py --tune` measures them and keeps them in the user's cache, by the GPU's name.
Before that, `kernel_tuning.json` has settings by the beginning of the name, which
benchmarks/kernel_costs.py has chosen by a model and nobody has measured; any other GPU gets the
defaults below, which are an H100's there. Few tokens are a matter of reading the weights with as
many programs as possible, many tokens one of reuse.
"""

from __future__ import annotations

import bisect
import functools
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_name("kernel_tuning.json")
# The largest number of tokens of each class; the last class has no end.
TOKEN_CLASSES = (16, 64, 256, 1024)


@dataclass(frozen=True)
class ShrinkTuning:
    """Of `h = A x`.

    Attributes:
        block_tokens: tokens of a program, one of `TokenBlocks.SIZES`.
        block_rows: rank rows that it sums at a time.
        block_in: input features of a step of the sum, of a 2-byte dtype; half of it in float32.
        splits: programs that share a sum; `expand` adds their parts.
        row_programs: programs that share the rows of a block of tokens.
        warps, stages: Triton's.
    """

    block_tokens: int
    block_rows: int
    block_in: int
    splits: int
    row_programs: int
    warps: int
    stages: int


@dataclass(frozen=True)
class ExpandTuning:
    """Of `y += B (h * gate)`.

    Attributes:
        block_tokens: as in `ShrinkTuning`.
        block_rows: rank rows of a step of the sum.
        block_columns: output columns of a tile, of a 2-byte dtype; half of it in float32.
        tiles: of a program, one after another: the gates of its tokens are computed once for all.
        warps, stages: Triton's.
    """

    block_tokens: int
    block_rows: int
    block_columns: int
    tiles: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tuning:
    """Both kernels' settings for one class of batches."""

    shrink: ShrinkTuning
    expand: ExpandTuning


DEFAULTS = (
    Tuning(ShrinkTuning(16, 16, 128, 8, 8, 4, 3), ExpandTuning(16, 32, 64, 1, 4, 1)),
    Tuning(ShrinkTuning(16, 16, 128, 8, 8, 4, 3), ExpandTuning(16, 32, 64, 2, 4, 1)),
    Tuning(ShrinkTuning(16, 16, 128, 8, 4, 4, 3), ExpandTuning(16, 32, 64, 2, 4, 1)),
    Tuning(ShrinkTuning(16, 32, 64, 2, 4, 4, 3), ExpandTuning(64, 32, 64, 4, 8, 1)),
    Tuning(ShrinkTuning(64, 32, 64, 2, 4, 4, 3), ExpandTuning(64, 32, 64, 8, 8, 1)),
)
# For Triton's interpreter: few programs, and pieces so small that small shapes have several.
_ON_CPU = tuple(
    Tuning(ShrinkTuning(size, 16, 64, 2, 2, 1, 1), ExpandTuning(size, 16, 64, 2, 1, 1))
    for size in (16, 16, 64, 64, 64)
)


def tuning_for(device: torch.device, tokens: int) -> Tuning:
    """The settings for a launch on this device with (at most) so many tokens."""
    return _of_device(device)[bisect.bisect_left(TOKEN_CLASSES, tokens)]


def measured_file() -> Path:
    """Where `store` keeps settings: in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "guilomo" / "kernel_tuning.json"


def stored(gpu: str) -> tuple[Tuning, ...] | None:
    """The settings for a GPU, one for each class of tokens; None if there are none.

    Args:
        gpu: its name, as torch gives it.
    """
    measured = _read(measured_file()).get(gpu)
    if measured is not None:
        return _parsed(measured)
    modelled = _read(FILE)
    known = [name for name in modelled if gpu.startswith(name)]
    return _parsed(modelled[max(known, key=len)]) if known else None


def store(gpu: str, found: tuple[Tuning, ...]) -> None:
    """Keeps measured settings for this user, in place of the GPU's old ones.

    Raises:
        OSError: the cache cannot be written.
    """
    if len(found) != len(TOKEN_CLASSES) + 1:
        raise ValueError(f"{len(found)} settings, expected one for each class of tokens")
    file = measured_file()
    everything = _read(file) | {gpu: [asdict(tuning) for tuning in found]}
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_suffix(".new")
    written.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    written.replace(file)
    _of_device.cache_clear()


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def _parsed(classes: Sequence[Any]) -> tuple[Tuning, ...]:
    return tuple(
        Tuning(ShrinkTuning(**of_class["shrink"]), ExpandTuning(**of_class["expand"]))
        for of_class in classes
    )


@functools.cache
def _of_device(device: torch.device) -> tuple[Tuning, ...]:
    if device.type != "cuda":
        return _ON_CPU
    return stored(torch.cuda.get_device_name(device)) or DEFAULTS
