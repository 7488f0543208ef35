"""The demo's data: deterministic, well formed, and no test row's combination in train."""

from __future__ import annotations

import json
import random
import re
from itertools import product
from pathlib import Path

import pytest

from demo.tasks import (
    DAYS,
    HOURS,
    LENGTHS,
    PEOPLE,
    PROBLEMS,
    PRODUCTS,
    TASKS,
    TOPICS,
    URGENCY,
    Row,
    Task,
    _spoken_time,
    write_rows,
)

TICKET, CALENDAR = TASKS


def combination(row: Row) -> tuple[str, str]:
    """The pair that a row was drawn around, read back from its text."""
    if "JSON" in row["prompt"]:
        item = json.loads(row["completion"])["product"]
        sentences = (s.format(item) for of in PROBLEMS.values() for s in of)
        return next(s for s in sentences if s in row["prompt"]), item
    _, _, _, person, topic = row["completion"].split(" | ")
    return person, topic


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_rows_are_as_many_as_asked_and_all_different(task: Task) -> None:
    train, test = task.split(400, 40, seed=0)
    assert (len(train), len(test)) == (400, 40)
    assert len({row["prompt"] for row in train + test}) == 440
    assert all(row.keys() == {"prompt", "completion"} for row in train + test)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_no_combination_of_a_test_row_is_in_train(task: Task, seed: int) -> None:
    train, test = task.split(500, 60, seed)
    assert not {combination(r) for r in train} & {combination(r) for r in test}


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_the_seed_alone_decides_the_rows(task: Task) -> None:
    assert task.split(50, 10, seed=3) == task.split(50, 10, seed=3)
    assert task.split(50, 10, seed=3) != task.split(50, 10, seed=4)


def test_tickets_are_json_whose_product_stands_in_the_message() -> None:
    train, test = TICKET.split(480, 90, seed=1)
    tickets = [json.loads(row["completion"]) for row in train + test]
    for row, ticket in zip(train + test, tickets, strict=True):
        assert list(ticket) == ["category", "product", "priority"]
        assert ticket["product"] in row["prompt"]
        said = [
            p for p, phrases in URGENCY.items() if any(f and f in row["prompt"] for f in phrases)
        ]
        assert said in ([ticket["priority"]], []), row
    assert {t["category"] for t in tickets} == set(PROBLEMS)
    assert {t["priority"] for t in tickets} == set(URGENCY)
    assert {t["product"] for t in tickets} == set(PRODUCTS)


def test_no_sentence_belongs_to_two_categories_or_priorities() -> None:
    for groups in (PROBLEMS, URGENCY, LENGTHS):
        phrases = [phrase for group in groups.values() for phrase in group]
        assert len(phrases) == len(set(phrases))


def test_calendar_lines_say_what_the_request_says() -> None:
    for row in CALENDAR.split(480, 60, seed=1)[0]:
        line = re.fullmatch(
            r"(\w{3}) \| (\d\d):(\d\d) \| (\d+) \| (\w+) \| (.+)", row["completion"]
        )
        assert line is not None, row
        day, hour, minute, minutes, person, topic = line.groups()
        assert any(d.startswith(day) and d in row["prompt"] for d in DAYS)
        assert any(length in row["prompt"] for length in LENGTHS[int(minutes)])
        assert person in PEOPLE
        assert topic in TOPICS
        assert person in row["prompt"]
        assert topic in row["prompt"]
        assert 8 <= int(hour) <= 17
        assert int(minute) % 15 == 0


def test_a_spoken_time_means_one_time_of_the_day() -> None:
    meanings: dict[str, tuple[int, int]] = {}
    for hour, minute in product(range(8, 18), (0, 15, 30, 45)):
        for seed in range(20):
            said = _spoken_time(random.Random(seed), hour, minute)
            assert meanings.setdefault(said, (hour, minute)) == (hour, minute)
    assert meanings["half past two"] == (14, 30)
    assert meanings["quarter to one"] == (12, 45)
    assert meanings["12 pm"] == (12, 0)
    assert meanings["quarter to six"] == (17, 45)
    assert len(HOURS) == 12


def test_rows_are_written_as_jsonl(tmp_path: Path) -> None:
    rows = TICKET.split(3, 1, seed=0)[0]
    write_rows(rows, tmp_path / "new" / "train.jsonl")
    lines = (tmp_path / "new" / "train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
