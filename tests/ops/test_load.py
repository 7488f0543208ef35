"""Counts of routers' choices are those of a loop over tokens."""

from __future__ import annotations

import math

import pytest
import torch

from guilomo_serve.ops.load import router_load
from guilomo_serve.ops.torch_ops import route

SIZES = (8, 2, 5, 1, 3)


def by_loop(logits: list[list[float]], top_k: int) -> tuple[list[int], float, int]:
    """Of one router: how often each expert is chosen, the sum of entropies, and tokens."""
    experts = len(logits[0])
    chosen, entropy, tokens = [0] * experts, 0.0, 0
    for token in logits:
        if not all(map(math.isfinite, token)):
            continue
        tokens += 1
        for expert in sorted(range(experts), key=lambda e: -token[e])[:top_k]:
            chosen[expert] += 1
        weights = [math.exp(z - max(token)) for z in token]
        for weight in weights:
            p = weight / sum(weights)
            entropy -= p * math.log(p) / math.log(experts) if experts > 1 and p > 0 else 0.0
    return chosen, entropy, tokens


def random_logits(tokens: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(tokens, size, generator=generator) for size in SIZES]


def check(logits: list[torch.Tensor], top_k: int) -> None:
    load = router_load(logits, top_k)
    for m, of_router in enumerate(logits):
        chosen, entropy, tokens = by_loop(of_router.tolist(), top_k)
        assert load.chosen[m].tolist() == chosen + [0] * (max(SIZES) - len(chosen))
        assert load.entropy[m].item() == pytest.approx(entropy, abs=1e-5 * max(tokens, 1))
        assert load.tokens[m].item() == tokens


@pytest.mark.parametrize("top_k", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("tokens", [1, 2, 63])
def test_counts_are_those_of_a_loop(top_k, tokens):
    check(random_logits(tokens), top_k)


def test_of_equal_logits_the_lower_index_is_chosen():
    check([torch.zeros(3, size) for size in SIZES], 2)


def test_a_token_without_finite_logits_counts_in_no_router_that_has_them():
    logits = random_logits(9)
    logits[0][3, 7] = torch.nan
    logits[1][3] = torch.inf
    logits[2][8, 0] = -torch.inf
    check(logits, 2)
    load = router_load(logits, 2)
    assert load.tokens.tolist() == [8, 8, 8, 9, 9]
    assert load.entropy.isfinite().all()


def test_entropy_is_1_for_a_router_that_cannot_tell_and_0_for_a_certain_one():
    logits = [torch.zeros(4, 6), torch.tensor([[0.0, 500.0, -500.0]]).expand(4, 3)]
    load = router_load(logits, 2)
    assert (load.entropy / load.tokens).tolist() == pytest.approx([1.0, 0.0])


def test_the_chosen_are_those_that_the_product_uses():
    """`route` decides what is served: an expert with a weight is one that is counted."""
    for logits in random_logits(200, seed=1):
        used = (route(logits, 2) > 0).sum(0)
        load = router_load([logits], 2)
        assert load.chosen[0].tolist() == used.tolist()


def test_sums_of_steps_are_those_of_all_tokens():
    logits = random_logits(30)
    parts = [router_load([z[a:b] for z in logits], 2) for a, b in ((0, 7), (7, 8), (8, 30))]
    summed, whole = parts[0] + parts[1] + parts[2], router_load(logits, 2)
    assert torch.equal(summed.chosen, whole.chosen)
    assert torch.equal(summed.tokens, whole.tokens)
    torch.testing.assert_close(summed.entropy, whole.entropy)
