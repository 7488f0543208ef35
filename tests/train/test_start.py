"""A fine-tuning starts from the weights of the search, or from those of an adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from guilomo_serve.adapter import WEIGHTS_FILE, write_adapter
from guilomo_train.adapters import adapter_of
from guilomo_train.cli import main
from guilomo_train.lora_moe import LoraMoeConfig
from guilomo_train.lora_moe.layer import LoraMoeLayer, Masks
from guilomo_train.search.allocation import Allocation
from guilomo_train.searching import cut
from tests.serve import hf_reference
from tests.train.tiny import tiny_llama

EXPERTS, RANK = 4, 3
STILL = ["--learning_rate", "1e-30"]  # so that what a fine-tuning ends in is where it started
ROWS = [{"prompt": f"number {i}", "completion": "odd" if i % 2 else "even"} for i in range(48)]


def test_an_adapter_cut_to_an_allocation_computes_what_the_search_did_under_its_masks(
    tmp_path: Path,
) -> None:
    base = tiny_llama(64)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraMoeConfig(num_experts=EXPERTS, expert_rank=RANK, top_k=2))
    generator = torch.Generator().manual_seed(0)
    ranks = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraMoeLayer):
            torch.nn.init.normal_(layer.lora_B["default"].weight, generator=generator)
            count = len(ranks) % (EXPERTS + 1)  # none in some layers, one in others
            of_all = torch.randint(1, RANK + 1, (EXPERTS,), generator=generator)
            layer.masks = Masks(
                (torch.arange(EXPERTS) < count).float(),
                (torch.arange(RANK) < of_all[:, None]).float(),
            )
            module = name.removeprefix("base_model.model.")
            ranks[module] = tuple(of_all[:count].tolist())
    tokens = torch.randint(64, (2, 9), generator=generator)
    allocation = Allocation(ranks, top_k=2, max_rank=RANK)
    part = cut(adapter_of(model), allocation)
    there = {module: of_module for module, of_module in ranks.items() if of_module}
    assert {m: tuple(e.rank for e in experts) for m, experts in part.spec.experts.items()} == there

    write_adapter(part, tmp_path / "adapter", card="")
    served = hf_reference.model_with(tmp_path / "base", tmp_path / "adapter")
    with torch.inference_mode():
        expected = model(tokens).logits
        torch.testing.assert_close(served(tokens).logits, expected, rtol=0, atol=1e-5)
        with model.disable_adapter():
            assert (model(tokens).logits - expected).abs().max() > 0.1


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("data") / "parity.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return ["--train", str(path)]


@pytest.fixture(scope="module")
def run(tiny_base: Path, data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search, and a fine-tuning that does not move."""
    output = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["run", "--base", tiny_base, *data, "--output", output, "--max_experts", EXPERTS]
    assert main([*map(str, arguments), "--max_rank", "3", "--epochs", "0.2", *STILL]) == 0
    return output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS_FILE)


def finetune(tiny_base: Path, data: list[str], run: Path, output: Path, *more: object) -> int:
    arguments = ["finetune", "--base", tiny_base, *data, "--output", output, "--epochs", 0.2]
    arguments += ["--allocation", run / "allocation.json", *STILL, *more]
    return main([str(item) for item in arguments])


def test_a_run_goes_on_from_the_weights_of_its_search(
    run: Path, tiny_base: Path, data: list[str], tmp_path: Path
) -> None:
    started, ended = weights(run / "start"), weights(run / "adapter")
    assert all(t.abs().max() > 0 for name, t in started.items() if "lora_B" in name)
    assert started.keys() == ended.keys()
    for name, tensor in started.items():
        torch.testing.assert_close(ended[name], tensor, rtol=0, atol=1e-12)

    # Any adapter of that allocation can be trained further; without --start weights are fresh.
    assert finetune(tiny_base, data, run, tmp_path / "on", "--start", run / "adapter") == 0
    for name, tensor in weights(tmp_path / "on" / "adapter").items():
        torch.testing.assert_close(tensor, started[name], rtol=0, atol=1e-12)
    assert finetune(tiny_base, data, run, tmp_path / "fresh") == 0
    fresh = weights(tmp_path / "fresh" / "adapter")
    assert all(t.abs().max() < 1e-12 for name, t in fresh.items() if "lora_B" in name)


def test_the_learning_rate_falls_at_the_end_of_fine_tuning_alone(
    tiny_base: Path, data: list[str], tmp_path: Path
) -> None:
    sizes = ["--max_experts", "2", "--max_rank", "1", "--search_batch_size", "2"]
    sizes += ["--batch_size", "2", "--epochs", "1"]  # 24 steps of either stage, every tenth logged
    assert main(["run", "--base", str(tiny_base), *data, "--output", str(tmp_path), *sizes]) == 0
    history = json.loads((tmp_path / "history.json").read_text())
    rates = {
        stage: [line["learning_rate"] for line in history[stage]["log"] if "loss" in line]
        for stage in ("search", "finetune")
    }
    assert rates["search"] == [1e-3, 1e-3]
    assert rates["finetune"][0] > 2 * rates["finetune"][1] > 0


def test_a_run_can_start_from_fresh_weights(
    tiny_base: Path, data: list[str], tmp_path: Path
) -> None:
    arguments = ["run", "--base", tiny_base, *data, "--output", tmp_path, "--search_epochs", 0.3]
    assert main([*map(str, arguments), "--epochs", "0.2", "--fresh", *STILL]) == 0
    trained = weights(tmp_path / "adapter")
    assert all(t.abs().max() < 1e-12 for name, t in trained.items() if "lora_B" in name)
    assert "from fresh weights; NLL" in (tmp_path / "report.md").read_text()


def test_an_adapter_that_cannot_be_started_from_is_one_line(
    run: Path,
    tiny_base: Path,
    data: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def changed(name: str, change: object) -> Path:
        folder = tmp_path / name
        shutil.copytree(run / "start", folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = weights(folder)
        change(config, tensors)  # type: ignore[operator]
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / WEIGHTS_FILE)
        return folder

    module = "model.layers.0.mlp.down_proj"

    def without_module(config: dict, tensors: dict) -> None:
        del config["experts"][module]
        for name in [n for n in tensors if module in n]:
            del tensors[name]

    def top_1(config: dict, _: dict) -> None:
        config["top_k"] = 1

    for wrong, message in (
        (["--start", tmp_path / "nowhere"], "nowhere"),
        (["--start", changed("top_1", top_1)], "--start: its top_k is 1, expected 2"),
        (
            ["--start", changed("less", without_module)],
            f"--start: only the allocation has {module}, expected the modules of the allocation",
        ),
        (["--start", run / "start", "--lora_alpha", 8], "(scaling 5.33333), expected those of"),
    ):
        output = tmp_path / "out"
        assert finetune(tiny_base, data, run, output, *wrong) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("guilomo-train finetune: error: "), said
        assert message in said
        assert not list(output.glob("*")), "nothing is written"
