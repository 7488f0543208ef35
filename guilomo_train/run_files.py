"""The files of a run, below its --output.

allocation.json         the allocation a search found
allocation.png          its heat map
selection.safetensors   the selection vectors it was read off
start/                  the adapter as the search left it, where fine-tuning starts
adapter/                the adapter folder
history.json            per stage the modules that could be adapted and the trainer's log; of a
                        search its allocations over the steps; of a fine-tuning the health of each
                        router in its last steps; of an evaluation 1 for each row that a score
                        counts, 0 for the others
run.json                settings, seed, versions, times, sizes, scores; written when all is done
report.md               the report page (report.py), made of all these, with its pictures
checkpoints/            while it runs: see checkpoints.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guilomo_train.adapters import read_trained_spec
from guilomo_train.allocation_map import allocation_of
from guilomo_train.config import FRESH
from guilomo_train.errors import ConfigError
from guilomo_train.limits import replace_file
from guilomo_train.search.allocation import Allocation

ALLOCATION_FILE = "allocation.json"
PICTURE_FILE = "allocation.png"
SELECTION_FILE = "selection.safetensors"
START_FOLDER = "start"
ADAPTER_FOLDER = "adapter"
HISTORY_FILE = "history.json"
RUN_FILE = "run.json"
PAGE_FILE = "report.md"
CHECKPOINT_FOLDER = "checkpoints"


@dataclass(frozen=True)
class Curve:
    """A figure over the steps of a training."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class FinishedRun:
    """What a run left behind: its folder, run.json, history.json and its allocation."""

    folder: Path
    record: Mapping[str, Any]
    history: Mapping[str, Any]
    allocation: Allocation

    @classmethod
    def read(cls, folder: Path) -> FinishedRun:
        """Reads the files of a run.

        Raises:
            ConfigError: a file is missing or broken.
            AllocationError, AdapterError: its allocation is.
        """
        record, history = (read_json(folder / name) for name in (RUN_FILE, HISTORY_FILE))
        if "finetune" in history:
            modules = history["finetune"].get("modules", ())  # a run of before has none
            allocation = allocation_of(read_trained_spec(folder / ADAPTER_FOLDER)[0], modules)
        else:
            allocation = Allocation.load(folder / ALLOCATION_FILE)
        return cls(folder, record, history, allocation)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def start(self) -> str:
        """What its fine-tuning began with."""
        if self.record["inputs"].get("start", FRESH) == FRESH:
            return FRESH
        return "the search's weights" if "search" in self.record else "an adapter's weights"

    @property
    def seconds(self) -> dict[str, float]:
        """What each stage took."""
        seconds = {}
        if "search" in self.record:
            seconds["search"] = float(self.record["search"]["seconds"])
        if "finetune_seconds" in self.record:
            seconds["fine-tuning"] = float(self.record["finetune_seconds"])
        return seconds

    def curve(self, stage: str, key: str) -> Curve:
        """A figure of the trainer's log over the steps."""
        log = self.history[stage]["log"] if stage in self.history else []
        at = {e["step"]: e[key] for e in log if key in e}
        return Curve(tuple(at), tuple(at.values()))

    def final_nll(self) -> float | None:
        """Of the fine-tuning: the mean over the last tenth of its log."""
        values = self.curve("finetune", "nll").values
        last = values[-max(1, len(values) // 10) :]
        return sum(last) / len(last) if last else None


def read_json(path: Path) -> Any:
    """Reads a file of a run.

    Raises:
        ConfigError: it is missing or broken.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; guilomo-train search, finetune and run write it"
        ) from None
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path}: not a JSON file ({e})") from None


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Writes a JSON file; one of that name is replaced only when all is written."""
    with replace_file(path) as partial:
        partial.write_text(json.dumps(value, indent=indent) + "\n")
