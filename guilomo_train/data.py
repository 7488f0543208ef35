"""Rows of a data set, brought to one form: `prompt` and `completion` as chat messages, `answer`.

    {"prompt": "...", "completion": "..."}                     both may be lists of messages
    {"messages": [..., {"role": "assistant", ...}]}            the last message is the completion
    {"conversations": [{"from": "human", "value": ...}, ...]}  ShareGPT; likewise
    {"instruction": "...", "input": "...", "output": "..."}    Alpaca; input may be missing

Beside a text as prompt, `system` is a system message and `history` the turns before, pairs of
texts. `answer` is what an evaluation compares with; it is the completion where a row has none. Rows
stay plain text for a tokenizer without chat template.

What would change what is learned and is not known here (tools, images, weights of messages) is
refused by its name. Other columns, such as a row's number or source, are left alone.
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
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from guilomo_train import sources
from guilomo_train.config import VALIDATION_SHARE, CommonConfig
from guilomo_train.errors import DataError
from guilomo_train.limits import writing

FORMS = "prompt and completion, or messages, or conversations, or instruction and output"
_IN_MEMORY = 1000  # rows; more are in a file
_FEWEST_ROWS = 8  # that a search can judge by
# What a key that other rows need has in one that does not.
_EMPTY: tuple[Any, ...] = (None, "", [], {})
# Columns by which other trainers change what a row teaches.
_REFUSED = (
    "tools", "functions", "documents", "chat_template_kwargs",
    "image", "images", "audio", "audios", "video", "videos",
    "reasoning_content", "weight", "loss_mask",
)  # fmt: skip
_SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
             "system": "system"}  # fmt: skip
# What chat templates raise of themselves for messages that they do not like.
_OF_TEMPLATES = (TemplateError, TypeError, ValueError, LookupError, AttributeError)


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
        Columns `prompt`, `completion`, `answer` (text) and `where` (the row's file and line); with
        `loss_on` all, `input_ids` and `labels` as well.

    Raises:
        DataError: the source cannot be read, or a row has none of the known forms or is one that
            the base's chat template rejects.
        OutputError: that file cannot be written.
    """
    chat = tokenizer.chat_template is not None
    if loss_on == "all" and not chat:
        raise DataError("--loss_on all: the base has no chat template, so its rows have no turns")
    sources_ = [source] if isinstance(source, str) else list(source)

    def rows() -> Iterator[dict[str, Any]]:
        for where, row in chosen(sources_, limit, seed, weights):
            yield in_form(where, row, tokenizer, loss_on)

    return _as_dataset(rows())


def in_form(
    where: str, row: Any, tokenizer: PreTrainedTokenizerBase, loss_on: Literal["last", "all"]
) -> dict[str, Any]:
    """One row of a source as `load_rows` has it.

    Raises:
        DataError: it has none of the known forms, or the base's chat template rejects it.
    """
    chat = tokenizer.chat_template is not None
    formed = {**_row(row, where, chat), "where": where}
    if chat:
        _check_template(formed, tokenizer)
    if loss_on == "all":
        formed["input_ids"], formed["labels"] = encode_all_turns(tokenizer, formed)
    return formed


def chosen(
    sources_: list[str], limit: int | None, seed: int, weights: Sequence[float] | None
) -> Iterator[tuple[str, Any]]:
    """The rows to load, of all sources, as `sources.read` gives them; arguments as `load_rows`.

    Raises:
        DataError: a source cannot be read, or has no rows.
    """
    if limit is None and weights is None:
        for source in sources_:
            empty = True
            for found in sources.read(source):
                empty = False
                yield found
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
        yield from _numbered((row for source in sources_ for row in sources.read(source)), drawn)
        return
    for source, count, number in zip(sources_, counts, wanted, strict=True):
        yield from _numbered(sources.read(source), _draw(count, number, seed))


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


def _numbered(rows: Iterator[tuple[str, Any]], numbers: Sequence[int]) -> Iterator[tuple[str, Any]]:
    """The rows of these numbers, in the order of the numbers."""
    if numbers == list(range(len(numbers))):
        yield from itertools.islice(rows, len(numbers))
        return
    wanted = set(numbers)
    kept = {number: row for number, row in enumerate(rows) if number in wanted}
    yield from (kept[number] for number in numbers)


def _as_dataset(rows: Iterator[dict[str, Any]]) -> Dataset:
    """Few rows in memory, more in a file."""
    first = list(itertools.islice(rows, _IN_MEMORY))
    if len(first) < _IN_MEMORY:
        return Dataset.from_list(first)
    path = Path(tempfile.mkdtemp(dir=_folder())) / "rows.arrow"
    with writing(path), closing(ArrowWriter(path=str(path))) as writer:
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


def encode_all_turns(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]
) -> tuple[list[int], list[int]]:
    """Token ids of a row and its labels, which are -100 outside of the assistant's turns.

    A turn is what the template renders after what it renders before the turn, opened for an
    answer.

    Raises:
        DataError: the template renders a turn otherwise when others follow.
    """
    messages = row["prompt"] + row["completion"]

    def ids_of(part: list[Any], opened: bool) -> list[int]:
        encoded = tokenizer.apply_chat_template(
            part, add_generation_prompt=opened, return_dict=True
        )
        return encoded["input_ids"]

    ids = ids_of(messages, False)
    labels = [-100] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = common_length(ids_of(messages[:turn], True), ids) if turn else 0
        upto = ids_of(messages[: turn + 1], False)
        if ids[: len(upto)] != upto:
            raise DataError(
                f"{row['where']}: the base's chat template renders message {turn + 1} otherwise "
                "when others follow, so the loss cannot be on it: give --loss_on last"
            )
        labels[start : len(upto)] = ids[start : len(upto)]
    return ids, labels


def common_length(first: list[int], second: list[int]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


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


def _row(row: Any, where: str, chat: bool) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: found {type(row).__name__}, expected an object with {FORMS}")
    for key in _REFUSED:
        if row.get(key) not in _EMPTY:
            raise DataError(f"{where}: has {key!r}, which is not used here: leave it out")
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
    elif isinstance(row.get("messages"), list) and len(row["messages"]) >= 2:
        prompt, completion = row["messages"][:-1], row["messages"][-1:]
    elif isinstance(row.get("conversations"), list) and len(row["conversations"]) >= 2:
        turns = [_of_sharegpt(turn, where) for turn in row["conversations"]]
        prompt, completion = turns[:-1], turns[-1:]
    elif "instruction" in row and "output" in row:
        prompt, completion = _instruction(row, where), row["output"]
    else:
        raise DataError(f"{where}: has {sorted(map(str, row))}, expected {FORMS}")
    before = _before(row, where)
    if before and not isinstance(prompt, str):
        raise DataError(
            f"{where}: has 'system' or 'history' beside messages, expected them among the messages"
        )
    prompt = before + _messages(prompt, "user", f"{where}: prompt")
    completion = _messages(completion, "assistant", f"{where}: completion", learned=True)
    if completion[-1]["role"] != "assistant":
        raise DataError(f"{where}: the last message is not the assistant's")
    text = completion[-1]["content"]
    answer = text if row.get("answer") is None else _text(str(row["answer"]), f"{where}: answer")
    if chat:
        return {"prompt": prompt, "completion": completion, "answer": answer}
    plain = "\n".join(m["content"] for m in prompt)
    return {"prompt": plain, "completion": text, "answer": answer}


def _instruction(row: dict[str, Any], where: str) -> str:
    instruction = _text(row["instruction"], f"{where}: instruction")
    given = _text(row.get("input") or "", f"{where}: input")
    return f"{instruction}\n\n{given}" if given else instruction


def _before(row: dict[str, Any], where: str) -> list[dict[str, str]]:
    """The messages that `system` and `history` stand for."""
    messages = []
    if row.get("system"):
        messages.append({"role": "system", "content": _text(row["system"], f"{where}: system")})
    history = row.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"{where}: history is {history!r}, expected a list of pairs of texts")
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2:
            raise DataError(f"{where}: history has {turn!r}, expected a pair of texts")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": _text(text, f"{where}: history")})
    return messages


def _of_sharegpt(turn: Any, where: str) -> Any:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn  # as other messages, or refused as one of them
    if not isinstance(turn["from"], str) or turn["from"] not in _SHAREGPT:
        raise DataError(
            f"{where}: conversations has a turn from {turn['from']!r}, expected "
            f"{', '.join(_SHAREGPT)}"
        )
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {"role": _SHAREGPT[turn["from"]], "content": turn.get("value"), **others}


def _check_template(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Renders a row as training and generation will; templates have rules of their own."""
    messages = row["prompt"] + row["completion"]
    try:
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    except _OF_TEMPLATES as e:
        roles = [message["role"] for message in messages]
        raise DataError(
            f"{row['where']}: the base's chat template rejects messages of the roles {roles}: {e}"
        ) from None
    # The last line: templates may move what comes before it, such as reasoning.
    if messages[-1]["content"].strip().splitlines()[-1].strip() not in rendered:
        raise DataError(
            f"{row['where']}: the base's chat template leaves out the completion's text; it may "
            "expect content in another form than text"
        )


def _messages(value: Any, role: str, where: str, learned: bool = False) -> list[dict[str, str]]:
    """Messages of a text or a list; `learned` says whether the last one is what a row teaches."""
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} is {value!r}, expected text or a list of messages")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where} has {message!r}, expected an object with role and content")
        for key, given in message.items():
            if key == "weight" and given == (1 if learned else 0):
                continue  # what happens anyway
            if key not in ("role", "content") and given not in _EMPTY:
                raise DataError(f"{where} has a message with {key!r}, which is not used here")
        if not isinstance(message.get("content"), str):
            raise DataError(f"{where} has {message!r}, expected an object with role and content")
        content = _text(message["content"], where)
        messages.append({"role": message["role"], "content": content})
    if not messages[-1]["content"].strip():
        raise DataError(f"{where} is empty")
    return messages


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} is {value!r}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        broken = value[e.start].encode("unicode_escape").decode()
        raise DataError(
            f"{where} has half a character ({broken}, at {e.start}), as a text that was cut within "
            "an emoji: no tokenizer can read it"
        ) from None
    return value
