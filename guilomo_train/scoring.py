"""What is right: exact match, and accuracy by the answer that a generated text ends with; and how
sure a difference of two such shares is."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Scores:
    """Shares of rows, 0 to 1, and a loss.

    Attributes:
        exact_match: the generated text is the completion, as the chat template writes it.
        accuracy: the answer that the generated text ends with is the row's (`answer`, where it
            has one), so that reasoning before it, or case, does not count.
        majority: accuracy of always giving the most frequent answer.
        loss: negative log-likelihood of the completions, per token, in nats. It tells models
            apart that answer the same rows right.
        rows: how many were asked.
    """

    exact_match: float
    accuracy: float
    majority: float
    loss: float
    rows: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def sentence(self) -> str:
        """What people read of it."""
        return (
            f"{self.rows} rows: exact match {self.exact_match:.3f}, accuracy "
            f"{self.accuracy:.3f} (most frequent answer alone {self.majority:.3f}), loss "
            f"{self.loss:.3f}"
        )


def score(texts: list[str], completions: list[str], answers: list[str], loss: float) -> Scores:
    """Compares generated texts with completions and answers; all lists are in the same order."""
    right = hits(texts, completions, answers)
    majority = max(answers.count(a) for a in set(answers))
    n = len(texts)
    exact, accuracy = sum(right["exact_match"]), sum(right["accuracy"])
    return Scores(exact / n, accuracy / n, majority / n, loss, n)


def hits(texts: list[str], completions: list[str], answers: list[str]) -> dict[str, list[int]]:
    """1 for each row that `exact_match` and `accuracy` count, 0 for the others."""
    return {
        "exact_match": [
            int(t.strip() == c.strip()) for t, c in zip(texts, completions, strict=True)
        ],
        "accuracy": [
            int(found == _plain(a))
            for found, a in zip(answers_given(texts, answers), answers, strict=True)
        ],
    }


def answers_given(texts: list[str], answers: Iterable[str]) -> list[str | None]:
    """The longest of the answers that each text ends with, as whole words; None for none of them.

    All answers of a data set take part, so that "not equivalent" is no "equivalent" where both
    are. Case and a final stop do not count.
    """
    known = {_plain(answer) for answer in answers}
    return [_answer_given(_plain(text), known) for text in texts]


def _answer_given(text: str, known: set[str]) -> str | None:
    ends = (text[i:] for i in range(len(text) + 1) if _may_begin(text, i))
    return next((end for end in ends if end in known), None)


def _may_begin(text: str, i: int) -> bool:
    """Whether an answer may begin at a place of a text: not within a word or a number."""
    if i in (0, len(text)):
        return True
    before, first = text[i - 1], text[i]
    if first.isdecimal():  # not the 5 of -5, 1.5 or 1,500; but that of x=5 or 3 - 5
        sign = before in "-\N{MINUS SIGN}" and not text[: i - 1].rstrip()[-1:].isalnum()
        part = before in ".," and text[i - 2 : i - 1].isdecimal()
        return not (before.isalnum() or sign or part)
    if _WITHOUT_SPACES.match(first) or _WITHOUT_SPACES.match(before):
        return True
    return not (_is_word(before) and _is_word(first))


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


# Scripts that put no space between words: Thai, Lao, Burmese, Khmer, Japanese and Chinese.
_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
)


def _plain(text: str) -> str:
    return text.strip().rstrip(".!。").strip().casefold()


def expected_text(row: dict[str, Any]) -> str:
    """What a model that has learned a row answers: its completion, as the template writes it."""
    if isinstance(row["completion"], str):
        return row["completion"]
    return row["expected"] if "expected" in row else row["completion"][-1]["content"]


def paired_error(mine: Sequence[int], theirs: Sequence[int]) -> float:
    """The standard error of the difference of two shares of the same rows.

    A row's difference is 1, 0 or -1, so that rows which both answer alike, however hard they are,
    add nothing to the error. Smoothed as a single share's: one more row gained, and one lost.

    Args:
        mine, theirs: for each row 1 if it counts, else 0.
    """
    differences = [a - b for a, b in zip(mine, theirs, strict=True)] + [1, -1]
    mean = sum(differences) / len(differences)
    variance = sum(d * d for d in differences) / len(differences) - mean * mean
    return math.sqrt(variance / len(mine))


def unpaired_error(*scores: tuple[float, int]) -> float:
    """The standard error of the difference of two shares of different rows.

    Each is smoothed (one more row of each kind): 0 of 8 is not certain.

    Args:
        scores: of each the share, 0 to 1, and the number of rows.
    """
    variance = 0.0
    for share, rows in scores:
        smooth = (share * rows + 1) / (rows + 2)
        variance += smooth * (1 - smooth) / rows
    return math.sqrt(variance)
