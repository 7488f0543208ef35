"""How selection vectors learn: estimators against the derivative or difference they stand for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch

from guilomo_train.search.estimators import AdamSteps, MarginalWorth
from guilomo_train.search.fill import fill, shared
from guilomo_train.search.selection import (
    Draw,
    SelectionVectors,
    expected_mask,
    first_off,
    last_on,
)
from guilomo_train.search.space import SearchSpace

SPACE = SearchSpace({"a": (4, 4), "b": (4, 4)}, max_experts=4, max_rank=3, top_k=2)


def test_edges_of_a_mask() -> None:
    masks = torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 1, 1]])
    assert last_on(masks).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert first_off(masks).tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0]]


def test_argmax_gradient_reaches_the_chosen_count_alone() -> None:
    torch.manual_seed(0)
    selection = SelectionVectors(SPACE, choice="argmax", initial="random")
    draw = selection.draw(torch.Generator())
    learner = AdamSteps(selection, "argmax", learning_rate=0.1)
    learner.step(draw, torch.ones(2, 4), torch.ones(2, 4, 3))
    for gradient, count in (
        (selection.ranks.grad, draw.ranks.sum(-1)),
        (selection.experts.grad, draw.experts.sum(-1)),
    ):
        assert gradient is not None
        assert torch.equal(gradient.sum(-1), count)  # as many entries as were on, of slope 1
        assert gradient.count_nonzero() == (count > 0).sum()


def test_adam_descends_what_the_expected_masks_give() -> None:
    """Against autograd through the softmax of the counts that are allowed, and torch's Adam."""
    torch.manual_seed(0)
    selection = SelectionVectors(replace(SPACE, fewest_experts=2), initial="random")
    learner = AdamSteps(selection, "cumulative", learning_rate=0.3)
    experts, ranks = (v.detach().clone().requires_grad_() for v in selection.parameters())
    adam = torch.optim.Adam([experts, ranks], lr=0.3, betas=(0.5, 0.999))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        by_experts, by_ranks = torch.randn(2, 4), torch.randn(2, 4, 3)
        learner.step(selection.draw(generator), by_experts, by_ranks)
        allowed = experts.masked_fill(torch.arange(5) < 2, -torch.inf)
        masks = expected_mask(allowed.softmax(-1))[:, 1:], expected_mask(ranks.softmax(-1))
        adam.zero_grad()
        ((masks[0] * by_experts).sum() + (masks[1] * by_ranks).sum()).backward()
        adam.step()
    torch.testing.assert_close(selection.experts.detach(), experts.detach())
    torch.testing.assert_close(selection.ranks.detach(), ranks.detach())


class Quadratic:
    """A loss that is quadratic in each entry of a mask, and what each entry is worth in it."""

    def __init__(self, experts: int = 4, rank: int = 3) -> None:
        torch.manual_seed(1)
        self.experts = [torch.randn(2, experts) for _ in range(2)]
        self.ranks = [torch.randn(2, experts, rank) for _ in range(2)]

    def gradients(self, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        """dL/dM of `L = sum a M^2 + b M`; nonsense for the ranks of experts that are off."""
        by_experts = 2 * self.experts[0] * draw.experts + self.experts[1]
        by_ranks = 2 * self.ranks[0] * draw.ranks + self.ranks[1]
        return by_experts, torch.where(draw.experts[..., None] > 0, by_ranks, 1e6)


def test_vectors_are_what_counts_are_worth_over_how_sure_that_is() -> None:
    selection = SelectionVectors(SPACE)
    learner = MarginalWorth(selection, steps=60)
    generator = torch.Generator().manual_seed(0)
    problem = Quadratic()
    for step in range(1, 61):
        draw = selection.draw(generator)
        by_experts, by_ranks = problem.gradients(draw)
        noise = 1 + torch.randn(2, 1, generator=generator)
        learner.step(draw, by_experts * noise, by_ranks * noise[..., None])
        if step % 2:  # a search of 60 steps updates its vectors every other one
            continue
        worths = learner.evidence.worths()
        if worths.error() == 0:  # no edge was seen twice yet
            assert not selection.experts.any()
            assert step < 10
            continue
        rows = worths.trained.sum(-1) / worths.trained[:, 0].clamp_min(1e-30)
        expected = worths.expected()
        router = torch.tensor([0.0, 8.0, 4.0, 4.0])  # the second brings the first one's along
        of_expert = expected[..., 0] * (8 * rows + router)
        counts = torch.nn.functional.pad(of_expert.cumsum(-1), (1, 0))
        spread = (counts.amax(-1) - counts.amin(-1)).mean()
        sharpness = min(1 / (worths.error() * 8), 20.0 / spread.item()) * step / 60
        torch.testing.assert_close(selection.experts.detach(), (sharpness * counts).float())
        of_rows = 8 * expected
        of_rows[..., 0] = 0
        wanted = (sharpness * of_rows.cumsum(-1)).float()
        torch.testing.assert_close(selection.ranks.detach(), wanted)


def test_an_allocation_is_worth_most_of_all_that_cost_as_much() -> None:
    """Against all allocations of two modules, at budgets where a price alone decides."""
    space = SearchSpace({"a": (3, 4), "b": (6, 5)}, max_experts=2, max_rank=3, top_k=2)
    selection = SelectionVectors(space, budget=space.cost(2, 3) / 2)
    learner = MarginalWorth(selection, 300)
    problem, generator = Quadratic(2, 3), torch.Generator().manual_seed(0)
    for _ in range(300):
        draw = selection.draw(generator)
        learner.step(draw, *problem.gradients(draw))
    worths = learner.evidence.worths()
    assert worths.told_apart
    kept = worths.kept().tolist()
    on = worths.trained / worths.trained[:, :1]  # how likely a row was, where its expert was on

    def worth(module: int, ranks: tuple[int, ...], row: int, router: int) -> float:
        total = 0.0
        for e, rank in enumerate(ranks):
            # An expert's worth was measured with the rows that it had.
            total += kept[module][e][0] * (row * on[e].sum().item() + 2 * router * e)
            for j in (1, 2):
                total += kept[module][e][j] * row * ((j < rank) - on[e, j].item())
        return total

    choices = [r for n in range(3) for r in product((1, 2, 3), repeat=n)]
    known = {
        (a, b): (
            7 * sum(a) + 11 * sum(b) + 4 * len(a) * (len(a) > 1) + 5 * len(b) * (len(b) > 1),
            worth(0, a, 7, 4) + worth(1, b, 11, 5),
        )
        for a, b in product(choices, repeat=2)
    }
    seen = set()
    for price in torch.linspace(-20, 20, 61).tolist():
        cost, most = max(known.values(), key=lambda found, p=price: found[1] - p * found[0])
        seen.add(cost)
        selection.budget = cost
        found = tuple(learner.allocation().ranks.values())
        assert known[found] == (cost, pytest.approx(most))  # type: ignore[index]
    assert len(seen) > 4
    selection.budget = None
    found = tuple(learner.allocation().ranks.values())
    assert known[found][1] == pytest.approx(max(w for _, w in known.values()))  # type: ignore[index]


def test_rows_are_in_proportion_to_worth_where_modules_alone_are_told_apart() -> None:
    space = SearchSpace({f"layer.{m}": (8, 8) for m in range(6)}, max_experts=4, max_rank=4)
    selection = SelectionVectors(space, budget=space.cost(4, 4) / 3)
    learner = MarginalWorth(selection, 200)
    generator = torch.Generator().manual_seed(0)
    draws = [selection.draw(generator) for _ in range(200)]
    trained = torch.stack([(d.experts[..., None] * d.ranks).mean(0) for d in draws]).mean(0)
    worths = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 4.0])
    router = torch.tensor([0.0, 16.0, 8.0, 8.0])
    for draw in draws:
        seen = worths * (1 + torch.randn(6, generator=generator))
        by_ranks = -16 * seen[:, None, None] * trained
        sizes = 16 * draw.ranks.sum(-1) + router
        learner.step(draw, -seen[:, None] * trained[:, 0] * sizes, by_ranks)
    found = learner.evidence.worths()
    assert found.told_apart
    assert not found.curves_told_apart
    wanted = fill(space, shared(worths, 16), selection.budget)
    for rows, ranks in zip(wanted.ranks.values(), learner.allocation().ranks.values(), strict=True):
        assert abs(sum(ranks) - sum(rows)) <= 1
    assert [sum(r) for r in wanted.ranks.values()] == [1, 3, 3, 5, 8, 12]


@pytest.mark.parametrize(
    "learner_of",
    [lambda s: MarginalWorth(s, 20), lambda s: AdamSteps(s, "cumulative", 0.1)],
    ids=["marginal", "adam"],
)
def test_a_learner_goes_on_from_its_state(
    learner_of: Callable[[SelectionVectors], MarginalWorth | AdamSteps],
) -> None:
    problem = Quadratic()

    def steps(selection: SelectionVectors, learner: MarginalWorth | AdamSteps, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(20):
            draw = selection.draw(generator)
            learner.step(draw, *problem.gradients(draw))

    selection = SelectionVectors(SPACE)
    learner = learner_of(selection)
    steps(selection, learner, seed=0)
    other = SelectionVectors(SPACE)
    again = learner_of(other)
    other.load_state_dict(selection.state_dict())
    again.load_state_dict(copy.deepcopy(learner.state_dict()))  # type: ignore[arg-type]
    steps(selection, learner, seed=1)
    steps(other, again, seed=1)
    assert torch.equal(selection.experts, other.experts)
    assert torch.equal(selection.ranks, other.ranks)
    assert selection.ranks.abs().sum() > 0
