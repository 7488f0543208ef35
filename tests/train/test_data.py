"""Rows in every form people have become prompt and completion; bad ones say where they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from guilomo_train.config import CommonConfig
from guilomo_train.data import load_rows, search_rows
from guilomo_train.errors import DataError

PROMPT = [{"role": "user", "content": "2 + 2?"}]
COMPLETION = [{"role": "assistant", "content": "4"}]


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_base)


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?", "completion": "4"},
        {"prompt": PROMPT, "completion": COMPLETION},
        {"messages": PROMPT + COMPLETION},
        {"instruction": "2 + 2?", "output": "4"},
        {"instruction": "2 + 2?", "input": "", "output": "4"},
    ],
)
def test_every_form_gives_the_same_row(
    row: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (loaded,) = load_rows(write(tmp_path / "rows.jsonl", [row]), tokenizer)
    assert loaded.pop("where").endswith("rows.jsonl, line 1")
    assert loaded == {"prompt": PROMPT, "completion": COMPLETION, "answer": "4"}


def test_alpaca_input_follows_the_instruction_and_answer_is_kept(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    row = {"instruction": "Add.", "input": "2 and 2", "output": "It is 4", "answer": 4}
    (loaded,) = load_rows(write(tmp_path / "rows.jsonl", [row]), tokenizer)
    assert loaded["prompt"][0]["content"] == "Add.\n\n2 and 2"
    assert loaded["answer"] == "4"


def test_without_a_chat_template_rows_stay_text(tmp_path: Path, tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = None
    source = write(tmp_path / "rows.jsonl", [{"messages": PROMPT + COMPLETION}])
    (loaded,) = load_rows(source, tokenizer)
    del loaded["where"]
    assert loaded == {"prompt": "2 + 2?", "completion": "4", "answer": "4"}


def test_a_data_set_is_loaded_by_name_and_split(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = tmp_path / "sums"
    folder.mkdir()
    write(folder / "train.jsonl", [{"prompt": f"{i}", "completion": "x"} for i in range(5)])
    write(folder / "test.jsonl", [{"prompt": "2 + 2?", "completion": "4"}])
    assert len(load_rows(str(folder), tokenizer)) == 5
    assert load_rows(f"{folder}:test", tokenizer)[0]["prompt"] == PROMPT


def test_a_limit_draws_rows_by_the_seed(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "p", "completion": str(i)} for i in range(50)]
    source = write(tmp_path / "rows.jsonl", rows)
    drawn = [load_rows(source, tokenizer, 3, seed)["answer"] for seed in (0, 1, 1)]
    assert load_rows(source, tokenizer, 3)["answer"] == drawn[0]
    assert drawn[1] == drawn[2] != drawn[0]
    # A file sorted by its answers would give one of them alone.
    assert ["0", "1", "2"] not in drawn
    assert len(set(drawn[0])) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "completion": "b"}\n\n{"prompt": ', "line 3: not JSON"),
        ('{"question": "a"}', r"line 1: has \['question'\], expected prompt and completion"),
        ('["a"]', "line 1: found list"),
        ('{"prompt": "a", "completion": " "}', "line 1: completion is empty"),
        ('{"prompt": 3, "completion": "b"}', "line 1: prompt is 3"),
        ('{"messages": [{"role": "user"}, {"role": "assistant"}]}', "role and content"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
            "not the assistant's",
        ),
        ("\n", "has no rows"),
    ],
)
def test_a_bad_row_is_named(
    text: str, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        load_rows(str(path), tokenizer)


def test_a_missing_file_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        load_rows("nowhere.jsonl", tokenizer)


def test_validation_rows_are_split_off_and_too_few_are_refused() -> None:
    rows = Dataset.from_list([{"answer": str(i)} for i in range(100)])
    common = CommonConfig(base="", train="", output="")
    lower, upper = search_rows(rows, common, None, held_out=True)
    assert upper is not None
    assert (len(lower), len(upper)) == (80, 20)
    assert set(lower["answer"]).isdisjoint(upper["answer"])
    for few, held_out in ((20, True), (7, False)):
        with pytest.raises(DataError, match="too few"):
            search_rows(rows.select(range(few)), common, None, held_out)
    assert search_rows(rows, common, upper, held_out=True) == (rows, upper)
    assert search_rows(rows, common, None, held_out=False) == (rows, None)
