"""Evaluation: does the model answer as the row does, and how likely is that answer to it?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from tqdm import tqdm
from transformers import GenerationMixin, PreTrainedTokenizerBase

from guilomo_train.adapters import put_on
from guilomo_train.base import check_tokens, load_base
from guilomo_train.config import EvalConfig
from guilomo_train.data import load_rows
from guilomo_train.data.rendering import encode, prompt_ids
from guilomo_train.endings import end_tokens, written_ends
from guilomo_train.limits import enough_memory
from guilomo_train.loss import completion_nll
from guilomo_train.scoring import Scores, expected_text, score


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
    completions = [expected_text(row) for row in rows]
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


def evaluate_adapter(
    base_name: str,
    data: str,
    adapter: str | None,
    dtype: str,
    config: EvalConfig,
    quantize: str = "none",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Scores, list[dict[str, str]]]:
    """Scores an adapter folder, or the base alone.

    Returns:
        The scores and, for each row, what was generated and what was expected.

    Raises:
        TrainError, AdapterError: the base, the data or the adapter cannot be used.
    """
    base = load_base(
        base_name, dtype, quantize, revision=revision, trust_remote_code=trust_remote_code
    )
    rows = load_rows(data, base.tokenizer, config.eval_rows)
    model: Any = base.model
    if adapter is not None:
        model, _ = put_on(base.model, Path(adapter))
    with enough_memory("the evaluation", less_memory(config)):
        scores, texts = evaluate(model, base.tokenizer, rows, config)
    answers = [
        {"generated": text, "answer": answer}
        for text, answer in zip(texts, rows["answer"], strict=True)
    ]
    return scores, answers


def less_memory(config: EvalConfig) -> str:
    """What to lower when memory runs out in an evaluation."""
    return (
        f"lower --eval_batch_size ({config.eval_batch_size}) "
        f"or --max_new_tokens ({config.max_new_tokens})"
    )
