"""Is a product what the formula says? For `guilomo-serve check`, and for what a server loads.

The fast ops are compiled where they run: a compiler, a driver or a GPU that gets them wrong would
be seen in no answer at once. `guilomo-serve --check-adapters` compares each layer as it is loaded.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from guilomo_serve.ops import reference
from guilomo_serve.ops.layer import Batch, LayerWeights, SliceWeights

# As a share of a product's norm. Rounding to bfloat16 comes to less than half a percent.
PRODUCT_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.01}
# Router logits in float32 may order two experts otherwise than in float64 if they are as close as
# this, as a share of the largest; such a token's product is not compared.
_FLOAT32_TIE = 1e-5
_TOKENS = 4
_SEED = 0


class SlotsOp(Protocol):
    """`Slots` in any implementation."""

    def apply_(self, y: torch.Tensor, x: torch.Tensor, batch: Batch) -> None: ...


def product_error(
    x: torch.Tensor, added: torch.Tensor, weights: SliceWeights | None, top_k: int
) -> float:
    """The largest error of a token's product, as a share of its norm; not finite if a value is not.

    The formula is taken in float64, with A and B in the layer's precision.

    Args:
        x: [T, in], the layer's input, in its precision.
        added: [T, out], what is added for the adapter.
        weights: the adapter's; None where it leaves the module alone: nothing may be added.
        top_k: experts that a token uses.
    """
    added, dtype, x = added.double(), x.dtype, x.double()
    if weights is None:
        wanted = torch.zeros_like(added)
    else:
        router = None if weights.router is None else weights.router.double()
        wanted = reference.routed_lora(
            x,
            weights.lora_a.to(dtype).double(),
            weights.lora_b.to(dtype).double(),
            router,
            weights.ranks,
            weights.scalings,
            top_k,
        )
        if router is not None and len(router) > top_k:
            ranked = (x @ router.T).sort(dim=-1, descending=True).values
            margin = ranked[:, top_k - 1] - ranked[:, top_k]
            decided = margin > _FLOAT32_TIE * ranked.abs().amax(dim=-1)
            added, wanted = added[decided], wanted[decided]
    if not len(added):
        return 0.0
    off, size = (added - wanted).norm(dim=1), wanted.norm(dim=1)
    return torch.where(off == 0, 0.0, off / size).max().item()


def slot_error(slots: SlotsOp, slot: int, weights: LayerWeights, columns: int) -> float:
    """`product_error` of a loaded adapter in one layer, on random inputs: its slices' largest.

    Args:
        slots: of a layer, with the adapter in `slot`.
        slot: the adapter's.
        weights: the adapter's for this layer, on the layer's device.
        columns: of the layer's output; in those of no slice nothing may be added.
    """
    dtype, device = weights.lora_a.dtype, weights.lora_a.device
    generator = torch.Generator().manual_seed(_SEED)
    x = torch.randn(_TOKENS, weights.lora_a.shape[1], generator=generator).to(device, dtype)
    y = torch.zeros(_TOKENS, columns, dtype=dtype, device=device)
    slots.apply_(y, x, Batch(np.full(_TOKENS, slot)))
    errors = []
    for layout, slice_ in zip(weights.layout, weights.slices(), strict=True):
        of_slice = slice(*layout.columns)
        errors.append(product_error(x, y[:, of_slice], slice_, weights.top_k))
        y[:, of_slice] = 0
    errors.append(product_error(x, y, None, weights.top_k))  # beside the slices
    return torch.tensor(errors).max().item()  # which a NaN wins
