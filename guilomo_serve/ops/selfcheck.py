"""Does a slot compute what its adapter's formula says, on this machine?

The fast ops are compiled where they run: a compiler, a driver or a GPU that gets them wrong would
be seen in no answer at once. `guilomo-serve --check-adapters` compares each layer as it is loaded.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from guilomo_serve.ops import reference
from guilomo_serve.ops.layer import Batch, LayerWeights

_TOKENS = 4
_SEEDS = (0, 1)


class SlotsOp(Protocol):
    """`Slots` in any implementation."""

    def apply_(self, y: torch.Tensor, x: torch.Tensor, batch: Batch) -> None: ...


def product_error(slots: SlotsOp, slot: int, weights: LayerWeights, columns: int) -> float:
    """By how much a slot's product differs from the formula in float64, on random inputs.

    Args:
        slots: of a layer, with the adapter in `slot`.
        slot: the adapter's.
        weights: the adapter's for this layer, on any device.
        columns: of the layer's output.

    Returns:
        The largest difference of a token, as a share of its product's norm; infinite if a value is
        not finite. Of two tries the better one: in one, two experts may tie within rounding.
    """
    return min(_error(slots, slot, weights, columns, seed) for seed in _SEEDS)


def _error(slots: SlotsOp, slot: int, weights: LayerWeights, columns: int, seed: int) -> float:
    dtype, device = weights.lora_a.dtype, weights.lora_a.device
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(_TOKENS, weights.lora_a.shape[1], generator=generator).to(device, dtype)
    y = torch.zeros(_TOKENS, columns, dtype=dtype, device=device)
    slots.apply_(y, x, Batch(np.full(_TOKENS, slot)))
    wanted = formula(weights, x, columns)
    off, size = (y.double() - wanted).norm(dim=1), wanted.norm(dim=1)
    error = torch.where(off == 0, 0.0, off / size).max().item()
    return error if error == error else float("inf")


def formula(weights: LayerWeights, x: torch.Tensor, columns: int) -> torch.Tensor:
    """The product of a layer's adapter [T, columns] in float64, by the reference's loop."""
    product = torch.zeros(len(x), columns, dtype=torch.float64, device=x.device)
    for layout, lora_b in zip(weights.layout, weights.lora_b, strict=True):
        rows, (first, last) = slice(*layout.rows), layout.experts
        # Rows of one expert lie together, in the order of the experts.
        counts = torch.unique_consecutive(weights.expert_of_row[rows], return_counts=True)[1]
        ranks = counts.tolist()
        begins = [rows.start + sum(ranks[:e]) for e in range(len(ranks))]
        product[:, slice(*layout.columns)] = reference.routed_lora(
            x.double(),
            weights.lora_a[rows].double(),
            lora_b.t().double(),
            weights.router[first:last].double() if last > first else None,
            ranks,
            [weights.row_scale[begin].item() for begin in begins],
            weights.top_k,
        )
    return product
