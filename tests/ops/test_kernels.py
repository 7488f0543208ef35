"""The Triton kernels against their reference in torch.

On a machine without a GPU the kernels run in Triton's interpreter, which has to be chosen before
Triton is imported: `test_kernels_in_the_interpreter` runs this file and test_layer.py once more in
a process of its own. There the ops are the kernels; in the outer process they are the reference.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from guilomo_serve.adapter import AdapterError
from guilomo_serve.ops import kernels, reference, two_steps
from guilomo_serve.ops import tuning as tuning_module
from guilomo_serve.ops.layer import Batch, LayerWeights, SliceWeights, Slots, TokenBlocks
from guilomo_serve.ops.load import router_load
from guilomo_serve.ops.memory import AdapterMemory, AdapterMemoryError
from guilomo_serve.ops.triton_slots import AdapterSlots, TritonSlots
from guilomo_serve.ops.tuning import DEFAULTS, ExpandTuning, ShrinkTuning
from guilomo_serve.runtime.loading import check_fits
from tests.ops.late_copies import LateCopies

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
TOP_K = 2
IN, WIDTHS = 80, (96, 32, 32)

runs_kernels = pytest.mark.skipif(
    not (GPU or kernels.INTERPRETED), reason="test_kernels_in_the_interpreter runs it"
)
needs_gpu = pytest.mark.skipif(not GPU, reason="no CUDA device")


def random_slice(generator, out_features, ranks, in_features=IN):
    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return SliceWeights(
        lora_a=normal(sum(ranks), in_features) / in_features**0.5,
        lora_b=normal(out_features, sum(ranks)),
        router=normal(len(ranks), in_features) if len(ranks) > 1 else None,
        ranks=tuple(ranks),
        scalings=tuple((torch.rand(len(ranks), generator=generator) + 0.5).tolist()),
    )


def random_layer(seed, ranks_of_slices, dtype=torch.float32, widths=WIDTHS, in_features=IN):
    """Weights of an adapter; a slice without ranks is left alone."""
    generator = torch.Generator().manual_seed(seed)
    slices = [
        random_slice(generator, width, ranks, in_features) if ranks else None
        for width, ranks in zip(widths, ranks_of_slices, strict=True)
    ]
    return LayerWeights.stack(slices, widths, TOP_K, dtype)


def filled(weights, dtype=torch.float32, widths=WIDTHS, in_features=IN):
    slots = TritonSlots(len(weights), in_features, widths, dtype, DEVICE)
    for slot, of_slot in enumerate(weights):
        slots.set(slot, of_slot)
    return slots


def in_torch(y, x, weights, batch):
    slots = Slots(len(weights))
    for slot, of_slot in enumerate(weights):
        slots.set(slot, of_slot)
    result = y.clone()
    slots.apply_(result, x, batch)
    return result


def tensors(tokens, dtype=torch.float32, widths=WIDTHS, in_features=IN):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, in_features, generator=generator).to(dtype)
    return x, torch.randn(tokens, sum(widths), generator=generator).to(dtype)


def assert_near(found, expected, tolerance):
    error = (found.double().cpu() - expected.double().cpu()).abs().max()
    assert error <= tolerance * expected.abs().max().cpu(), f"differs by {error:.2g}"


ADAPTERS = (
    ((3, 1, 7), (2, 2), (5,)),  # the last slice has one expert and no router
    ((20,) * 16, (), (1,) * 16),  # as many experts as there may be; leaves a slice alone
    None,  # an empty slot
    ((), (), (4, 4, 4)),
    ((8,), (8,), (8,)),  # a plain LoRA
)
# Segments: one of many tokens, of one token, none (3), of a slot that is empty, of the base.
SLOTS = np.array([1] * 21 + [-1, 0, 2, 4, 4, 1, -1])


@pytest.mark.skipif(GPU or kernels.INTERPRETED, reason="the kernels run in this process")
@pytest.mark.timeout(900)  # half a minute where nothing else runs
def test_kernels_in_the_interpreter() -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [
            *command,
            *(str(here / f"test_{part}.py") for part in ("kernels", "layer", "costs")),
            "-k",
            "kernels",
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=here.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "test_kernels_in_the_interpreter runs it" not in done.stdout  # that is, it was run


FEW = (ShrinkTuning(16, 16, 32, 1, 1, 4, 2), ExpandTuning(64, 16, 32, 2, 4, 2))
MANY = (ShrinkTuning(64, 64, 64, 3, 4, 4, 2), ExpandTuning(16, 32, 64, 1, 4, 2))


@runs_kernels
@pytest.mark.parametrize(
    ("dtype", "shrink", "expand"),
    [(torch.float32, *FEW), (torch.bfloat16, *MANY), (torch.float16, *MANY)],
)
def test_kernels_equal_their_reference_at_any_settings(dtype, shrink, expand) -> None:
    weights = [a and random_layer(i, a, dtype) for i, a in enumerate(ADAPTERS)]
    slots = filled(weights, dtype)
    x, y = tensors(len(SLOTS) + 3, dtype)
    batch = Batch(SLOTS)
    # In host memory, where the reference can follow addresses.
    host = slots if not GPU else _on_host(weights, dtype)
    blocks, host_blocks = batch.blocks(DEVICE), batch.blocks(torch.device("cpu"))

    h, z = slots.results.of(len(x), 3, shrink.splits)
    cut = blocks.cut(len(x), shrink.block_tokens)
    kernels.shrink_launch(x.to(DEVICE), blocks.order, cut, slots.table, h, z, shrink).run()
    of_host = (host_blocks.order, host_blocks.of_size[16], host.table)
    want_h, want_z = two_steps.Results("cpu").of(len(x), 3, 2)
    two_steps.shrink(x, *of_host, want_h, want_z)

    for slot, begin, end in batch.segments.tolist():
        if (of_slot := weights[slot]) is not None:
            rows, experts = len(of_slot.lora_a), len(of_slot.router)
            for found, want, count in ((h, want_h, rows), (z, want_z, experts)):
                covered = (slice(begin, end), slice(None), slice(count))
                if count:
                    assert_near(found[covered].sum(1), want[covered].sum(1), 1e-5)

    got = y.clone().to(DEVICE)
    cut = blocks.cut(len(x), expand.block_tokens)
    counts = (blocks.sampled, slots.load)
    kernels.expand_launch(got, h, z, blocks.order, cut, slots.table, *counts, WIDTHS, expand).run()
    want_y = y.clone()
    two_steps.expand(want_y, want_h, want_z, *of_host, host_blocks.sampled, host.load, WIDTHS)
    assert_near(got, want_y, 1e-5 if dtype == torch.float32 else 1e-2)
    untouched = torch.tensor([*(SLOTS < 0), True, True, True])
    assert torch.equal(got.cpu()[untouched], y[untouched])


def _on_host(weights, dtype):
    slots = TritonSlots(len(weights), IN, WIDTHS, dtype, "cpu")
    for slot, of_slot in enumerate(weights):
        slots.set(slot, of_slot)
    return slots


@runs_kernels
def test_of_equal_logits_the_kernels_take_the_lower_index() -> None:
    slice_ = random_slice(torch.Generator().manual_seed(0), 48, (2, 3, 1, 4))
    router = torch.zeros_like(slice_.router)
    router[3] = -slice_.router[3].abs()  # below the ties for inputs above 0
    tied = SliceWeights(slice_.lora_a, slice_.lora_b, router, slice_.ranks, slice_.scalings)
    weights = LayerWeights.stack([tied], (48,), TOP_K, torch.float32)
    x, y = tensors(5, widths=(48,))
    x = x.abs()
    want = y + reference.routed_lora(
        x, tied.lora_a[:5], tied.lora_b[:, :5], router[:2], (2, 3), tied.scalings[:2], TOP_K
    )
    got = y.clone().to(DEVICE)
    filled([weights], widths=(48,)).apply_(got, x.to(DEVICE), Batch(np.zeros(5, dtype=np.int64)))
    assert_near(got, want, 1e-5)


@runs_kernels
def test_kernels_take_the_largest_adapter() -> None:
    """16 experts, total rank 512, one of them of rank 64, beside a small one."""
    ranks = (64, *(30,) * 14, 28)
    weights = [random_layer(0, [ranks], widths=(40,)), random_layer(1, [(1, 1)], widths=(40,))]
    x, y = tensors(3, widths=(40,))
    batch = Batch(np.array([0, 1, 0]))
    got = y.clone().to(DEVICE)
    filled(weights, widths=(40,)).apply_(got, x.to(DEVICE), batch)
    assert_near(got, in_torch(y, x, weights, batch), 1e-5)


def test_a_batch_of_the_base_alone_changes_nothing_in_kernels() -> None:
    x, y = tensors(4)
    slots = filled([random_layer(0, ADAPTERS[0])])
    got = y.clone().to(DEVICE)
    slots.apply_(got, x.to(DEVICE), Batch(np.full(4, -1)))
    slots.apply_(got[:0], x.to(DEVICE)[:0], Batch(np.empty(0, dtype=np.int64)))
    assert torch.equal(got.cpu(), y)


def test_kernels_follow_loads_and_unloads() -> None:
    """Whatever was loaded and unloaded before, a slot gives what its adapter alone gives."""
    generator = np.random.default_rng(0)
    weights: list[LayerWeights | None] = [None] * 4
    slots = filled(weights)
    x, y = tensors(8)
    batch = Batch(np.arange(8) % 4)
    for seed in range(30):
        slot = int(generator.integers(4))
        ranks = [tuple(generator.integers(1, 9, generator.integers(1, 5))) for _ in WIDTHS]
        weights[slot] = random_layer(seed, ranks) if generator.random() < 0.7 else None
        slots.set(slot, weights[slot])
        if seed % 10 == 9:
            got = y.clone().to(DEVICE)
            slots.apply_(got, x.to(DEVICE), batch)
            assert_near(got, in_torch(y, x, weights, batch), 1e-5)


def bytes_of(weights: LayerWeights) -> int:
    of_all = (weights.lora_a, *weights.lora_b, weights.router, weights.row_scale)
    return sum(t.numel() * t.element_size() for t in of_all)


def adapter_slots(count, memory, layers=("a", "b")):
    """Empty slots of layers that share memory."""
    return AdapterSlots({name: filled([None] * count) for name in layers}, memory)


def test_memory_is_what_the_adapters_weigh() -> None:
    weights = [random_layer(i, a) for i, a in enumerate(ADAPTERS) if a]
    memory = AdapterMemory(None, DEVICE)
    slots = adapter_slots(len(weights), memory)
    packed = [slots.pack({"a": of_slot, "b": of_slot}) for of_slot in weights]
    own = 2 * sum(map(bytes_of, weights))
    for slot, adapter in enumerate(packed):
        slots.set(slot, adapter)
    assert own <= memory.used <= 1.05 * own
    for slot in range(1, len(weights)):
        slots.set(slot, None)
    slots.set(0, packed[2])
    assert memory.used <= 1.1 * 2 * bytes_of(weights[2])


def test_an_adapter_that_was_packed_keeps_its_weights() -> None:
    """As views of what goes to the GPU: a worker has no other copy."""
    weights = {"a": random_layer(0, ADAPTERS[0]), "b": random_layer(1, ADAPTERS[1])}
    packed = adapter_slots(1, AdapterMemory(None, DEVICE)).pack(weights)
    (begin, end) = packed.data.data_ptr(), packed.data.data_ptr() + len(packed.data)
    for name, views in packed.weights.items():
        for view, own in zip(_large_tensors(views), _large_tensors(weights[name]), strict=True):
            assert torch.equal(view, own)
            assert begin <= view.data_ptr() < end
            assert view.data_ptr() % 16 == 0


def _large_tensors(weights: LayerWeights) -> list[torch.Tensor]:
    return [weights.lora_a, weights.router, *weights.lora_b]


def test_putting_an_adapter_into_a_slot_copies_its_weights_once() -> None:
    """And the tables of all layers, whose number changes nothing."""
    layers = {str(i): random_layer(i, ADAPTERS[i % 2]) for i in range(12)}
    slots = adapter_slots(3, AdapterMemory(2**21, DEVICE), layers)
    packed = slots.pack(layers)
    with _Ops() as ops:
        slots.set(1, packed)
    names = [str(func) for func, _, _ in ops.calls]
    assert "aten._local_scalar_dense.default" not in names
    assert names.count("aten.copy_.default") == 2
    copied = max((args[1] for f, args, _ in ops.calls if "copy_" in str(f)), key=torch.numel)
    assert copied.data_ptr() == packed.data.data_ptr()
    with _Ops() as ops:
        slots.load_of(1, list(layers))
        slots.set(1, None)
    assert len(ops.calls) < len(layers), "an operation for each layer"


def test_steps_wait_for_the_weights_that_they_use_alone() -> None:
    """And for no other's that are still coming; moved memory has all that were."""
    one, other = random_layer(0, ADAPTERS[0]), random_layer(1, ADAPTERS[1])
    memory = AdapterMemory(2**21, DEVICE)
    memory._beside = LateCopies()
    memory._reserved.zero_()
    slots = adapter_slots(3, memory, ("a",))
    layer = slots._layers["a"]
    for slot, weights in enumerate((one, other, one)):
        slots.set(slot, slots.pack({"a": weights}))
    coming = [placed[1] for placed in slots._in_slot]
    assert not any(taken.data.any() for taken in coming)
    slots.use([1])
    assert coming[2].coming
    assert not coming[2].data.any()
    x, y = tensors(4)
    for slot_of_token, weights in (
        ([1, -1, 1, 1], [None, other]),
        ([2, 0, 1, 1], [one, other, one]),
    ):
        batch = Batch(np.array(slot_of_token))
        got = y.clone().to(DEVICE)
        slots.use(batch.slots)
        layer.apply_(got, x.to(DEVICE), batch)
        assert_near(got, in_torch(y, x, weights, batch), 1e-5)
    slots.set(0, slots.pack({"a": other}))
    slots.set(0, None)  # before it came
    slots.use([0])


def test_a_layer_allocates_nothing_in_a_step(monkeypatch) -> None:
    """What is between both kernels is in one memory for all layers, from the warm-up on."""
    launches: list[kernels.Launch] = []
    monkeypatch.setattr(kernels, "INTERPRETED", True)  # on a CPU; nothing runs
    monkeypatch.setattr(kernels.Launch, "run", lambda launch: launches.append(launch))
    three, one = filled([None] * 2), filled([None] * 2, widths=(48,))
    split = TritonSlots(2, IN, WIDTHS, torch.float32, DEVICE, all_reduce=lambda z: z)
    AdapterSlots({"three": three, "one": one, "split": split}, AdapterMemory(2**16, DEVICE))
    for layer in (three, one, split):
        layer.warm_up(300)
    launches.clear()
    blocks = TokenBlocks(300, 2, DEVICE)
    for tokens in (300, 1, 17, 256):
        batch = Batch(np.arange(tokens) % 3 - 1)
        blocks.update(batch)
        for layer in (three, one, split):
            x, y = (t.to(DEVICE) for t in tensors(tokens, widths=layer.widths))
            with _Ops() as ops:
                layer.apply_(y, x, batch)
            sums = {"aten.sum.IntList_out"} if layer is split else set()
            assert {str(func) for func, _, _ in ops.calls} <= _VIEWS | sums
    at = {
        launch.arguments[i].untyped_storage().data_ptr()
        for launch in launches
        for i in ((4, 5) if launch.kernel is kernels._shrink else (1, 2))
    }
    assert len(launches) == 2 * 3 * 4
    assert len(at) == 1


_VIEWS = {f"aten.{name}.default" for name in ("view", "detach")} | {
    "aten.slice.Tensor",
    "aten.split_with_sizes.default",
}


def test_a_graph_takes_no_batch_that_has_no_place_of_its_own(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    batch = Batch(np.array([0, -1]))
    with pytest.raises(RuntimeError, match=r"write the batch with TokenBlocks\.update first"):
        batch.blocks(torch.device("cuda", 0))


def test_adapters_share_memory_that_is_reserved_and_kernels_follow_when_it_is_moved() -> None:
    one, other = random_layer(0, ADAPTERS[0]), random_layer(1, ADAPTERS[1])
    pack = adapter_slots(1, AdapterMemory(None, DEVICE)).pack
    small, between, large = pack({"a": one}), pack({"b": other}), pack({"a": one, "b": one})
    room = 2 * len(small.data) + len(between.data) + 3 * 256  # of which some is lost to rounding
    slots = adapter_slots(4, AdapterMemory(room, DEVICE))
    slots.check_room([large, between])
    assert slots.has_room(large)
    with pytest.raises(AdapterMemoryError, match="adapters that a batch may have take"):
        slots.check_room([large, small, between])
    for slot, adapter in enumerate((small, between, small)):
        slots.set(slot, adapter)
    assert not slots.has_room(small)
    with pytest.raises(AdapterMemoryError, match="bytes for adapters are free"):
        slots.set(3, small)
    a, b = slots._layers.values()
    assert a.table[3].eq(0).all()
    before = b.table[1].clone()
    slots.set(0, None)
    slots.set(2, None)
    slots.set(3, large)  # larger than either gap
    assert not torch.equal(b.table[1], before)
    x, y = tensors(4)
    batch = Batch(np.array([0, 1, 3, -1]))
    for layer, weights in ((a, [None, None, None, one]), (b, [None, other, None, one])):
        got = y.clone().to(DEVICE)
        layer.apply_(got, x.to(DEVICE), batch)
        assert_near(got, in_torch(y, x, weights, batch), 1e-5)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ((33,) * 16, "the total rank of a module is 528, expected at most 512"),
        ((1,) * 17, "the number of experts of a module is 17, expected at most 16"),
    ],
)
def test_an_adapter_that_is_too_large_is_refused_and_the_slot_as_it_was(ranks, message) -> None:
    slots = filled([random_layer(0, ADAPTERS[0]), random_layer(1, ADAPTERS[1])])
    before = slots.table.clone()
    with pytest.raises(two_steps.UnsupportedAdapterError, match=message):
        slots.set(0, random_layer(2, [ranks, (), ()]))
    assert torch.equal(slots.table, before)


@pytest.mark.skipif(not kernels.INTERPRETED, reason="test_kernels_in_the_interpreter runs it")
@pytest.mark.parametrize(("max_tokens", "classes"), [(8, 1), (256, 3), (300, 4), (1100, 5)])
def test_warming_up_launches_the_kernels_of_all_classes(monkeypatch, max_tokens, classes) -> None:
    launched = []
    launch = kernels._shrink.run
    monkeypatch.setattr(
        kernels._shrink,
        "run",
        lambda *a, grid, **k: (launched.append(grid), launch(*a, grid=grid, **k)),
    )
    filled([None]).warm_up(max_tokens)
    assert len(launched) == classes
    assert all(min(grid) > 0 for grid in launched)


def test_an_adapter_for_which_a_gpu_has_no_kernels_is_refused_when_it_is_read() -> None:
    too_large = {"model.layers.0.mlp": random_layer(0, [(1,) * 17, (), ()])}
    check_fits(too_large, torch.device("cpu"), "folder")
    message = "folder: model.layers.0.mlp: the number of experts of a module is 17, .* at most 16"
    with pytest.raises(AdapterError, match=message):
        check_fits(too_large, torch.device("cuda"), "folder")


def test_token_blocks_keep_their_place_and_forget_the_last_batch() -> None:
    blocks = TokenBlocks(max_tokens=100, adapters=3, device="cpu")
    places = [blocks.order.data_ptr(), *(b.data_ptr() for b in blocks.of_size.values())]
    batches = (
        np.array([2] * 70 + [0] * 17 + [-1] * 3 + [1]),
        np.array([1, -1, 1]),
        np.array([-1]),
    )
    # Each so often that it comes through all of the host's memory, where the last one was.
    for slot_of_token in (of_batch for of_batch in batches for _ in range(TokenBlocks._AHEAD)):
        batch = Batch(slot_of_token)
        blocks.update(batch)
        assert batch.blocks(torch.device("cpu")) is blocks
        assert places == [blocks.order.data_ptr(), *(b.data_ptr() for b in blocks.of_size.values())]
        for size, of_size in blocks.of_size.items():
            taken = {slot: [] for slot in range(3)}
            for slot, begin, end in of_size.tolist():
                assert end - begin <= size
                taken[slot] += blocks.order[begin:end].tolist()
            for slot, tokens in taken.items():
                assert tokens == np.flatnonzero(slot_of_token == slot).tolist()
            filled_blocks = (of_size[:, 2] > of_size[:, 1]).nonzero().flatten().tolist()
            most = TokenBlocks.count(len(slot_of_token), 3, size)
            assert filled_blocks == list(range(len(filled_blocks)))  # a launch takes the first ones
            assert len(filled_blocks) <= most
    with pytest.raises(ValueError, match="101 tokens of 1 adapters, expected at most 100 of 3"):
        blocks.update(Batch(np.zeros(101, dtype=np.int64)))


class _Ops(TorchDispatchMode):
    """Keeps the operations of torch, and their arguments alive."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[object, tuple[object, ...], dict[str, object]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def test_a_batch_costs_one_copy_from_memory_that_stays() -> None:
    blocks = TokenBlocks(max_tokens=100, adapters=3, device="cpu")
    slots_of_steps = [np.arange(tokens) % 4 - 1 for tokens in (100, 1, 30, 7) * 5]
    with _Ops() as ops:
        for slot_of_token in slots_of_steps:
            blocks.update(Batch(slot_of_token))
    assert {func for func, _, _ in ops.calls} == {torch.ops.aten.copy_.default}
    assert len(ops.calls) == len(slots_of_steps)
    assert all(args[2:] == (True,) for _, args, _ in ops.calls), "a copy is waited for"
    sources = [source.data_ptr() for _, (_, source, *_), _ in ops.calls]
    assert len(set(sources)) < len(slots_of_steps) / 2
    # A step's copy may not be done when the host writes the next batch.
    assert all(now != before for before, now in itertools.pairwise(sources))


def test_settings_are_kept_by_gpu_in_the_users_cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    package = tuning_module.FILE.read_bytes()
    other = tuple(reversed(DEFAULTS))
    tuning_module.store("GPU A", DEFAULTS)
    tuning_module.store("GPU B", DEFAULTS)
    tuning_module.store("GPU B", other)
    assert tuning_module.stored("GPU A") == DEFAULTS
    assert tuning_module.stored("GPU B") == other
    assert tuning_module.stored("GPU C") is None
    assert [file.name for file in tmp_path.rglob("*.*")] == ["kernel_tuning.json"]
    assert tuning_module.FILE.read_bytes() == package
    with pytest.raises(ValueError, match="1 settings, expected one for each class"):
        tuning_module.store("GPU A", DEFAULTS[:1])


def test_known_gpus_have_settings_until_they_are_measured(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for gpu in ("H100 80GB HBM3", "H200", "A100-SXM4-40GB", "L40S", "B200"):
        assert len(tuning_module.stored(f"NVIDIA {gpu}")) == len(DEFAULTS)
    assert tuning_module.stored("NVIDIA H100 80GB HBM3") == DEFAULTS  # as tuning.py says
    measured = tuple(reversed(DEFAULTS))
    tuning_module.store("NVIDIA H100 80GB HBM3", measured)
    assert tuning_module.stored("NVIDIA H100 80GB HBM3") == measured
    assert tuning_module.stored("NVIDIA H100 PCIe") == DEFAULTS


@pytest.mark.parametrize("implementation", [Slots, TritonSlots])
def test_only_slots_that_graphs_can_keep_are_capturable(implementation) -> None:
    assert implementation.capturable == (implementation is TritonSlots)


def test_kernels_count_what_routers_choose_in_sampled_steps() -> None:
    weights = [a and random_layer(i, a) for i, a in enumerate(ADAPTERS)]
    slots = filled(weights)
    x, y = tensors(len(SLOTS))
    x[3] = torch.nan  # of slot 1: in no count
    batch = Batch(SLOTS)
    blocks = TokenBlocks(len(SLOTS), len(ADAPTERS), DEVICE)
    for sampled in (True, False, True):
        blocks.update(batch, sampled)
        slots.apply_(y.clone().to(DEVICE), x.to(DEVICE), batch)
    for slot, of_slot in enumerate(weights):
        counted = slots._alone.load_of(slot, [""])
        routed = [p for p in of_slot.layout if p.experts[1] > p.experts[0]] if of_slot else []
        if not routed:
            assert counted is None
            continue
        tokens = np.flatnonzero(slot == SLOTS)
        logits = x[tokens] @ of_slot.router.t()
        want = router_load([logits[:, slice(*part.experts)] for part in routed], TOP_K)
        most = want.chosen.shape[1]
        assert torch.equal(counted.chosen[:, :most].cpu(), 2 * want.chosen)
        assert not counted.chosen[:, most:].any()
        assert torch.equal(counted.tokens.cpu(), 2 * want.tokens)
        torch.testing.assert_close(counted.entropy.cpu(), 2 * want.entropy, rtol=1e-5, atol=1e-5)
    slots.set(1, random_layer(9, ADAPTERS[0]))
    assert not slots._alone.load_of(1, [""]).tokens.any()


@pytest.mark.skipif(not kernels.INTERPRETED, reason="test_kernels_in_the_interpreter runs it")
def test_kernels_of_two_processes_with_split_inputs_are_those_of_one(tmp_path) -> None:
    script = str(Path(__file__).with_name("split_rank.py"))
    ranks = [
        subprocess.Popen([sys.executable, script, str(rank), str(tmp_path / "meet")])
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 200, 3000])
def test_kernels_on_the_gpu_at_the_size_of_a_real_layer(dtype, tokens) -> None:
    in_features, widths = 4096, (4096, 1024, 1024)
    generator = np.random.default_rng(0)
    weights = [
        random_layer(
            seed,
            [tuple(generator.integers(1, 17, generator.integers(2, 9))) for _ in widths],
            dtype,
            widths,
            in_features,
        )
        for seed in range(4)
    ]
    x, y = tensors(tokens, dtype, widths, in_features)
    batch = Batch(generator.integers(-1, 4, tokens))
    want = in_torch(y.float(), x.float(), [_in_float32(w) for w in weights], batch)
    got = y.clone().to(DEVICE)
    filled(weights, dtype, widths, in_features).apply_(got, x.to(DEVICE), batch)
    # Near ties a token may choose another expert: few, and none in float32's own precision.
    apart = (got.float().cpu() - want).abs().amax(1) / want.abs().max()
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert (apart > tolerance).float().mean() <= 0.005


def _in_float32(weights):
    return LayerWeights(
        lora_a=weights.lora_a.float(),
        lora_b=tuple(b.float() for b in weights.lora_b),
        router=weights.router,
        row_scale=weights.row_scale,
        expert_of_row=weights.expert_of_row,
        top_k=weights.top_k,
        layout=weights.layout,
    )


@needs_gpu
def test_a_cuda_graph_follows_batches_and_swaps() -> None:
    """Captured once; replayed for other tokens, after a load."""
    weights = [random_layer(0, ADAPTERS[0]), None]
    slots = filled(weights)
    blocks = TokenBlocks(max_tokens=32, adapters=2, device=DEVICE)
    x, y = (t.to(DEVICE) for t in tensors(32))
    first = Batch(np.zeros(32, dtype=np.int64))
    blocks.update(first)
    static_y = y.clone()
    slots.apply_(static_y, x, first)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static_y.copy_(y)
        slots.apply_(static_y, x, first)

    weights[1] = random_layer(1, ADAPTERS[1])
    slots.set(1, weights[1])
    second = Batch(np.array([1] * 9 + [0, -1] * 7))
    blocks.update(second)
    graph.replay()
    torch.cuda.synchronize()
    assert_near(static_y, in_torch(y.cpu(), x.cpu(), weights, second), 1e-4)
