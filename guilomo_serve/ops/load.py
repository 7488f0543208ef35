"""How routers share tokens out over their experts, counted from logits.

    chosen   tokens that use the expert
    entropy  of the router's softmax over its experts / log of their number: 1 where it cannot tell
             them apart, 0 where it is certain; as guilomo_train/health.py has it while training

Many routers of different sizes are counted in a few operations, as one tensor with gaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RouterLoad:
    """Sums over tokens, for M routers of at most E experts.

    Attributes:
        chosen: [M, E] int64; 0 beyond a router's experts.
        entropy: [M] float64.
        tokens: [M] int64, those that were counted.
    """

    chosen: torch.Tensor
    entropy: torch.Tensor
    tokens: torch.Tensor

    def __add__(self, other: RouterLoad) -> RouterLoad:
        return RouterLoad(
            self.chosen + other.chosen, self.entropy + other.entropy, self.tokens + other.tokens
        )


def router_load(logits: Sequence[torch.Tensor], top_k: int) -> RouterLoad:
    """Counts the choices of M routers for the same T tokens; waits for no device.

    Args:
        logits: of each router [T, its experts], float32.
        top_k: experts that a token uses; all of them where a router has fewer.

    Returns:
        The counts. A token is left out where its logits are not finite.
    """
    first, device = logits[0], logits[0].device
    sizes = torch.tensor([part.shape[1] for part in logits], device=device)
    most = max(part.shape[1] for part in logits)
    padded = first.new_full((len(logits), len(first), most), -torch.inf)
    for row, part in zip(padded, logits, strict=True):
        row[:, : part.shape[1]] = part
    there = (torch.arange(most, device=device) < sizes[:, None])[:, None]  # [M, 1, E]
    counted = (padded.isfinite() | ~there).all(-1, keepdim=True)  # [M, T, 1]
    # Of equal logits the lower index, as in the native op and the kernels.
    best = padded.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    chosen = torch.zeros_like(padded, dtype=torch.int64).scatter(-1, best, 1) * (there & counted)
    entropy = torch.special.entr(torch.softmax(padded, dim=-1)).sum(-1, keepdim=True)
    return RouterLoad(
        chosen.sum(1),
        torch.where(counted, entropy, 0.0).double().sum((1, 2)) / sizes.clamp(min=2).double().log(),
        counted.sum((1, 2)),
    )
