"""The upper gradient against brute force, and what an upper step must leave alone."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer

from guilomo_serve.adapter import BaseModel
from guilomo_train.arguments import training_arguments
from guilomo_train.config import CommonConfig
from guilomo_train.lora_moe import LoraMoeConfig, LoraMoeLayer
from guilomo_train.lora_moe.layer import Masks
from guilomo_train.search.estimators import Estimator
from guilomo_train.search.hypergradient import UnrolledStep, adam_scales, hypergradient
from guilomo_train.search.selection import SelectionVectors, expected_mask
from guilomo_train.search.space import SearchSpace
from guilomo_train.search.trainer import SearchTrainer
from tests.train.routing_reference import masked_routing
from tests.train.tiny import tiny_llama


class TinyModel(nn.Module):
    """Tokens to next-token logits. (transformers' norms compute in float32 even in float64.)"""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 6)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return (x + self.down(torch.tanh(self.up(x)))) @ self.embed.weight.T


class Problem:
    """A bilevel problem in float64: the adapter away from its start, masks between 0 and 1."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        config = LoraMoeConfig(target_modules=["up", "down"], num_experts=3, expert_rank=2, top_k=2)
        self.model = get_peft_model(TinyModel(), config).double()
        self.layers = [m for m in self.model.modules() if isinstance(m, LoraMoeLayer)]
        shapes = [(2, 3), (2, 3, 2)]
        self.masks = [expected_mask(torch.randn(s).double().softmax(-1)) for s in shapes]
        for mask in self.masks:
            mask.requires_grad_()
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        for weight in self.weights:
            nn.init.normal_(weight, std=0.3)
        self.train, self.validation = (self.batch(seed) for seed in (0, 1))

    @staticmethod
    def batch(seed: int) -> torch.Tensor:
        return torch.randint(0, 16, (40,), generator=torch.Generator().manual_seed(seed))

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        for layer, e, r in zip(self.layers, *self.masks, strict=True):
            layer.masks = Masks(e, r)
        return F.cross_entropy(self.model(ids[:-1]), ids[1:])


@pytest.mark.parametrize("preconditioned", [False, True])
def test_second_order_agrees_with_the_brute_force_derivative(
    preconditioned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Brute force varies the masks, so the routing must have a value between 0 and 1 too.
    monkeypatch.setattr("guilomo_train.lora_moe.layer.masked_top_k_softmax", masked_routing)
    problem = Problem()
    eta = 0.5
    scales = None
    if preconditioned:
        scales = [torch.rand_like(w) + 0.5 for w in problem.weights]
    start = [w.detach().clone() for w in problem.weights]
    origin = [mask.detach().clone() for mask in problem.masks]

    gradient = torch.autograd.grad(problem.loss(problem.train), problem.weights)
    estimate = hypergradient(
        [lambda: problem.loss(problem.train)],
        [lambda: problem.loss(problem.validation)],
        problem.weights,
        problem.masks,
        UnrolledStep(eta, gradient, None if scales is None else lambda: scales),
        relative_step=1e-4,
    )

    def upper(direction: list[torch.Tensor], h: float) -> float:
        """L_val(w'(M + h d), M + h d) with w' = w - eta D dL_train/dw."""
        with torch.no_grad():
            for mask, o, d in zip(problem.masks, origin, direction, strict=True):
                mask.copy_(o + h * d)
        step = torch.autograd.grad(problem.loss(problem.train), problem.weights)
        with torch.no_grad():
            for i, (w, s) in enumerate(zip(problem.weights, start, strict=True)):
                w.copy_(s - eta * (step[i] if scales is None else scales[i] * step[i]))
            value = problem.loss(problem.validation).item()
            for w, s in zip(problem.weights, start, strict=True):
                w.copy_(s)
        return value

    first = torch.autograd.grad(problem.loss(problem.validation), problem.masks)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        direction = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in origin]
        h = 1e-5
        brute = (upper(direction, h) - upper(direction, -h)) / (2 * h)
        second = sum((e * d).sum().item() for e, d in zip(estimate, direction, strict=True))
        assert second == pytest.approx(brute, rel=1e-4)
        # The problem must be one where the orders differ, or this test could not fail.
        simple = sum((f * d).sum().item() for f, d in zip(first, direction, strict=True))
        assert abs(simple - brute) > 1e-2 * abs(brute)


def test_first_order_is_the_plain_derivative_at_the_weights() -> None:
    problem = Problem()
    expected = torch.autograd.grad(problem.loss(problem.validation), problem.masks)
    got = hypergradient(
        [lambda: problem.loss(problem.train)],
        [lambda: problem.loss(problem.validation)],
        problem.weights,
        problem.masks,
        None,
    )
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_adam_scales_are_those_of_the_step_that_adam_takes() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    # Without momentum the step is eta D g alone.
    optimizer = torch.optim.AdamW([weight], lr=0.1, betas=(0.0, 0.99), weight_decay=0.0)
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        before = weight.detach().clone()
        (scale,) = adam_scales(optimizer, [weight], [weight.grad])
        optimizer.step()
        torch.testing.assert_close(before - 0.1 * scale * weight.grad, weight.detach())
    weight.grad = torch.zeros_like(weight)
    fresh = torch.optim.AdamW([weight])
    (scale,) = adam_scales(fresh, [weight], [weight.grad])
    assert scale.tolist() == [0.0] * 5


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("estimator", ["marginal", "cumulative"])
def test_an_upper_step_changes_the_selection_vectors_and_nothing_else(
    tiny_base: Path, tmp_path: Path, second_order: bool, estimator: Estimator
) -> None:
    rows = Dataset.from_list(
        [{"prompt": f"number {i}", "completion": f" is {i * i}"} for i in range(24)]
    )
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    config = LoraMoeConfig(num_experts=3, expert_rank=2, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(len(tokenizer)), config)
    shapes = BaseModel.from_module(tiny_llama(len(tokenizer))).linears
    linears = {module: shapes[module] for module in model.peft_config["default"].experts}
    common = CommonConfig(base="", train="", output="")
    trainer = SearchTrainer(
        model=model,
        args=training_arguments(common, tmp_path, epochs=1, batch_size=4, learning_rate=1e-2),
        train_dataset=rows,
        processing_class=tokenizer,
        balance_coefficient=0.01,
        selection=SelectionVectors(SearchSpace(linears, 3, 2), budget=4000),
        estimator=estimator,
        second_order=second_order,
        selection_learning_rate=0.1,
        validation_dataset=rows,
    )
    seen = []
    upper_step = trainer._upper_step

    def watched(*args: object) -> None:
        def state() -> tuple[object, ...]:
            return deepcopy(
                (
                    [p.detach() for p in model.parameters()],
                    [p.grad for p in model.parameters()],
                    trainer.optimizer.state_dict(),
                )
            )

        before, vectors = state(), deepcopy(list(trainer.upper.selection.parameters()))
        upper_step(*args)  # type: ignore[arg-type]
        assert_identical(before, state())
        moved = [
            not torch.equal(a, b)
            for a, b in zip(vectors, trainer.upper.selection.parameters(), strict=True)
        ]
        seen.append((all(moved), len(trainer.optimizer.state_dict()["state"])))

    trainer._upper_step = watched  # type: ignore[method-assign]
    trainer.train()
    assert len(seen) == 6
    # B starts at zero and the first learning rate of the warm-up is zero: until B has moved, the
    # vectors have no gradient.
    assert any(moved for moved, _ in seen)
    assert seen[-1][1] > 0  # the optimiser had moments to disturb


def assert_identical(a: object, b: object) -> None:
    """Equal bit by bit, through lists and dicts."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert isinstance(b, dict)
        assert a.keys() == b.keys()
        for key in a:
            assert_identical(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert isinstance(b, (list, tuple))
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_identical(x, y)
    else:
        assert a == b
