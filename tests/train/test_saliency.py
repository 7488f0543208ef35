"""One-shot scores: exactly what autograd gives, on bases that stay as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from guilomo_serve.adapter import BaseModel
from guilomo_train.search.fill import fill
from guilomo_train.search.saliency import (
    mean_gradients,
    one_shot_worths,
    shared,
    whitened_worths,
)
from guilomo_train.search.space import SearchSpace
from tests.train.test_quantized import Int8Linear
from tests.train.tiny import tiny_llama


class Twice(nn.Module):
    """`first` works twice, `unused` never."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.last = nn.Linear(6, 4, bias=False)
        self.unused = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        return self.last(torch.relu_(self.first(x)))


SPACE = SearchSpace({"last": (4, 6), "first": (6, 6), "unused": (6, 6)}, max_experts=2, max_rank=3)


def by_autograd(model: nn.Module, space: SearchSpace, losses: list) -> dict[str, torch.Tensor]:
    model.requires_grad_(True)
    sum(loss() for loss in losses).div(len(losses)).backward()
    zero = torch.zeros(())
    found = {n: model.get_parameter(f"{n}.weight").grad for n in space.linears}
    model.zero_grad()
    return {n: zero.expand(space.linears[n]) if g is None else g for n, g in found.items()}


def setting(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list]:
    torch.manual_seed(0)
    model = Twice().to(dtype).requires_grad_(False)
    batches = [torch.randn(3, 5, 6, dtype=dtype) for _ in range(3)]
    return model, [lambda x=x: model(x).square().mean() for x in batches]


def test_gradients_are_those_of_autograd() -> None:
    model, losses = setting()
    found = mean_gradients(model, SPACE, losses)
    assert list(found) == list(SPACE.linears)
    assert found["first"].dtype == torch.float64
    for name, gradient in by_autograd(model, SPACE, losses).items():
        torch.testing.assert_close(found[name], gradient, check_dtype=name != "unused")


def test_scores_are_norm_product_and_singular_values() -> None:
    model, losses = setting()
    worths = one_shot_worths(model, SPACE, losses)
    for m, (name, gradient) in enumerate(by_autograd(model, SPACE, losses).items()):
        weight = model.get_parameter(f"{name}.weight").detach()
        share = 1 / torch.arange(1, 7, dtype=torch.float64)
        norm, product = gradient.square().sum(), (weight * gradient).abs().sum()
        u, s, v = torch.linalg.svd(gradient, full_matrices=False)
        for score, expected in (("gradient", norm * share), ("snip", product * share)):
            torch.testing.assert_close(worths[score][m], expected, check_dtype=False)
        # What a step of rank R takes off the gradient: its worth is that of its first R rows.
        for rank in range(len(s)):
            rest = gradient - u[:, :rank] * s[:rank] @ v[:rank]
            taken = norm - rest.square().sum()
            torch.testing.assert_close(worths["spectrum"][m, :rank].sum(), taken, check_dtype=False)
        assert worths["spectrum"][m, len(s) :].eq(0).all()


def test_whitened_scores_are_what_the_best_step_of_each_rank_gains() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=False)).double()
    x = torch.randn(50, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    y = torch.randn(50, 4, dtype=torch.float64)
    space = SearchSpace({"0": (4, 6)})
    (worths,) = whitened_worths(model, space, [lambda: (model(x) - y).square().mean()])

    # Reduced-rank regression: the best step is the best fit of the residuals, its fitted values
    # cut to rank R.
    left = y - model(x).detach()
    fitted = x @ torch.linalg.lstsq(x, left).solution
    u, s, v = torch.linalg.svd(fitted, full_matrices=False)
    for rank in range(5):
        cut = u[:, :rank] * s[:rank] @ v[:rank]
        gained = (left.square() - (left - cut).square()).mean()
        # The loss is the mean over 4 outputs, so it curves by 2 / 4 in each.
        torch.testing.assert_close(worths[:rank].sum(), gained * 2 * 2 / 4)
    assert worths[4:].eq(0).all()


def test_whitened_scores_do_not_depend_on_scales_and_heed_unused_inputs() -> None:
    model, losses = setting()
    before = whitened_worths(model, SPACE, losses)
    assert before[2].eq(0).all()  # no loss depends on it

    class Scaled(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(100 * x)

    model.last.weight.data /= 100
    model.last = Scaled(model.last)
    linears = {"last.layer": (4, 6), "first": (6, 6), "unused": (6, 6)}
    space = SearchSpace(linears, max_experts=2, max_rank=3)
    torch.testing.assert_close(whitened_worths(model, space, losses), before)


def test_scores_without_a_curve_give_rows_in_proportion() -> None:
    space = SearchSpace(dict.fromkeys("abc", (64, 64)), max_experts=1, max_rank=64)
    worths = shared(torch.tensor([4.0, 2.0, 0.0]), 64)
    rows = [sum(ranks) for ranks in fill(space, worths, 30 * 128).ranks.values()]
    assert rows == [20, 10, 0]


@pytest.mark.parametrize("frozen", [True, False])
def test_the_base_stays_as_it_was(frozen: bool) -> None:
    model, losses = setting()
    model.requires_grad_(not frozen)
    before = {name: p.clone() for name, p in model.named_parameters()}
    worths = one_shot_worths(model, SPACE, losses)
    assert not any(w.requires_grad for w in worths.values())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None
        assert p.requires_grad != frozen
    assert not model.first._forward_hooks
    assert not losses[0]().requires_grad or not frozen


def test_a_base_in_bfloat16_has_its_scores_in_float32() -> None:
    model, losses = setting(torch.bfloat16)
    precise, _ = setting(torch.float32)
    precise.load_state_dict(model.state_dict())
    found = mean_gradients(model, SPACE, losses)
    assert found["first"].dtype == torch.float32
    for name, gradient in by_autograd(model, SPACE, losses).items():
        torch.testing.assert_close(found[name], gradient.float(), rtol=0.05, atol=0.01)


def test_a_quantised_layer_counts_as_what_it_computes_with() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 4, bias=False)
    model = nn.Sequential(Int8Linear(linear))
    quantised: Int8Linear = model[0]
    plain = nn.Linear(6, 4, bias=False)
    plain.weight = nn.Parameter(quantised.weight * quantised.scale)
    x = torch.randn(5, 6)
    space = SearchSpace({"0": (4, 6)})
    worths, expected = (
        one_shot_worths(m, space, [lambda m=m: m(x).square().mean()])
        for m in (model, nn.Sequential(plain))
    )
    for score in worths:
        torch.testing.assert_close(worths[score], expected[score])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_language_model(checkpointing: bool) -> None:
    model = tiny_llama(vocab_size=64)
    linears = {n: s for n, s in BaseModel.from_module(model).linears.items() if n != "lm_head"}
    assert len(linears) == 14
    space = SearchSpace(linears)
    ids = torch.randint(0, 64, (2, 9))
    losses = [lambda ids=ids: model(input_ids=ids, labels=ids).loss]
    expected = by_autograd(model, space, losses)
    model.requires_grad_(False)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = mean_gradients(model, space, losses)
    for name in linears:
        torch.testing.assert_close(found[name], expected[name])
