"""What is right: exact match, and accuracy by the answer that a generated text ends with."""

from __future__ import annotations

import re
from collections.abc import Iterable
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
