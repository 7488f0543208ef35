"""`guilomo-serve check` tells a server that computes as transformers does from one that doesn't."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from guilomo_serve import check, cli
from guilomo_serve.adapter import Adapter, read_adapter
from tests.serve.helpers import random_adapter

PROMPTS = [[72, 101, 108, 108, 111, 44, 32, 119], [50, 43, 50, 61]]


@pytest.mark.slow
def test_the_command_prints_a_table_and_a_verdict(tiny_model, adapters, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The quick brown fox jumps over the lazy dog.\n\n2 + 2 =\n")
    command = [sys.executable, "-m", "guilomo_serve.cli", "check", str(tiny_model)]
    ran = subprocess.run(
        [*command, str(adapters["first"]), "--prompts", str(prompts)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr[-4000:]
    lines = ran.stdout.splitlines()
    assert "same: vLLM computes what transformers computes" in lines
    (heading,) = (i for i, line in enumerate(lines) if line.split()[:2] == ["prompt", "tokens"])
    rows = [line.split() for line in lines[heading + 1 : heading + 3]]
    assert [row[:2] for row in rows] == [["1", "44"], ["2", "7"]]
    for row in rows:
        assert float(row[2]) < 2e-3
        assert int(row[5]) > 0
        assert row[5] == row[6]


def verdict(base: Path, ours: Adapter, wanted: Adapter) -> tuple[bool, list[check.Row]]:
    """Of two adapters in transformers, in the places of vLLM's and transformers' one."""
    alone, ours_seen, wanted_seen = (
        check.see_transformers(base, adapter, PROMPTS, torch.float32)
        for adapter in (None, ours, wanted)
    )
    rows = [
        check.compare(*seen, top_k=wanted.spec.top_k)
        for seen in zip(alone, ours_seen, alone, wanted_seen, strict=True)
    ]
    return check.is_same(rows, torch.float32), rows


def with_weights(adapter: Adapter, module: str, **changes: torch.Tensor) -> Adapter:
    weights = dict(adapter.weights)
    weights[module] = dataclasses.replace(weights[module], **changes)
    return Adapter(adapter.spec, weights)


def test_a_difference_in_weights_or_in_choices_is_found(tiny_model, adapters):
    adapter = read_adapter(adapters["first"])
    assert verdict(tiny_model, adapter, adapter)[0]
    last = "model.layers.1.mlp.down_proj"
    weights = adapter.weights[last]
    assert len(adapter.spec.experts[last]) > adapter.spec.top_k
    assert weights.router is not None
    other = with_weights(adapter, last, lora_b=weights.lora_b * 1.05)
    same, rows = verdict(tiny_model, other, adapter)
    assert not same
    assert all(row.agreed == row.choices for row in rows)
    # Choices alone: the layer's product is taken away, so that no log-probability depends on them.
    silent = with_weights(adapter, last, lora_b=torch.zeros_like(weights.lora_b))
    turned = with_weights(silent, last, router=weights.router.flip(0))
    same, rows = verdict(tiny_model, turned, silent)
    assert not same
    assert all(row.error == 0 for row in rows)
    assert sum(row.clear for row in rows) > 0


def test_wrong_input_is_one_error(tiny_model, adapters, tmp_path, capsys):
    def refused(*arguments: object) -> str:
        assert cli.main(["check", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    base, first = tiny_model, adapters["first"]
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    assert "empty.txt: no prompts" in refused(base, first, "--prompts", empty)
    assert "missing.txt" in refused(base, first, "--prompts", tmp_path / "missing.txt")
    empty.write_text("x\n")
    assert "at least 2" in refused(base, first, "--prompts", empty)
    assert "no LoRA-MoE adapter" in refused(base, adapters["plain"])
    assert "nowhere" in refused(base, tmp_path / "nowhere")
    assert "no model" in refused(tmp_path / "nowhere", first)

    def other_base(adapter: Adapter) -> Adapter:
        fingerprint = dataclasses.replace(adapter.spec.base, vocab_size=9)
        return Adapter(dataclasses.replace(adapter.spec, base=fingerprint), adapter.weights)

    bad = random_adapter(base, tmp_path / "bad", seed=4, change=other_base)
    assert "made for another base model" in refused(base, bad)
