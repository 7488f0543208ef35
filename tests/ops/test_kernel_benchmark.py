"""benchmarks/kernels.py without a GPU: its data, its floor, what its contestants compute."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels.py"


@pytest.fixture
def benchmark(monkeypatch):
    """The script as a module, with layers of few features."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("kernels_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kernels_benchmark", module)
    spec.loader.exec_module(module)
    module.LAYERS = {"qkv_proj": (64, (32, 16, 16))}
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would run")
def test_without_a_gpu_it_ends_with_one_line() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--tune"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "benchmarks/kernels.py needs a CUDA GPU, and torch finds none\n"


def test_adapters_are_as_searched_ones_and_differ(benchmark) -> None:
    generator = np.random.default_rng(0)
    drawn = [benchmark.searched_ranks(generator) for _ in range(2000)]
    assert {len(ranks) for ranks in drawn} == set(range(2, 9))
    assert {rank for ranks in drawn for rank in ranks} == set(range(1, 9))
    assert 15 < np.mean([sum(ranks) for ranks in drawn]) < 25
    assert [benchmark.vllm_rank(r) for r in (1, 2, 33, 64)] == [1, 8, 64, 64]


def test_every_case_has_tokens_of_every_adapter(benchmark) -> None:
    cases = list(benchmark.cases())
    assert {(c.tokens, c.adapters) for c in cases} >= {(1, 1), (256, 64), (8192, 64)}
    for case in cases:
        segments = case.batch().segments
        assert len(segments) == case.adapters
        assert (segments[:, 2] - segments[:, 1]).sum() == case.tokens


def test_floor_counts_each_byte_once(benchmark) -> None:
    layer = benchmark.Layer.random("qkv_proj", 2, 0, "cpu")
    ranks = [[sum(s.ranks) for s in slices] for slices in layer.adapters]
    experts = [sum(len(s.ranks) for s in slices) for slices in layer.adapters]
    of_weights = sum(
        2 * (64 * sum(r) + 32 * r[0] + 16 * r[1] + 16 * r[2]) + 4 * sum(r) + 4 * 64 * e
        for r, e in zip(ranks, experts, strict=True)
    )
    assert benchmark.floor_bytes(layer.weights, 0) == of_weights
    assert benchmark.floor_bytes(layer.weights, 5) == of_weights + 5 * 2 * (64 + 2 * 64)


def test_a_known_gpu_has_a_modelled_time_above_the_floor(benchmark) -> None:
    layer, case = benchmark.Layer.random("qkv_proj", 3, 0, "cpu"), benchmark.Case(16, 3)
    gpus = ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB")
    h100, a100 = (benchmark.modelled(layer, case, gpu) for gpu in gpus)
    assert benchmark.floor_bytes(layer.weights, 16) / 3.35e12 < h100 < a100 < 1e-4
    assert np.isnan(benchmark.modelled(layer, case, "a GPU of another maker"))


@pytest.mark.parametrize("rank", [None, 8])
def test_contestants_compute_the_same(benchmark, rank) -> None:
    layer = benchmark.Layer.random("qkv_proj", 3, 0, "cpu", rank)
    y, x = layer.tensors(7, "cpu")
    batch = benchmark.Batch(np.array([0, 2, 1, -1, 2, 2, 0]))
    want, got = y.clone(), y.clone()
    layer.in_torch().apply_(want, x, batch)
    routers = [[s.router for s in slices] for slices in layer.adapters]
    benchmark.loop_over_experts(got, x, batch, layer, routers)
    # h is rounded before and after the gate, and each expert's part once more.
    torch.testing.assert_close(got, want, rtol=0, atol=3e-2 * want.abs().max().item())
    benchmark.check(layer, layer.ours(), y, x, batch)

    # vLLM's padded weights are the same products: the rows that were added are zero.
    lora_a, lora_b = layer.padded()
    for slot, slices in enumerate(layer.adapters):
        for i, weights in enumerate(slices):
            assert torch.equal(
                lora_b[i][slot, 0].float() @ lora_a[i][slot, 0].float(),
                weights.lora_b.float() @ weights.lora_a.float(),
            )
