"""Which rows a search learns from; its parts have tests of their own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from tests.train.test_checkpointing import ROWS, searching, wrapped


def test_a_pass_trains_and_validates_on_every_row_once(tmp_path: Path) -> None:
    """Twelve rows on both levels, in three steps of four."""
    trainer = searching(tmp_path, wrapped(), False, second_order=False)
    seen: Counter[tuple[int, ...]] = Counter()
    collate = trainer.data_collator

    def watched(rows: list[dict[str, Any]]) -> Any:
        seen.update(tuple(row["input_ids"]) for row in rows)
        return collate(rows)

    trainer.data_collator = watched
    trainer.train()
    assert len(seen) == len(ROWS)
    assert set(seen.values()) == {2}
