"""Scores: what counts as an exact match and as a right answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from guilomo_train.config import EvalConfig
from guilomo_train.evaluate import ends_with_answer, evaluate, prompt_ids, score


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("acceptable", "acceptable", True),
        ("unacceptable", "acceptable", False),
        ("The answer is Answer2.", "answer2", True),
        ("16 - 4 = 12\n#### 12", "12", True),
        ("#### 112", "12", False),
        ("#### 12 or 13", "12", False),
        ("", "yes", False),
        ("C++", "C++", True),
    ],
)
def test_an_answer_is_right_if_the_text_ends_with_it(text: str, answer: str, right: bool) -> None:
    assert ends_with_answer(text, answer) is right


def test_scores_are_shares_of_rows() -> None:
    got = score(["yes", "so, no", "maybe"], ["yes", "no", "yes"], ["yes", "no", "yes"])
    assert (got.exact_match, got.accuracy, got.majority, got.rows) == (1 / 3, 2 / 3, 2 / 3, 3)


def test_batched_generation_is_what_each_prompt_gives_alone(small_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(small_model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    questions = ["Name a colour.", "What is the capital of France? Answer in one word.", "Hi"]
    rows = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": q}],
                "completion": [{"role": "assistant", "content": "-"}],
                "answer": "-",
            }
            for q in questions
        ]
    )
    config = EvalConfig(eval_batch_size=3, max_new_tokens=6)
    _, texts = evaluate(model, tokenizer, rows, config)
    for row, text in zip(rows, texts, strict=True):
        ids = model.generate(
            **tokenizer(
                tokenizer.decode(prompt_ids(tokenizer, row["prompt"])), return_tensors="pt"
            ),
            max_new_tokens=6,
            do_sample=False,
        )[0]
        alone = tokenizer.decode(
            ids[len(prompt_ids(tokenizer, row["prompt"])) :], skip_special_tokens=True
        )
        assert text == alone.strip()
