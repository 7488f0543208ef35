"""Selection vectors: what a search chooses from, and how it draws and reads off its choices.

Each module has a vector `g_E [E]` over counts of experts and, for each expert, a vector `g_R [r]`
over ranks (GuiLoMo, arXiv 2506.14646). With `p = softmax(g)`, entry n - 1 is the probability of
the count n; a count n is applied as the mask `M[j] = 1 if j <= n`. How the vectors learn stands in
estimators.py.

**Budget.** A search has a size to keep: the number of adapter parameters. Of all distributions
that expect this size, the one nearest to p (in relative entropy) multiplies each allocation's
probability by `exp(-price * its parameters)`, with the one price at which the size is right. So
every draw is at the budget from the first step on, and an allocation of that size is read off the
same way. For a module whose rank row costs c and whose router costs d an expert,

    g_R'[r] = log p_R[r] - price c r
    g_E'[n] = g_E[n] + sum_{e <= n} log sum_r exp g_R'[e, r] - price d n
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from guilomo_train.search.allocation import Allocation

Choice = Literal["sample", "argmax"]
Initial = Literal["uniform", "random", "full"]

_BISECTIONS = 50
# Nats that separate one rank row from the next at the largest price looked at: more decides
# nothing, since e^-50 is never drawn.
_LARGEST_STEP = 50.0


@dataclass(frozen=True)
class SearchSpace:
    """What can be chosen: up to `max_experts` (at least `top_k`) of ranks up to `max_rank`.

    `linears` has the (out, in) features of each module, by its full name.
    """

    linears: Mapping[str, tuple[int, int]]
    max_experts: int = 8
    max_rank: int = 8
    top_k: int = 2

    @property
    def fewest_experts(self) -> int:
        """A token needs `top_k` experts to choose from."""
        return min(self.top_k, self.max_experts)

    def parameters(self, experts: int, rank: int) -> int:
        """Parameters of an adapter with so many experts of such rank in each module."""
        ranks = dict.fromkeys(self.linears, (rank,) * experts)
        return Allocation(ranks, self.top_k, self.max_rank).parameters(self.linears)


@dataclass(frozen=True)
class Draw:
    """The masks of one step, of all modules, and the distributions that they were drawn from.

    `experts` and `p_experts` are `[M, E]`, `ranks` and `p_ranks` are `[M, E, r]`.
    """

    experts: torch.Tensor
    ranks: torch.Tensor
    p_experts: torch.Tensor
    p_ranks: torch.Tensor


class SelectionVectors(nn.Module):
    """The selection vectors of all modules: `experts [M, E]` and `ranks [M, E, r]`.

    They stay on the CPU, wherever the model is: they are small, and a seed means the same
    everywhere.

    Args:
        space: what can be chosen.
        choice: `sample` draws counts from p in each step (Gumbel-max); `argmax` takes the most
            likely count.
        initial: `uniform` makes every count equally likely; `random` draws the vectors from a
            normal distribution, as the authors' release does; `full` prefers the largest counts.
        budget: parameters to keep to; None for no price on size.
    """

    def __init__(
        self,
        space: SearchSpace,
        choice: Choice = "sample",
        initial: Initial = "uniform",
        budget: int | None = None,
    ) -> None:
        super().__init__()
        self.space = space
        self.choice = choice
        self.budget = budget
        shape = (len(space.linears), space.max_experts)
        self.experts = nn.Parameter(torch.zeros(shape))
        self.ranks = nn.Parameter(torch.zeros(*shape, space.max_rank))
        if initial == "random":
            nn.init.normal_(self.experts)
            nn.init.normal_(self.ranks)
        elif initial == "full":
            with torch.no_grad():
                self.experts[:, -1] = self.ranks[..., -1] = 1.0
        sizes = torch.tensor(list(space.linears.values()), dtype=torch.float64)
        self._row_cost = sizes.sum(-1)  # [M]: a row of A and a column of B
        self._router_cost = sizes[:, 1]  # [M]

    @torch.no_grad()
    def probabilities(self) -> tuple[torch.Tensor, torch.Tensor]:
        """p of all vectors at the budget: `[M, E]` and `[M, E, r]`."""
        return self._probabilities(*self._at_budget())

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> Draw:
        """The masks of one step."""
        priced = self._at_budget()
        p = self._probabilities(*priced)
        chosen = []
        for logits in priced:
            if self.choice == "sample":
                uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
                logits = logits - (-uniform.clamp_min(1e-20).log()).log()
            last = logits.argmax(-1, keepdim=True)
            chosen.append((torch.arange(logits.shape[-1]) <= last).to(self.experts))
        return Draw(chosen[0], chosen[1], *p)

    @torch.no_grad()
    def allocation(self) -> Allocation:
        """The most likely count of each vector at the price that gives the budget's size.

        No price may give it exactly. Then the allocation at the next price that stays below is
        filled up towards that at the next one above, by single rank rows.
        """
        if self.budget is None:
            return self._most_likely(0.0)
        price = self._price(lambda p: self._most_likely(p).parameters(self.space.linears))
        return self._filled(self._most_likely(price), self._most_likely(price - self._price_grain))

    def expected_parameters(self) -> int:
        """Parameters of an adapter in expectation under p."""
        return round(self._expected_parameters(self._price(self._expected_parameters)))

    @torch.no_grad()
    def expected_total_rank(self) -> float:
        """Rank rows of all modules in expectation under p: what the search leans to."""
        p_experts, p_ranks = self.probabilities()
        return float((expected_mask(p_experts) * expected_mask(p_ranks).sum(-1)).sum())

    @property
    def _price_limit(self) -> float:
        return _LARGEST_STEP / float(self._row_cost.min())

    @property
    def _price_grain(self) -> float:
        return 2 * self._price_limit / 2**_BISECTIONS

    def _price(self, parameters: Callable[[float], float]) -> float:
        """The smallest price at which `parameters(price)`, which falls, is within the budget."""
        if self.budget is None:
            return 0.0
        low, high = -self._price_limit, self._price_limit
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if parameters(middle) > self.budget:
                low = middle
            else:
                high = middle
        return high

    def _at_budget(self) -> tuple[torch.Tensor, torch.Tensor]:
        """g' at the price that the budget sets on p."""
        return self._priced(self._price(self._expected_parameters))

    def _probabilities(
        self, experts: torch.Tensor, ranks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """p of g', in the vectors' precision."""
        return experts.softmax(-1).to(self.experts), ranks.softmax(-1).to(self.ranks)

    def _priced(self, price: float) -> tuple[torch.Tensor, torch.Tensor]:
        """g' of the head of this file, float64; counts of experts below `top_k` are ruled out."""
        rank = torch.arange(1, self.space.max_rank + 1)
        count = torch.arange(1, self.space.max_experts + 1)
        ranks = torch.log_softmax(self.ranks.detach().double(), -1)
        ranks = ranks - price * self._row_cost[:, None, None] * rank
        routers = torch.where(count > 1, count, 0)  # one expert needs no router
        experts = self.experts.detach().double() + ranks.logsumexp(-1).cumsum(-1)
        experts = experts - price * self._router_cost[:, None] * routers
        return experts.masked_fill(count < self.space.fewest_experts, -torch.inf), ranks

    def _expected_parameters(self, price: float) -> float:
        experts, ranks = (logits.softmax(-1) for logits in self._priced(price))
        rows = (expected_mask(experts) * expected_mask(ranks).sum(-1)).sum(-1)
        count = torch.arange(1, self.space.max_experts + 1)
        routers = (experts * torch.where(count > 1, count, 0)).sum(-1)
        return float((rows * self._row_cost + routers * self._router_cost).sum())

    def _most_likely(self, price: float) -> Allocation:
        experts, ranks = (logits.argmax(-1) + 1 for logits in self._priced(price))
        return self._allocation(
            [ranks[m, :count].tolist() for m, count in enumerate(experts.tolist())]
        )

    def _filled(self, below: Allocation, above: Allocation) -> Allocation:
        """`below` with rows of `above` added, one to each module in turn, while budget is left."""
        assert self.budget is not None
        left = self.budget - below.parameters(self.space.linears)
        filled = {module: list(ranks) for module, ranks in below.ranks.items()}
        grew = True
        while grew:
            grew = False
            for module, wanted in above.ranks.items():
                ranks, (out_features, in_features) = filled[module], self.space.linears[module]
                expert = next((e for e, r in enumerate(ranks) if r < wanted[e]), len(ranks))
                new = expert == len(ranks)
                cost = out_features + in_features + (in_features if new else 0)  # a router row
                if expert < len(wanted) and cost <= left:
                    if new:
                        ranks.append(0)
                    ranks[expert] += 1
                    left -= cost
                    grew = True
        return self._allocation(list(filled.values()))

    def _allocation(self, ranks: list[list[int]]) -> Allocation:
        modules = zip(self.space.linears, map(tuple, ranks), strict=True)
        return Allocation(dict(modules), self.space.top_k, self.space.max_rank)


def expected_mask(p: torch.Tensor) -> torch.Tensor:
    """`m[j] = sum_{n >= j} p[n]`: the mask of a count drawn from p, in expectation."""
    return p.flip(-1).cumsum(-1).flip(-1)
