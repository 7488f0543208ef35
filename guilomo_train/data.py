"""Rows of a data set, brought to one form: `prompt` and `completion` as chat messages, `answer`.

    {"prompt": "...", "completion": "..."}                     both may be lists of messages
    {"messages": [..., {"role": "assistant", ...}]}            the last message is the completion
    {"instruction": "...", "input": "...", "output": "..."}    Alpaca; input may be missing

`answer` is what an evaluation compares with; it is the completion where a row has none. Rows stay
plain text for a tokenizer without chat template.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from guilomo_train.config import VALIDATION_SHARE, CommonConfig
from guilomo_train.errors import DataError

FORMS = "prompt and completion, or messages, or instruction and output"
_FEWEST_ROWS = 8  # that a search can judge by


def load_rows(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Loads a data set in one form.

    Args:
        source: a .jsonl file, or NAME, NAME:SPLIT or NAME:CONFIG:SPLIT of a data set that the
            `datasets` library can load.
        tokenizer: its chat template decides whether rows become messages.
        limit: rows to keep, drawn at random: files are often sorted by their answers.
        seed: of that draw.

    Returns:
        Columns `prompt`, `completion`, `answer` (text) and `where` (the row's file and line).

    Raises:
        DataError: the source cannot be read, or a row has none of the known forms or is one that
            the base's chat template rejects.
    """
    chat = tokenizer.chat_template is not None
    is_file = source.endswith((".jsonl", ".json")) or Path(source).is_file()
    raw = _read_jsonl(Path(source)) if is_file else _read_named(source)
    rows = [{**_row(row, where, chat), "where": where} for where, row in raw]
    if not rows:
        raise DataError(f"{source}: has no rows")
    if chat:
        for row in rows:
            _check_template(row, tokenizer)
    dataset = Dataset.from_list(rows)
    if limit is not None and limit < len(dataset):
        dataset = dataset.shuffle(seed=seed).select(range(limit))
    return dataset


def search_rows(
    train: Dataset, common: CommonConfig, validation: Dataset | None, held_out: bool
) -> tuple[Dataset, Dataset | None]:
    """Rows of a search's two levels.

    Args:
        train: the training rows.
        common: the settings.
        validation: rows of the upper level; None splits a share off `train`.
        held_out: whether the upper level has rows of its own; else its rows are None.

    Raises:
        DataError: the upper level has too few rows.
    """
    lower, upper = train, validation
    if held_out and validation is None:
        share = common.validation_share or VALIDATION_SHARE
        parts = train.train_test_split(test_size=share, seed=common.seed)
        lower, upper = parts["train"], parts["test"]
    judging = lower if upper is None else upper
    if len(judging) < _FEWEST_ROWS:
        remedy = ", a larger --validation_share or --validation" if held_out else ""
        raise DataError(
            f"{len(judging)} rows to validate on are too few for a search, expected at least "
            f"{_FEWEST_ROWS}: give more rows{remedy}"
        )
    return lower, upper


def _read_jsonl(path: Path) -> list[tuple[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: cannot be read as text ({e})") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append((f"{path}, line {number}", json.loads(line)))
        except ValueError as e:
            raise DataError(f"{path}, line {number}: not JSON ({e})") from None
    return rows


def _read_named(source: str) -> list[tuple[str, Any]]:
    name, *rest = source.split(":")
    split = rest[-1] if rest else "train"
    config = rest[0] if len(rest) == 2 else None
    try:
        dataset = load_dataset(name, config, split=split)
    except (DatasetsError, FileNotFoundError, ValueError, ConnectionError) as e:
        reason = str(e.__cause__ or e).strip().splitlines()[0]
        raise DataError(f"{source}: not a file, and not a data set to load: {reason}") from None
    return [(f"{source}, row {i}", row) for i, row in enumerate(dataset)]


def _row(row: Any, where: str, chat: bool) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: found {type(row).__name__}, expected an object with {FORMS}")
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
    elif isinstance(row.get("messages"), list) and len(row["messages"]) >= 2:
        prompt, completion = row["messages"][:-1], row["messages"][-1:]
    elif "instruction" in row and "output" in row:
        given = row.get("input") or ""
        prompt = f"{row['instruction']}\n\n{given}" if given else row["instruction"]
        completion = row["output"]
    else:
        raise DataError(f"{where}: has {sorted(row)}, expected {FORMS}")
    prompt = _messages(prompt, "user", f"{where}: prompt")
    completion = _messages(completion, "assistant", f"{where}: completion")
    if completion[-1]["role"] != "assistant":
        raise DataError(f"{where}: the last message is not the assistant's")
    text = completion[-1]["content"]
    answer = row.get("answer")
    answer = text if answer is None else str(answer)
    if chat:
        return {"prompt": prompt, "completion": completion, "answer": answer}
    plain = "\n".join(m["content"] for m in prompt)
    return {"prompt": plain, "completion": text, "answer": answer}


def _check_template(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Renders a row as training and generation will; templates have rules of their own on roles."""
    try:
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
    except TemplateError as e:
        roles = [message["role"] for message in row["prompt"] + row["completion"]]
        raise DataError(
            f"{row['where']}: the base's chat template rejects messages of the roles {roles}: {e}"
        ) from None


def _messages(value: Any, role: str, where: str) -> list[dict[str, str]]:
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} is {value!r}, expected text or a list of messages")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise DataError(f"{where} has {message!r}, expected an object with role and content")
        messages.append({"role": message["role"], "content": message["content"]})
    if not messages[-1]["content"].strip():
        raise DataError(f"{where} is empty")
    return messages
