"""Selection vectors: how a search holds, samples and learns its choices (arXiv 2506.14646).

Each module has a vector `g_E [E]` over the counts of experts and, for each expert, a vector
`g_R [r]` over its ranks. With `p = softmax(g)`, entry n - 1 is the probability of the count n.

A count n is applied as the mask `M[j] = 1 if j <= n`. In expectation over p that is the reverse
cumulative sum `m[j] = sum_{n >= j} p[n]`, and the gradient goes through it (straight-through,
Bengio et al. 2013): forward the hard M, backward dL/dp[n] = sum_{j <= n} dL/dM[j]. So every entry
learns in each step, also of counts not chosen now (`cumulative`). The estimator of the authors'
released code gives a gradient to the chosen entry alone (`argmax`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from guilomo_train.search.allocation import Allocation

Estimator = Literal["cumulative", "argmax"]
Choice = Literal["sample", "argmax", "relaxed"]


@dataclass(frozen=True)
class SearchSpace:
    """What can be chosen: up to `max_experts` (at least `top_k`) of ranks up to `max_rank`."""

    modules: tuple[str, ...]
    max_experts: int = 8
    max_rank: int = 8
    top_k: int = 2


@dataclass(frozen=True)
class Noise:
    """Gumbel noise of one step: `experts [M, E]`, `ranks [M, E, r]` for M modules.

    All passes of an upper step share it: they differentiate one function.
    """

    experts: torch.Tensor
    ranks: torch.Tensor


class SelectionVectors(nn.Module):
    """The selection vectors of all modules: `experts [M, E]` and `ranks [M, E, r]`.

    They start at zero: every count is equally likely, and nothing but the data decides.

    Args:
        space: what can be chosen.
        estimator: how the gradient passes the choice; see the head of this file.
        choice: `sample` draws counts from p in each step (Gumbel-max); `argmax` takes the most
            likely count; `relaxed` applies the expectation m itself.
    """

    def __init__(
        self,
        space: SearchSpace,
        estimator: Estimator = "cumulative",
        choice: Choice = "sample",
    ) -> None:
        super().__init__()
        self.space = space
        self.estimator = estimator
        self.choice = choice
        modules, experts, rank = len(space.modules), space.max_experts, space.max_rank
        self.experts = nn.Parameter(torch.zeros(modules, experts))
        self.ranks = nn.Parameter(torch.zeros(modules, experts, rank))

    def noise(self, generator: torch.Generator) -> Noise:
        """Gumbel noise for one step; drawn on the CPU, so that a seed means the same anywhere."""

        def gumbel(like: torch.Tensor) -> torch.Tensor:
            uniform = torch.rand(like.shape, generator=generator).clamp_min_(1e-20)
            return -torch.log(-torch.log(uniform)).to(like)

        return Noise(gumbel(self.experts), gumbel(self.ranks))

    def masks(self, noise: Noise) -> tuple[torch.Tensor, torch.Tensor]:
        """The masks of all modules under the current vectors.

        Returns:
            `[M, E]` and `[M, E, r]`, differentiable in the vectors.
        """
        return (
            self._mask(self._expert_logits(), noise.experts),
            self._mask(self.ranks, noise.ranks),
        )

    @torch.no_grad()
    def allocation(self) -> Allocation:
        """The most likely counts: `argmax + 1`, an expert's rank from its own vector."""
        experts = self._expert_logits().argmax(-1) + 1
        ranks = self.ranks.argmax(-1) + 1
        return Allocation(
            ranks={
                module: tuple(ranks[m, : experts[m]].tolist())
                for m, module in enumerate(self.space.modules)
            },
            top_k=self.space.top_k,
            max_rank=self.space.max_rank,
        )

    @torch.no_grad()
    def expected_total_rank(self) -> float:
        """Rank rows of all modules in expectation under p: what the search leans to."""
        experts = cumulative_mask(self._expert_logits())
        return float((experts * cumulative_mask(self.ranks).sum(-1)).sum())

    def _expert_logits(self) -> torch.Tensor:
        """g_E with counts below top_k ruled out: a token needs top_k experts to choose from."""
        fewest = min(self.space.top_k, self.space.max_experts)
        ruled_out = torch.arange(self.space.max_experts, device=self.experts.device) < fewest - 1
        return self.experts.masked_fill(ruled_out, -torch.inf)

    def _mask(self, g: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """`g [..., n]` over counts 1..n to a mask `[..., n]`."""
        soft = cumulative_mask(g)
        if self.choice == "relaxed":
            return soft
        chosen = (g + noise if self.choice == "sample" else g).detach().argmax(-1, keepdim=True)
        hard = (torch.arange(g.shape[-1], device=g.device) <= chosen).to(g.dtype)
        if self.estimator == "cumulative":
            return hard + (soft - soft.detach())
        entry = g.gather(-1, chosen)
        return hard * (1 + entry - entry.detach())


def cumulative_mask(g: torch.Tensor) -> torch.Tensor:
    """`m[j] = sum_{n >= j} softmax(g)[n]`: the mask of a count drawn from softmax(g), expected."""
    return torch.softmax(g, dim=-1).flip(-1).cumsum(-1).flip(-1)
