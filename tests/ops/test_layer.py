"""A layer's routed product for mixed batches: torch, C++ and kernels against the reference."""

import numpy as np
import pytest
import torch

from guilomo_serve.ops import native, reference
from guilomo_serve.ops.layer import Batch, LayerWeights, SliceWeights, Slots
from guilomo_serve.ops.triton_slots import TritonSlots

TOP_K = 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_slice(generator, in_features, out_features, experts, max_rank):
    ranks = tuple(torch.randint(1, max_rank + 1, (experts,), generator=generator).tolist())
    scalings = tuple((torch.rand(experts, generator=generator) + 0.5).tolist())
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return SliceWeights(
        lora_a=normal(sum(ranks), in_features) / in_features**0.5,
        lora_b=normal(out_features, sum(ranks)),
        router=normal(experts, in_features) if experts > 1 else None,
        ranks=ranks,
        scalings=scalings,
    )


def expected(y, x, slots, widths, slot_of_token):
    """The reference in float64, token by token."""
    result = y.double()
    for t, slot in enumerate(slot_of_token.tolist()):
        column = 0
        for i, width in enumerate(widths):
            s = slots[slot][i] if slot >= 0 and slots[slot] is not None else None
            if s is not None:
                result[t, column : column + width] += reference.routed_lora(
                    x[t : t + 1].double(),
                    s.lora_a.to(x.dtype).double(),
                    s.lora_b.to(x.dtype).double(),
                    None if s.router is None else s.router.double(),
                    s.ranks,
                    s.scalings,
                    TOP_K,
                )[0]
            column += width
    return result


def in_torch(y, x, weights, batch, widths):
    apply(Slots(len(weights)), y, x, weights, batch)


def in_cpp(y, x, weights, batch, widths):
    if not native.is_available():
        pytest.skip("no C++ compiler on this machine")
    apply(native.NativeSlots(len(weights)), y, x, weights, batch)


def in_kernels(y, x, weights, batch, widths):
    """On a GPU or, under tests/ops/test_kernels.py, in Triton's interpreter; else in torch."""
    on_device = y.to(DEVICE)
    slots = TritonSlots(len(weights), x.shape[1], widths, x.dtype, DEVICE)
    apply(slots, on_device, x.to(DEVICE), weights, batch)
    y.copy_(on_device)


def apply(slots, y, x, weights, batch):
    for i, of_slot in enumerate(weights):
        slots.set(i, of_slot)
    slots.apply_(y, x, batch)


@pytest.mark.parametrize("implementation", [in_torch, in_cpp, in_kernels])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 8, 75])
@pytest.mark.parametrize(
    ("in_features", "widths", "experts", "max_rank"),
    [
        (64, (64,), (3,), 8),
        (96, (96, 32, 32), (5, 8, 2), 8),  # q, k, v
        (576, (192, 192), (1, 6), 5),  # gate and up, one of them a plain LoRA
        (37, (53, 19), (4, 3), 3),  # nothing a multiple of a vector
        (40, (48,), (70,), 2),  # more experts than bits in a word
        (64, (128,), (1,), 64),
    ],
)
def test_mixed_batch_equals_the_reference(
    implementation, dtype, tokens, in_features, widths, experts, max_rank
):
    if implementation is in_kernels and max(experts) > 16:
        pytest.skip("more experts than the kernels take: test_kernels.py has the refusal")
    generator = torch.Generator().manual_seed(tokens + in_features)
    slots = [
        [random_slice(generator, in_features, w, e, max_rank) for w, e in zip(widths, experts)]  # noqa: B905
        for _ in range(3)
    ]
    slots[1][-1] = None  # this adapter leaves a slice alone,
    slots[2][:-1] = [None] * (len(widths) - 1)  # this one all but one,
    slots.append(None)  # this one the whole layer
    if all(s is None for s in slots[1]):
        slots[1] = None
    weights = [s and LayerWeights.stack(s, widths, TOP_K, dtype) for s in slots]
    slot_of_token = torch.randint(-1, len(slots), (tokens,), generator=generator).numpy()
    x = torch.randn(tokens + 2, in_features, generator=generator).to(dtype)  # two rows of padding
    y = torch.randn(tokens + 2, sum(widths), generator=generator).to(dtype)
    want = expected(y, x, slots, widths, slot_of_token)

    got = y.clone()
    implementation(got, x, weights, Batch(slot_of_token), widths)

    # Relative to the largest value, as the order of sums and the rounding of h make it.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (got.double() - want).abs().max() / want.abs().max() < tolerance
    untouched = np.append(slot_of_token < 0, [True, True])
    assert torch.equal(got[untouched], y[untouched])


@pytest.mark.parametrize("implementation", [in_cpp, in_kernels])
def test_strided_rows_are_followed(implementation):
    generator = torch.Generator().manual_seed(0)
    weights = LayerWeights.stack(
        [random_slice(generator, 64, 48, 4, 4)], (48,), TOP_K, torch.float32
    )
    wide_x, wide_y = torch.randn(9, 100, generator=generator), torch.zeros(9, 80)
    x, y = wide_x[:, 10:74], wide_y[:, 5:53]
    batch = Batch(np.zeros(9, dtype=np.int64))
    alone = torch.zeros(9, 48)
    in_torch(alone, x.contiguous(), [weights], batch, (48,))
    implementation(y, x, [weights], batch, (48,))
    torch.testing.assert_close(y, alone)
    assert wide_y[:, :5].eq(0).all()
    assert wide_y[:, 53:].eq(0).all()


def test_batch_groups_tokens_by_slot_and_leaves_the_base_out():
    batch = Batch(np.array([2, -1, 0, 2, -1, 0]))
    assert batch.order.tolist() == [2, 5, 0, 3]
    assert batch.segments.tolist() == [[0, 0, 2], [2, 2, 4]]
    assert batch.slots == [0, 2]
    assert Batch(np.array([-1, -1])).segments.tolist() == []
    # Where another process has the adapters in other slots, each is at the same place.
    adapters = np.array([700, -1, 9, 700, -1, 9])
    for batch, slots in (
        (Batch(np.array([2, -1, 0, 2, -1, 0]), adapters), [0, 2]),
        (Batch(np.array([0, -1, 2, 0, -1, 2]), adapters), [2, 0]),
    ):
        assert batch.order.tolist() == [2, 5, 0, 3]
        assert batch.segments[:, 1:].tolist() == [[0, 2], [2, 4]]
        assert batch.slots == slots
    assert Batch(np.array([], dtype=np.int64)).segments.tolist() == []
