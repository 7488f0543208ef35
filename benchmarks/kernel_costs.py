"""What a launch of the kernels moves and computes, counted from the launch, and a time for it.

    .venv/bin/python benchmarks/kernel_costs.py [--gpu H100]    steps of Llama-3, modelled
    .venv/bin/python benchmarks/kernel_costs.py --choose        settings for the GPUs below
    .venv/bin/python benchmarks/kernel_costs.py --designs       other designs than the one there is

Bytes are those that programs ask for, as Triton's interpreter sees them (tests/ops/test_costs.py);
memory has to move each once, L2 all of them. A kernel's time is the longest of what memory, L2, the
arithmetic and the chain of loads of one program after another take, and its launch. Rates are the
makers'; L2's, a launch's and a load's are usual measured ones. It ranks settings until they are
measured; it is no measurement.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from guilomo_serve.ops import kernels, two_steps
from guilomo_serve.ops.layer import Batch, TokenBlocks
from guilomo_serve.ops.tuning import (
    DEFAULTS,
    TOKEN_CLASSES,
    ExpandTuning,
    ShrinkTuning,
    Tuning,
)
from guilomo_serve.ops.two_steps import table_width

LLAMA_8B = {
    "qkv_proj": (4096, (4096, 1024, 1024)),
    "o_proj": (4096, (4096,)),
    "gate_up_proj": (4096, (14336, 14336)),
    "down_proj": (14336, (4096,)),
}
LLAMA_70B = {
    "qkv_proj": (8192, (8192, 1024, 1024)),
    "o_proj": (8192, (8192,)),
    "gate_up_proj": (8192, (28672, 28672)),
    "down_proj": (28672, (8192,)),
}
BASES = {"8B": (LLAMA_8B, 32), "70B": (LLAMA_70B, 80)}


@dataclass(frozen=True)
class Gpu:
    """Multiprocessors; bytes a second of memory and L2; products and sums a second; seconds."""

    multiprocessors: int
    memory: float
    l2: float
    half: float
    tf32: float
    single: float
    host: float = 50e9  # bytes a second from pinned memory of the host, of a fifth PCIe
    launch: float = 1.3e-6
    overlapped: float = 0.6e-6  # of a kernel that starts before its predecessor ends
    load: float = 0.7e-6


GPUS = {
    "NVIDIA A100": Gpu(108, 2.0e12, 4.0e12, 312e12, 156e12, 19.5e12, 25e9, overlapped=1.3e-6),
    "NVIDIA H100": Gpu(132, 3.35e12, 5.5e12, 990e12, 495e12, 67e12),
    "NVIDIA H200": Gpu(132, 4.8e12, 5.5e12, 990e12, 495e12, 67e12),
    "NVIDIA L40S": Gpu(142, 0.86e12, 4.5e12, 362e12, 183e12, 91e12, 25e9, overlapped=1.3e-6),
    "NVIDIA B200": Gpu(148, 8.0e12, 10e12, 2250e12, 1100e12, 75e12),
}


@dataclass(frozen=True)
class Cost:
    """Of one launch.

    Attributes:
        loaded, stored: bytes that its programs ask for.
        flops: of 2-byte or float32 factors, and of the routers.
        programs: that have something to do.
        chain: loads of the longest program that wait for one another.
    """

    loaded: int
    stored: int
    flops: int
    router_flops: int
    programs: int
    chain: int


@dataclass(frozen=True)
class Adapter:
    """What a slot holds for a layer: of each slice its total rank and number of experts."""

    ranks: tuple[int, ...]
    experts: tuple[int, ...]

    def table_row(self) -> list[int]:
        """Of `two_steps.py`, without addresses."""
        row = [0, 0, 0, sum(self.ranks), sum(self.experts), 2]
        first_row = first_expert = 0
        for rank, experts in zip(self.ranks, self.experts, strict=True):
            row += [0, first_row, first_row + rank, first_expert, first_expert + experts, 0, 0]
            first_row, first_expert = first_row + rank, first_expert + experts
        return row


def shrink_cost(
    launch: kernels.Launch, adapters: Sequence[Adapter], blocks: Sequence[Sequence[int]]
) -> Cost:
    """Of a launch of shrink. Args: blocks: rows (slot, begin, end) of all of its programs."""
    x, in_features = launch.arguments[0], launch.arguments[6]
    c, size = launch.constants, x.element_size()
    _, row_programs, splits = launch.grid
    loaded = stored = flops = router_flops = programs = chain = 0
    for slot, begin, end in blocks[: launch.grid[0]]:
        tokens, adapter = end - begin, adapters[slot]
        rows, experts = sum(adapter.ranks), sum(adapter.experts)
        for program, split in itertools.product(range(row_programs), range(splits)):
            loaded += 12 + 8
            if tokens <= 0 or rows == 0:
                continue
            loaded += 3 * 8 + 4 * tokens
            programs += 1
            row_pieces = math.ceil(rows / c["BLOCK_ROWS"])
            pieces = row_pieces + math.ceil(experts / 16)
            steps = range(split * c["BLOCK_IN"], in_features, splits * c["BLOCK_IN"])
            features = sum(min(c["BLOCK_IN"], in_features - k) for k in steps)
            rounds = 3
            for piece in range(program, pieces, row_programs):
                is_router = piece >= row_pieces
                first = (piece - row_pieces) * 16 if is_router else piece * c["BLOCK_ROWS"]
                block = 16 if is_router else c["BLOCK_ROWS"]
                count = min(block, (experts if is_router else rows) - first)
                loaded += features * (tokens * size + count * (4 if is_router else size))
                stored += 4 * tokens * count
                work = 2 * c["BLOCK_TOKENS"] * block * features
                router_flops, flops = (
                    router_flops + work * is_router,
                    flops + work * (not is_router),
                )
                rounds += math.ceil(len(steps) / max(launch.options["num_stages"] - 1, 1))
            chain = max(chain, rounds)
    return Cost(loaded, stored, flops, router_flops, programs, chain)


def expand_cost(
    launch: kernels.Launch, adapters: Sequence[Adapter], blocks: Sequence[Sequence[int]]
) -> Cost:
    """Of a launch of expand in a step that is not sampled. Args: as of `shrink_cost`."""
    c, size = launch.constants, launch.arguments[0].element_size()
    wide, block_rows, tiles_of_program = c["BLOCK_COLUMNS"], c["BLOCK_ROWS"], c["TILES"]
    loaded = stored = flops = programs = chain = 0
    for slot, begin, end in blocks[: launch.grid[0]]:
        tokens, adapter = end - begin, adapters[slot]
        for slice_, width in enumerate(c["WIDTHS"]):
            rank, experts = adapter.ranks[slice_], adapter.experts[slice_]
            tiles = math.ceil(width / wide)
            for first in range(0, tiles, tiles_of_program):
                loaded += 12 + 8
                if tokens <= 0 or not sum(adapter.ranks):
                    continue
                loaded += 2 * 8
                if not rank:
                    continue
                mine = range(first, min(first + tiles_of_program, tiles))
                columns = sum(min(wide, width - tile * wide) for tile in mine)
                pieces = math.ceil(rank / block_rows)
                loaded += 6 * 8 + 4 * tokens + 4  # with the word that says whether to count
                loaded += 4 * c["Z_SPLITS"] * tokens * experts
                loaded += rank * columns * size
                loaded += len(mine) * rank * (4 * c["SPLITS"] * tokens + 2 * 4)
                loaded += tokens * columns * size
                stored += tokens * columns * size
                flops += 2 * c["BLOCK_TOKENS"] * block_rows * wide * pieces * len(mine)
                programs += 1
                chain = max(chain, 4 + len(mine) * pieces)
    return Cost(loaded, stored, flops, 0, programs, chain)


def seconds(cost: Cost, launch: kernels.Launch, once: int, gpu: Gpu, is_half: bool) -> float:
    """Args: once: bytes that memory has to move at least."""
    at_once = gpu.multiprocessors * max(1, 16 // launch.options["num_warps"])
    waves = math.ceil(cost.programs / at_once)
    on_cores = is_half and launch.constants["BLOCK_TOKENS"] >= 64
    return (gpu.overlapped if launch.kernel is kernels._expand else gpu.launch) + max(
        once / gpu.memory,
        (cost.loaded + cost.stored) / gpu.l2,
        cost.flops / (gpu.half if is_half else gpu.single)
        + cost.router_flops * (2 / gpu.tf32 if on_cores else 1 / gpu.single),
        waves * cost.chain * gpu.load,
    )


@dataclass(frozen=True)
class Layer:
    """A layer of a base with the adapters in its slots, of which a batch has so many at most."""

    in_features: int
    widths: tuple[int, ...]
    adapters: tuple[Adapter, ...]
    in_batch: int
    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def searched(
        cls, in_features: int, widths: tuple[int, ...], adapters: int, slots: int = 0
    ) -> Layer:
        """Of mean total rank 20 in 5 experts, as a search leaves them.

        Args: adapters: that a batch may have; slots: that have one, if more.
        """
        one = Adapter((20,) * len(widths), (5,) * len(widths))
        return cls(in_features, widths, (one,) * max(adapters, slots), adapters)

    def launches(self, batch: Batch, tuning: Tuning) -> tuple[kernels.Launch, kernels.Launch]:
        """Of both kernels; nothing is filled, and little is allocated (meta tensors)."""
        blocks, x = (
            TokenBlocks(batch.size, self.in_batch, "meta"),
            self._empty(batch.size, self.in_features),
        )
        table = torch.empty(
            len(self.adapters), table_width(len(self.widths)), dtype=torch.int64, device="meta"
        )
        results = two_steps.Results("meta")
        h, z = results.of(batch.size, len(self.widths), tuning.shrink.splits)
        cut = blocks.cut(batch.size, tuning.shrink.block_tokens)
        shrink = kernels.shrink_launch(x, blocks.order, cut, table, h, z, tuning.shrink)
        cut = blocks.cut(batch.size, tuning.expand.block_tokens)
        y, load = self._empty(batch.size, sum(self.widths)), self._empty(1, 1)
        return shrink, kernels.expand_launch(
            y, h, z, blocks.order, cut, table, blocks.sampled, load, self.widths, tuning.expand
        )

    def seconds(self, batch: Batch, tuning: Tuning, gpu: Gpu) -> tuple[float, float]:
        """Of both kernels."""
        is_half = self.dtype != torch.float32
        size = self.dtype.itemsize
        found = []
        used = [self.adapters[slot] for slot in batch.slots]
        rows = [sum(a.ranks) for a in used]
        of_a = sum(r * self.in_features * size for r in rows) + sum(
            4 * self.in_features * sum(a.experts) for a in used
        )
        of_b = sum(
            rank * width * size
            for a in used
            for rank, width in zip(a.ranks, self.widths, strict=True)
        )
        once = (
            of_a + batch.size * self.in_features * size,
            of_b + 2 * batch.size * sum(self.widths) * size,
        )
        costs = (shrink_cost, expand_cost)
        block_tokens = (tuning.shrink.block_tokens, tuning.expand.block_tokens)
        for launch, cost, bytes_, cut in zip(
            self.launches(batch, tuning), costs, once, block_tokens, strict=True
        ):
            of_launch = cost(launch, self.adapters, batch.cut(cut).tolist())
            found.append(seconds(of_launch, launch, bytes_, gpu, is_half))
        return found[0], found[1]

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device="meta")


def batch_of(tokens: int, adapters: int, slots: int = 0) -> Batch:
    """Of the adapters in the last ones of so many slots."""
    first = max(slots - adapters, 0)
    return Batch(first + np.sort(np.arange(tokens) % adapters))


def step(
    base: str, tokens: int, adapters: int, tuning: Tuning, gpu: Gpu, slots: int = 0
) -> tuple[float, float]:
    """Seconds of both kernels in all layers. Args: slots: with adapters, if more."""
    layers, count = BASES[base]
    batch = batch_of(tokens, adapters, slots)
    times = [
        Layer.searched(*shape, adapters, slots).seconds(batch, tuning, gpu)
        for shape in layers.values()
    ]
    return count * sum(t[0] for t in times), count * sum(t[1] for t in times)


def adapter_bytes(base: str) -> int:
    """Of one adapter as `Layer.searched` has it, packed: what is copied when it gets a slot."""
    layers, count = BASES[base]
    total = 0
    for in_features, widths in layers.values():
        (one,) = Layer.searched(in_features, widths, 1).adapters
        slices = list(zip(one.ranks, one.experts, widths, strict=True))
        total += two_steps.packed_bytes(in_features, slices, torch.bfloat16)
    return count * total


def candidates(tokens: int) -> tuple[list[ShrinkTuning], list[ExpandTuning]]:
    """Settings that compile without spills and, for few tokens, leave room for four programs."""
    if tokens <= 256:
        shrink = [
            ShrinkTuning(16, 16, 128, splits, programs, 4, 3)
            for splits, programs in itertools.product((2, 4, 8), (2, 4, 8))
        ]
        expand = [ExpandTuning(16, 32, 64, tiles, 4, 1) for tiles in (1, 2)]
        return shrink, expand
    shrink = [
        ShrinkTuning(block, 32, 64, splits, programs, 4, 3)
        for block, splits, programs in itertools.product((16, 64), (1, 2), (1, 2, 4))
    ]
    expand = [ExpandTuning(64, 32, 64, tiles, 8, 1) for tiles in (2, 4, 8)]
    return shrink, [*expand, *(ExpandTuning(16, 32, 64, tiles, 4, 1) for tiles in (2, 4))]


SEEN = ((1, 8, 16), (32, 64), (128, 256), (512, 1024), (4096,))  # tokens of each class


def choose(gpu: Gpu) -> tuple[Tuning, ...]:
    """The settings of least modelled time for one and for eight adapters, by class."""
    chosen = []
    for default, seen in zip(DEFAULTS, SEEN, strict=True):
        cases = [(tokens, adapters) for tokens in seen for adapters in (1, 8) if adapters <= tokens]

        def total(tuning: Tuning, cases: list[tuple[int, int]] = cases) -> float:
            return sum(sum(step("8B", *case, tuning, gpu)) / case[0] for case in cases)

        shrinks, expands = candidates(seen[-1])
        best = min((Tuning(shrink, default.expand) for shrink in shrinks), key=total)
        chosen.append(min((Tuning(best.shrink, expand) for expand in expands), key=total))
    return tuple(chosen)


def default_tuning(tokens: int) -> Tuning:
    return DEFAULTS[bisect.bisect_left(TOKEN_CLASSES, tokens)]


def designs(base: str, tokens: int, adapters: int, gpu: Gpu) -> dict[str, float]:
    """Seconds of all layers' kernels in a step: as they are, and as they might be.

    Returns:
        `as it is`; `no early start`: expand is launched when shrink has ended; `modules apart`:
        each of those that a layer packs has launches of its own; `gates a tile`: a program of
        expand has one tile; `one part`: shrink is not split; `a third kernel` adds shrink's parts
        and takes the gates; `shrink beside`: a second stream hides it behind the base product,
        which is the most that can be gained, with two waits of a stream for another.
    """
    layers, count = BASES[base]
    batch = batch_of(tokens, adapters)
    tuning = default_tuning(tokens)
    whole = replace(tuning, shrink=replace(tuning.shrink, splits=1))
    found: dict[str, float] = dict.fromkeys(
        ("as it is", "no early start", "modules apart", "gates a tile", "one part"), 0.0
    ) | {"a third kernel": 0.0, "shrink beside": 0.0}
    for in_features, widths in layers.values():
        layer = Layer.searched(in_features, widths, adapters)
        shrink, expand = layer.seconds(batch, tuning, gpu)
        found["as it is"] += shrink + expand
        found["no early start"] += sum(
            layer.seconds(batch, tuning, replace(gpu, overlapped=gpu.launch))
        )
        found["modules apart"] += sum(
            sum(Layer.searched(in_features, (width,), adapters).seconds(batch, tuning, gpu))
            for width in widths
        )
        a_tile = replace(tuning, expand=replace(tuning.expand, tiles=1))
        found["gates a tile"] += sum(layer.seconds(batch, a_tile, gpu))
        found["one part"] += sum(layer.seconds(batch, whole, gpu))
        (one, *_) = layer.adapters
        parts = tuning.shrink.splits + 1  # read, and one written
        moved = 4 * parts * tokens * (sum(one.ranks) + sum(one.experts))
        between = gpu.overlapped + max(moved / gpu.l2, 3 * gpu.load)
        _, of_one_part = layer.seconds(batch, whole, gpu)
        found["a third kernel"] += shrink + between + of_one_part - gpu.load  # that of the logits
        found["shrink beside"] += expand + 2 * gpu.launch
    return {name: count * seconds for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", choices=[name.split()[1] for name in GPUS], default="H100")
    parser.add_argument("--choose", action="store_true", help="print settings as they are stored")
    parser.add_argument("--designs", action="store_true", help="other designs, in ms of a step")
    args = parser.parse_args()
    if args.designs:
        for tokens, adapters in ((1, 1), (32, 8), (32, 32), (8192, 8)):
            times = designs("8B", tokens, adapters, GPUS[f"NVIDIA {args.gpu}"])
            print(f"8B, {tokens} tokens, {adapters} adapters, ms")
            print("".join(f"  {name:<16}{1e3 * time:8.2f}\n" for name, time in times.items()))
        return
    if args.choose:
        everything = {
            name: [asdict(tuning) for tuning in choose(gpu)] for name, gpu in GPUS.items()
        }
        print(json.dumps(everything, indent=1, sort_keys=True))
        return
    gpu = GPUS[f"NVIDIA {args.gpu}"]
    for base in BASES:
        size = adapter_bytes(base)
        ms = 1e3 * size / gpu.host
        print(f"{base:>4} an adapter into a slot: a copy of {size / 1e6:.0f} MB, {ms:.1f} ms")
    for base, tokens, adapters in itertools.product(BASES, (1, 32, 128, 8192), (1, 8, 32)):
        if adapters <= tokens:
            tuning = default_tuning(tokens)
            shrink, expand = (1e6 * t for t in step(base, tokens, adapters, tuning, gpu))
            print(
                f"{base:>4} {tokens:>5} tokens {adapters:>3} adapters  "
                f"shrink {shrink:9.0f} us  expand {expand:9.0f} us"
            )


if __name__ == "__main__":
    main()
