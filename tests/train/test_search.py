"""Which rows a search learns from, and when; its parts have tests of their own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model, set_peft_model_state_dict
from transformers import TrainerCallback

from guilomo_train.adapters import adapter_of
from guilomo_train.config import CommonConfig, SearchConfig, order_of
from guilomo_train.lora_moe import LoraMoeConfig
from guilomo_train.searching import cut
from tests.train.test_checkpointing import ROWS, searching, wrapped
from tests.train.tiny import tiny_llama, tiny_tokenizer


@pytest.mark.parametrize("order", ["online", "first"])
def test_a_pass_trains_and_validates_on_every_row_once(order: str, tmp_path: Path) -> None:
    """Twelve rows on both levels, in three steps of four; online the same rows serve both."""
    trainer = searching(tmp_path, wrapped(), False, order)
    seen: Counter[tuple[int, ...]] = Counter()
    collate = trainer.data_collator

    def watched(rows: list[dict[str, Any]]) -> Any:
        seen.update(tuple(row["input_ids"]) for row in rows)
        return collate(rows)

    trainer.data_collator = watched
    trainer.train()
    assert len(seen) == len(ROWS)
    assert set(seen.values()) == {1 if order == "online" else 2}


def test_an_online_search_judges_a_batch_by_the_weights_before_they_learn_it(
    tmp_path: Path,
) -> None:
    """What the vectors learn from is the gradient of a forward pass of its own at that time."""
    trainer = searching(tmp_path, wrapped(), False, "online")
    trainer.balance_coefficient = 0.0
    compute_loss, learn = trainer.compute_loss, trainer.upper.learner.step
    expected: list[tuple[torch.Tensor, ...]] = []
    steps = 0

    def watched_loss(model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        loss = trainer.losses(model, inputs)[0]
        expected.append(torch.autograd.grad(loss, trainer.upper.masks))
        return compute_loss(model, inputs, *args, **kwargs)

    def watched_step(draw: Any, *gradients: torch.Tensor) -> None:
        nonlocal steps
        steps += 1
        assert len(expected) == steps
        for gradient, of_loss in zip(gradients, expected[-1], strict=True):
            assert gradient.abs().max() > 0
            torch.testing.assert_close(gradient, of_loss)
        learn(draw, *gradients)

    trainer.compute_loss = watched_loss  # type: ignore[method-assign]
    trainer.upper.learner.step = watched_step  # type: ignore[method-assign]
    trainer.train()
    assert steps == 3


@pytest.mark.parametrize(
    ("common", "search", "expected"),
    [
        ({}, {}, "online"),
        ({}, {"search_epochs": 0.5}, "online"),
        ({}, {"search_epochs": 1.5}, "first"),
        ({"validation": "held_out.jsonl"}, {}, "first"),
        ({"validation_share": 0.1}, {}, "first"),
        ({}, {"order": "second"}, "second"),
    ],
)
def test_a_search_is_online_while_it_can_be(
    common: dict[str, Any], search: dict[str, Any], expected: str
) -> None:
    made = CommonConfig(base="", train="", output="", **common)
    assert order_of(made, SearchConfig(**search)) == expected


@pytest.mark.parametrize("order", ["online", "first", "second"])
def test_accumulated_parts_are_one_step(order: str, tmp_path: Path, one_thread: None) -> None:
    """Twice two rows are four: one draw, one observation, the same vectors and weights."""

    def found(batch: int, parts: int) -> tuple[list[torch.Tensor], dict[str, Any], int]:
        trainer = searching(tmp_path, wrapped(), False, order, batch, parts)
        # The load-balance loss of parts is the mean of theirs, which is not that of the whole.
        trainer.balance_coefficient = 0.0
        draws = 0
        draw = trainer.upper.draw

        def counted(online: bool) -> None:
            nonlocal draws
            draws += 1
            draw(online)

        trainer.upper.draw = counted  # type: ignore[method-assign]
        trainer.train()
        evidence = trainer.upper.learner.state_dict()["evidence"]
        weights = [p.detach().clone() for p in trainer.weights]
        return weights, evidence, draws

    (whole, seen, drawn), (parts, seen_in_parts, drawn_in_parts) = found(4, 1), found(2, 2)
    assert drawn == drawn_in_parts == seen["draws"] == seen_in_parts["draws"] == 3
    assert len(seen["seen"]) == 3
    for a, b in zip(seen["seen"], seen_in_parts["seen"], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(seen["sums"], seen_in_parts["sums"], strict=True):
        assert a.abs().max() > 0
        # Second order divides by the root of Adam's second moment, which is tiny in places.
        assert (a - b).abs().max() <= 5e-3 * a.abs().max()
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_second_order_differentiates_through_the_step_that_is_taken(tmp_path: Path) -> None:
    """The trainer clips the gradient before its step, so the unrolled step has it clipped too."""
    trainer = searching(tmp_path, wrapped(), False, "second")
    trainer.args.max_grad_norm = 0.1
    unrolled: list[list[torch.Tensor]] = []
    taken: list[list[torch.Tensor]] = []
    step = trainer.upper.step

    def watched(*args: Any, **kwargs: Any) -> None:
        unrolled.append([g.clone() for g in args[3].train_gradient])
        step(*args, **kwargs)

    class Taken(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            taken.append([w.grad.clone() for w in trainer.weights])

    trainer.upper.step = watched  # type: ignore[method-assign]
    trainer.add_callback(Taken())
    trainer.train()
    assert len(taken) == len(unrolled) == 3
    for ours, theirs in zip(unrolled, taken, strict=True):
        norm = torch.stack([g.norm() for g in theirs]).norm().item()
        assert norm == pytest.approx(0.1, rel=1e-3)  # or nothing was clipped
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("order", ["online", "first"])
def test_rows_are_judged_by_the_loss_that_is_learned(order: str, tmp_path: Path) -> None:
    """The load-balance loss counts on both levels, wherever the upper level's rows come from."""
    evidence = []
    for balance in (0.0, 5.0):
        trainer = searching(tmp_path, wrapped(), False, order)
        trainer.balance_coefficient = balance
        trainer.args.max_steps = 1
        trainer.train()
        evidence.append(trainer.upper.learner.state_dict()["evidence"]["sums"][0])
    assert evidence[0].abs().max() > 0
    assert (evidence[0] - evidence[1]).abs().max() > 1e-3


def test_after_a_search_the_model_computes_what_it_found(tmp_path: Path) -> None:
    """The Python way: train, then ask. The last step's random masks do not stay behind."""
    model = wrapped()
    trainer = searching(tmp_path, model, False, "online")
    trainer.train()
    allocation = trainer.allocation()
    findings = trainer.upper.findings()
    assert findings["told_apart"] is False  # of three steps
    assert findings["evidence_steps"] == 3
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        found = model(input_ids=ids).logits
    cut_down = cut(adapter_of(model), allocation)
    base = tiny_llama(len(tiny_tokenizer()))
    experts = {
        module: [{"rank": e.rank, "scaling": e.scaling} for e in listed]
        for module, listed in cut_down.spec.experts.items()
    }
    config = LoraMoeConfig(task_type="CAUSAL_LM", experts=experts)
    alone = get_peft_model(base, config)
    set_peft_model_state_dict(alone, cut_down.tensors())
    with torch.no_grad():
        expected = alone(input_ids=ids).logits
        without = base_logits(alone, ids)
    torch.testing.assert_close(found, expected)
    assert (expected - without).abs().max() > 1e-2


def base_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with model.disable_adapter():
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits
