"""Rows of data sets, chosen, mixed and brought to one form, that of their chats and tokens.

messages.py reads a row and rendering.py renders it. Rows stay plain text for a tokenizer without
chat template.
"""

from __future__ import annotations

import atexit
import itertools
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerBase

from guilomo_train.config import VALIDATION_SHARE, CommonConfig
from guilomo_train.data import sources
from guilomo_train.data.messages import Chat, Message, read_row
from guilomo_train.data.rendering import (
    NOT_LEARNED,
    check_template,
    encode_all_turns,
    encode_last_turn,
)
from guilomo_train.errors import DataError
from guilomo_train.limits import writing

_IN_MEMORY = 200  # rows; more are in a file, and so many are written at once
_FEWEST_ROWS = 8  # that a search can judge by


def load_rows(
    source: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
    seed: int = 0,
    weights: Sequence[float] | None = None,
    loss_on: Literal["last", "all"] = "last",
) -> Dataset:
    """Loads a data set in one form. Many rows are kept in a file, below the folder for temporary
    ones (TMPDIR), so that they may be more than memory holds.

    Args:
        source: a file, a folder or a data set's name, as `sources.read` takes it; or several.
        tokenizer: its chat template decides whether rows become messages.
        limit: rows to keep, drawn at random: files are often sorted by their answers.
        seed: of that draw.
        weights: shares of the rows that come from each source. The mixture is as large as it can
            be without a row twice. None for all rows of all.
        loss_on: "all" for the turns of the assistant before the last one, too.

    Returns:
        Columns `prompt`, `completion`, `answer` (text) and `where` (the row's file and line); of
        chats also `input_ids`, `labels` (-100: not learned), `expected`, the completion as the
        template writes it, `dropped`, the end of the prompt that the whole row does not have, and
        `chat`, which has a row's chat as JSON text where roles and
        contents do not say all of it, for `messages.chat_of`.

    Raises:
        DataError: the source cannot be read, or a row has none of the known forms or is one that
            the base's chat template rejects.
        OutputError: that file cannot be written.
    """
    chat = tokenizer.chat_template is not None
    if loss_on == "all" and not chat:
        raise DataError("--loss_on all: the base has no chat template, so its rows have no turns")
    sources_ = [source] if isinstance(source, str) else list(source)
    places = []  # of the rows in their order, which is that of the draw

    def rows() -> Iterator[dict[str, Any]]:
        for place, where, row in chosen(sources_, limit, seed, weights):
            places.append(place)
            yield in_form(where, row, tokenizer, loss_on)

    dataset = _as_dataset(rows())
    order = sorted(range(len(places)), key=places.__getitem__)
    return dataset if order == list(range(len(order))) else dataset.select(order)


def in_form(
    where: str, raw: Any, tokenizer: PreTrainedTokenizerBase, loss_on: Literal["last", "all"]
) -> dict[str, Any]:
    """One row of a source as `load_rows` has it.

    Raises:
        DataError: it has none of the known forms, or the base's chat template rejects it.
    """
    chat, answer = read_row(raw, where)
    if tokenizer.chat_template is None:
        return {**_as_text(chat, answer, where), "where": where}
    check_template(tokenizer, chat, where)
    row: dict[str, Any] = {
        "prompt": [_shown(message) for message in chat.prompt],
        "completion": [_shown(message) for message in chat.completion],
        "where": where,
        "chat": chat.to_json() if chat.calls_tools else "",
    }
    ids, labels, row["dropped"] = encode_last_turn(tokenizer, chat)
    learned = [label for label in labels if label != NOT_LEARNED]
    row["expected"] = tokenizer.decode(learned, skip_special_tokens=True).strip()
    if loss_on == "all":
        ids, labels = encode_all_turns(tokenizer, chat, where)
    last = chat.completion[-1]
    text = row["expected"] if "tool_calls" in last else last["content"]
    row["answer"] = text if answer is None else answer
    return {**row, "input_ids": ids, "labels": labels}


def _as_text(chat: Chat, answer: str | None, where: str) -> dict[str, Any]:
    if chat.calls_tools:
        raise DataError(
            f"{where}: has tools or calls of tools, which the base has no chat template to write: "
            "take a base with one, or write them into the prompt's and completion's text"
        )
    text = chat.completion[-1]["content"]
    prompt = "\n".join(message["content"] for message in chat.prompt)
    return {"prompt": prompt, "completion": text, "answer": text if answer is None else answer}


def _shown(message: Message) -> dict[str, str]:
    return {"role": message["role"], "content": message["content"]}


def chosen(
    sources_: list[str], limit: int | None, seed: int, weights: Sequence[float] | None
) -> Iterator[tuple[int, str, Any]]:
    """The rows to load, one after another as their sources have them; arguments as `load_rows`.

    Yields:
        A row's place in the order of the draw, where it stands, and the row.

    Raises:
        DataError: a source cannot be read, or has no rows.
    """
    if limit is None and weights is None:
        place = itertools.count()
        for source in sources_:
            empty = True
            for where, row in sources.read(source):
                empty = False
                yield next(place), where, row
            if empty:
                raise DataError(f"{source}: has no rows")
        return
    counts = [sum(1 for _ in sources.read(source)) for source in sources_]
    for source, count in zip(sources_, counts, strict=True):
        if count == 0:
            raise DataError(f"{source}: has no rows")
    wanted = mixture(counts, weights, limit)
    if weights is None:  # one draw over all sources
        drawn = _draw(sum(counts), wanted[0], seed)
        yield from _drawn((row for source in sources_ for row in sources.read(source)), drawn, 0)
        return
    before = 0
    for source, count, number in zip(sources_, counts, wanted, strict=True):
        yield from _drawn(sources.read(source), _draw(count, number, seed), before)
        before += number


def mixture(counts: Sequence[int], weights: Sequence[float] | None, limit: int | None) -> list[int]:
    """How many rows to take of each source; of all together, in one number, without weights.

    Args:
        counts: rows that each has.
        weights: shares, in any unit.
        limit: rows to take at most.
    """
    if weights is None:
        return [min(limit or sum(counts), sum(counts))]
    most = min(count / weight for count, weight in zip(counts, weights, strict=True))
    if limit is not None:
        most = min(most, limit / sum(weights))
    return [max(1, int(most * weight + 1e-9)) for weight in weights]


def _draw(rows: int, number: int, seed: int) -> list[int]:
    if number == rows:
        return list(range(rows))
    numbers = Dataset.from_dict({"number": list(range(rows))})
    return numbers.shuffle(seed=seed)["number"][:number]


def _drawn(
    rows: Iterator[tuple[str, Any]], numbers: Sequence[int], before: int
) -> Iterator[tuple[int, str, Any]]:
    """The rows of these numbers, with their places among them after so many others."""
    place_of = {number: place for place, number in enumerate(numbers, start=before)}
    for number, (where, row) in enumerate(itertools.islice(rows, max(numbers) + 1)):
        if number in place_of:
            yield place_of[number], where, row


def _as_dataset(rows: Iterator[dict[str, Any]]) -> Dataset:
    """Few rows in memory, more in a file."""
    first = list(itertools.islice(rows, _IN_MEMORY))
    if len(first) < _IN_MEMORY:
        return Dataset.from_list(first)
    path = Path(tempfile.mkdtemp(dir=_folder())) / "rows.arrow"
    with (
        writing(path),
        closing(ArrowWriter(path=str(path), writer_batch_size=_IN_MEMORY)) as writer,
    ):
        for row in itertools.chain(first, rows):
            writer.write(row)
        writer.finalize()
    return Dataset.from_file(str(path))


@cache
def _folder() -> str:
    """Where rows are while this process lives."""
    folder = tempfile.mkdtemp(prefix="guilomo-rows-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


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
