"""Which rows a search learns from, and when; its parts have tests of their own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from guilomo_train.config import CommonConfig, SearchConfig, order_of
from tests.train.test_checkpointing import ROWS, searching, wrapped


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
