"""Selection vectors: what they choose and how the gradient passes the choice."""

from __future__ import annotations

import pytest
import torch

from guilomo_train.search.selection import Noise, SearchSpace, SelectionVectors

SPACE = SearchSpace(modules=("a", "b"), max_experts=4, max_rank=3, top_k=2)


def no_noise() -> Noise:
    return Noise(torch.zeros(2, 4), torch.zeros(2, 4, 3))


def vectors(**kwargs: object) -> SelectionVectors:
    torch.manual_seed(0)
    selection = SelectionVectors(SPACE, **kwargs).double()  # type: ignore[arg-type]
    torch.nn.init.normal_(selection.experts)
    torch.nn.init.normal_(selection.ranks)
    return selection


def test_the_allocation_is_the_most_likely_count_of_each_vector() -> None:
    selection = vectors()
    with torch.no_grad():
        selection.experts.copy_(torch.tensor([[9.0, 0, 1, 0], [0, 0, 0, 5]]))
    allocation = selection.allocation()
    ranks = (selection.ranks.argmax(-1) + 1).tolist()
    # One expert is fewer than top_k and cannot be chosen, however likely: three is the next.
    assert allocation.ranks == {"a": tuple(ranks[0][:3]), "b": tuple(ranks[1])}


def test_hard_masks_keep_the_first_of_the_chosen_count() -> None:
    selection = vectors(choice="argmax")
    experts, ranks = selection.masks(no_noise())
    for m, module in enumerate(SPACE.modules):
        chosen = selection.allocation().ranks[module]
        assert experts[m].tolist() == [1.0] * len(chosen) + [0.0] * (4 - len(chosen))
        for e, rank in enumerate(chosen):
            assert ranks[m, e].tolist() == [1.0] * rank + [0.0] * (3 - rank)


def test_cumulative_gradient_of_a_count_is_the_sum_over_the_entries_it_switches_on() -> None:
    selection = vectors(choice="argmax")
    upstream = torch.randn(2, 4, 3, dtype=torch.float64)
    masks = selection.masks(no_noise())[1]
    (gradient,) = torch.autograd.grad((masks * upstream).sum(), selection.ranks)
    p = torch.softmax(selection.ranks, -1)
    by_count = upstream.cumsum(-1)  # dL/dp[n] = sum_{j <= n} dL/dM[j]
    expected = p * (by_count - (p * by_count).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient, expected)


def test_argmax_gradient_reaches_the_chosen_entry_alone() -> None:
    selection = vectors(estimator="argmax", choice="argmax")
    (gradient,) = torch.autograd.grad(selection.masks(no_noise())[1].sum(), selection.ranks)
    chosen = selection.ranks.argmax(-1, keepdim=True)
    assert (gradient.gather(-1, chosen).squeeze(-1) == chosen.squeeze(-1) + 1).all()
    assert gradient.count_nonzero() == chosen.numel()


def test_sampled_counts_follow_softmax_and_repeat_with_the_seed() -> None:
    selection = vectors()
    generator = torch.Generator().manual_seed(7)
    draws = [selection.masks(selection.noise(generator))[1].detach() for _ in range(4000)]
    frequency = torch.stack(draws).mean(0)
    expected = torch.softmax(selection.ranks, -1).flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(frequency, expected, rtol=0, atol=0.04)

    again = torch.Generator().manual_seed(7)
    repeated = selection.masks(selection.noise(again))[1]
    assert torch.equal(repeated, draws[0])


def test_expected_rank_counts_rows_of_experts_that_exist() -> None:
    selection = vectors()
    with torch.no_grad():
        selection.experts.copy_(torch.tensor([[0.0, 80, 0, 0], [0, 0, 0, 80]]))
        selection.ranks.copy_(torch.tensor([0.0, 80, 0]).expand(2, 4, 3))
    assert selection.expected_total_rank() == pytest.approx(2 * 2 + 4 * 2)
