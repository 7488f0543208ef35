"""Packed rows are learned as they would be alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from guilomo_train.cli import main
from guilomo_train.data.packing import check_packing
from guilomo_train.errors import ConfigError
from guilomo_train.loss import completion_nll
from guilomo_train.search.allocation import Allocation
from tests.train.tiny import tiny_llama

ROWS = [{"prompt": "n" * (i % 9 + 1), "completion": "odd" if i % 2 else "even"} for i in range(24)]


def log_of(base: Path, folder: Path, *flags: str) -> list[dict[str, float]]:
    data, allocation = folder / "rows.jsonl", folder / "allocation.json"
    if not data.exists():
        data.write_text("\n".join(map(json.dumps, ROWS)))
        modules = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
        Allocation.uniform(tuple(modules), 3, 2).save(allocation)
    output = folder / f"out{len(list(folder.iterdir()))}"
    command = ["finetune", "--base", base, "--train", data, "--allocation", allocation]
    command += ["--output", output, "--epochs", 1, "--max_length", 128, "--dtype", "float32"]
    assert main([*map(str, command), *flags]) == 0
    return json.loads((output / "history.json").read_text())["finetune"]["log"]


def test_a_packed_step_is_that_of_the_same_rows_one_by_one(tiny_base: Path, tmp_path: Path) -> None:
    packed = log_of(tiny_base, tmp_path, "--packing", "--batch_size", "16")
    alone = log_of(tiny_base, tmp_path, "--batch_size", "24")
    assert packed[-1]["step"] == alone[-1]["step"] == 1, "one step has all rows"
    for figure in ("nll", "balance"):
        assert packed[-1][figure] == pytest.approx(alone[-1][figure], rel=1e-5)
    # Accumulated parts, and a batch that is not full.
    parts = log_of(tiny_base, tmp_path, "--packing", "--batch_size", "2",
                   "--gradient_accumulation_steps", "8")  # fmt: skip
    assert parts[-1]["step"] == 1
    assert parts[-1]["nll"] == pytest.approx(alone[-1]["nll"], rel=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_do_not_see_one_another(attention: str) -> None:
    model = tiny_llama(64)
    model.set_attn_implementation(attention)
    rows = [torch.randint(64, (length,)) for length in (5, 9, 4)]
    packed = {
        "input_ids": torch.cat(rows)[None],
        "labels": torch.cat([torch.cat([torch.tensor([-100]), row[1:]]) for row in rows])[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
    }
    alone = sum(
        completion_nll(
            model,
            {"input_ids": r[None], "labels": r[None], "attention_mask": torch.ones(1, len(r))},
            num_items=1,
        )
        for r in rows
    )
    torch.testing.assert_close(completion_nll(model, packed, num_items=1), alone)


def test_a_base_in_which_packed_rows_see_one_another_is_refused() -> None:
    rows = [[1, 2, 3, 4], [5, 6, 7]]
    check_packing(tiny_llama(64), rows)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(ConfigError, match="packing: in a base of type bloom"):
        check_packing(bloom, rows)
