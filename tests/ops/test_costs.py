"""benchmarks/kernel_costs.py counts the bytes that Triton's interpreter sees.

Runs in the process of its own that test_kernels.py starts.
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


@pytest.mark.skipif(not kernels.INTERPRETED, reason="test_kernels_in_the_interpreter runs it")
@pytest.mark.parametrize(
    ("shrink", "expand"),
    [
        (ShrinkTuning(16, 16, 32, 2, 2, 4, 2), ExpandTuning(64, 16, 32, 2, 4, 1)),
        (ShrinkTuning(64, 32, 64, 3, 1, 4, 2), ExpandTuning(16, 32, 64, 1, 4, 1)),
    ],
)
def test_the_model_counts_the_bytes_that_kernels_move(monkeypatch, shrink, expand) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import kernel_costs

    held = [((20, 3, 40), (3, 0, 16)), ((0, 7, 0), (0, 2, 0)), ((0, 0, 0), (0, 0, 0))]
    adapters = [kernel_costs.Adapter(*of_slot) for of_slot in held]
    slots = TritonSlots(len(held), IN, WIDTHS, torch.float32, "cpu")
    for slot, (ranks, experts) in enumerate(held[:2]):
        slots.set(slot, layer(ranks, experts))
    batch = Batch(np.array([0] * 21 + [-1] + [1] * 3 + [2, 2]))
    blocks = batch.blocks(torch.device("cpu"))
    x, y = torch.randn(batch.size, IN), torch.zeros(batch.size, sum(WIDTHS))
    h, z = slots.results.of(batch.size, 3, shrink.splits)
    cut = blocks.of_size[shrink.block_tokens]
    first = kernels.shrink_launch(x, blocks.order, cut, slots.table, h, z, shrink)
    end = blocks.of_size[expand.block_tokens]
    of_slots = (slots.table, blocks.sampled, slots.load, WIDTHS)
    second = kernels.expand_launch(y, h, z, blocks.order, end, *of_slots, expand)
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
