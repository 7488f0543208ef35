"""Which implementation of a layer's op is used where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from guilomo_serve.ops import native
from guilomo_serve.ops.layer import Slots, SplitSlots

if TYPE_CHECKING:  # needs Triton, which only a GPU's torch brings along
    from guilomo_serve.ops.triton_slots import TritonSlots


def make_slots(
    count: int,
    in_features: int,
    widths: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Slots | TritonSlots:
    """The fastest implementation for a layer; arguments as those of `TritonSlots`."""
    if device.type == "cuda":
        from guilomo_serve.ops.triton_slots import DTYPES, TritonSlots

        if dtype in DTYPES:
            return TritonSlots(count, in_features, widths, dtype, device, all_reduce)
    if all_reduce is not None:
        return SplitSlots(count, all_reduce)
    return native.make_slots(count, device, dtype)
