"""Selection vectors: what they draw, how a price keeps them to a budget, what is read off."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from guilomo_train.errors import ConfigError
from guilomo_train.search.selection import SelectionVectors, expected_mask
from guilomo_train.search.space import SearchSpace, latency_prices

SHAPES = {"small": (4, 4), "large": (8, 16)}
LINEARS = {"a": (5, 7), "b": (11, 3)}
SPACE = SearchSpace(LINEARS, max_experts=4, max_rank=3, top_k=2)


def vectors(space: SearchSpace = SPACE, **kwargs: object) -> SelectionVectors:
    torch.manual_seed(0)
    return SelectionVectors(space, initial="random", **kwargs)  # type: ignore[arg-type]


def many_modules() -> SearchSpace:
    shapes = {f"m{i}": (16 + i % 5, 8 + i % 3) for i in range(40)}
    return SearchSpace(shapes, max_experts=8, max_rank=8, top_k=2)


def test_the_allocation_is_the_most_likely_count_of_each_vector() -> None:
    selection = vectors()
    with torch.no_grad():
        selection.experts.copy_(torch.tensor([[9.0, 0, 0, 1, 0], [0, 9.0, 0, 0, 10]]))
    allocation = selection.allocation()
    ranks = (selection.ranks.argmax(-1) + 1).tolist()
    assert allocation.ranks == {"a": (), "b": tuple(ranks[1])}
    # Where the space rules counts out they cannot be chosen, however likely: three is the next.
    selection.space = replace(SPACE, fewest_experts=2)
    assert selection.allocation().ranks == {"a": tuple(ranks[0][:3]), "b": tuple(ranks[1])}


def test_hard_masks_keep_the_first_of_the_chosen_count() -> None:
    selection = vectors(choice="argmax")
    draw = selection.draw(torch.Generator())
    for m, (module, chosen) in enumerate(selection.allocation().ranks.items()):
        assert list(SPACE.linears)[m] == module
        assert draw.experts[m].tolist() == [1.0] * len(chosen) + [0.0] * (4 - len(chosen))
        for e, rank in enumerate(chosen):
            assert draw.ranks[m, e].tolist() == [1.0] * rank + [0.0] * (3 - rank)


@pytest.mark.parametrize("budget", [None, 130])
def test_sampled_counts_follow_p_and_repeat_with_the_seed(budget: int | None) -> None:
    selection = vectors(budget=budget)
    generator = torch.Generator().manual_seed(7)
    draws = [selection.draw(generator) for _ in range(300)]
    for drawn, p in zip(("experts", "ranks"), selection.probabilities(), strict=True):
        frequency = torch.stack([getattr(draw, drawn) for draw in draws]).mean(0)
        expected = expected_mask(p)
        if drawn == "experts":  # of which a count may be 0, and has no entry then
            expected = expected[:, 1:]
        torch.testing.assert_close(frequency, expected, rtol=0, atol=0.1)

        assert torch.equal(getattr(draws[0], f"p_{drawn}"), p)

    repeated = selection.draw(torch.Generator().manual_seed(7))
    assert torch.equal(repeated.ranks, draws[0].ranks)
    assert torch.equal(repeated.experts, draws[0].experts)


def test_a_sampled_count_is_as_likely_as_its_softmax_says() -> None:
    """The other counts are many and alike: noise with another tail would favour them or the one."""
    selection = SelectionVectors(many_modules())
    with torch.no_grad():
        selection.ranks[..., 0] = torch.log(torch.tensor(7.0))  # as likely as the seven others
    generator = torch.Generator().manual_seed(0)
    first = [selection.draw(generator).ranks.sum(-1) == 1 for _ in range(20)]
    assert torch.stack(first).double().mean().item() == pytest.approx(0.5, abs=0.02)


def test_a_price_multiplies_the_probability_of_each_allocation_by_its_size() -> None:
    """Against all allocations of a module, one by one."""
    space = SearchSpace({"a": (5, 7)}, max_experts=3, max_rank=2, top_k=1)
    selection = vectors(space, budget=50)
    p_experts = torch.softmax(selection.experts[0].detach().double(), -1)
    p_ranks = torch.softmax(selection.ranks[0].detach().double(), -1)

    def distribution(price: float) -> dict[tuple[int, ...], float]:
        weights = {}
        for count in range(4):
            for ranks in product((1, 2), repeat=count):
                prior = p_experts[count].item()
                for e, r in enumerate(ranks):
                    prior *= p_ranks[e, r - 1].item()
                size = 12 * sum(ranks) + (7 * count if count > 1 else 0)
                weights[ranks] = prior * 2.718281828459045 ** (-price * size)
        total = sum(weights.values())
        return {ranks: weight / total for ranks, weight in weights.items()}

    def size(p: dict[tuple[int, ...], float]) -> float:
        return sum(
            q * (12 * sum(ranks) + (7 * len(ranks) if len(ranks) > 1 else 0))
            for ranks, q in p.items()
        )

    low, high = -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if size(distribution(middle)) > 50 else (low, middle)
    expected = distribution(high)
    found_experts, found_ranks = selection.probabilities()
    for count in range(4):
        q = sum(v for ranks, v in expected.items() if len(ranks) == count)
        assert found_experts[0, count].item() == pytest.approx(q, rel=1e-4)
    for e in range(3):
        there = {ranks: v for ranks, v in expected.items() if len(ranks) > e}
        q = sum(v for ranks, v in there.items() if ranks[e] == 2) / sum(there.values())
        assert found_ranks[0, e, 1].item() == pytest.approx(q, rel=1e-4)


@pytest.mark.parametrize("initial", ["uniform", "random", "full"])
@pytest.mark.parametrize("share", [0.15, 0.5, 0.9])
def test_draws_and_allocation_keep_to_the_budget(initial: str, share: float) -> None:
    space = many_modules()
    budget = round(space.cost(8, 8) * share)
    torch.manual_seed(0)
    selection = SelectionVectors(space, initial=initial, budget=budget)  # type: ignore[arg-type]
    assert selection.expected_cost() == pytest.approx(budget, rel=1e-3)
    allocation = selection.allocation()
    # Within the largest row, even where all vectors are alike and tip over at one price.
    assert 0 <= budget - allocation.parameters(space.linears) < 16 + 4 + 8 + 2
    assert all(len(r) <= 8 and all(1 <= x <= 8 for x in r) for r in allocation.ranks.values())


def test_draws_narrow_from_the_whole_space_to_the_budget() -> None:
    space = many_modules()
    whole = SelectionVectors(space).expected_cost()
    for budget in (whole / 25, whole * 1.5):
        selection = SelectionVectors(space, budget=budget)
        found = selection.allocation()
        widest = max(whole, budget)
        for progress, cost in ((0.0, widest), (0.5, (widest * budget) ** 0.5), (1.0, budget)):
            selection.narrow(progress)
            assert selection.expected_cost() == pytest.approx(cost, rel=1e-3)
            assert selection.allocation() == found
    unbounded = SelectionVectors(space)
    unbounded.narrow(1.0)
    assert unbounded.expected_cost() == whole


def test_what_is_left_of_the_budget_goes_to_the_vectors_that_tip_over_next() -> None:
    space = SearchSpace({"decided": (4, 4), "open": (4, 4)}, max_experts=2, max_rank=4, top_k=2)
    budget = 2 * (2 * 4) + (2 + 5) * 8  # routers, and rank rows: two and five
    selection = SelectionVectors(space, budget=budget)
    with torch.no_grad():
        selection.ranks[0, :, 0] = 1000.0
    assert selection.allocation().ranks == {"decided": (1, 1), "open": (4, 1)}


def test_vectors_that_are_all_alike_share_the_budget_evenly() -> None:
    space = SearchSpace({f"layer.{m}": (4, 4) for m in range(12)}, max_experts=8, max_rank=8)
    allocation = SelectionVectors(space, budget=space.cost(8, 8) // 3).allocation()
    sizes = [sum(ranks) for ranks in allocation.ranks.values()]
    assert max(sizes) - min(sizes) <= 1


def test_without_a_budget_size_has_no_price() -> None:
    selection = SelectionVectors(many_modules(), initial="full")
    assert selection.allocation().total_rank == 40 * 8 * 8
    uniform = SelectionVectors(many_modules())
    # Counts from 0 to 8 and ranks from 1 to 8, all equally likely.
    assert uniform.expected_total_rank() == pytest.approx(40 * 4 * 4.5)


def test_a_budget_in_seconds_follows_the_prices_of_serving(tmp_path: Path) -> None:
    """What is dear to have at all is left out first, though it has the fewest parameters."""
    prices = {"4x4": {"present": 9e-6, "row": 1e-6, "router": 5e-7}}
    prices["8x16"] = {"present": 1e-6, "row": 1e-6, "router": 5e-7}
    (tmp_path / "prices.json").write_text(json.dumps({"result": {"shapes": prices}}))
    linears = {f"{kind}{i}": shape for i in range(6) for kind, shape in SHAPES.items()}
    space = SearchSpace(linears, 4, 4, prices=latency_prices(linears, tmp_path / "prices.json"))
    assert space.cost(1, 2) == pytest.approx(6 * (9e-6 + 1e-6 + 2 * 2e-6))
    assert space.cost(3, 2) == pytest.approx(6 * (10e-6 + 2 * 6e-6 + 2 * 1.5e-6))
    selection = SelectionVectors(space, budget=space.cost(4, 4) / 4)
    assert selection.expected_cost() == pytest.approx(space.cost(4, 4) / 4, rel=1e-3)
    absent = selection.probabilities()[0][:, 0]
    assert absent[0::2].min() > absent[1::2].max()
    found = selection.allocation()
    assert space.costs.cost(found) <= space.cost(4, 4) / 4
    assert found.total_experts > 0

    del prices["8x16"]
    (tmp_path / "prices.json").write_text(json.dumps({"result": {"shapes": prices}}))
    with pytest.raises(ConfigError, match="has no prices of 8x16, the shape of large0"):
        latency_prices(linears, tmp_path / "prices.json")
    with pytest.raises(ConfigError, match=r"prices .*: no result of benchmarks/serving_prices"):
        latency_prices(linears, tmp_path / "none.json")
