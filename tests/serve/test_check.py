"""`guilomo-serve check` tells a server that computes as transformers does from one that doesn't."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from guilomo_serve import cli
from guilomo_serve.adapter import Adapter
from guilomo_serve.check import command, hf
from guilomo_serve.check.compare import HALF, compare, difference
from guilomo_serve.check.served import Product, Record, Served, record
from guilomo_serve.ops.layer import SliceWeights
from tests.serve.helpers import in_hub_cache, random_adapter

SHORT = "The quick brown fox jumps over the lazy dog.\n\n2 + 2 =\n"
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
            "input_activations": {
                **{"num_bits": 8, "type": "int", "symmetric": True},
                **{"strategy": "token", "dynamic": True},
            },
        }
    },
}


@pytest.fixture(scope="module")
def int8_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in bfloat16, its linear layers in int8 by output channel (W8A8)."""
    folder = tmp_path_factory.mktemp("int8") / "model"
    shutil.copytree(tiny_model, folder)
    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        tensors[name] = weight
        if "_proj." in name:
            scale = weight.abs().amax(dim=1, keepdim=True) / 127
            tensors[name] = (weight / scale).round().to(torch.int8)
            tensors[name.replace(".weight", ".weight_scale")] = scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": INT8, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str]]:
    """The command's exit status and the lines that it printed."""
    status = cli.main(["check", *map(str, arguments)])
    return status, capsys.readouterr().out.splitlines()


def rows_of(lines: list[str]) -> list[list[str]]:
    return [cells for line in lines if (cells := line.split()) and cells[0].isdigit()]


@pytest.mark.slow
def test_smollm2_chooses_and_adds_what_transformers_does(
    small_model, tmp_path, capsys, monkeypatch
):
    seen = []
    for module, name in ((command, "record"), (hf, "see")):
        monkeypatch.setattr(module, name, keeping(getattr(module, name), seen))
    folder = random_adapter(small_model, tmp_path / "adapter", seed=5)
    status, lines = run(capsys, small_model, folder, "--enforce-eager", "--dtype", "bfloat16")
    assert status == 0, lines
    assert lines[-1].startswith("EQUAL")
    rows = rows_of(lines)
    assert len(rows) == len(command.PROMPTS)
    choices, equal = (sum(int(row[column]) for row in rows) for column in (5, 6))
    assert choices > 5000
    assert equal / choices > 0.97
    assert all(0 < float(row[7].rstrip("%")) < 1 for row in rows)

    # Other experts, chosen clearly: the layer's input is another one.
    served, (alone,), base, wanted = seen[0], seen[0].adapters, seen[1], seen[2]
    _, modules = hf.with_adapter(hf.load_base(small_model), folder)
    module = "model.layers.9.mlp.up_proj"
    products = dict(alone[0].products)
    products[module] = dataclasses.replace(products[module], x=-products[module].x)
    other = dataclasses.replace(alone[0], products=products)
    row = compare(served.base[0], other, base[0], wanted[0], modules)
    assert row.clear == module
    reason = difference([dataclasses.replace(row, product=None)], HALF, quantized=False)
    assert reason == f"prompt 1, {module}: other experts are chosen"


def test_a_choice_behind_a_near_tie_of_its_token_is_no_fault():
    """Layers `first` and `second` of two tokens, with the identity as A, B and router."""
    eye = torch.eye(3)
    weights = SliceWeights(eye, eye, eye, (1, 1, 1), (1.0, 1.0, 1.0))
    modules = hf.Modules({"first": weights, "second": weights}, top_k=1)
    tie, other, clear = [1.0, 0.999, -1], [0.999, 1.0, -1], [-1.0, -1, 1]

    def compared(first: list, second: list):
        """Of vLLM's logits, where transformers has near ties and then clear choices."""
        found = {"first": torch.tensor(first), "second": torch.tensor(second)}
        products = {name: Product(x, torch.zeros_like(x), 0.0) for name, x in found.items()}
        nothing = torch.zeros(1)
        served = Served(nothing, products)
        logits = {"first": torch.tensor([tie, tie]), "second": torch.tensor([clear, clear])}
        base, base_wanted = Served(nothing, {}), hf.Wanted(nothing, {})
        return compare(base, served, base_wanted, hf.Wanted(nothing, logits), modules)

    assert compared([tie, tie], [clear, clear]).agreed == 4
    assert compared([other, tie], [clear, clear]).clear is None, "a near tie"
    assert compared([other, tie], [tie, clear]).clear is None, "behind a near tie"
    assert compared([other, tie], [clear, tie]).clear == "second", "of the other token"
    assert compared([tie, tie], [tie, clear]).clear == "second"


def keeping(function: Callable, results: list) -> Callable:
    def kept(*arguments):
        results.append(function(*arguments))
        return results[-1]

    return kept


@pytest.mark.slow
def test_an_int8_base_and_what_makes_a_difference(
    int8_model, adapters, sparse, tmp_path, capsys, monkeypatch
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(SHORT)
    folders = (adapters["second"], adapters["plain"], in_hub_cache(sparse, tmp_path))
    arguments = (int8_model, *folders, "--prompts", prompts)
    records: list[Record] = []
    monkeypatch.setattr(command, "record", keeping(record, records))
    status, lines = run(capsys, *arguments, "--enforce-eager")
    assert status == 0, lines
    assert sum(line.startswith("EQUAL") for line in lines) == 3
    assert [row[:2] for row in rows_of(lines)] == 3 * [["1", "44"], ["2", "7"]]
    assert records[0].quantization == "compressed-tensors"
    (first, second), plain, of_few = records[0].adapters
    # Layers in which an adapter has nothing compute nothing for it.
    packed = [*(f"self_attn.{name}_proj" for name in "qkv"), "mlp.gate_proj", "mlp.up_proj"]
    ran = {f"model.layers.0.{name}" for name in (*packed, "mlp.down_proj")}
    assert all(served.products.keys() == ran for served in of_few)

    def verdict(quantization: str | None = "compressed-tensors", **changes: object) -> str:
        """Of the same record, but for something in the first adapter's second prompt."""
        changed = dataclasses.replace(second, **changes)
        altered = dataclasses.replace(
            records[0], quantization=quantization, adapters=[[first, changed], plain, of_few]
        )
        monkeypatch.setattr(command, "record", lambda *_: altered)
        status, lines = run(capsys, *arguments)
        assert (status, lines[-1].partition(":")[0]) == (
            1,
            "EQUAL" if quantization else "DIFFERENT",
        )
        (line, *_) = (line for line in lines if line.startswith("DIFFERENT: "))
        return line.removeprefix("DIFFERENT: ")

    def with_product(module: str, **changes: object) -> dict[str, Product]:
        one = dataclasses.replace(second.products[module], **changes)
        return {**second.products, module: one}

    adapted, left_alone = (f"model.layers.1.self_attn.{name}_proj" for name in "qk")
    product = second.products[adapted]
    assert second.products[left_alone].added.abs().max() == 0
    off = with_product(adapted, added=product.added * 1.02)
    assert verdict(products=off).startswith(f"prompt 2, {adapted}: the product is off by ")
    off = with_product(left_alone, added=product.added[:, :64])
    assert verdict(products=off).startswith(f"prompt 2, {left_alone}: the product is off by ")
    off = with_product(adapted, unsummed=5.0)
    assert "not what the layer's output grows by" in verdict(products=off)
    off = {name: kept for name, kept in second.products.items() if name != adapted}
    assert verdict(products=off) == f"prompt 2, {adapted}: vLLM adds nothing"
    off = second.logprobs - 9
    assert verdict(logprobs=off).startswith("prompt 2: log-probabilities differ by ")
    # A base that is not quantised may not differ by itself.
    assert "without the adapter: log-probabilities" in verdict(quantization=None)


def test_wrong_input_is_one_error(tiny_model, adapters, tmp_path, capsys):
    def refused(*arguments: object) -> str:
        assert cli.main(["check", *map(str, arguments)]) == 2
        printed = capsys.readouterr().err.splitlines()  # vLLM's log is beside it
        (line,) = [line for line in printed if line.startswith("guilomo-serve check: ")]
        return line

    base, first = tiny_model, adapters["first"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n")
    assert "prompts.txt: has no prompts" in refused(base, first, "--prompts", prompts)
    assert "missing.txt" in refused(base, first, "--prompts", tmp_path / "missing.txt")
    prompts.write_text("x\n")
    assert "at least 2" in refused(base, first, "--prompts", prompts)
    assert "nowhere" in refused(base, tmp_path / "nowhere")
    assert "no model" in refused(tmp_path / "nowhere", first)
    for flag in ("--tensor-parallel-size", "--pipeline-parallel-size", "--data-parallel-size"):
        assert f"{flag}: layers are compared whole" in refused(base, first, flag, "2")

    def other_base(adapter: Adapter) -> Adapter:
        fingerprint = dataclasses.replace(adapter.spec.base, vocab_size=9)
        return Adapter(dataclasses.replace(adapter.spec, base=fingerprint), adapter.weights)

    bad = random_adapter(base, tmp_path / "bad", seed=4, change=other_base)
    assert "made for another base model" in refused(base, bad)
