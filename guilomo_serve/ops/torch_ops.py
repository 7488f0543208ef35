"""The routed product in fused form: a plain LoRA of rank R with a gate between its products.

    h  = A x                             [T, R]
    y += B (h * (w * s)[expert_of_row])  [T, out]

No token is sorted and no expert is looped over: ranks are small, so computing the rows whose
gate is 0 is cheaper than gathering the others.
"""

from __future__ import annotations

import torch


def route(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Weights of the experts: softmax, the largest k kept, renormalised to sum 1.

    Args:
        logits: [T, E], float32 or wider. Equal logits are resolved towards the lower index
            by `torch.topk` no more than it promises; they weigh the same either way.
        top_k: experts kept for each token; all of them where E is smaller.

    Returns:
        [T, E], zero where an expert is not chosen.
    """
    if top_k >= logits.shape[-1]:
        return torch.softmax(logits, dim=-1)
    # Renormalising a softmax over a subset is the softmax of that subset.
    best = torch.topk(logits, top_k, dim=-1)
    weights = torch.softmax(best.values, dim=-1)
    return torch.zeros_like(logits).scatter(-1, best.indices, weights)


def row_gates(
    x: torch.Tensor,
    router: torch.Tensor | None,
    row_scaling: torch.Tensor,
    expert_of_row: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    """The factor between the two products, for each token and rank row.

    Args:
        x: [T, in].
        router: [E, in] float32, or None for a single expert.
        row_scaling: [R], the scale of each row's expert.
        expert_of_row: [R] int64.
        top_k: experts that a token uses.

    Returns:
        [T, R] (or [R] without router), float32 or wider.
    """
    if router is None:
        return row_scaling
    logits = torch.nn.functional.linear(x.to(router.dtype), router)
    return route(logits, top_k)[..., expert_of_row] * row_scaling


def routed_lora(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    router: torch.Tensor | None,
    row_scaling: torch.Tensor,
    expert_of_row: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    """`sum_e w_e s_e B_e (A_e x)` for each token; see `reference.routed_lora`.

    Args:
        x: [T, in]; lora_a: [R, in]; lora_b: [out, R], all of one dtype.
        router, row_scaling, expert_of_row, top_k: as in `row_gates`.

    Returns:
        [T, out], in x's dtype.
    """
    gates = row_gates(x, router, row_scaling, expert_of_row, top_k)
    h = torch.nn.functional.linear(x, lora_a) * gates.to(x.dtype)
    return torch.nn.functional.linear(h, lora_b)
