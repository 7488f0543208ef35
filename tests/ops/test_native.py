"""The C++ op on other processors than the one at hand, and what it does with NaN."""

import platform
from pathlib import Path

import numpy as np
import pytest
import torch

from guilomo_serve.ops import native
from guilomo_serve.ops.layer import Batch, LayerWeights, SliceWeights, Slots

# What each needs of the processor that runs the test.
ARCHITECTURES = {"x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512bw", "native": ""}
WIDTHS = (150, 64)  # with columns left over from every width of a vector


def slots_for(architecture, count):
    if not native.is_available():
        pytest.skip("no C++ compiler on this machine")
    if architecture != "native":
        if platform.machine() != "x86_64":
            pytest.skip(f"{architecture} does not run on {platform.machine()}")
        if ARCHITECTURES[architecture] not in Path("/proc/cpuinfo").read_text():
            pytest.skip(f"this processor has no {ARCHITECTURES[architecture]}")
    return native.NativeSlots(count, architecture)


def layer(generator, dtype):
    ranks = ((3, 1, 4), (2,))
    slices = [
        SliceWeights(
            torch.randn(sum(r), 70, generator=generator) / 8,
            torch.randn(width, sum(r), generator=generator),
            torch.randn(len(r), 70, generator=generator) if len(r) > 1 else None,
            r,
            (0.5,) * len(r),
        )
        for width, r in zip(WIDTHS, ranks, strict=True)
    ]
    return LayerWeights.stack(slices, WIDTHS, 2, dtype)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_architecture_agrees_with_torch(architecture, dtype):
    generator = torch.Generator().manual_seed(0)
    weights = [layer(generator, dtype) for _ in range(2)]
    x = torch.randn(45, 70, generator=generator).to(dtype)
    batch = Batch(np.arange(45) % 3 - 1)
    results = []
    for slots in (Slots(2), slots_for(architecture, 2)):
        for i, of_slot in enumerate(weights):
            slots.set(i, of_slot)
        y = torch.ones(45, sum(WIDTHS), dtype=dtype)
        slots.apply_(y, x, batch)
        results.append(y)
    # The largest sums are about 8: four roundings to bfloat16 of numbers of that size.
    atol = 1e-5 if dtype == torch.float32 else 8 * 2**-8 * 4
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=atol)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_shows_in_its_token_alone(architecture, dtype):
    slots = slots_for(architecture, 1)
    slots.set(0, layer(torch.Generator().manual_seed(0), dtype))
    x = torch.ones(5, 70, dtype=dtype)
    x[3, 69] = torch.nan  # the last one, which fills no vector
    y = torch.zeros(5, sum(WIDTHS), dtype=dtype)
    slots.apply_(y, x, Batch(np.zeros(5, dtype=np.int64)))
    assert y[3].isnan().all()
    assert y[[0, 1, 2, 4]].isfinite().all()
