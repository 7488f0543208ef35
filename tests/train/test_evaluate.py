"""Scores: what counts as an exact match and as a right answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from guilomo_train.config import EvalConfig
from guilomo_train.data.rendering import encode, prompt_ids
from guilomo_train.endings import written_ends
from guilomo_train.evaluate import completion_loss, evaluate
from guilomo_train.scoring import answers_given, score


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
        ("x = -5", "5", False),
        ("x = -5", "-5", True),
        ("that is 8-5", "5", True),
        ("It is 1,500.", "500", False),
        ("It is 1.5", "5", False),
        ("x=5", "5", True),
        ("答案是北京。", "北京", True),
        ("答案是南京", "北京", False),
        ("Die Stadt ist Örebro", "rebro", False),
    ],
)
def test_an_answer_is_right_if_the_text_ends_with_it(text: str, answer: str, right: bool) -> None:
    assert (answers_given([text], [answer]) == [answer.casefold()]) is right


def test_of_answers_that_end_alike_the_longest_is_given() -> None:
    answers = ["Equivalent", "not equivalent", "not"]
    texts = ["not equivalent", "Equivalent.", "They are not equivalent", "unequivalent", "so not"]
    found = ["not equivalent", "equivalent", "not equivalent", None, "not"]
    assert answers_given(texts, answers) == found
    got = score(["not equivalent"] * 2, answers[:2], answers[:2], 0.0)
    assert got.accuracy == 0.5


def test_scores_are_shares_of_rows() -> None:
    got = score(["yes", "so, no", "maybe"], ["yes", "no", "yes"], ["yes", "no", "yes"], 0.5)
    assert (got.exact_match, got.accuracy, got.majority, got.rows) == (1 / 3, 2 / 3, 2 / 3, 3)


@pytest.mark.parametrize("chat", [True, False])
def test_the_loss_is_that_of_the_completions_tokens(small_model: Path, chat: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(small_model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    pairs = [("Name a colour.", "red"), ("The capital of France is", " Paris, I am sure")]
    rows, total, count = [], 0.0, 0
    for prompt, completion in pairs:
        if chat:
            row = {
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": completion}],
            }
            both = [*row["prompt"], *row["completion"]]
            text = tokenizer.apply_chat_template(both, tokenize=False)
            before = tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, tokenize=False
            )
        else:
            row = {"prompt": prompt, "completion": completion}
            text, before = prompt + completion + tokenizer.eos_token, prompt
        rows.append(row)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        start = len(tokenizer(before)["input_ids"])
        logs = model(ids).logits.log_softmax(-1)[0]
        total -= sum(logs[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1]))
        count += ids.shape[1] - start
    got = completion_loss(model, tokenizer, Dataset.from_list(rows), batch_size=2)
    assert got == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("2 + 2 = ", "4"), ("Once upon", " a time"), ("Say hel", "lo")],
)
def test_the_loss_scores_what_training_learns(
    small_model: Path, tmp_path: Path, prompt: str, completion: str
) -> None:
    """Where the prompt's last token joins the completion's first, and where a template ends a
    prompt in what a whole row does not have."""
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    thinking = tokenizer.chat_template.replace(
        "<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"
    )
    assert thinking != tokenizer.chat_template
    for template in (None, thinking):
        tokenizer.chat_template = template
        row = {"prompt": prompt, "completion": completion}
        if template is not None:
            row = {
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": completion}],
            }
        args = SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, max_length=512)
        model = AutoModelForCausalLM.from_pretrained(small_model)
        trainer = SFTTrainer(
            model, args, train_dataset=Dataset.from_list([row]), processing_class=tokenizer
        )
        (learned,) = trainer.train_dataset
        assert encode(tokenizer, row, written_ends(tokenizer)) == (
            learned["input_ids"],
            learned["labels"],
        )


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
            **tokenizer(tokenizer.decode(prompt_ids(tokenizer, row)), return_tensors="pt"),
            max_new_tokens=6,
            do_sample=False,
        )[0]
        alone = tokenizer.decode(ids[len(prompt_ids(tokenizer, row)) :], skip_special_tokens=True)
        assert text == alone.strip()
