"""The rows of benchmarks/proof.py: which run trains and is scored on which.

Each task has three pools that no row is in twice: `train`, `dev` (rows of the training file that
no run trains on) and `test`. A seed draws a run's rows from them, so two seeds have other rows, and
all arms of a seed the same. docs/protocol.md says why.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from datasets import Dataset

sys.path.append(str(Path(__file__).parents[1]))  # the demo is no installed package
from demo.tasks import TASKS

Row = dict[str, str]
Pool = Literal["dev", "test"]

MIXTURE = "mixture"
PARTS = ("banking77", "ticket", "calendar")  # single tasks; the mixture has all of them
NAMES = (*PARTS, MIXTURE)
DEMO = {task.name: task for task in TASKS}
POOL_SEED = 4711  # of the demo's tasks; the demo itself has 0
DEV_POOL = 1000
GENERATED = 6000, 3000  # rows of a demo's task: train and dev, test
EARLIER = 300  # test rows of Banking77 that earlier results drew, by each of two ways


@dataclass(frozen=True)
class Sizes:
    """Rows of a run."""

    train: int = 480
    dev: int = 300
    test: int = 1000


@dataclass(frozen=True)
class Rows:
    """Rows of one run: those to train on, and to score by the part of the mixture they are of."""

    train: list[Row]
    score: dict[str, list[Row]]


def draw(task: str, seed: int, pool: Pool, data: Path, sizes: Sizes) -> Rows:
    """The rows of a run.

    Args:
        task: one of NAMES.
        seed: another seed, other rows.
        pool: where the rows to score come from.
        data: folder of `banking77.train.jsonl` and so on.
        sizes: how many; the mixture has as many in all, or a few more to score.
    """
    parts = PARTS if task == MIXTURE else (task,)
    trained: list[Row] = []
    score = {}
    for part in parts:
        pools = pools_of(part, data)
        generator = random.Random(f"{task} {part} {seed}")  # the same training rows for any pool
        trained += generator.sample(pools["train"], sizes.train // len(parts))
        score[part] = generator.sample(pools[pool], -(-getattr(sizes, pool) // len(parts)))
    return Rows(trained, score)


@cache
def pools_of(part: str, data: Path) -> dict[str, list[Row]]:
    """The three pools of a single task."""
    if part in DEMO:
        trained, test = DEMO[part].split(*GENERATED, POOL_SEED)
        test = without(test, [row for of in DEMO[part].split(240, 20, 0) for row in of])
    else:
        trained, test = (read(data / f"{part}.{split}.jsonl") for split in ("train", "test"))
        if part == "banking77":
            test = without(test, scored_earlier(test))
    # A test row that is in the training file too would not be new.
    test = without(test, trained)
    random.Random(part).shuffle(trained)
    return {"dev": trained[:DEV_POOL], "train": without(trained[DEV_POOL:], trained[:DEV_POOL]),
            "test": test}  # fmt: skip


def read(path: Path) -> list[Row]:
    # Not splitlines: it would also end a row at a line separator inside a text.
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def scored_earlier(test: list[Row]) -> list[Row]:
    """Rows of Banking77 in results from before the protocol: those of task_accuracy.py, and those
    of `guilomo-train finetune --eval_rows 300`, which the comparison before this one called."""
    asked = random.Random(0).sample(range(len(test)), EARLIER)
    numbers = Dataset.from_dict({"number": list(range(len(test)))})
    scored = numbers.shuffle(seed=0)["number"][:EARLIER]
    return [test[number] for number in {*asked, *scored}]


def without(rows: list[Row], others: list[Row]) -> list[Row]:
    """The rows whose prompt is none of the others', each prompt once."""
    taken = {row["prompt"] for row in others}
    kept = {row["prompt"]: row for row in rows if row["prompt"] not in taken}
    return list(kept.values())
