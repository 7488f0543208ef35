"""Packed rows: several in one, whose attention stays apart by their positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from trl import pack_dataset

from guilomo_train.data.rendering import NOT_LEARNED
from guilomo_train.errors import ConfigError


class PackedCollator:
    """Adds `position_ids` to what a collator makes: from 0 in each of the rows that are packed into
    one, and 0 for padding. (TRL's own does so in some versions alone.)"""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(rows)
        positions = torch.zeros_like(batch["input_ids"])
        for place, row in zip(positions, rows, strict=True):
            lengths = row.get("seq_lengths", [len(row["input_ids"])])
            place[: sum(lengths)] = torch.cat([torch.arange(length) for length in lengths])
        return {**batch, "position_ids": positions}


def packed(model: nn.Module, rows: Dataset, max_length: int | None) -> Dataset:
    """Whole rows put one after another, up to a number of tokens. Each has positions from 0, which
    is how transformers knows to keep their attention apart. (TRL's own packing computes with
    FlashAttention alone.)

    Args:
        model: what will compute with them.
        rows: `input_ids` and `labels`, none longer than `max_length`.
        max_length: tokens of a packed row.

    Returns:
        `input_ids`, `labels` and `seq_lengths`, the tokens of each row in a packed one.

    Raises:
        ConfigError: `max_length` is None, or the model does not keep packed rows apart.
    """
    rows = rows.select_columns(["input_ids", "labels"])
    if max_length is None:
        raise ConfigError("packing needs max_length, the tokens of a packed row")
    check_packing(model, list(rows[:2]["input_ids"]))
    # A row's first token is predicted from nothing, and not from the row before it.
    rows = rows.map(lambda row: {"labels": [NOT_LEARNED, *row["labels"][1:]]})
    return pack_dataset(rows, max_length, "bfd")


@torch.no_grad()
def check_packing(model: nn.Module, rows: list[list[int]]) -> None:
    """Checks on two rows that a model keeps packed rows apart.

    Raises:
        ConfigError: the second row's logits are those of one that sees the first.
    """
    first, second = (torch.tensor(ids[:16]) for ids in (rows[0], rows[-1]))
    positions = torch.cat([torch.arange(len(ids)) for ids in (first, second)])[None]
    device = next(model.parameters()).device
    both = torch.cat([first, second])[None].to(device)
    was_training = model.training
    model.eval()
    try:
        alone = model(input_ids=both[:, len(first) :], use_cache=False).logits
        joined = model(input_ids=both, use_cache=False).logits[:, len(first) :]
        packed = model(input_ids=both, position_ids=positions.to(device), use_cache=False).logits
        error = (packed[:, len(first) :] - alone).abs().mean()
        apart = bool(error < 0.25 * (joined - alone).abs().mean())
    except TypeError:  # a model that takes no positions
        apart = False
    model.train(was_training)
    if not apart:
        kind = getattr(model, "config", None)
        raise ConfigError(
            f"packing: in a base of type {getattr(kind, 'model_type', '?')} rows that are packed "
            "together see one another, with this version of transformers: leave it out"
        )
