"""The routed product as the formula reads: a loop over experts (GuiLoMo, arXiv 2506.14646).

Slow and plain on purpose. In float64 it is what every fast path is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def routed_lora(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    router: torch.Tensor | None,
    ranks: Sequence[int],
    scalings: Sequence[float],
    top_k: int,
) -> torch.Tensor:
    """`sum_e w_e s_e B_e (A_e x)` for each token.

    Args:
        x: [T, in].
        lora_a: [R, in], the experts' rows one expert after another.
        lora_b: [out, R], the experts' columns in the same order.
        router: [E, in]; None for a single expert, whose weight is 1.
        ranks: the rank of each expert; they sum to R.
        scalings: the scale s_e of each expert.
        top_k: experts that a token uses; all of them where there are fewer.

    Returns:
        [T, out], in x's dtype.
    """
    output = x.new_zeros(x.shape[0], lora_b.shape[0])
    experts_a = lora_a.split(list(ranks), dim=0)
    experts_b = lora_b.split(list(ranks), dim=1)
    for t in range(x.shape[0]):
        if router is None:
            chosen, weights = [0], x.new_ones(1)
        else:
            probabilities = torch.softmax(router @ x[t], dim=0)
            best = torch.topk(probabilities, min(top_k, len(ranks)))
            chosen, weights = best.indices.tolist(), best.values / best.values.sum()
        for e, weight in zip(chosen, weights, strict=True):
            output[t] += weight * scalings[e] * (experts_b[e] @ (experts_a[e] @ x[t]))
    return output
