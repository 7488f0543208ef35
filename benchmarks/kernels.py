"""What the GPU kernels cost: against vLLM's own, a loop over experts, and the bytes to be moved.

    .venv/bin/python benchmarks/kernels.py [--tune] [--rank N] [--out FILE]

The adapted layers of Llama-3-8B, bfloat16, adapters whose experts and ranks differ in every module
as a search leaves them. For each number of tokens and adapters the times of the four layers are
added up:

- ours: both kernels, router and gate included;
- vLLM's lora_shrink and lora_expand with every module padded to the next rank that vLLM allows,
  and without a router, which they have not;
- a loop over slots, slices and experts;
- the floor: weights, input and output once through memory, at the bandwidth that a copy reaches;
- modelled: what kernel_costs.py says of our kernels, for a GPU that it knows.

Times are those of a CUDA graph over several copies of each layer, so that neither launches nor the
cache flatter anybody. `--tune` first finds the kernels' settings for this GPU and keeps them in
the user's cache (guilomo_serve/ops/tuning.py). With `--rank` all adapters are plain LoRAs of a rank
that vLLM pads nothing of.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import kernel_costs
import numpy as np
import torch
from common import report

from guilomo_serve.ops.layer import Batch, LayerWeights, SliceWeights, Slots
from guilomo_serve.ops.torch_ops import route
from guilomo_serve.ops.tuning import DEFAULTS, TOKEN_CLASSES, stored

TOP_K = 2
DTYPE = torch.bfloat16
# Of Llama-3-8B: input features, and output columns of each module that vLLM packs.
LAYERS = {
    "qkv_proj": (4096, (4096, 1024, 1024)),
    "o_proj": (4096, (4096,)),
    "gate_up_proj": (4096, (14336, 14336)),
    "down_proj": (14336, (4096,)),
}
DECODE, PREFILL = (1, 4, 16, 64, 256), (512, 2048, 8192)
ADAPTERS = (1, 8, 64)
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Copies of a layer in a graph hold so many bytes that no cache has them all (H100: 50 MB).
BYTES_OF_COPIES = 256 * 2**20
TUNED_AT = (8, 64, 256, 1024, 4096)  # tokens, one for each class of tuning.TOKEN_CLASSES


@dataclass(frozen=True)
class Case:
    """A batch: decode has a token a request, prefill long runs of one adapter."""

    tokens: int
    adapters: int

    @property
    def name(self) -> str:
        return f"{self.tokens} tokens, {self.adapters} adapters"

    def batch(self) -> Batch:
        """Every adapter has tokens; in decode they are spread, in prefill together."""
        slots = np.arange(self.tokens) % self.adapters
        return Batch(slots if self.tokens in DECODE else np.sort(slots))


def cases() -> Iterator[Case]:
    for tokens, adapters in itertools.product(DECODE + PREFILL, ADAPTERS):
        if adapters <= tokens:
            yield Case(tokens, adapters)


def searched_ranks(generator: np.random.Generator) -> tuple[int, ...]:
    """Ranks of a module's experts: 2 to 8 experts of rank 1 to 8, most of them small.

    The mean total is about 20, as in adapters that were searched at the default budget.
    """
    experts = int(generator.integers(2, 9))
    return tuple(int(r) for r in np.minimum(generator.geometric(0.25, experts), 8))


def vllm_rank(rank: int) -> int:
    """The rank that vLLM's storage is padded to."""
    return next(allowed for allowed in VLLM_RANKS if allowed >= rank)


def adapter(
    in_features: int,
    widths: tuple[int, ...],
    generator: np.random.Generator,
    device: str,
    rank: int | None,
) -> list[SliceWeights]:
    """An adapter of one layer, random, with A and B on the device; a plain LoRA if given a rank."""
    slices = []
    for width in widths:
        ranks = searched_ranks(generator) if rank is None else (rank,)
        a = torch.randn(sum(ranks), in_features, dtype=DTYPE, device=device) / in_features**0.5
        b = torch.randn(width, sum(ranks), dtype=DTYPE, device=device)
        router = None if rank else torch.randn(len(ranks), in_features) / in_features**0.5
        slices.append(SliceWeights(a, b, router, ranks, (1.0,) * len(ranks)))
    return slices


def floor_bytes(weights: list[LayerWeights], tokens: int) -> int:
    """Bytes that have to go through memory: weights once, x once, y in and out.

    Args:
        weights: of the adapters that the batch uses.
        tokens: of the batch.
    """
    in_features = weights[0].lora_a.shape[1]
    out_features = max(layout.columns[1] for of_slot in weights for layout in of_slot.layout)
    of_weights = sum(
        tensor.numel() * tensor.element_size()
        for of_slot in weights
        for tensor in (of_slot.lora_a, *of_slot.lora_b, of_slot.router, of_slot.row_scale)
    )
    return of_weights + tokens * (in_features + 2 * out_features) * DTYPE.itemsize


@dataclass(frozen=True)
class Layer:
    """A layer with its adapters in each contestant's form."""

    in_features: int
    widths: tuple[int, ...]
    adapters: list[list[SliceWeights]]
    weights: list[LayerWeights]

    @classmethod
    def random(
        cls, name: str, adapters: int, seed: int, device: str, rank: int | None = None
    ) -> Layer:
        in_features, widths = LAYERS[name]
        generator = np.random.default_rng(seed)
        made = [adapter(in_features, widths, generator, device, rank) for _ in range(adapters)]
        stacked = [LayerWeights.stack(slices, widths, TOP_K, DTYPE, device) for slices in made]
        return cls(in_features, widths, made, stacked)

    def tensors(self, tokens: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """y and x of a batch."""
        x = torch.randn(tokens, self.in_features, dtype=DTYPE, device=device)
        return torch.zeros(tokens, sum(self.widths), dtype=DTYPE, device=device), x

    def ours(self) -> Any:
        from guilomo_serve.ops.triton_slots import TritonSlots

        device = self.weights[0].lora_a.device
        slots = TritonSlots(len(self.weights), self.in_features, self.widths, DTYPE, device)
        for slot, weights in enumerate(self.weights):
            slots.set(slot, weights)
        return slots

    def in_torch(self) -> Slots:
        slots = Slots(len(self.weights))
        for slot, weights in enumerate(self.weights):
            slots.set(slot, weights)
        return slots

    def padded(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """vLLM's stacked weights: [slots, 1, rank, in] and [slots, 1, width, rank] a slice."""
        # One rank for the whole server: that of the largest module of any adapter.
        rank = vllm_rank(max(sum(s.ranks) for slices in self.adapters for s in slices))
        lora_a, lora_b = [], []
        for i, width in enumerate(self.widths):
            of_slice = [slices[i] for slices in self.adapters]
            a = of_slice[0].lora_a.new_zeros(len(of_slice), 1, rank, self.in_features)
            b = a.new_zeros(len(of_slice), 1, width, rank)
            for slot, weights in enumerate(of_slice):
                a[slot, 0, : len(weights.lora_a)] = weights.lora_a
                b[slot, 0, :, : len(weights.lora_a)] = weights.lora_b
            lora_a.append(a)
            lora_b.append(b)
        return lora_a, lora_b


def loop_over_experts(
    y: torch.Tensor,
    x: torch.Tensor,
    batch: Batch,
    layer: Layer,
    routers: list[list[torch.Tensor | None]],
) -> None:
    """One product after another: each slot, slice and expert by itself."""
    for (slot, _, _), tokens in zip(batch.segments.tolist(), batch.tokens(x.device), strict=True):
        inputs, column = x[tokens], 0
        for weights, router, width in zip(
            layer.adapters[slot], routers[slot], layer.widths, strict=True
        ):
            gates = None if router is None else route(inputs.float() @ router.t(), TOP_K)
            row = 0
            for e, (rank, scaling) in enumerate(zip(weights.ranks, weights.scalings, strict=True)):
                h = inputs @ weights.lora_a[row : row + rank].t() * scaling
                if gates is not None:
                    h = h * gates[:, e : e + 1].to(h.dtype)
                added = h @ weights.lora_b[:, row : row + rank].t()
                y[:, column : column + width].index_add_(0, tokens, added)
                row += rank
            column += width


def seconds(run: Callable[[], None], repeats: int) -> float:
    """The median device time of `run` in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles, and fills what is cached on first use
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times[1:])


def bandwidth(repeats: int) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def run() -> None:
        target.copy_(source)

    return 2 * source.numel() / seconds(run, repeats)


def modelled(layer: Layer, case: Case, gpu: str) -> float:
    """Seconds of both our kernels by the model; not a number for a GPU that it does not know."""
    known = next((g for name, g in kernel_costs.GPUS.items() if gpu.startswith(name)), None)
    if known is None:
        return float("nan")
    adapters = tuple(
        kernel_costs.Adapter(
            tuple(sum(s.ranks) for s in slices),
            tuple(0 if s.router is None else len(s.ranks) for s in slices),
        )
        for slices in layer.adapters
    )
    of_layer = kernel_costs.Layer(layer.in_features, layer.widths, adapters, len(adapters))
    tuning = (stored(gpu) or DEFAULTS)[bisect.bisect_left(TOKEN_CLASSES, case.tokens)]
    return sum(of_layer.seconds(case.batch(), tuning, known))


def measure(
    case: Case, name: str, bytes_per_second: float, repeats: int, rank: int | None
) -> dict[str, float]:
    """Seconds of one layer for each contestant, its floor and what is modelled."""
    first = Layer.random(name, case.adapters, 0, "cuda", rank)
    copies = max(1, min(32, -(-BYTES_OF_COPIES // floor_bytes(first.weights, 0))))
    more = (Layer.random(name, case.adapters, seed, "cuda", rank) for seed in range(1, copies))
    layers = [first, *more]
    y, x = first.tensors(case.tokens, "cuda")
    batch = case.batch()
    return {
        "ours": time_ours(layers, y, x, batch, repeats) / copies,
        "vllm": time_vllm(layers, y, x, batch, repeats) / copies,
        "loop": time_loop(first, y, x, batch, repeats),
        "floor": floor_bytes(first.weights, case.tokens) / bytes_per_second,
        "modelled": modelled(first, case, torch.cuda.get_device_name()),
    }


def time_ours(
    layers: list[Layer], y: torch.Tensor, x: torch.Tensor, batch: Batch, repeats: int
) -> float:
    """Seconds of both our kernels over all of the layers."""
    of_layers = [layer.ours() for layer in layers]
    for slots in of_layers:
        slots.results = of_layers[0].results  # as layers of a model share it
    check(layers[0], of_layers[0], y, x, batch)

    def run() -> None:
        for slots in of_layers:
            slots.apply_(y, x, batch)

    return seconds(run, repeats)


def time_vllm(
    layers: list[Layer], y: torch.Tensor, x: torch.Tensor, batch: Batch, repeats: int
) -> float:
    """Seconds of vLLM's kernels over all of the layers."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink, utils

    # Its caches know tensors by address alone; another case's may have been at the same.
    utils._LORA_A_PTR_DICT.clear()
    utils._LORA_B_PTR_DICT.clear()
    of_layers = [layer.padded() for layer in layers]
    slot_of_token = torch.full((batch.size,), -1, dtype=torch.int32)
    for slot, begin, end in batch.segments.tolist():
        slot_of_token[torch.from_numpy(batch.order[begin:end]).long()] = slot
    meta = LoRAKernelMeta.make(len(layers[0].weights), batch.size, x.device)
    meta.prepare_tensors(slot_of_token.to(x.device))

    def run() -> None:
        for lora_a, lora_b in of_layers:
            h = x.new_empty(len(lora_a), batch.size, lora_a[0].shape[2], dtype=torch.float32)
            args = meta.meta_args(batch.size, False)
            lora_shrink(x, lora_a, h, *args, 1.0)
            lora_expand(h, lora_b, y, *args, offset_start=0, add_inputs=True)

    return seconds(run, repeats)


def time_loop(layer: Layer, y: torch.Tensor, x: torch.Tensor, batch: Batch, repeats: int) -> float:
    """Seconds of one layer's loop over slots, slices and experts."""
    routers = [
        [None if s.router is None else s.router.to(x.device) for s in slices]
        for slices in layer.adapters
    ]
    return seconds(lambda: loop_over_experts(y, x, batch, layer, routers), repeats)


def check(layer: Layer, slots: Any, y: torch.Tensor, x: torch.Tensor, batch: Batch) -> None:
    """Stops before a wrong kernel is timed. Near ties may choose another expert: few tokens."""
    got, want = torch.zeros_like(y), torch.zeros_like(y)
    slots.apply_(got, x, batch)
    layer.in_torch().apply_(want, x, batch)
    apart = (got.float() - want.float()).abs().amax(1) / want.float().abs().max()
    if (apart > 2e-2).float().mean() > 0.01:
        sys.exit(f"the kernels differ from torch in {(apart > 2e-2).sum().item()} tokens")


def tune(repeats: int) -> None:
    """Finds settings for each class of tokens and stores them under this GPU's name."""
    from triton.runtime.errors import OutOfResources

    from guilomo_serve.ops import kernels, two_steps
    from guilomo_serve.ops.tuning import ExpandTuning, ShrinkTuning, Tuning, store

    # Few candidates that differ in what matters: each is compiled, which takes seconds.
    def candidates(tokens: int) -> tuple[list[ShrinkTuning], list[ExpandTuning]]:
        block_tokens = (16,) if tokens <= 64 else (16, 64)
        splits = (4, 8, 16) if tokens <= 64 else (1, 4) if tokens <= 1024 else (1,)
        row_programs = (1, 4) if tokens <= 256 else (1,)
        sizes = ((16, 256), (32, 128), (64, 64))
        shrink = [
            ShrinkTuning(cut, *size, split, programs, 4, 3)
            for cut, size, split, programs in itertools.product(
                block_tokens, sizes, splits, row_programs
            )
        ]
        expand = [
            ExpandTuning(cut, 32, columns, tiles, warps, 1)
            for cut, columns, tiles, warps in itertools.product(
                block_tokens, (64, 128), (1, 4), (4, 8)
            )
        ]
        return shrink, expand

    found = []
    for tokens, default in zip(TUNED_AT, DEFAULTS, strict=True):
        case = Case(tokens, 8)
        layers = [Layer.random(name, case.adapters, 0, "cuda") for name in LAYERS]
        slots = [layer.ours() for layer in layers]
        tensors = [layer.tensors(tokens, "cuda") for layer in layers]
        blocks = case.batch().blocks(torch.device("cuda", torch.cuda.current_device()))
        results = two_steps.Results("cuda")

        def run(
            tuning: Tuning,
            slots: Any = slots,
            tensors: Any = tensors,
            blocks: Any = blocks,
            results: Any = results,
        ) -> None:
            shrink, expand = tuning.shrink, tuning.expand
            for of_layer, (y, x) in zip(slots, tensors, strict=True):
                order, table, widths = blocks.order, of_layer.table, of_layer.widths
                cut = blocks.cut(len(x), shrink.block_tokens)
                h, z = results.of(len(x), len(widths), shrink.splits)
                kernels.shrink_launch(x, order, cut, table, h, z, shrink).run()
                cut = blocks.cut(len(x), expand.block_tokens)
                counts = (blocks.sampled, of_layer.load)
                kernels.expand_launch(y, h, z, order, cut, table, *counts, widths, expand).run()

        def time_of(tuning: Tuning, run: Any = run) -> float:
            try:
                return seconds(lambda: run(tuning), repeats)
            except OutOfResources:
                return float("inf")

        shrinks, expands = candidates(tokens)
        best = min((replace(default, shrink=s) for s in shrinks), key=time_of)
        best = min((replace(best, expand=e) for e in expands), key=time_of)
        print(f"{tokens:>5} tokens  {time_of(best) * 1e6:7.1f} us  {best}", flush=True)
        found.append(best)
    store(torch.cuda.get_device_name(), tuple(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="find this GPU's settings first")
    parser.add_argument("--repeats", type=int, default=20, help="replays that a median is of")
    parser.add_argument(
        "--rank", type=int, choices=VLLM_RANKS, help="of all adapters, plain LoRAs then"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/kernels.py needs a CUDA GPU, and torch finds none")

    torch.manual_seed(0)
    if args.tune:
        tune(min(args.repeats, 5))
    bytes_per_second = bandwidth(args.repeats)
    print(f"a copy moves {bytes_per_second / 1e9:.0f} GB/s; times in us of the four layers")
    over_vllm, over_loop, over_floor = {}, {}, {}
    for case in cases():
        of_layers = [
            measure(case, name, bytes_per_second, args.repeats, args.rank) for name in LAYERS
        ]
        total = {key: sum(found[key] for found in of_layers) for key in of_layers[0]}
        columns = "  ".join(f"{key} {1e6 * value:9.1f}" for key, value in total.items())
        print(f"{case.name:>26}  {columns}", flush=True)
        over_vllm[case.name] = round(total["ours"] / total["vllm"], 3)
        over_loop[case.name] = round(total["ours"] / total["loop"], 3)
        over_floor[case.name] = round(total["ours"] / total["floor"], 3)
    result = {"over_vllm": over_vllm, "over_loop": over_loop, "over_floor": over_floor}
    report(result, args, args.out)


if __name__ == "__main__":
    main()
