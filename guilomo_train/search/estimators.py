"""How selection vectors learn: from the upper gradient in the masks, dL/dM, to new vectors.

A count n switches on the entries j <= n of a mask, so what it gains is a sum of what each entry
gains. A mask is 0 or 1, but a gradient is a slope at one point. Two facts about that slope decide
what a search can see:

1. Where an entry is on and its weights are trained, the slope is about 0: scaling a rank row is
   something training has already done as well as it can. Where it is off, the slope is about
   twice the entry's worth, for a loss that is quadratic in the entry. Neither is the worth; their
   mean is, exactly so if quadratic (the trapezoid rule; Gregor et al. 2014 use it for binary
   units). Entries beyond the count's edge have other entries missing before them, so only the two
   at the edge, the last one on and the first one off, say what one more would change.
2. To choose between layers under one budget, the worths of different layers must stay
   comparable. An optimiser that scales each entry by its own gradient's size, as Adam does, takes
   that away.

`MarginalWorth` (`marginal`, the default) follows from both. `AdamSteps` is the gradient descent of
the paper, with two ways through the choice: `cumulative` passes the gradient through the expected
mask, dL/dp[n] = sum_{j <= n} dL/dM[j], to all entries (straight-through, Bengio et al. 2013);
`argmax`, as the authors' released code has it, to the chosen entry alone.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from guilomo_train.search.selection import Draw, SelectionVectors

Estimator = Literal["marginal", "cumulative", "argmax"]

# Adam as in DARTS (Liu et al. 2019): little momentum, the vectors' gradients are noisy.
_BETAS = (0.5, 0.999)
# Steps over which worths are averaged, as a share of all. They change while the weights train,
# yet a step's own is noise.
_WINDOW = 0.2
# Nats between the best and the worst count of an average module when the search ends.
_SHARPNESS = 20.0


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
    """Vectors as what each count is worth, averaged over the last steps.

    An entry j is worth `w[j]`: half the mean slope where it was the last one on, and half where it
    was the first one off. A count has the sum of its entries, and the vectors are

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
        self._keep = max(0.0, 1 - 1 / (_WINDOW * steps))
        # At both edges, last on and first off: slopes seen and how many, both fading.
        self._experts = torch.zeros(2, 2, *selection.experts.shape)
        self._ranks = torch.zeros(2, 2, *selection.ranks.shape)

    @torch.no_grad()
    def step(self, draw: Draw, experts: torch.Tensor, ranks: torch.Tensor) -> None:
        """Takes in dL/dM, `experts [M, E]` and `ranks [M, E, r]`, of a draw."""
        self.taken += 1
        self._see(self._experts, experts, draw.experts, torch.ones_like(draw.experts))
        # An expert that is off says nothing of its ranks.
        self._see(self._ranks, ranks, draw.ranks, draw.experts[..., None])
        by_experts = self._worths(self._experts)
        by_experts[:, : self.selection.space.fewest_experts] = 0.0
        by_experts, by_ranks = by_experts.cumsum(-1), self._worths(self._ranks).cumsum(-1)
        spread = (by_experts.amax(-1) - by_experts.amin(-1)).mean()
        if spread > 0:
            sharpness = _SHARPNESS * min(1.0, self.taken / self.steps) / spread
            self.selection.experts.copy_(-sharpness * by_experts)
            self.selection.ranks.copy_(-sharpness * by_ranks)

    def _see(
        self, seen: torch.Tensor, slope: torch.Tensor, mask: torch.Tensor, exists: torch.Tensor
    ) -> None:
        edges = torch.stack([last_on(mask), first_off(mask)]) * exists
        seen.mul_(self._keep)
        seen[0] += edges * slope
        seen[1] += edges

    @staticmethod
    def _worths(seen: torch.Tensor) -> torch.Tensor:
        """The mean over both edges; an edge never seen counts as 0."""
        slopes, counts = seen
        return (slopes / counts.clamp_min(1e-12)).mean(0)

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken, "experts": self._experts, "ranks": self._ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]
        self._experts.copy_(state["experts"])
        self._ranks.copy_(state["ranks"])


def last_on(mask: torch.Tensor) -> torch.Tensor:
    """1 at the last entry that is 1 of hard masks `[..., n]`, 0 elsewhere."""
    return mask - torch.nn.functional.pad(mask[..., 1:], (0, 1))


def first_off(mask: torch.Tensor) -> torch.Tensor:
    """1 at the first entry that is 0 of hard masks `[..., n]`, 0 elsewhere."""
    return torch.nn.functional.pad(mask[..., :-1], (1, 0), value=1.0) - mask
