"""A fine-tuning in which some layers have no adapter, some one expert, and some several."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from guilomo_serve.adapter import read_adapter
from guilomo_train.cli import main
from guilomo_train.lora_moe import LoraMoeLayer
from guilomo_train.search.allocation import Allocation
from tests.train.tiny import tiny_llama, tiny_tokenizer

ROWS = [{"prompt": f"number {i}", "completion": "odd" if i % 2 else "even"} for i in range(48)]
KINDS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
MODULES = [
    f"model.layers.{i}.{part}.{kind}" for i in range(3) for part in KINDS for kind in KINDS[part]
]
# Nothing at all in the middle layer.
RANKS = {
    "model.layers.0.self_attn.v_proj": (3,),
    "model.layers.0.mlp.down_proj": (2, 1, 2),
    "model.layers.2.self_attn.q_proj": (1, 2),
    "model.layers.2.mlp.up_proj": (4,),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    tiny_llama(len(tokenizer), layers=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def allocation(base: Path) -> Path:
    path = base.parent / "allocation.json"
    Allocation({module: RANKS.get(module, ()) for module in MODULES}, 2, 4).save(path)
    return path


@pytest.fixture(scope="module")
def run(base: Path, allocation: Path) -> Path:
    data, output = base.parent / "rows.jsonl", base.parent / "out"
    data.write_text("\n".join(map(json.dumps, ROWS)))
    command = ["finetune", "--base", base, "--train", data, "--allocation", allocation]
    command += ["--output", output, "--epochs", 2, "--learning_rate", 1e-2]
    command += ["--eval", data, "--eval_rows", 4, "--max_new_tokens", 2]
    assert main([*map(str, command)]) == 0
    return output


def test_the_adapter_has_those_layers_alone_and_peft_loads_it(base: Path, run: Path) -> None:
    adapter = read_adapter(run / "adapter")
    assert {m: tuple(e.rank for e in found) for m, found in adapter.spec.experts.items()} == RANKS
    assert adapter.spec.target_modules == ("down_proj", "q_proj", "up_proj", "v_proj")
    for module, weights in adapter.weights.items():
        assert weights.lora_b.abs().max() > 0, "it was trained"
        assert (weights.router is None) == (len(RANKS[module]) == 1)

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter")
    wrapped = [n for n, layer in model.named_modules() if isinstance(layer, LoraMoeLayer)]
    assert sorted(n.removeprefix("base_model.model.") for n in wrapped) == sorted(RANKS)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        found = model(tokens).logits
        with model.disable_adapter():
            assert (model(tokens).logits - found).abs().max() > 1e-3


def test_what_people_read_shows_the_layers_without_adapter(
    run: Path, allocation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png = tmp_path / "map.png"
    assert main(["inspect", "--path", str(allocation), "--png", str(png)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["layer", *(kind for kinds in KINDS.values() for kind in kinds), "rank"],
        ["0", "-", "-", "1", "x", "3", "-", "-", "-", "3", "x", "5", "8"],
        ["1", "-", "-", "-", "-", "-", "-", "-", "0"],
        ["2", "2*", "x", "3", "-", "-", "-", "-", "1", "x", "4", "-", "7"],
    ]
    assert "21 modules, 17 without adapter: 7 experts (0.33 a module), total rank 15" in lines[4]
    assert png.read_bytes()[:4] == b"\x89PNG"

    page, record = (run / "report.md").read_text(), json.loads((run / "run.json").read_text())
    assert (
        f"7 experts in 4 of 21 linear layers, total rank 15: {record['parameters']:,} parameters"
    ) in page
    assert f"than 8 experts of rank 8 in all 21 ({record['uniform_parameters']:,})" in page
    # Two layers have routers.
    rows = re.findall(r"^\| (\d) \| (\d) \|", page, re.MULTILINE)
    assert rows == [("0", "1"), ("2", "1")]
    assert "dead experts" in page
    assert "7 experts in 4 layers" not in page
    assert "Experts: 7 in 4 layers" in (run / "adapter" / "README.md").read_text()
    routers = json.loads((run / "history.json").read_text())["finetune"]["routers"]
    assert set(routers) == {m for m, ranks in RANKS.items() if len(ranks) > 1}
