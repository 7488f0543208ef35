"""Checkpoints of a stage: which one to go on from, and whether it fits what is asked for now.

    <output>/checkpoints/run.json         the record of the stages that are finished
    <output>/checkpoints/<stage>/checkpoint-N/
        adapter, optimiser, scheduler,    as transformers' trainer writes and reads them
        random state, trainer state
        guilomo.pt                        what our trainers add, a search's upper level too
        complete.json                     written last: the settings it was made with

A checkpoint without `complete.json` was being written when the process died; it is never read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from guilomo_serve.adapter import Adapter
from guilomo_train.config import FRESH, WITHOUT_EFFECT
from guilomo_train.errors import OutputError, ResumeError
from guilomo_train.limits import replace_file, writing
from guilomo_train.search.allocation import Allocation

STATE_FILE = "guilomo.pt"
COMPLETE_FILE = "complete.json"
KEPT = 2  # newest checkpoints of a stage

# Settings that may change between a checkpoint and the run that goes on from it. Rows are compared
# by what they say and not by the name of their file.
FREE = WITHOUT_EFFECT | {"train", "validation", "dev"}


@dataclass(frozen=True)
class Checkpointing:
    """What a stage's trainer is told about checkpoints.

    Attributes:
        save_steps: steps between two; 0 for none.
        settings: all that the result depends on, as JSON; written into each checkpoint.
        resume: the checkpoint to go on from.
    """

    save_steps: int
    settings: dict[str, Any]
    resume: Path | None


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a stage, oldest first."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE_FILE}")]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def half_written(folder: Path) -> list[Path]:
    """What the death of a process left of a checkpoint."""
    return [p for p in folder.glob("checkpoint-*") if not (p / COMPLETE_FILE).is_file()]


@contextmanager
def whole(checkpoint: Path) -> Iterator[None]:
    """Deletes a checkpoint whose writing fails in the block; those before it stay.

    Raises:
        OutputError: it cannot be written, because a disk is full for example.
    """
    try:
        with writing(checkpoint):
            yield
    except OutputError:
        shutil.rmtree(checkpoint, ignore_errors=True)
        raise


def complete(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Declares a checkpoint complete; to be called when all of its files are there."""
    with replace_file(checkpoint / COMPLETE_FILE) as partial:
        partial.write_text(json.dumps(settings, indent=2) + "\n")


def made_with(checkpoint: Path) -> dict[str, Any]:
    """The settings a checkpoint was made with."""
    return json.loads((checkpoint / COMPLETE_FILE).read_text())


def check_same(then: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Compares settings with those of a checkpoint or record, `{"common": {"seed": 0}, ...}` each.

    Raises:
        ResumeError: a setting differs; the message names it.
    """
    for group, settings in now.items():
        for name, value in settings.items():
            before = then.get(group, {}).get(name)
            if name not in FREE and before != value:
                raise ResumeError(
                    f"--resume: {name} is {value!r}, but {where} was made with {before!r}: give it "
                    "as it was there, or delete that to start anew"
                )


def describe_rows(rows: Dataset) -> str:
    """A short text that tells rows from others: their count and a digest of what they say."""
    rows = rows.remove_columns("where")  # the name of their file
    return f"{len(rows)} rows, sha256 {_digest(json.dumps(row, sort_keys=True) for row in rows)}"


def describe_allocation(allocation: Allocation) -> str:
    """A short text that tells an allocation from others."""
    ranks = json.dumps(allocation.to_json(), sort_keys=True)
    return f"{allocation.total_experts} experts, sha256 {_digest([ranks])}"


def describe_start(start: Adapter | None) -> str:
    """A short text that tells the weights that a fine-tuning begins with from others."""
    if start is None:
        return FRESH
    raw = (t.view(torch.uint8).numpy().tobytes() for t in start.tensors().values())
    return f"an adapter's weights, sha256 {_digest(raw)}"


def _digest(texts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() if isinstance(text, str) else text)
    return digest.hexdigest()[:16]
