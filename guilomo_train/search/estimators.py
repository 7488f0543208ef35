"""How selection vectors learn: from the upper gradient in the masks, dL/dM, to new vectors.

A count n switches on the entries j <= n of a mask, so what it gains is a sum of what each entry
gains. A mask is 0 or 1, but a gradient is a slope at one point. Three facts about that slope
decide what a search can see:

1. Where an entry is on and its weights are trained, the slope is about 0: scaling a rank row is
   something training has already done as well as it can. Where it is off, the slope is about
   twice the entry's worth, for a loss that is quadratic in the entry. Neither is the worth; their
   mean is, exactly so if quadratic (the trapezoid rule; Gregor et al. 2014 use it for binary
   units). Entries beyond the count's edge have other entries missing before them, so only the two
   at the edge, the last one on and the first one off, say what one more would change.
2. To choose between layers under one budget, the worths of different layers must stay
   comparable. An optimiser that scales each entry by its own gradient's size, as Adam does, takes
   that away.
3. A slope is mostly noise, and a search on a real task is short. What an entry has seen tells less
   than what is common to its module, and that less than what is common to all.

`MarginalWorth` (`marginal`, the default) follows from all three. `AdamSteps` is the gradient
descent of the paper, with two ways through the choice: `cumulative` passes the gradient through
the expected mask, dL/dp[n] = sum_{j <= n} dL/dM[j], to all entries (straight-through, Bengio et al.
2013); `argmax`, as the authors' released code has it, to the chosen entry alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from guilomo_train.search.selection import Draw, SelectionVectors

Estimator = Literal["marginal", "cumulative", "argmax"]

# Adam as in DARTS (Liu et al. 2019): little momentum, the vectors' gradients are noisy.
_BETAS = (0.5, 0.999)
# Nats between the best and the worst count of an average module when the search ends.
_SHARPNESS = 20.0
_TINY = 1e-30  # instead of dividing by 0


class AdamSteps:
    """Gradient descent of the vectors by Adam.

    Args:
        selection: the vectors to move.
        estimator: how the gradient passes the choice; see the head of this file.
        learning_rate: Adam's.
    """

    def __init__(
        self,
        selection: SelectionVectors,
        estimator: Literal["cumulative", "argmax"],
        learning_rate: float,
    ) -> None:
        self.selection = selection
        self.estimator = estimator
        self.optimizer = torch.optim.Adam(selection.parameters(), lr=learning_rate, betas=_BETAS)

    def step(self, draw: Draw, experts: torch.Tensor, ranks: torch.Tensor) -> None:
        """Moves the vectors by dL/dM, `experts [M, E]` and `ranks [M, E, r]`, of a draw."""
        self.selection.experts.grad = self._gradient(experts, draw.experts, draw.p_experts)
        self.selection.ranks.grad = self._gradient(ranks, draw.ranks, draw.p_ranks)
        self.optimizer.step()

    def _gradient(self, by_mask: torch.Tensor, mask: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """dL/dg of vectors `[..., n]`."""
        by_count = by_mask.cumsum(-1)
        if self.estimator == "argmax":
            return by_count * last_on(mask)
        return p * (by_count - (p * by_count).sum(-1, keepdim=True))

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


class MarginalWorth:
    """Vectors as what each count is worth, by all that the search has seen.

    An entry j is worth `w[j]`: half the slope to expect where it is the last one on, and half where
    it is the first one off. A count has the sum of its entries, and the vectors are

        g[n] = - sharpness * t / T * sum_{j <= n} w[j] / s

    in step t of T, with one s for all modules (the mean spread of their expert vectors), so that
    p goes from indifferent to decided. Only differences between counts matter, so an entry that
    every count has (the first rank, experts below top_k) needs no worth.

    Args:
        selection: the vectors to set.
        steps: T.
    """

    def __init__(self, selection: SelectionVectors, steps: int) -> None:
        self.selection = selection
        self.steps = steps
        self.taken = 0
        # At both edges, last on and first off: how many slopes were seen, their sum and squares.
        self._experts = torch.zeros(3, 2, *selection.experts.shape)
        self._ranks = torch.zeros(3, 2, *selection.ranks.shape)

    @torch.no_grad()
    def step(self, draw: Draw, experts: torch.Tensor, ranks: torch.Tensor) -> None:
        """Takes in dL/dM, `experts [M, E]` and `ranks [M, E, r]`, of a draw."""
        self.taken += 1
        self._see(self._experts, experts, draw.experts, torch.ones_like(draw.experts))
        # An expert that is off says nothing of its ranks.
        self._see(self._ranks, ranks, draw.ranks, draw.experts[..., None])
        by_experts = expected_slopes(self._experts, groups=[(-1,)]).mean(0)
        by_experts[:, : self.selection.space.fewest_experts] = 0.0
        by_ranks = expected_slopes(self._ranks, groups=[(-2, -1), (-1,)]).mean(0)
        by_experts, by_ranks = by_experts.cumsum(-1), by_ranks.cumsum(-1)
        spread = (by_experts.amax(-1) - by_experts.amin(-1)).mean()
        if spread > 0:
            sharpness = _SHARPNESS * min(1.0, self.taken / self.steps) / spread
            self.selection.experts.copy_(-sharpness * by_experts)
            self.selection.ranks.copy_(-sharpness * by_ranks)

    @staticmethod
    def _see(
        seen: torch.Tensor, slope: torch.Tensor, mask: torch.Tensor, exists: torch.Tensor
    ) -> None:
        edges = torch.stack([last_on(mask), first_off(mask)]) * exists
        seen += torch.stack([edges, edges * slope, edges * slope.square()])

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken, "experts": self._experts, "ranks": self._ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]
        self._experts.copy_(state["experts"])
        self._ranks.copy_(state["ranks"])


def expected_slopes(seen: torch.Tensor, groups: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """The slope to expect at each entry, from few and noisy ones: empirical Bayes.

    One slope is mostly noise, and an entry has seen few. So each starts from what is common to all
    modules, in units of its module's slopes (a module with larger gradients has larger worths),
    and goes as far towards what was seen there as this bears out: from groups of entries down to
    single ones,

        (mean of n slopes - what is expected so far)  times  rho n / (v + rho n)

    with v the variance of slopes at one entry, and rho that between the groups of a level beyond
    what v explains (by moments, as DerSimonian and Laird 1986 have it).

    Args:
        seen: `[3, 2, M, ..., n]`: how many slopes were seen, their sum and their squares' sum, for
            an edge, a module and an entry.
        groups: the axes over which the groups of each level go, from large groups to small ones.

    Returns:
        `[2, M, ..., n]`, in the units of a slope.
    """
    counts, sums, squares = seen
    entries = tuple(range(2, counts.dim()))
    of_module = (0, *entries)
    total = counts.sum(of_module, keepdim=True)
    unit = (squares.sum(of_module, keepdim=True) / total.clamp_min(_TINY)).sqrt()
    means = sums / (counts * unit).clamp_min(_TINY)
    # One slope more, of variance 1, until there are enough to tell.
    explained = (counts * means.square()).sum(of_module, keepdim=True)
    repeated = total - (counts > 0).sum(of_module, keepdim=True)
    variance = (total - explained + 1) / (repeated + 1)

    all_alike = tuple(range(1, counts.dim() - 1))
    expected = weighted_mean(means, counts, all_alike)[0]
    for axes in (*groups, ()):
        mean, n = weighted_mean(means - expected, counts, axes)
        between = torch.where(n > 0, n * mean.square() - variance, 0.0).sum() / n.sum()
        signal = between.clamp_min(0) * n
        expected = expected + mean * signal / (variance + signal)
    return expected * unit


def weighted_mean(
    values: torch.Tensor, weights: torch.Tensor, axes: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean over axes, which stay with size 1, and the sum of its weights; 0 where that is 0."""
    if not axes:
        return values, weights
    total = weights.sum(axes, keepdim=True)
    return (weights * values).sum(axes, keepdim=True) / total.clamp_min(_TINY), total


def last_on(mask: torch.Tensor) -> torch.Tensor:
    """1 at the last entry that is 1 of hard masks `[..., n]`, 0 elsewhere."""
    return mask - torch.nn.functional.pad(mask[..., 1:], (0, 1))


def first_off(mask: torch.Tensor) -> torch.Tensor:
    """1 at the first entry that is 0 of hard masks `[..., n]`, 0 elsewhere."""
    return torch.nn.functional.pad(mask[..., :-1], (1, 0), value=1.0) - mask
