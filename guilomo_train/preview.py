"""How training will read rows: what `guilomo-train data` shows, without the base's weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from guilomo_train.base import load_tokenizer
from guilomo_train.config import PreviewConfig
from guilomo_train.data.rendering import DROPPED, NOT_LEARNED, encode
from guilomo_train.data.rows import chosen, in_form
from guilomo_train.endings import written_ends
from guilomo_train.errors import DataError


@dataclass
class _Found:
    """What the rows are, one entry a row but for those that say what and where."""

    lengths: list[int] = field(default_factory=list)
    learned: list[int] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def preview(config: PreviewConfig) -> Iterator[str]:
    """Lines for people: some rows as the model will see them, then counts and lengths.

    Raises:
        BaseError: there is no such tokenizer.
        DataError: a source cannot be read, or rows of it are ones that training refuses.
    """
    tokenizer = load_tokenizer(config.base, config.revision, config.trust_remote_code)
    written = written_ends(tokenizer)
    found = _Found()
    for _, where, raw in chosen(config.train, config.train_rows, config.seed, config.train_weights):
        try:
            row = in_form(where, raw, tokenizer, config.loss_on)
        except DataError as e:
            found.refused.append(str(e))
            continue
        if config.loss_on == "all":
            ids, labels = row["input_ids"], row["labels"]
        else:
            ids, labels = encode(tokenizer, row, written)
        scored = [label != NOT_LEARNED for label in labels]
        if len(found.lengths) < config.show:
            yield f"{where} (what is learned stands in [[ ]]):\n"
            yield _marked(tokenizer, ids[: config.max_length], scored) + "\n"
        if row.get("dropped"):
            found.dropped.append(f"{row['dropped']!r} in {where}")
        found.lengths.append(len(ids))
        found.learned.append(sum(scored[: config.max_length]))
        if not any(scored[: config.max_length]):
            found.lost.append(where)
        elif len(ids) > config.max_length:
            found.cut.append(where)
    yield from _summary(found, config)
    if found.refused:
        rows = len(found.refused) + len(found.lengths)
        raise DataError(
            f"{len(found.refused)} of {rows} rows are refused, first {found.refused[0]}"
        )


def _marked(tokenizer: PreTrainedTokenizerBase, ids: list[int], scored: list[bool]) -> str:
    text = ""
    for learned, part in groupby(zip(ids, scored, strict=False), key=lambda pair: pair[1]):
        decoded = tokenizer.decode([token for token, _ in part])
        text += f"[[{decoded}]]" if learned else decoded
    return text


def _summary(found: _Found, config: PreviewConfig) -> Iterator[str]:
    lengths = sorted(found.lengths)
    if not lengths:
        return
    total, learned = sum(lengths), sum(found.learned)
    yield (
        f"{len(lengths):,} rows of {total:,} tokens, of which {learned:,} ({learned / total:.0%}) "
        "are learned"
    )
    yield (
        f"tokens of a row: half have {lengths[len(lengths) // 2]} or fewer, 95 of 100 "
        f"{lengths[int(0.95 * (len(lengths) - 1))]} or fewer, the longest {lengths[-1]}"
    )
    if found.lost:
        yield (
            f"left out: {len(found.lost)} have no token to learn within --max_length "
            f"{config.max_length}, first {found.lost[0]}"
        )
    if found.cut:
        yield (
            f"cut: {len(found.cut)} go on after --max_length {config.max_length} and teach no end, "
            f"first {found.cut[0]}"
        )
    if found.dropped:
        yield (
            f"begun otherwise: {len(found.dropped)} have an end of the prompt that {DROPPED}, "
            f"first {found.dropped[0]}"
        )
    for message in found.refused[:10]:
        yield f"refused: {message}"
