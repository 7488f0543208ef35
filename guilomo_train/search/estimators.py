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
3. A slope is mostly noise, and a search on a real task is short. How sure a worth is matters as
   much as how large it looks (evidence.py).

`MarginalWorth` (`marginal`, the default) follows from all three. `AdamSteps` is the gradient
descent of the paper, with two ways through the choice: `cumulative` passes the gradient through
the expected mask, dL/dp[n] = sum_{j <= n} dL/dM[j], to all entries (straight-through, Bengio et al.
2013); `argmax`, as the authors' released code has it, to the chosen entry alone.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from guilomo_train.search.allocation import Allocation
from guilomo_train.search.evidence import Evidence, Worths
from guilomo_train.search.fill import even, fill, shared
from guilomo_train.search.selection import Draw, SelectionVectors, at_budget, last_on

Estimator = Literal["marginal", "cumulative", "argmax"]

# Adam as in DARTS (Liu et al. 2019): little momentum, the vectors' gradients are noisy.
_BETAS = (0.5, 0.999)
# Nats at most between the best and the worst count of an average module when the search ends: it
# goes on looking at other counts, however sure it is.
_SHARPEST = 20.0
_UPDATES = 25  # of the vectors in a search, about: what one more step says changes little


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
        # No expert at all gains nothing.
        by_count = torch.nn.functional.pad(experts.cumsum(-1), (1, 0))
        count = torch.nn.functional.one_hot(draw.experts.sum(-1).long(), by_count.shape[-1])
        self.selection.experts.grad = self._gradient(by_count, count, draw.p_experts)
        self.selection.ranks.grad = self._gradient(
            ranks.cumsum(-1), last_on(draw.ranks), draw.p_ranks
        )
        self.optimizer.step()

    def _gradient(
        self, by_count: torch.Tensor, chosen: torch.Tensor, p: torch.Tensor
    ) -> torch.Tensor:
        """dL/dg of vectors `[..., n]`, from what each count gains and which was chosen."""
        if self.estimator == "argmax":
            return by_count * chosen
        return p * (by_count - (p * by_count).sum(-1, keepdim=True))

    def allocation(self) -> Allocation:
        return self.selection.allocation()

    def findings(self) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


class MarginalWorth:
    """Vectors as what each count is worth over how sure that is, by all that the search has seen.

    A count has the sum of its entries' worths, each times the parameters that it brings, and

        g[n] = t / T * sum_{j <= n} worth[j] / (standard error of a rank row's worth)

    in step t of T. So p goes from indifferent to what the evidence bears, and no further. Only
    differences between counts matter.

    The allocation is the one of the largest worth within the budget, by what chance does not
    explain. Where that tells modules apart, but not the curve of worth over a module's rows, its
    i-th row is taken as worth 1/i of the module: rows in proportion to worth. Where nothing is told
    apart, it is the even one.

    Args:
        selection: the vectors to set.
        steps: T.
    """

    def __init__(self, selection: SelectionVectors, steps: int) -> None:
        self.selection = selection
        self.steps = steps
        self.taken = 0
        self.evidence = Evidence(selection.space)

    @torch.no_grad()
    def step(self, draw: Draw, experts: torch.Tensor, ranks: torch.Tensor) -> None:
        """Takes in dL/dM, `experts [M, E]` and `ranks [M, E, r]`, of a draw."""
        self.taken += 1
        self.evidence.see(draw, experts, ranks)
        if self.evidence.steps < 2 or self.taken % max(1, self.steps // _UPDATES):
            return
        worths = self.evidence.worths()
        by_experts, by_ranks = self._values(worths, worths.expected())
        error = worths.error() * float(self.selection.space.sizes.row.mean())
        by_experts = torch.nn.functional.pad(by_experts.cumsum(-1), (1, 0))
        spread = float((by_experts.amax(-1) - by_experts.amin(-1)).mean())
        if error > 0 and spread > 0:
            sharpness = min(1 / error, _SHARPEST / spread) * min(1.0, self.taken / self.steps)
            self.selection.experts.copy_(sharpness * by_experts)
            self.selection.ranks.copy_(sharpness * by_ranks.cumsum(-1))

    def allocation(self) -> Allocation:
        """What the evidence so far bears."""
        space, budget = self.selection.space, self.selection.budget
        worths = self.evidence.worths()
        if not worths.told_apart and budget is not None:
            return even(space, budget)
        if not worths.curves_told_apart and budget is not None:
            scores = worths.of_modules().clamp_min(0) * space.sizes.row
            return fill(space, shared(scores, space.max_experts * space.max_rank), budget)
        by_experts, by_ranks = self._values(worths, worths.kept())
        # The worth of an expert has that of the rows that it had; here it begins with one row.
        later = (worths.trained / worths.trained[:, :1].clamp_min(1e-30))[..., 1:]
        first = by_experts - (by_ranks[..., 1:] * later).sum(-1)

        def best(price: float) -> Allocation:
            """The most worth, less the price of what it costs: the best rank of each expert, and
            then the best number of these."""
            rows = by_ranks - price * space.costs.row[:, None, None]
            rows[..., 0] = 0.0
            gains = rows.cumsum(-1).max(-1)
            each = first - price * (space.costs.row[:, None] + space.expert_costs) + gains.values
            counts = torch.nn.functional.pad(each.cumsum(-1), (1, 0)).argmax(-1)
            return space.allocation(
                [(gains.indices[m, :n] + 1).tolist() for m, n in enumerate(counts.tolist())]
            )

        if budget is None:
            return best(0.0)
        dearest = float((by_ranks.abs().amax() + first.abs().amax()) / space.costs.row.min())
        return at_budget(best, space, budget, 2 * dearest)

    def findings(self) -> dict[str, Any]:
        """Whether the data tell layers apart, by how many steps, and how likely chance is to show
        as much at each level of evidence.py."""
        worths = self.evidence.worths()
        found: dict[str, Any] = {"told_apart": worths.told_apart, "evidence_steps": worths.steps}
        for name, level in worths.levels.items():
            found[f"p_{name}"] = round(level.p_value, 4)
        return found

    def _values(self, worths: Worths, each: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Worth of each expert, with the rows it had on average, and of each row: `[M, E]` and
        `[M, E, r]`, from what a parameter is worth."""
        sizes = self.selection.space.sizes
        rows = worths.trained.sum(-1) / worths.trained[:, 0].clamp_min(1e-30)
        expert = sizes.row[:, None] * rows + self.evidence.expert_sizes
        by_ranks = each * sizes.row[:, None, None]
        by_ranks[..., 0] = 0.0
        return each[..., 0] * expert, by_ranks

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken, "evidence": self.evidence.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]
        self.evidence.load_state_dict(state["evidence"])
