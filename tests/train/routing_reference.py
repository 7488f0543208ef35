"""Masked routing to read: what `guilomo_train.lora_moe.routing` computes, expert by expert."""

from __future__ import annotations

import torch


def masked_routing(logits: torch.Tensor, expert_mask: torch.Tensor, top_k: int) -> torch.Tensor:
    """The weights of the experts that are there, and linearly what a mask's distance changes."""
    there = expert_mask.detach() > 0.5
    weights = of_experts(logits, there, top_k)
    for e in range(len(there)):
        with_it, without_it = there.clone(), there.clone()
        with_it[e], without_it[e] = True, False
        change = of_experts(logits, with_it, top_k) - of_experts(logits, without_it, top_k)
        weights = weights + (expert_mask[e] - there[e].to(expert_mask)) * change
    return weights


def of_experts(logits: torch.Tensor, there: torch.Tensor, top_k: int) -> torch.Tensor:
    """Softmax over the top_k largest logits of some experts `[..., E]`, 0 for all others."""
    if not there.any():
        return torch.zeros_like(logits)
    among = logits.masked_fill(~there, -torch.inf)
    threshold = among.topk(min(top_k, int(there.sum())), dim=-1).values[..., -1:]
    return torch.softmax(among.masked_fill(among < threshold, -torch.inf), dim=-1)
