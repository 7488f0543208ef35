"""benchmarks/kernel_costs.py counts the bytes that Triton's interpreter sees.

That runs in the process of its own that test_kernels.py starts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from guilomo_serve.ops import kernels
from guilomo_serve.ops.layer import Batch, LayerWeights, SliceWeights
from guilomo_serve.ops.triton_slots import TritonSlots
from guilomo_serve.ops.tuning import ExpandTuning, ShrinkTuning

IN, WIDTHS = 144, (96, 32, 40)


class Counted:
    """Bytes of the interpreter's loads and stores, by a look at their masks."""

    def __init__(self, monkeypatch) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        self.loaded = self.stored = 0
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def counting_load(builder, ptrs, mask, *rest):
            self.loaded += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
            return load(builder, ptrs, mask, *rest)

        def counting_store(builder, ptrs, value, mask, *rest):
            self.stored += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
            return store(builder, ptrs, value, mask, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counting_store)


@pytest.fixture
def kernel_costs(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import kernel_costs

    return kernel_costs


def test_a_launch_is_the_same_however_many_adapters_are_in_slots(kernel_costs) -> None:
    """Of a batch of 16 adapters with 16 and with 1,024 in slots: programs, bytes and time."""
    of_slots = []
    gpu = kernel_costs.GPUS["NVIDIA H100"]
    for slots in (16, 1024):
        batch = kernel_costs.batch_of(128, 16, slots)
        tuning = kernel_costs.default_tuning(batch.size)
        layer = kernel_costs.Layer.searched(IN, WIDTHS, 16, slots)
        launches = layer.launches(batch, tuning)
        assert len(launches[0].arguments[3]) == len(launches[1].arguments[5]) == slots
        of_slots.append(
            (
                [(launch.grid, launch.constants) for launch in launches],
                layer.seconds(batch, tuning, gpu),
                kernel_costs.step("8B", 128, 16, tuning, gpu, slots),
            )
        )
    assert of_slots[0] == of_slots[1]
    # What counts is how many adapters a batch may have.
    assert kernel_costs.step("8B", 128, 64, tuning, gpu) > of_slots[0][2]


@pytest.mark.skipif(not kernels.INTERPRETED, reason="test_kernels_in_the_interpreter runs it")
@pytest.mark.parametrize(
    ("shrink", "expand"),
    [
        (ShrinkTuning(16, 16, 32, 2, 2, 4, 2), ExpandTuning(64, 16, 32, 2, 4, 1)),
        (ShrinkTuning(64, 32, 64, 3, 1, 4, 2), ExpandTuning(16, 32, 64, 1, 4, 1)),
    ],
)
@pytest.mark.parametrize("others", [0, 40])
def test_the_model_counts_the_bytes_that_kernels_move(
    monkeypatch, kernel_costs, shrink, expand, others
) -> None:
    """Whatever is in other slots. Args: others: how many there are."""
    held = [((20, 3, 40), (3, 0, 16)), ((0, 7, 0), (0, 2, 0)), ((0, 0, 0), (0, 0, 0))]
    held = [held[0]] * others + held
    adapters = [kernel_costs.Adapter(*of_slot) for of_slot in held]
    slots = TritonSlots(len(held), IN, WIDTHS, torch.float32, "cpu")
    for slot, (ranks, experts) in enumerate(held[:-1]):
        slots.set(slot, layer(ranks, experts))
    batch = Batch(np.array([0] * 21 + [-1 - others] + [1] * 3 + [2, 2]) + others)
    blocks = batch.blocks(torch.device("cpu"))
    x, y = torch.randn(batch.size, IN), torch.zeros(batch.size, sum(WIDTHS))
    h, z = slots.results.of(batch.size, 3, shrink.splits)
    cut = blocks.cut(batch.size, shrink.block_tokens)
    first = kernels.shrink_launch(x, blocks.order, cut, slots.table, h, z, shrink)
    end = blocks.cut(batch.size, expand.block_tokens)
    of_slots = (slots.table, blocks.sampled, slots.load, WIDTHS)
    second = kernels.expand_launch(y, h, z, blocks.order, end, *of_slots, expand)
    assert len(cut) == blocks.count(batch.size, 3, shrink.block_tokens)
    for launch, cost, of_blocks in (
        (first, kernel_costs.shrink_cost, cut),
        (second, kernel_costs.expand_cost, end),
    ):
        modelled = cost(launch, adapters, of_blocks.tolist())
        with monkeypatch.context() as patch:
            counted = Counted(patch)
            launch.run()
        assert (modelled.loaded, modelled.stored) == (counted.loaded, counted.stored)


def layer(ranks: tuple[int, ...], experts: tuple[int, ...]) -> LayerWeights:
    slices = []
    for width, rank, count in zip(WIDTHS, ranks, experts, strict=True):
        each = (rank - max(count - 1, 0), *(1,) * max(count - 1, 0))
        of_slice = SliceWeights(
            torch.randn(rank, IN),
            torch.randn(width, rank),
            torch.randn(count, IN) if count else None,
            each,
            (1.0,) * len(each),
        )
        slices.append(of_slice if rank else None)
    return LayerWeights.stack(slices, WIDTHS, 2, torch.float32)
