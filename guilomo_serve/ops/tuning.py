"""Launch settings of the kernels: which ones by GPU and number of tokens, and where they are kept.

`kernel_tuning.json` has what `benchmarks/kernels.py --tune` has found, by the GPU's name. A GPU
that is not in it gets the defaults below, which follow from shapes alone: few tokens are a matter
of reading the weights with as many programs as possible, many tokens one of reuse.
"""

from __future__ import annotations

import bisect
import functools
import json
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
    Tuning(ShrinkTuning(16, 16, 128, 8, 4, 4, 3), ExpandTuning(16, 32, 64, 1, 4, 1)),
    Tuning(ShrinkTuning(16, 16, 128, 8, 4, 4, 3), ExpandTuning(16, 32, 64, 1, 4, 1)),
    Tuning(ShrinkTuning(16, 16, 128, 4, 4, 4, 3), ExpandTuning(16, 32, 64, 2, 4, 1)),
    Tuning(ShrinkTuning(16, 32, 128, 2, 2, 4, 3), ExpandTuning(16, 32, 64, 2, 4, 1)),
    Tuning(ShrinkTuning(64, 32, 64, 1, 1, 4, 3), ExpandTuning(64, 32, 64, 4, 8, 1)),
)
# For Triton's interpreter: few programs, and pieces so small that small shapes have several.
_ON_CPU = tuple(
    Tuning(ShrinkTuning(size, 16, 64, 2, 2, 1, 1), ExpandTuning(size, 16, 64, 2, 1, 1))
    for size in (16, 16, 64, 64, 64)
)


def tuning_for(device: torch.device, tokens: int) -> Tuning:
    """The settings for a launch on this device with (at most) so many tokens."""
    return _of_device(device)[bisect.bisect_left(TOKEN_CLASSES, tokens)]


def stored(gpu: str) -> tuple[Tuning, ...] | None:
    """The settings found for a GPU, one for each class of tokens; None if it was never tuned."""
    found = _read().get(gpu)
    if found is None:
        return None
    return tuple(
        Tuning(ShrinkTuning(**of_class["shrink"]), ExpandTuning(**of_class["expand"]))
        for of_class in found
    )


def store(gpu: str, found: tuple[Tuning, ...]) -> None:
    """Keeps settings in the package, in place of the GPU's old ones."""
    if len(found) != len(TOKEN_CLASSES) + 1:
        raise ValueError(f"{len(found)} settings, expected one for each class of tokens")
    everything = _read() | {gpu: [asdict(tuning) for tuning in found]}
    written = FILE.with_suffix(".new")
    written.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    written.replace(FILE)
    _of_device.cache_clear()


def _read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


@functools.cache
def _of_device(device: torch.device) -> tuple[Tuning, ...]:
    if device.type != "cuda":
        return _ON_CPU
    return stored(torch.cuda.get_device_name(device)) or DEFAULTS
