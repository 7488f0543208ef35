"""Which base is loaded, and how: a revision on the hub, code that comes with it, its attention."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import get_peft_model

from guilomo_serve.adapter import read_spec
from guilomo_train.base import load_base
from guilomo_train.cli import main
from guilomo_train.errors import BaseError
from guilomo_train.lora_moe import LoraMoeConfig
from tests.serve.helpers import in_hub_cache
from tests.train.tiny import tiny_llama, tiny_tokenizer

COMMIT, OTHER = 40 * "a", 40 * "b"
MODULE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def write_base(folder: Path, **config: object) -> Path:
    tokenizer = tiny_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def test_the_commit_of_the_base_is_in_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's cache has two commits of a base; a branch names the older one."""
    cached = tmp_path / "hub" / "models--tiny--llama"
    for commit in (COMMIT, OTHER):
        write_base(cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(OTHER)
    (cached / "refs" / "older").write_text(COMMIT)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(f'{{"prompt": "{i}", "completion": "{i}"}}' for i in range(8)))
    # As HF_HUB_CACHE and HF_HUB_OFFLINE in the environment of a process that is yet to import it.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    search = ["search", "--base", "tiny/llama", "--revision", "older", "--target_modules", "q_proj"]
    search += ["--attn_implementation", "eager", "--train", rows, "--output", tmp_path / "out"]
    assert main([str(item) for item in search]) == 0
    spec = read_spec(tmp_path / "out" / "start")
    assert (spec.base_model_name_or_path, spec.revision) == ("tiny/llama", COMMIT)


def test_an_adapter_in_the_hubs_cache_is_evaluated(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    config = LoraMoeConfig(num_experts=2, expert_rank=2, task_type="CAUSAL_LM")
    get_peft_model(load_base(str(base)).model, config).save_pretrained(tmp_path / "adapter")
    folder = in_hub_cache(tmp_path / "adapter", tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1", "completion": "odd"}')
    given = {"--base": base, "--data": rows, "--adapter": folder, "--max_new_tokens": 2}
    assert main(["eval", *(str(x) for pair in given.items() for x in pair)]) == 0


def test_code_of_a_base_runs_only_if_it_may(tmp_path: Path, capsys) -> None:
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    folder = write_base(tmp_path / "base", model_type="own", auto_map=classes)
    (folder / "own.py").write_text(MODULE)
    with pytest.raises(BaseError, match="trust_remote_code"):
        load_base(str(folder))
    base = load_base(str(folder), trust_remote_code=True)
    assert type(base.model).__name__ == "OwnForCausalLM"
    allocation = tmp_path / "allocation.json"
    command = ["baseline", "--base", folder, "--kind", "uniform", "--output", allocation]
    command = [str(part) for part in command]
    assert main(command) != 0
    assert "trust_remote_code" in capsys.readouterr().err
    assert main([*command, "--trust_remote_code"]) == 0
    assert allocation.is_file()


@pytest.mark.parametrize("command", ["baseline", "data"])
def test_a_folder_has_no_revisions(tmp_path: Path, capsys, command: str) -> None:
    """The flag means what it does in training, in commands that read no weights too."""
    base = write_base(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1", "completion": "odd"}')
    rest = {
        "baseline": ("--kind", "uniform", "--output", tmp_path / "allocation.json"),
        "data": ("--train", rows),
    }[command]
    given = [command, "--base", base, *rest, "--revision", "older"]
    assert main([str(part) for part in given]) != 0
    assert "of which there is one version" in capsys.readouterr().err


def test_attention_is_computed_as_it_is_said(tmp_path: Path) -> None:
    folder = str(write_base(tmp_path / "base"))
    assert load_base(folder).commit is None
    base = load_base(folder, attn_implementation="eager")
    assert base.model.config._attn_implementation == "eager"
    with pytest.raises(BaseError, match="attn_implementation"):
        load_base(folder, attn_implementation="fast")
