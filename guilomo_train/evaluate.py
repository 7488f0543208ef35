"""Evaluation: does the model answer as the row does, and how likely is that answer to it?"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from tqdm import tqdm
from transformers import GenerationMixin, PreTrainedTokenizerBase

from guilomo_train.config import EvalConfig
from guilomo_train.endings import end_tokens, written_ends
from guilomo_train.models import check_tokens
from guilomo_train.rendering import encode, prompt_ids
from guilomo_train.trainer import completion_nll


@dataclass(frozen=True)
class Scores:
    """Shares of rows, 0 to 1, and a loss.

    Attributes:
        exact_match: the generated text is the completion.
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


@torch.inference_mode()
def evaluate(
    model: GenerationMixin,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    config: EvalConfig,
) -> tuple[Scores, list[str]]:
    """Generates an answer to each row and scores it.

    Args:
        model: a causal language model (a PEFT model too).
        tokenizer: its tokenizer.
        rows: as `data.load_rows` gives them.
        config: batch size and length.

    Returns:
        The scores, and the generated texts in the rows' order.

    Raises:
        BaseError: a prompt has a token that the base has no embedding of.
    """
    model.eval()
    prompts = [prompt_ids(tokenizer, row) for row in rows]
    check_tokens(model, tokenizer, prompts)
    ends = end_tokens(model, tokenizer) | stops_of(model)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    for start in tqdm(range(0, len(order), config.eval_batch_size), desc="evaluate"):
        batch = order[start : start + config.eval_batch_size]
        padded = tokenizer.pad(
            {"input_ids": [prompts[i] for i in batch]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        generated = model.generate(
            **padded,
            max_new_tokens=config.max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(ends),
            pad_token_id=tokenizer.pad_token_id,
        )[:, padded["input_ids"].shape[1] :]
        decoded = tokenizer.batch_decode(generated, skip_special_tokens=True)
        for i, text in zip(batch, decoded, strict=True):
            texts[i] = text.strip()
    completions = [completion_text(row["completion"]) for row in rows]
    loss = completion_loss(model, tokenizer, rows, config.eval_batch_size)
    return score(texts, completions, rows["answer"], loss), texts


@torch.inference_mode()
def completion_loss(
    model: GenerationMixin, tokenizer: PreTrainedTokenizerBase, rows: Dataset, batch_size: int
) -> float:
    """Negative log-likelihood of the rows' completions per token, in nats."""
    written = written_ends(tokenizer)
    encoded = [encode(tokenizer, row, written) for row in rows]
    encoded.sort(key=lambda ids_labels: len(ids_labels[0]))
    total, count = 0.0, 0
    for start in tqdm(range(0, len(encoded), batch_size), desc="loss"):
        batch = encoded[start : start + batch_size]
        padded = tokenizer.pad(
            {"input_ids": [ids for ids, _ in batch]}, padding_side="right", return_tensors="pt"
        )
        labels = torch.full_like(padded["input_ids"], -100)
        for row, (_, of_row) in zip(labels, batch, strict=True):
            row[: len(of_row)] = torch.tensor(of_row)
        inputs = {**padded, "labels": labels}
        total += completion_nll(
            model, {k: v.to(model.device) for k, v in inputs.items()}, num_items=1
        ).item()
        count += int((labels[:, 1:] != -100).sum())
    return total / count


def stops_of(model: nn.Module) -> set[int]:
    """The stop tokens of a model's active adapter; none without an adapter."""
    if not isinstance(model, PeftModel):
        return set()
    return set(getattr(model.active_peft_config, "stop_token_ids", None) or ())


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


def completion_text(completion: Any) -> str:
    """The text of a completion, given as text or as messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
