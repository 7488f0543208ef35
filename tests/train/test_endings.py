"""Answers end, whatever a base's chat template writes at their end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from guilomo_serve.adapter import BaseModel, read_adapter, write_adapter
from guilomo_train.base import Base, load_base
from guilomo_train.cli import main
from guilomo_train.config import CommonConfig, EvalConfig, FinetuneConfig
from guilomo_train.data import load_rows
from guilomo_train.endings import end_tokens, stop_tokens, written_ends
from guilomo_train.evaluate import completion_loss, evaluate
from guilomo_train.finetuning import FinetuneResult, finetune
from guilomo_train.model_card import model_card
from guilomo_train.search.allocation import Allocation
from guilomo_train.trainer import LoraMoeTrainer
from tests.train.tiny import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer

# Of a base model whose end token is another one than its chats' turns end with.
OTHER_END = {"eos_token": "<s>", "chat_template": CHAT_TEMPLATE}
# A template that writes no token at the end of a turn.
PLAIN = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
WITHOUT_END = {"eos_token": "<s>", "chat_template": PLAIN}
# One that writes more than a row has, as Qwen3's empty thoughts.
THOUGHTS = CHAT_TEMPLATE.replace(
    "{{ message['content'] +",
    "{{ '(-) ' if message['role'] == 'assistant' else '' }}{{ message['content'] +",
)
THINKING = {"eos_token": "<|im_end|>", "chat_template": THOUGHTS}


def base_folder(folder: Path, eos_token: str, chat_template: str) -> Path:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token, tokenizer.chat_template = eos_token, chat_template
    model = tiny_llama(len(tokenizer))
    model.config.tie_word_embeddings = False  # and logits that can tell tokens apart
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows_file(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text('{"prompt": "1", "completion": "yes"}\n{"prompt": "3", "completion": "yes"}')
    return path


def tuned(base: Base, rows: Path, work: Path) -> FinetuneResult:
    linears = tuple(BaseModel.from_module(base.model).linears)
    allocation = Allocation.uniform([m for m in linears if m != "lm_head"], 2, 4)
    common = CommonConfig(base=base.name, train=str(rows), output="")
    config = FinetuneConfig(epochs=60, learning_rate=2e-2)
    return finetune(base, load_rows(str(rows), base.tokenizer), allocation, common, config, work)


@pytest.mark.parametrize(
    "kind", [OTHER_END, WITHOUT_END, THINKING], ids=["another token", "no token", "thoughts"]
)
def test_an_adapter_stops_where_its_answer_ends(kind: dict[str, str], tmp_path: Path) -> None:
    folder, rows = base_folder(tmp_path / "base", **kind), rows_file(tmp_path)
    base = load_base(str(folder))
    result = tuned(base, rows, tmp_path / "work")
    asked = load_rows(str(rows), base.tokenizer)
    config = EvalConfig(max_new_tokens=16)
    scores, texts = evaluate(result.model, base.tokenizer, asked, config)
    answer = "(-) yes" if kind is THINKING else "yes"
    assert (scores.exact_match, scores.accuracy, texts) == (1.0, 1.0, [answer, answer])

    # The folder says it to who loads it, and the model stops without being told.
    write_adapter(result.adapter, tmp_path / "adapter", "card")
    stops = [2] if kind is OTHER_END else []
    assert list(read_adapter(tmp_path / "adapter").spec.stop_token_ids) == stops
    card = model_card(replace(result.adapter.spec, revision="0a1b"), "rows", 1, None)
    assert ("eos_token_id = [2]" in card) is (stops == [2])
    assert "- Base: commit 0a1b" in card
    again = PeftModel.from_pretrained(load_base(str(folder)).model, tmp_path / "adapter")
    scores, _ = evaluate(again, base.tokenizer, asked, config)
    assert scores.exact_match == 1.0
    prompt = base.tokenizer.apply_chat_template(
        asked[0]["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = again.generate(**prompt, max_new_tokens=16)[0, prompt["input_ids"].shape[1] :]
    assert base.tokenizer.decode(said, skip_special_tokens=True).strip() == answer


def test_what_is_scored_is_what_is_learned_where_an_end_is_added(tmp_path: Path) -> None:
    base = load_base(str(base_folder(tmp_path / "base", **WITHOUT_END)))
    rows = load_rows(str(rows_file(tmp_path)), base.tokenizer)
    result = tuned(base, rows_file(tmp_path), tmp_path / "work")
    trainer = LoraMoeTrainer(
        model=result.model,
        args=_arguments(tmp_path),
        train_dataset=rows,
        processing_class=base.tokenizer,
        balance_coefficient=0.0,
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    with torch.no_grad():
        learned, _ = trainer.losses(result.model.eval(), batch)
    scored = completion_loss(result.model, base.tokenizer, rows, 2)
    assert scored == pytest.approx(learned.item(), rel=1e-4)


def _arguments(folder: Path):
    from guilomo_train.arguments import training_arguments

    common = CommonConfig(base="", train="", output="")
    return training_arguments(common, folder, epochs=1, batch_size=2, learning_rate=1e-3)


@pytest.mark.parametrize(
    ("template", "eos_token", "written", "stops"),
    [
        (CHAT_TEMPLATE, "<|im_end|>", [2], ()),
        (CHAT_TEMPLATE, "<s>", [2], (2,)),
        (CHAT_TEMPLATE.replace("<|im_end|>\n", "<|im_end|>\n<s>"), "<s>", [2, 0], ()),
        (PLAIN, "<s>", [], ()),
        (None, "<s>", [0], ()),
        ("{{ raise_exception('no users here') }}", "<s>", [0], ()),
    ],
    ids=["usual", "another", "both", "none", "no template", "refused"],
)
def test_what_a_template_writes_behind_an_answer(
    template: str | None, eos_token: str, written: list[int], stops: tuple[int, ...]
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = template, eos_token
    model = tiny_llama(len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert written_ends(tokenizer) == written
    assert stop_tokens(end_tokens(model, tokenizer), written) == stops


def test_the_command_says_it_before_it_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, rows = base_folder(tmp_path / "base", **OTHER_END), rows_file(tmp_path)
    given = ["search", "--base", folder, "--train", rows, "--output", tmp_path / "out"]
    assert main([str(item) for item in given]) == 2
    error = capsys.readouterr().err
    said = "ends an answer with '<|im_end|>', which is none of the base's end tokens ('<s>')"
    assert said in error
    assert "too few for a search" in error.splitlines()[-1]  # nothing was trained
