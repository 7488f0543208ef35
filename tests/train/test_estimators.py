"""How selection vectors learn: estimators against the derivative or difference they stand for."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from guilomo_train.search.estimators import (
    AdamSteps,
    MarginalWorth,
    expected_slopes,
    first_off,
    last_on,
)
from guilomo_train.search.selection import Draw, SearchSpace, SelectionVectors, expected_mask

SPACE = SearchSpace({"a": (4, 4), "b": (4, 4)}, max_experts=4, max_rank=3, top_k=2)


def test_edges_of_a_mask() -> None:
    masks = torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 1, 1]])
    assert last_on(masks).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert first_off(masks).tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0]]


def test_cumulative_gradient_is_that_of_the_expected_mask() -> None:
    torch.manual_seed(0)
    selection = SelectionVectors(SPACE, initial="random")
    upstream = torch.randn(2, 4, 3)
    learner = AdamSteps(selection, "cumulative", learning_rate=0.1)
    by_hand = torch.softmax(selection.ranks, -1)
    (expected,) = torch.autograd.grad((expected_mask(by_hand) * upstream).sum(), selection.ranks)
    draw = selection.draw(torch.Generator().manual_seed(0))
    gradient = learner._gradient(upstream, draw.ranks, draw.p_ranks)
    torch.testing.assert_close(gradient, expected)


def test_argmax_gradient_reaches_the_chosen_entry_alone() -> None:
    torch.manual_seed(0)
    selection = SelectionVectors(SPACE, choice="argmax", initial="random")
    draw = selection.draw(torch.Generator())
    learner = AdamSteps(selection, "argmax", learning_rate=0.1)
    gradient = learner._gradient(torch.ones(2, 4, 3), draw.ranks, draw.p_ranks)
    chosen = selection.ranks.argmax(-1, keepdim=True)
    assert (gradient.gather(-1, chosen).squeeze(-1) == chosen.squeeze(-1) + 1).all()
    assert gradient.count_nonzero() == chosen.numel()


def test_adam_descends_what_the_expected_masks_give() -> None:
    """Against autograd through the softmax of the counts that are allowed, and torch's Adam."""
    torch.manual_seed(0)
    selection = SelectionVectors(SPACE, initial="random")
    learner = AdamSteps(selection, "cumulative", learning_rate=0.3)
    experts, ranks = (v.detach().clone().requires_grad_() for v in selection.parameters())
    adam = torch.optim.Adam([experts, ranks], lr=0.3, betas=(0.5, 0.999))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        by_experts, by_ranks = torch.randn(2, 4), torch.randn(2, 4, 3)
        learner.step(selection.draw(generator), by_experts, by_ranks)
        allowed = experts.masked_fill(torch.tensor([True, False, False, False]), -torch.inf)
        masks = expected_mask(allowed.softmax(-1)), expected_mask(ranks.softmax(-1))
        adam.zero_grad()
        ((masks[0] * by_experts).sum() + (masks[1] * by_ranks).sum()).backward()
        adam.step()
    torch.testing.assert_close(selection.experts.detach(), experts.detach())
    torch.testing.assert_close(selection.ranks.detach(), ranks.detach())


class Quadratic:
    """A loss that is quadratic in each entry of a mask, and what each entry is worth in it."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.experts = [torch.randn(2, 4) for _ in range(2)]
        self.ranks = [torch.randn(2, 4, 3) for _ in range(2)]

    def gradients(self, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        """dL/dM of `L = sum a M^2 + b M`; nonsense for the ranks of experts that are off."""
        by_experts = 2 * self.experts[0] * draw.experts + self.experts[1]
        by_ranks = 2 * self.ranks[0] * draw.ranks + self.ranks[1]
        return by_experts, torch.where(draw.experts[..., None] > 0, by_ranks, 1e6)

    def worth(self, which: str) -> torch.Tensor:
        """L with the entry on minus L with it off: a + b."""
        a, b = getattr(self, which)
        return a + b


def learned(steps: int, until: int | None = None) -> tuple[SelectionVectors, MarginalWorth]:
    problem = Quadratic()
    selection = SelectionVectors(SPACE)
    learner = MarginalWorth(selection, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(until or steps):
        draw = selection.draw(generator)
        learner.step(draw, *problem.gradients(draw))
    return selection, learner


def test_marginal_vectors_are_proportional_to_what_counts_are_worth() -> None:
    problem = Quadratic()
    # Early in a long search, while every count is still drawn often.
    selection, _ = learned(steps=4000, until=400)
    worths = problem.worth("experts")
    worths[:, :2] = 0.0  # every count has them
    by_experts, by_ranks = worths.cumsum(-1), problem.worth("ranks").cumsum(-1)
    spread = (by_experts.amax(-1) - by_experts.amin(-1)).mean()
    sharpness = 20.0 * 400 / 4000 / spread
    near = {"rtol": 1e-3, "atol": 1e-3}  # no slopes are trusted wholly
    torch.testing.assert_close(selection.experts.detach(), -sharpness * by_experts, **near)
    # A first rank is in every count, so only differences have a meaning.
    found = selection.ranks.detach() - selection.ranks.detach()[..., :1]
    wanted = -sharpness * (by_ranks - by_ranks[..., :1])
    torch.testing.assert_close(found, wanted, **near)


def test_marginal_vectors_are_sharp_when_the_search_ends() -> None:
    selection = SelectionVectors(SPACE)
    learner = MarginalWorth(selection, steps=20)
    draw = selection.draw(torch.Generator().manual_seed(0))
    learner.step(draw, torch.zeros(2, 4), torch.zeros(2, 4, 3))  # as long as every B is 0
    assert selection.experts.abs().sum() == selection.ranks.abs().sum() == 0

    def spread() -> float:
        vectors = selection.experts.detach()
        return (vectors.amax(-1) - vectors.amin(-1)).mean().item()

    for step in range(2, 25):
        draw = selection.draw(torch.Generator().manual_seed(step))
        learner.step(draw, *Quadratic().gradients(draw))
        # More steps than were announced make nothing sharper.
        assert spread() == pytest.approx(min(step, 20))


def slopes_seen(worths: torch.Tensor, seen: torch.Tensor, noise: float) -> torch.Tensor:
    """Counts, sums and squares `[3, 2, M, ...]`, of `seen` noisy slopes at each entry."""
    counts, sums, squares = (torch.zeros_like(worths) for _ in range(3))
    for number in range(int(seen.max())):
        slopes = worths + noise * torch.randn_like(worths)
        there = (seen > number).to(worths)
        counts += there
        sums += there * slopes
        squares += there * slopes.square()
    return torch.stack([counts, sums, squares])


def test_expected_slopes_by_hand() -> None:
    """Module by module and entry by entry in plain numbers: two levels, an edge of one entry."""
    torch.manual_seed(0)
    worths = torch.randn(2, 3, 4, dtype=torch.float64)
    slopes = slopes_seen(worths, torch.randint(0, 5, (2, 3, 4)), 0.5)
    found = expected_slopes(slopes, groups=[(-1,)])
    counts, sums, squares = slopes

    edges, modules, entries = range(2), range(3), range(4)
    unit, variance = {}, {}
    for m in modules:
        n = counts[:, m].sum().item()
        unit[m] = (squares[:, m].sum().item() / n) ** 0.5
        # Squares about each entry's own mean.
        about = sum(
            (squares[d, m, j] - sums[d, m, j] ** 2 / counts[d, m, j]).item()
            for d in edges
            for j in entries
            if counts[d, m, j]
        )
        repeated = n - counts[:, m].count_nonzero().item()
        variance[m] = (about / unit[m] ** 2 + 1) / (repeated + 1)
    n = {(d, m, j): counts[d, m, j].item() for d in edges for m in modules for j in entries}
    mean = {k: sums[k].item() / n[k] / unit[k[1]] if n[k] else 0.0 for k in n}
    expected = {}
    for d, m, j in n:
        weight = sum(n[d, i, j] for i in modules)
        expected[d, m, j] = sum(n[d, i, j] * mean[d, i, j] for i in modules) / weight
    for group_of in (lambda d, m, j: (d, m), lambda d, m, j: (d, m, j)):
        sizes: dict[tuple[int, ...], float] = {}
        left: dict[tuple[int, ...], float] = {}
        for k in n:
            group = group_of(*k)
            sizes[group] = sizes.get(group, 0.0) + n[k]
            left[group] = left.get(group, 0.0) + n[k] * (mean[k] - expected[k])
        excess = sum(left[g] ** 2 / sizes[g] - variance[g[1]] for g in sizes if sizes[g])
        rho = max(0.0, excess / sum(sizes.values()))
        for k in n:
            g = group_of(*k)
            if sizes[g]:
                share = rho * sizes[g] / (variance[k[1]] + rho * sizes[g])
                expected[k] += share * left[g] / sizes[g]
    for k in n:
        assert found[k].item() == pytest.approx(expected[k] * unit[k[1]], rel=1e-9)


def test_expected_slopes_are_nearer_to_the_truth_than_means() -> None:
    """Modules whose slopes differ in size; many slopes an entry, then two."""
    torch.manual_seed(0)
    size = torch.rand(60, 1, 1) * 3 + 0.3
    alike = -torch.arange(4.0, 0, -1)  # rows are worth less and less, everywhere
    of_module, of_entry = torch.randn(60, 1, 1), torch.randn(60, 5, 4)
    worths = (size * (alike + of_module + 0.3 * of_entry) * 0.1).expand(2, -1, -1, -1)
    many = slopes_seen(worths, torch.full(worths.shape, 400), noise=0.01)
    found = expected_slopes(many, groups=[(-2, -1), (-1,)])
    torch.testing.assert_close(found, worths, rtol=1e-2, atol=3e-3)

    two = slopes_seen(worths, torch.full(worths.shape, 2), noise=1.0)
    found = expected_slopes(two, groups=[(-2, -1), (-1,)])
    counts, sums, _ = two

    def error(guess: torch.Tensor) -> float:
        return (guess - worths).square().mean().item()

    only_alike = (sums / counts).mean((1, 2), keepdim=True).expand_as(worths)
    assert error(found) < 0.1 * error(sums / counts)
    assert error(found) < 0.7 * error(only_alike)


def test_marginal_search_ends_at_the_best_counts() -> None:
    problem = Quadratic()
    selection, _ = learned(steps=400)
    best_experts = problem.worth("experts")[:, 2:].cumsum(-1)
    ranks = problem.worth("ranks")[..., 1:].cumsum(-1)
    for m, found in enumerate(selection.allocation().ranks.values()):
        gains = [0.0, *best_experts[m].tolist()]
        assert gains[len(found) - 2] == min(gains)
        for e, rank in enumerate(found):
            gains = [0.0, *ranks[m, e].tolist()]
            assert gains[rank - 1] == min(gains)


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
        for _ in range(10):
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
