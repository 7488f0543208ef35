"""The check of a loaded adapter accepts every implementation and sees small faults."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from guilomo_serve.ops import native
from guilomo_serve.ops.layer import LayerWeights, SliceWeights, Slots
from guilomo_serve.ops.selfcheck import PRODUCT_TOLERANCE, slot_error

WIDTHS = (48, 16, 16)
TOLERANCE = {dtype: PRODUCT_TOLERANCE[dtype] for dtype in (torch.float32, torch.bfloat16)}


@pytest.fixture
def weights(dtype: torch.dtype) -> LayerWeights:
    """Of a packed layer: a router, an untouched slice, a single expert."""
    torch.manual_seed(0)
    ranks = (3, 1, 4, 2)
    routed = SliceWeights(
        *(torch.randn(10, 64) / 8, torch.randn(48, 10), torch.randn(4, 64)),
        *(ranks, (0.5, 1.0, 2.0, 0.25)),
    )
    single = SliceWeights(torch.randn(5, 64) / 8, torch.randn(16, 5), None, (5,), (1.5,))
    return LayerWeights.stack([routed, None, single], WIDTHS, 2, dtype)


def error(slots: Slots, weights: LayerWeights, loaded: LayerWeights) -> float:
    """What the check finds of an adapter of which the slot has `loaded`."""
    slots.set(1, loaded)
    return slot_error(slots, 1, weights, sum(WIDTHS))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("make", [Slots, native.NativeSlots])
def test_what_is_computed_right_is_accepted(make, weights, dtype) -> None:
    if make is native.NativeSlots and not native.is_available():
        pytest.skip("no C++ compiler on this machine")
    assert error(make(2), weights, weights) < TOLERANCE[dtype]


def scaled(weights: LayerWeights) -> LayerWeights:
    row_scale = weights.row_scale.clone()
    row_scale[8:10] *= 1.5  # of the expert that counts least
    return replace(weights, row_scale=row_scale)


def routed_to_others(weights: LayerWeights) -> LayerWeights:
    return replace(weights, router=weights.router.flip(0))


def fewer_experts(weights: LayerWeights) -> LayerWeights:
    return replace(weights, top_k=1)


def a_column_off(weights: LayerWeights) -> LayerWeights:
    first, single = weights.lora_b
    return replace(weights, lora_b=(first, single.roll(1, dims=1)))


def not_finite(weights: LayerWeights) -> LayerWeights:
    lora_a = weights.lora_a.clone()
    lora_a[0, 0] = torch.nan
    return replace(weights, lora_a=lora_a)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "fault", [scaled, routed_to_others, fewer_experts, a_column_off, not_finite]
)
def test_what_is_computed_wrong_is_seen(fault, weights, dtype) -> None:
    assert not error(Slots(2), weights, fault(weights)) <= TOLERANCE[dtype]
