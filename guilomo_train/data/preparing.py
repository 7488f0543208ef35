"""Tokenised rows made ready to learn from: each with its end, none longer than it may be.

TRL cuts rows too, and says nothing of it. Here people are told which rows lose what.
"""

from __future__ import annotations

from collections.abc import Callable

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from guilomo_train.data.rendering import DROPPED, NOT_LEARNED
from guilomo_train.endings import written_ends
from guilomo_train.errors import DataError

_TOKENS = ("input_ids", "labels")  # columns with an entry a token


def prepare(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    keep_end: bool,
    warn: Callable[[str], None],
) -> Dataset:
    """Rows with their ends, cut to a length; those with nothing left to learn are left out.

    Args:
        rows: `input_ids` and `labels` (-100: not learned), of chats `dropped` as well, and `where`
            they stand, if that is known: as `data.load_rows` and TRL's trainer give them.
        tokenizer: of the base. Where its chat template writes no end of an answer, the rows get
            the end token.
        max_length: tokens that a row may have; None for any number.
        keep_end: cut rows at their beginning, not at their end.
        warn: is told, in a sentence each, of rows that are cut, left out, or begun otherwise than
            answers are asked for.

    Raises:
        DataError: no row has a token to learn.
    """
    if "dropped" in rows.column_names:  # of plain texts TRL says it
        unlike = [i for i, end in enumerate(rows["dropped"]) if end]
        if unlike:
            what = f"have an end of the prompt that {DROPPED}"
            warn(f"{_counted(rows, unlike, what)}, there {rows['dropped'][unlike[0]]!r}")
    if not written_ends(tokenizer):
        end = [tokenizer.eos_token_id]
        rows = rows.map(lambda row: {key: row[key] + end for key in _TOKENS})
    if max_length is None:
        return rows
    long = [i for i, ids in enumerate(rows["input_ids"]) if len(ids) > max_length]
    if not long:
        return rows
    span = slice(-max_length, None) if keep_end else slice(None, max_length)
    cut = rows.map(lambda row: {key: row[key][span] for key in _TOKENS})
    learned = [i for i, labels in enumerate(cut["labels"]) if any(x != NOT_LEARNED for x in labels)]
    if len(learned) < len(cut):
        lost = sorted(set(range(len(cut))) - set(learned))
        what = f"have no token of their completion within --max_length {max_length}"
        found = _counted(rows, lost, what)
        if not learned:
            raise DataError(f"{found}; raise --max_length or shorten the prompts")
        warn(f"{found}; they are left out")
    endless = [] if keep_end else sorted(set(long) & set(learned))
    if endless:
        what = f"go on after --max_length {max_length}, where their completion is cut"
        warn(f"{_counted(rows, endless, what)}: they teach no end")
    return cut.select(learned)


def _counted(rows: Dataset, which: list[int], what: str) -> str:
    first = f" (first: {rows[which[0]]['where']})" if "where" in rows.column_names else ""
    return f"{len(which)} of {len(rows)} rows {what}{first}"
