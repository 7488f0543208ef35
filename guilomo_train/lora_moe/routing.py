"""Routing weights: a softmax over the top_k largest logits, and the same under a mask of experts.

With a mask `M [E]` of 0 and 1 the weights `w(M) [..., E]` are those of a layer that has only the
experts with M = 1. The derivative in M is the whole change when an expert comes or goes,

    dw/dM_e = w(M with e) - w(M without e)

so that an expert that is masked out says what it would change, and one that is there what it does.
A single expert has the weight 1 and without any all weights are 0, so the first to come says what
it would do alone.
The slope of a softmax whose terms are weighted by M would not do: in it an expert that is masked
out has exp(z_e - z), which single tokens drive to any size, though its weight ends at 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def top_k_softmax(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Softmax over the `top_k` largest logits of `[..., E]`, 0 elsewhere (all E if fewer)."""
    if top_k >= logits.shape[-1]:
        return torch.softmax(logits, dim=-1)
    dropped = torch.ones_like(logits, dtype=torch.bool)
    dropped.scatter_(-1, logits.detach().topk(top_k, dim=-1).indices, False)
    return torch.softmax(logits.masked_fill(dropped, -torch.inf), dim=-1)


def masked_top_k_softmax(
    logits: torch.Tensor, expert_mask: torch.Tensor, top_k: int
) -> torch.Tensor:
    """The weights under a mask; see the head of this file.

    Args:
        logits: [..., E].
        expert_mask: [E], 0 or 1.
        top_k: experts that a token uses among those that are there.

    Returns:
        [..., E], 0 for experts that are masked out or not chosen.
    """
    weights: torch.Tensor = _MaskedTopKSoftmax.apply(logits, expert_mask, top_k)
    return weights


class _MaskedTopKSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, expert_mask: torch.Tensor, top_k: int
    ) -> torch.Tensor:
        there = expert_mask > 0.5
        weights = top_k_softmax(logits.masked_fill(~there, _lowest(logits)), top_k) * there
        ctx.save_for_backward(logits, there, weights)
        ctx.top_k = top_k
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, there, weights = ctx.saved_tensors
        now = (gradient * weights).sum(-1, keepdim=True)
        by_logits, by_mask = weights * (gradient - now), None
        if ctx.needs_input_grad[1]:
            flipped = if_flipped(gradient, logits, there, weights, ctx.top_k)
            change = torch.where(there, now - flipped, flipped - now)
            by_mask = change.flatten(0, -2).sum(0)
        return by_logits, by_mask, None


def if_flipped(
    values: torch.Tensor,
    logits: torch.Tensor,
    there: torch.Tensor,
    weights: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    """The weighted mean of `values` if the mask of expert e were the other way, for each e.

    An expert that comes takes the place of the last one chosen, if its logit is larger. One that
    goes leaves its place to the first one not chosen.

    Args:
        values, logits: [..., E].
        there: [E], bool: the mask as it is.
        weights: [..., E], under that mask.
        top_k: experts that a token uses.

    Returns:
        [..., E].
    """
    among = logits.masked_fill(~there, _lowest(logits))
    best = among.topk(min(top_k + 1, len(there)), dim=-1)
    chosen = best.indices[..., :top_k]
    last, first = chosen[..., -1:], chosen[..., :1]
    now = weights * values
    mean = now.sum(-1, keepdim=True)
    # In units of the sum of scores as it is; what lies e^60 above takes all.
    score = (logits - best.values[..., :top_k].logsumexp(-1, keepdim=True)).clamp(max=60.0).exp()

    rest = mean - now.gather(-1, last), 1 - weights.gather(-1, last)
    with_it = (rest[0] + score * values) / (rest[1] + score)

    next_in_line = best.indices[..., top_k:]  # one, or none where top_k is all
    joins = score.gather(-1, next_in_line) * there[next_in_line]
    joining = (joins * values.gather(-1, next_in_line)).sum(-1, keepdim=True)
    joins = joins.sum(-1, keepdim=True)
    without_it = (mean - now + joining) / (1 - weights + joins)
    # 1 - weight would lose what is left where the first takes nearly all.
    others = best.indices[..., 1:]
    of_others = torch.softmax(best.values[..., 1:], dim=-1) * there[others]
    without_first = (of_others * values.gather(-1, others)).sum(-1, keepdim=True)
    without_it = without_it.scatter(-1, first, without_first)

    comes = ~there & (logits > among.gather(-1, last))
    goes = there & (weights > 0)
    return torch.where(comes, with_it, torch.where(goes, without_it, mean))


def _lowest(logits: torch.Tensor) -> float:
    """Of its dtype; a softmax of nothing else is finite, as one of -inf is not."""
    return torch.finfo(logits.dtype).min
