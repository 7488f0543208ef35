"""The training layer against the float64 loop over experts, with and without masks."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from guilomo_serve.adapter import Expert
from guilomo_serve.ops import reference
from guilomo_train.balance import balance_loss
from guilomo_train.lora_moe import LoraMoeConfig, LoraMoeLinear
from guilomo_train.lora_moe.layer import Masks, Routing
from guilomo_train.lora_moe.routing import masked_top_k_softmax
from tests.train.routing_reference import masked_routing

IN, OUT, TOKENS = 12, 10, 7

# Of the largest value: float32 sums of a few dozen terms, bfloat16 with 8 bits of mantissa.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def random_layer(ranks: tuple[int, ...], top_k: int, dtype: torch.dtype) -> LoraMoeLinear:
    experts = tuple(Expert(r, 0.5 + 0.25 * i) for i, r in enumerate(ranks))
    layer = LoraMoeLinear(
        nn.Linear(IN, OUT, bias=False), "default", experts, LoraMoeConfig(top_k=top_k)
    )
    layer = layer.to(dtype)
    if len(ranks) > 1:
        layer.lora_router["default"].to(torch.promote_types(dtype, torch.float32))
    nn.init.normal_(layer.lora_B["default"].weight)
    layer.base_layer.requires_grad_(False)
    return layer


def adapter_tensors(layer: LoraMoeLinear) -> dict[str, torch.Tensor]:
    named = {"lora_a": layer.lora_A["default"].weight, "lora_b": layer.lora_B["default"].weight}
    if "default" in layer.lora_router:
        named["router"] = layer.lora_router["default"].weight
    return named


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(12))
def test_outputs_and_gradients_equal_the_reference(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    count = int(torch.randint(1, 9, (1,), generator=generator))
    ranks = tuple(torch.randint(1, 9, (count,), generator=generator).tolist())
    top_k = int(torch.randint(1, 4, (1,), generator=generator))
    layer = random_layer(ranks, top_k, dtype)
    x = torch.randn(TOKENS, IN).to(dtype).requires_grad_()
    weigh = torch.randn(TOKENS, OUT, dtype=torch.float64)

    tensors = adapter_tensors(layer)
    y = layer(x)
    got = torch.autograd.grad((y.double() * weigh).sum(), [x, *tensors.values()])

    exact = {k: t.detach().double().requires_grad_() for k, t in tensors.items()}
    x64 = x.detach().double().requires_grad_()
    expected = x64 @ layer.base_layer.weight.double().T + reference.routed_lora(
        x64,
        exact["lora_a"],
        exact["lora_b"],
        exact.get("router"),
        ranks,
        [e.scaling for e in layer.experts["default"]],
        top_k,
    )
    wanted = torch.autograd.grad((expected * weigh).sum(), [x64, *exact.values()])

    for name, a, b in zip(["y", "x", *tensors], [y, *got], [expected, *wanted], strict=True):
        error = (a.double() - b).abs().max()
        assert error <= TOLERANCE[dtype] * b.abs().max().clamp(min=1), name


def test_hard_masks_give_the_layer_of_the_chosen_experts_and_ranks() -> None:
    torch.manual_seed(0)
    full = random_layer((4, 4, 4), 2, torch.float64)
    counts = [3, 1, 4]
    x = torch.randn(TOKENS, IN, dtype=torch.float64)
    ranks = (torch.arange(4) < torch.tensor(counts)[:, None]).double()

    for chosen in (1, 2, 3):
        full.masks = Masks((torch.arange(3) < chosen).double(), ranks)
        small = random_layer(tuple(counts[:chosen]), 2, torch.float64)
        rows = torch.cat([4 * e + torch.arange(counts[e]) for e in range(chosen)])
        with torch.no_grad():
            small.base_layer.weight.copy_(full.base_layer.weight)
            small.lora_A["default"].weight.copy_(full.lora_A["default"].weight[rows])
            small.lora_B["default"].weight.copy_(full.lora_B["default"].weight[:, rows])
            if chosen > 1:
                small.lora_router["default"].weight.copy_(
                    full.lora_router["default"].weight[:chosen]
                )
        torch.testing.assert_close(full(x), small(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e4])  # of the router: logits of some real tokens
@pytest.mark.parametrize(
    "there",
    [[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1], [0]],
)
def test_the_derivative_in_a_mask_is_the_whole_change_it_makes(
    there: list[int], scale: float
) -> None:
    torch.manual_seed(1)
    layer = random_layer((3,) * len(there), 2, torch.float64)
    with torch.no_grad():
        for router in layer.lora_router.values():
            router.weight.mul_(scale)
    x, weight = torch.randn(TOKENS, IN).double(), torch.randn(TOKENS, OUT).double()

    def loss(experts: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
        """Linear in the layer's output, so that the change is not cut short to first order."""
        layer.masks = Masks(experts, ranks)
        return (layer(x) * weight).sum()

    experts = torch.tensor(there).double().requires_grad_()
    ranks = (torch.rand(len(there), 3) > 0.5).double().requires_grad_()
    gradients = torch.autograd.grad(loss(experts, ranks), (experts, ranks))

    with torch.no_grad():
        for which, mask in enumerate((experts, ranks)):
            for entry in range(mask.numel()):
                with_, without = ([experts.clone(), ranks.clone()] for _ in range(2))
                with_[which].view(-1)[entry], without[which].view(-1)[entry] = 1.0, 0.0
                change = loss(*with_) - loss(*without)
                torch.testing.assert_close(gradients[which].view(-1)[entry], change)
    assert gradients[0].abs().min() > 0


@pytest.mark.parametrize("experts", [1, 4])
def test_a_layer_without_experts_adds_nothing_and_hears_what_each_alone_would_add(
    experts: int,
) -> None:
    torch.manual_seed(3)
    layer = random_layer((3,) * experts, 2, torch.float64)
    x, weight = torch.randn(TOKENS, IN).double(), torch.randn(TOKENS, OUT).double()
    mask = torch.zeros(experts, dtype=torch.float64, requires_grad=True)
    layer.masks = Masks(mask, torch.ones(experts, 3, dtype=torch.float64))
    added = layer(x) - layer.base_layer(x)
    assert added.abs().max() == 0
    parameters = [p for p in layer.parameters() if p.requires_grad]
    by_mask, *by_weights = torch.autograd.grad((layer(x) * weight).sum(), [mask, *parameters])
    assert all(gradient.abs().max() == 0 for gradient in by_weights)

    lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for e, expert in enumerate(layer.experts["default"]):
        rows = slice(3 * e, 3 * e + 3)
        alone = reference.routed_lora(
            x, lora_a[rows], lora_b[:, rows], None, (3,), (expert.scaling,), 2
        )
        torch.testing.assert_close(by_mask[e], (alone * weight).sum())


@pytest.mark.parametrize("spread", [1.0, 100.0])
@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "there", [[0] * 5, [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 1, 0], [1] * 5]
)
def test_masked_routing_is_its_reference(there: list[int], top_k: int, spread: float) -> None:
    torch.manual_seed(0)
    logits = (spread * torch.randn(3, 40, 5)).requires_grad_()
    mask = torch.tensor(there).float().requires_grad_()
    weight = torch.randn(3, 40, 5)

    def value_and_gradients(routing: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        weights = routing(logits, mask, top_k)
        return weights, *torch.autograd.grad((weights * weight).sum(), (logits, mask))

    found = value_and_gradients(masked_top_k_softmax)
    expected = value_and_gradients(masked_routing)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert found[2].abs().max() > 0


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_masked_routing_is_its_reference_for_every_mask_and_logits_of_any_size(top_k: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(60, 4).double()
    logits[20:40] *= 1e4
    logits[40:] = 1e4 * torch.randint(-1, 2, (20, 4)) + torch.randn(20, 4)  # near ties up there
    logits.requires_grad_()
    weight = torch.randn(60, 4).double()
    for there in itertools.product((0.0, 1.0), repeat=4):
        mask = torch.tensor(there).double().requires_grad_()
        results = []
        for routing in (masked_top_k_softmax, masked_routing):
            weights = routing(logits, mask, top_k)
            results.append(torch.autograd.grad((weights * weight).sum(), (logits, mask)))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_an_expert_that_is_masked_out_cannot_promise_more_than_the_weight_1() -> None:
    # Some tokens of real models have logits this far apart.
    logits = torch.tensor([[2.0, 1.0, 99.0, 0.0]])
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0], requires_grad=True)
    weights = masked_top_k_softmax(logits, mask, top_k=2)
    assert weights.detach()[0, 2:].tolist() == [0.0, 0.0]
    first, third = (torch.autograd.grad(weights[0, e], mask, retain_graph=True) for e in (0, 2))
    assert third[0].tolist() == [0.0, 0.0, 1.0, 0.0]  # it would take over
    # Expert 0 alone has the weight 1 without expert 1; without itself, 0; with expert 3, as before.
    share = weights[0, 0].item()
    assert first[0].tolist() == pytest.approx([share, share - 1, -share, 0.0])


def test_balance_loss_is_the_switch_formula_and_ignores_padding() -> None:
    logits = torch.tensor([[[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [9.0, 0.0, 0.0]]])
    weights = torch.tensor([[[0.7, 0.3, 0.0], [0.0, 0.4, 0.6], [1.0, 0.0, 0.0]]])
    mask = torch.tensor([[1, 1, 0]])
    share = torch.tensor([1, 2, 1]) / 4
    expected = 3 * (share * torch.softmax(logits[0, :2], -1).mean(0)).sum()
    got = balance_loss([Routing(logits, weights, None)], mask)
    torch.testing.assert_close(got, expected)
    two = balance_loss([Routing(logits, weights, None)] * 2, mask)
    torch.testing.assert_close(two, expected)


def test_balance_loss_of_an_even_load_is_one() -> None:
    logits = torch.eye(4)[None]
    assert balance_loss(
        [Routing(logits, torch.eye(4)[None], None)], torch.ones(1, 4)
    ).item() == pytest.approx(1.0)


@pytest.mark.parametrize("experts", [2, 4])
def test_a_layer_with_fewer_than_two_experts_to_choose_from_has_no_balance_loss(
    experts: int,
) -> None:
    torch.manual_seed(4)
    tokens = torch.ones(2, 5)

    def drawn(count: int, wide: int, scale: float = 1.0) -> Routing:
        """A router's part in a search's step, in which the first `count` experts are there."""
        mask = (torch.arange(wide) < count).float()
        logits = (scale * torch.randn(2, 5, wide)).requires_grad_()
        return Routing(logits, masked_top_k_softmax(logits, mask, 2), mask > 0)

    routed = [drawn(2, experts), drawn(experts, experts), drawn(3, 5)]
    idle = [drawn(0, experts), drawn(1, experts), drawn(0, 5), drawn(1, 5, scale=1e4)]
    mixed = [idle[0], routed[0], idle[1], idle[2], routed[1], routed[2], idle[3]]
    logits = [routing.logits for routing in mixed]

    expected = balance_loss(routed, tokens)
    found = balance_loss(mixed, tokens)
    torch.testing.assert_close(found, expected)
    by_logits = torch.autograd.grad(found, logits)
    wanted = torch.autograd.grad(expected, [routing.logits for routing in routed])
    torch.testing.assert_close([by_logits[i] for i in (1, 4, 5)], list(wanted))
    assert all(by_logits[i].abs().max() == 0 for i in (0, 2, 3, 6))

    # Nor is there one where no layer has a choice; the gradient is still one.
    nothing = balance_loss(idle, tokens)
    assert nothing.item() == 0
    for gradient in torch.autograd.grad(nothing, [routing.logits for routing in idle]):
        assert gradient.abs().max() == 0
