"""Modules of the base that are trained whole beside the experts, as docs/new_tokens.md has it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from guilomo_serve.adapter import AdapterError, BaseModel, read_adapter
from guilomo_train.cli import main
from tests.conftest import REPOSITORY
from tests.train.tiny import save_tiny_base

HOW_TO = REPOSITORY / "docs" / "new_tokens.md"
ROWS = [{"prompt": f"{i}?", "completion": "<odd>" if i % 2 else "<even>"} for i in range(48)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_base(tmp_path / "MODEL")


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)```", HOW_TO.read_text(), re.M | re.S)
    return [re.sub(f"^{indent}", "", text, flags=re.M) for indent, text in found]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(40, 60)[None]).logits


def test_new_tokens_are_learned_loaded_and_served_as_the_how_to_says(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, rows in (("rows", ROWS), ("test", ROWS[:4])):
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    make_base, put_into_base = blocks("python")
    exec(make_base, {})
    new = len(AutoTokenizer.from_pretrained("base-with-tokens")) - 2
    (command,) = blocks("bash")
    command = command.replace("\\\n", " ")
    given = [*shlex.split(command)[1:], "--save_steps", "2", "--learning_rate", "0.01"]
    given += ["--max_experts", "3", "--max_rank", "2", "--epochs", "1"]
    assert main(given) == 0

    folder = Path("runs/tokens/adapter")
    before = AutoModelForCausalLM.from_pretrained("base-with-tokens")
    weights = load_file(folder / "adapter_model.safetensors")
    for module in ("model.embed_tokens", "lm_head"):
        old, trained = (
            before.get_submodule(module).weight,
            weights[f"base_model.model.{module}.weight"],
        )
        assert (trained[new:] - old[new:]).abs().max() > 1e-3, module
    with pytest.raises(AdapterError, match=r"modules_to_save is \['embed_tokens', 'lm_head'\]"):
        read_adapter(folder)
    card = (folder / "README.md").read_text()
    assert "Trained whole: embed_tokens, lm_head" in card
    assert "guilomo-serve" not in card

    # What reads adapters for training reads it: a resumption, an evaluation, a look.
    record = json.loads(Path("runs/tokens/run.json").read_text())
    assert main([*given, "--resume"]) == 0
    again = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    capsys.readouterr()
    scores = ["--output", "scores.json", "--max_new_tokens", "8", "--dtype", "float32"]
    evaluate = ["eval", "--base", "base-with-tokens", "--data", "test.jsonl"]
    assert main([*evaluate, "--adapter", str(folder), *scores]) == 0
    assert json.loads(Path("scores.json").read_text())["loss"] == pytest.approx(
        record["scores"]["loss"], rel=1e-5
    )
    assert main(["inspect", "--path", str(folder)]) == 0
    assert "trained whole: embed_tokens, lm_head" in capsys.readouterr().out

    # And the two folders for a server are the same function.
    whole = logits(PeftModel.from_pretrained(before, folder))
    exec(put_into_base, {})
    served = AutoModelForCausalLM.from_pretrained("served/base")
    read_adapter("served/adapter", BaseModel.from_module(served))
    torch.testing.assert_close(logits(PeftModel.from_pretrained(served, "served/adapter")), whole)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["lm_haed"], "--modules_to_save: the base has no module 'lm_haed'"),
        (["lm_head", "--dtype", "bfloat16"], "lm_head is bfloat16, in which small steps are lost"),
        (
            ["layers.0.mlp"],
            "layers.0.mlp would be trained whole, but model.layers.0.mlp.up_proj gets",
        ),
    ],
)
def test_what_cannot_be_trained_whole_is_one_line(
    flags: list[str],
    message: str,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    allocation = {"format_version": 1, "top_k": 2, "max_rank": 2}
    allocation["ranks"] = {"model.layers.0.mlp.up_proj": [2, 1]}
    (tmp_path / "allocation.json").write_text(json.dumps(allocation))
    given = ["finetune", "--base", base, "--train", tmp_path / "rows.jsonl"]
    given += ["--output", tmp_path / "out", "--allocation", tmp_path / "allocation.json"]
    assert main([str(item) for item in [*given, "--modules_to_save", *flags]]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
