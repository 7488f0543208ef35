"""Selection vectors: what a search chooses from, and how it draws and reads off its choices.

Each module has a vector `g_E [E + 1]` over counts of experts, from none to E, and, for each
expert, a vector `g_R [r]` over ranks (GuiLoMo, arXiv 2506.14646, whose counts begin at top_k).
With `p = softmax(g)` a count is drawn and applied as the mask `M[j] = 1 if j <= count`. How the
vectors learn stands in estimators.py.

**Budget.** A search has a size to keep: the cost of the adapter, in parameters or seconds
(space.py). Of all distributions that expect this cost, the one nearest to p (in relative entropy)
multiplies each allocation's probability by `exp(-price * its cost)`, with the one price at which
the cost is right, and an allocation of that cost is read off the same way. Draws begin with what
the vectors choose without a price and narrow down to the budget (`narrow`): at a small one hardly
any row is on in a step, and rows that are seldom on together learn nothing. For a module whose
rank row costs c and whose expert e costs d_e beside its rows,

    g_R'[r] = log p_R[r] - price c r
    g_E'[n] = log p_E[n] + sum_{e <= n} (log sum_r exp g_R'[e, r] - price d_e)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from guilomo_train.search.allocation import Allocation
from guilomo_train.search.space import SearchSpace

Choice = Literal["sample", "argmax"]
Initial = Literal["uniform", "random", "full"]

_BISECTIONS = 45
# Nats that separate one rank row from the next at the largest price looked at: more decides
# nothing, since e^-50 is never drawn.
_LARGEST_STEP = 50.0


@dataclass(frozen=True)
class Draw:
    """The masks of one step, of all modules, and the distributions that they were drawn from.

    The masks `experts` and `ranks` are `[M, E]` and `[M, E, r]`; `p_experts`, of no expert, one and
    so on, is `[M, E + 1]` and `p_ranks` `[M, E, r]`.
    """

    experts: torch.Tensor
    ranks: torch.Tensor
    p_experts: torch.Tensor
    p_ranks: torch.Tensor


class SelectionVectors(nn.Module):
    """The selection vectors of all modules: `experts [M, E + 1]` and `ranks [M, E, r]`.

    They stay on the CPU, wherever the model is: they are small, and a seed means the same
    everywhere.

    Args:
        space: what can be chosen.
        choice: `sample` draws counts from p in each step (Gumbel-max); `argmax` takes the most
            likely count.
        initial: `uniform` makes every count equally likely; `random` draws the vectors from a
            normal distribution, as the authors' release does; `full` prefers the largest counts.
        budget: the cost to keep to; None for no price on it.
    """

    def __init__(
        self,
        space: SearchSpace,
        choice: Choice = "sample",
        initial: Initial = "uniform",
        budget: float | None = None,
    ) -> None:
        super().__init__()
        self.space = space
        self.choice = choice
        self.budget = budget
        self.drawn_budget = budget  # the cost of draws
        modules = len(space.linears)
        self.experts = nn.Parameter(torch.zeros(modules, space.max_experts + 1))
        self.ranks = nn.Parameter(torch.zeros(modules, space.max_experts, space.max_rank))
        if initial == "random":
            nn.init.normal_(self.experts)
            nn.init.normal_(self.ranks)
        elif initial == "full":
            with torch.no_grad():
                self.experts[:, -1] = self.ranks[..., -1] = 1.0
        self._widest = self._expected_cost(0.0)

    def narrow(self, progress: float) -> None:
        """Sets what draws cost, in equal ratios from the whole space (0) to the budget (1)."""
        if self.budget is not None:
            widest = max(self._widest, self.budget)
            self.drawn_budget = widest * (self.budget / widest) ** progress

    @torch.no_grad()
    def probabilities(self) -> tuple[torch.Tensor, torch.Tensor]:
        """p of all vectors as they are drawn now: `[M, E + 1]` and `[M, E, r]`."""
        return self._probabilities(*self._at_budget())

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> Draw:
        """The masks of one step."""
        priced = self._at_budget()
        p = self._probabilities(*priced)
        experts, ranks = (self._choose(logits, generator) for logits in priced)
        rows = torch.arange(self.space.max_rank) <= ranks[..., None]
        there = torch.arange(self.space.max_experts) < experts[:, None]
        return Draw(there.to(self.experts), rows.to(self.ranks), *p)

    def _choose(self, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if self.choice == "sample":
            uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
            logits = logits - (-uniform.clamp_min(1e-20).log()).log()
        return logits.argmax(-1)

    @torch.no_grad()
    def allocation(self) -> Allocation:
        """The most likely count of each vector at the price that gives the budget's size."""
        if self.budget is None:
            return self._most_likely(0.0)
        return at_budget(self._most_likely, self.space, self.budget, self._price_limit)

    @torch.no_grad()
    def expected_cost(self) -> float:
        """What a draw costs in expectation."""
        return self._expected_cost(self._price())

    @torch.no_grad()
    def expected_total_rank(self) -> float:
        """Rank rows of all modules in expectation under p: what the search leans to."""
        p_experts, p_ranks = self.probabilities()
        on = expected_mask(p_experts)[:, 1:]
        return float((on * expected_mask(p_ranks).sum(-1)).sum())

    @property
    def _price_limit(self) -> float:
        return _LARGEST_STEP / float(self.space.costs.row.min())

    def _price(self) -> float:
        if self.drawn_budget is None:
            return 0.0
        return lowest_price(self._expected_cost, self.drawn_budget, self._price_limit)

    def _at_budget(self) -> tuple[torch.Tensor, torch.Tensor]:
        """g' at the price that gives draws their cost."""
        return self._priced(self._price())

    def _probabilities(
        self, experts: torch.Tensor, ranks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """p of g', in the vectors' precision."""
        return experts.softmax(-1).to(self.experts), ranks.softmax(-1).to(self.ranks)

    def _priced(self, price: float) -> tuple[torch.Tensor, torch.Tensor]:
        """g' of the head of this file, float64; counts that the space rules out have none."""
        rank = torch.arange(1, self.space.max_rank + 1)
        ranks = torch.log_softmax(self.ranks.detach().double(), -1)
        ranks = ranks - price * self.space.costs.row[:, None, None] * rank
        each = ranks.logsumexp(-1) - price * self.space.expert_costs
        experts = torch.log_softmax(self.experts.detach().double(), -1)
        experts = experts + nn.functional.pad(each.cumsum(-1), (1, 0))
        count = torch.arange(self.space.max_experts + 1)
        return experts.masked_fill(count < self.space.fewest_experts, -torch.inf), ranks

    def _expected_cost(self, price: float) -> float:
        experts, ranks = (logits.softmax(-1) for logits in self._priced(price))
        on = expected_mask(experts)[:, 1:]
        rows = (on * expected_mask(ranks).sum(-1)).sum(-1)
        return float((rows * self.space.costs.row).sum() + (on * self.space.expert_costs).sum())

    def _most_likely(self, price: float) -> Allocation:
        experts, ranks = (logits.argmax(-1) for logits in self._priced(price))
        return self.space.allocation(
            [(ranks[m, :count] + 1).tolist() for m, count in enumerate(experts.tolist())]
        )


def lowest_price(cost: Callable[[float], float], budget: float, limit: float) -> float:
    """The smallest price in +- `limit` at which `cost(price)`, which falls, is in the budget."""
    low, high = -limit, limit
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if cost(middle) > budget:
            low = middle
        else:
            high = middle
    return high


def at_budget(
    best: Callable[[float], Allocation], space: SearchSpace, budget: float, limit: float
) -> Allocation:
    """An allocation that costs what the budget allows, within one rank row.

    No price may give it exactly. Then the best allocation at the next price that stays below is
    filled up towards that at the next one above, by single rank rows, one to each module in turn.

    Args:
        best: the allocation that is best at a price; it costs less where the price is higher.
        space, budget: what to keep to.
        limit: of the prices that are looked at.
    """
    price = lowest_price(lambda p: space.costs.cost(best(p)), budget, limit)
    below, above = best(price), best(price - 2 * limit / 2**_BISECTIONS)
    left = budget - space.costs.cost(below)
    filled = [list(ranks) for ranks in below.ranks.values()]
    wanted = list(above.ranks.values())
    row, expert_costs = space.costs.row.tolist(), space.expert_costs.tolist()
    grew = True
    while grew:
        grew = False
        for m, ranks in enumerate(filled):
            expert = next((e for e, r in enumerate(ranks) if r < wanted[m][e]), len(ranks))
            new = expert == len(ranks)
            if expert >= len(wanted[m]):
                continue
            cost = row[m] + (expert_costs[m][expert] if new else 0.0)
            if cost <= left:
                if new:
                    ranks.append(0)
                ranks[expert] += 1
                left -= cost
                grew = True
    return space.allocation(filled)


def expected_mask(p: torch.Tensor) -> torch.Tensor:
    """`m[j] = sum_{n >= j} p[n]`: the mask of a count drawn from p, in expectation."""
    return p.flip(-1).cumsum(-1).flip(-1)


def last_on(mask: torch.Tensor) -> torch.Tensor:
    """1 at the last entry that is 1 of hard masks `[..., n]`, 0 elsewhere."""
    return mask - nn.functional.pad(mask[..., 1:], (0, 1))


def first_off(mask: torch.Tensor) -> torch.Tensor:
    """1 at the first entry that is 0 of hard masks `[..., n]`, 0 elsewhere."""
    return nn.functional.pad(mask[..., :-1], (1, 0), value=1.0) - mask
