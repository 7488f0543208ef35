"""The fused routed product against the float64 loop over experts: outputs and all gradients."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from guilomo_serve.ops import reference, torch_ops

# Largest error relative to the largest value of the tensor in question. float64 leaves room for
# the order of sums alone; bfloat16 (8 bits of mantissa) rounds h, the gates and each product.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Case:
    """Sizes of one random problem; the tensors follow from the seed."""

    tokens: int
    in_features: int
    out_features: int
    ranks: tuple[int, ...]
    top_k: int
    seed: int

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """x, A, B, router in float64, and the scaling of each expert.

        Values are rounded to bfloat16, so that every dtype starts from the same numbers. The
        tokens are drawn until the k-th and the next logit are apart in each: which of two equal
        experts is chosen is nobody's error.
        """
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).bfloat16().double()

        experts, total = len(self.ranks), sum(self.ranks)
        lora_a, lora_b = draw(total, self.in_features), draw(self.out_features, total)
        scalings = 0.25 + torch.rand(experts, generator=generator, dtype=torch.float64)
        # Logits of size 1, or a softmax of large ones hides errors of the gate.
        router = (draw(experts, self.in_features) / self.in_features**0.5).bfloat16().double()
        x = draw(64 * self.tokens, self.in_features)
        if self.top_k < experts:
            logits = (x @ router.T).sort(dim=-1, descending=True).values
            x = x[logits[:, self.top_k - 1] - logits[:, self.top_k] > 1e-3]
        return x[: self.tokens], lora_a, lora_b, router, scalings


cases = st.builds(
    Case,
    tokens=st.integers(1, 7),
    in_features=st.integers(2, 24),
    out_features=st.integers(1, 24),
    ranks=st.lists(st.integers(1, 8), min_size=1, max_size=8).map(tuple),
    top_k=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)


def loss_weights(count: int) -> torch.Tensor:
    return torch.linspace(-1, 2, count, dtype=torch.float64)


def gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of a sum with fixed uneven weights, so that no two outputs can cancel."""
    weights = loss_weights(output.numel()).view_as(output)
    return list(torch.autograd.grad((output.double() * weights).sum(), inputs))


def assert_near(
    found: torch.Tensor, truth: torch.Tensor, tolerance: float, name: str, least: float = 1.0
) -> None:
    """`least`: what the tolerance is a share of where the truth is smaller, as it may be 0."""
    scale = truth.abs().max().clamp(min=least)
    error = ((found.double() - truth).abs().max() / scale).item()
    assert error <= tolerance, f"{name} differs by {error:.2g} of its largest value"


def largest_term(case: Case) -> float:
    """Of the router's gradient, in which outputs of two experts may cancel: each term is as good
    as its dtype, however small their difference is."""
    x, lora_a, lora_b, _, scalings = case.tensors()
    weights = loss_weights(len(x) * case.out_features).view(len(x), -1)
    rows = (x @ lora_a.T) * (weights @ lora_b)  # what each rank row adds to the loss
    of_experts = torch.stack([part.sum(-1) for part in rows.split(case.ranks, -1)], -1) * scalings
    return max(1.0, float((of_experts.abs().amax(-1) * x.abs().amax(-1)).max()))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@given(case=cases)
@example(case=Case(5, 16, 12, ranks=(4,), top_k=2, seed=0))  # a single expert: plain LoRA
@example(case=Case(5, 16, 12, ranks=(1, 1), top_k=2, seed=1))  # all experts, always
@example(case=Case(5, 16, 12, ranks=(8, 1, 3), top_k=1, seed=2))  # one at a time
@example(case=Case(7, 24, 24, ranks=(1, 2, 3, 4, 5, 6, 7, 8), top_k=2, seed=3))
@example(case=Case(3, 9, 20, ranks=(6, 1, 1, 2, 8), top_k=2, seed=3414))  # two of nearly one worth
@settings(max_examples=60, deadline=None, derandomize=True)
def test_fused_product_and_gradients_are_those_of_the_loop(dtype: torch.dtype, case: Case) -> None:
    x, lora_a, lora_b, router, scalings = case.tensors()
    has_router = len(case.ranks) > 1
    names = ["x", "A", "B", "router"] if has_router else ["x", "A", "B"]

    exact = [t.clone().requires_grad_() for t in (x, lora_a, lora_b, router)][: len(names)]
    truth = reference.routed_lora(
        *exact[:3], exact[3] if has_router else None, case.ranks, scalings.tolist(), case.top_k
    )

    # As in training and serving: the router stays in float32 where the rest is narrower.
    router_dtype = torch.promote_types(dtype, torch.float32)
    fused = [t.to(dtype).requires_grad_() for t in (x, lora_a, lora_b)]
    if has_router:
        fused.append(router.to(router_dtype).requires_grad_())
    expert_of_row = torch.arange(len(case.ranks)).repeat_interleave(torch.tensor(case.ranks))
    output = torch_ops.routed_lora(
        *fused[:3],
        fused[3] if has_router else None,
        scalings[expert_of_row].to(router_dtype),
        expert_of_row,
        case.top_k,
    )

    assert output.dtype == dtype
    assert_near(output, truth, TOLERANCES[dtype], "output")
    for name, found, expected in zip(
        names, gradients(output, fused), gradients(truth, exact), strict=True
    ):
        least = largest_term(case) if name == "router" else 1.0
        assert_near(found, expected, TOLERANCES[dtype], f"gradient of {name}", least)


@given(
    st.integers(1, 8),
    st.integers(1, 9),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_route_keeps_the_k_largest_and_sums_to_one(experts: int, top_k: int, seed: int) -> None:
    logits = torch.randn(5, experts, generator=torch.Generator().manual_seed(seed))
    weights = torch_ops.route(logits, top_k)
    assert torch.equal((weights > 0).sum(-1), torch.full((5,), min(top_k, experts)))
    torch.testing.assert_close(weights.sum(-1), torch.ones(5))
    kept = logits.masked_fill(weights == 0, float("inf")).min(-1).values
    dropped = logits.masked_fill(weights > 0, float("-inf")).max(-1).values
    assert (kept >= dropped).all()


def test_route_survives_large_logits() -> None:
    weights = torch_ops.route(torch.tensor([[1e4, -1e4, 1e4, 0.0]]), top_k=2)
    assert torch.equal(weights, torch.tensor([[0.5, 0.0, 0.5, 0.0]]))


def test_leading_dimensions_are_kept() -> None:
    """Training calls with [batch, length, in], the reference with [tokens, in]."""
    x, lora_a, lora_b, router, scalings = Case(6, 8, 4, (2, 1, 3), 2, seed=0).tensors()
    expert_of_row = torch.tensor([0, 0, 1, 2, 2, 2])
    shared = (lora_a, lora_b, router, scalings[expert_of_row], expert_of_row, 2)
    flat = torch_ops.routed_lora(x, *shared)
    assert torch.equal(torch_ops.routed_lora(x.view(2, 3, 8), *shared), flat.view(2, 3, 4))
