"""The routed product in two ops over blocks of tokens: what they compute, and how, in torch.

    shrink   h = A x and router logits z = W_r x         for all slices of a layer
    expand   y += B (h * gate(z) * scale)

The kernels of `kernels.py` have the same signatures and results. Both read the weights through a
table on the device with a row for each slot, whose values are addresses and ranges. So weights
move, grow and change without a new launch or a new CUDA graph: only the table is written.
Results between the two are by position in `order`, that is with a slot's tokens together.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from guilomo_serve.ops.layer import LayerWeights
from guilomo_serve.ops.load import router_load
from guilomo_serve.ops.torch_ops import route

# What a kernel's shapes allow for, of one module.
MAX_RANK = 512
MAX_EXPERTS = 16
# What is counted of a router, as in `load.RouterLoad`: each expert's tokens, entropy, tokens.
LOAD_WIDTH = MAX_EXPERTS + 2

# A slot's row in the table, int64: these values, then SLICE_FIELDS for each slice of the layer.
# Addresses: A [rows, in] and routers [experts, in] of all slices one after another; gate rows
# [rows, 2] float32, each row's scale and its expert (a row of the routers, -1 for none).
LAYER_FIELDS = ("lora_a", "router", "gate_rows", "rows", "experts", "top_k")
# Address of B transposed [its rows, its columns]; half-open ranges as in `SliceLayout`. All are 0
# in a slice that the adapter leaves alone.
SLICE_FIELDS = (
    *("lora_b", "first_row", "end_row", "first_expert", "end_expert"),
    *("first_column", "end_column"),
)


class UnsupportedAdapterError(ValueError):
    """An adapter is larger than the kernels' shapes; the message has the limit."""


def check_size(weights: LayerWeights) -> None:
    """Refuses what the kernels' shapes do not allow for.

    Raises:
        UnsupportedAdapterError: names what there is too much of.
    """
    for layout in weights.layout:
        for name, (first, end), most in (
            ("total rank", layout.rows, MAX_RANK),
            ("number of experts", layout.experts, MAX_EXPERTS),
        ):
            if end - first > most:
                raise UnsupportedAdapterError(
                    f"the {name} of a module is {end - first}, expected at most {most} on a GPU"
                )


def table_width(slices: int) -> int:
    """Values of a table's row."""
    return len(LAYER_FIELDS) + slices * len(SLICE_FIELDS)


def packed_bytes(
    in_features: int, slices: Sequence[tuple[int, int, int]], dtype: torch.dtype
) -> int:
    """What a layer takes of an adapter's memory, where a table's addresses lead.

    Args:
        in_features: of the layer.
        slices: of each that the adapter adapts its total rank, experts of its router and columns.
        dtype: of A and B.
    """
    rows, experts = (sum(of_slice[i] for of_slice in slices) for i in (0, 1))
    of_b = (rank * columns * dtype.itemsize for rank, _, columns in slices)
    tensors = (rows * in_features * dtype.itemsize, experts * in_features * 4, rows * 2 * 4, *of_b)
    return sum(map(padded, tensors))


def padded(size: int) -> int:
    """Bytes up to where the next tensor begins: kernels load 16 at a time."""
    return -(-size // 16) * 16


def shrink(
    x: torch.Tensor,
    order: torch.Tensor,
    blocks: torch.Tensor,
    table: torch.Tensor,
    h: torch.Tensor,
    z: torch.Tensor,
) -> None:
    """The first product of each token's adapter, and its router logits.

    What no block and no row of its slot covers is not written.

    Args:
        x: [T, in], the layer's input.
        order: of `TokenBlocks`; its tokens are below T.
        blocks: of `TokenBlocks.cut`; a kernel has a program for each.
        table: [slots, table_width(slices)] int64, on x's device.
        h, z: of `Results`; their sums over the splits are the results.
    """
    for slot, begin, end in _filled(blocks):
        weights = _Row.of(table, slot)
        inputs = x[order[begin:end].long()]
        lora_a = _at(weights.lora_a, (weights.rows, x.shape[1]), x.dtype)
        router = _at(weights.router, (weights.experts, x.shape[1]), torch.float32)
        h[begin:end, :, : weights.rows] = 0
        z[begin:end, :, : weights.experts] = 0
        h[begin:end, 0, : weights.rows] = inputs.float() @ lora_a.float().t()
        z[begin:end, 0, : weights.experts] = inputs.float() @ router.t()


def expand(
    y: torch.Tensor,
    h: torch.Tensor,
    z: torch.Tensor,
    order: torch.Tensor,
    blocks: torch.Tensor,
    table: torch.Tensor,
    sampled: torch.Tensor,
    load: torch.Tensor,
    widths: Sequence[int],
) -> None:
    """Adds the gated second product to `y`, in place.

    Args:
        y: [T, out], the layer's output so far.
        h, z: of `shrink`; z may have other splits than h.
        order, blocks, table: as there.
        sampled: one int32, whether the routers' choices are counted.
        load: [slots, slices, LOAD_WIDTH] float64; where they are added, see there.
        widths: the output columns of each slice; they sum to `out`.
    """
    for slot, begin, end in _filled(blocks):
        weights = _Row.of(table, slot)
        tokens = order[begin:end].long()
        gate_rows = _at(weights.gate_rows, (weights.rows, 2), torch.float32)
        for i, slice_ in weights.slices:
            rows = slice(slice_.first_row, slice_.end_row)
            columns = slice(slice_.first_column, slice_.end_column)
            scale, expert = gate_rows[rows].unbind(1)
            gated = h[begin:end, :, rows].sum(1) * scale
            if slice_.end_expert > slice_.first_expert:
                logits = z[begin:end, :, slice_.first_expert : slice_.end_expert].sum(1)
                gates = route(logits, weights.top_k)
                if sampled.item():
                    _count(load[slot, i], logits, weights.top_k)
                gated = gated * gates[:, expert.long() - slice_.first_expert]
            lora_b = _at(
                slice_.lora_b,
                (slice_.end_row - slice_.first_row, slice_.end_column - slice_.first_column),
                y.dtype,
            )
            added = gated.to(y.dtype).float() @ lora_b.float()
            y[tokens, columns] = (y[tokens, columns].float() + added).to(y.dtype)


class Results:
    """Memory between the two ops, for layers that run one after another: made once.

    It grows where a batch is larger than all before. So the first one has to be the largest, as
    when kernels are warmed up; from then on nothing is allocated, and CUDA graphs may keep places.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._memory = torch.empty(0, dtype=torch.float32, device=device)
        self._tokens = 0
        self._parts: dict[tuple[int, int], list[torch.Tensor]] = {}

    def of(self, tokens: int, slices: int, splits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For a batch and a layer, with room for the largest adapter; values are old ones.

        Args:
            tokens: T, of the batch.
            slices: of the layer.
            splits: parts in which a sum is handed over.

        Returns:
            h [T, splits, slices * MAX_RANK] and z [T, splits, slices * MAX_EXPERTS], float32.
        """
        h, z, _ = self._of(tokens, slices, splits)
        return h, z

    def total(self, tokens: int, slices: int, splits: int) -> torch.Tensor:
        """For the sum of z over its splits, beside both; arguments as of `of`.

        Returns: [T, 1, slices * MAX_EXPERTS] float32.
        """
        return self._of(tokens, slices, splits)[2]

    def _of(self, tokens: int, slices: int, splits: int) -> list[torch.Tensor]:
        if tokens != self._tokens:
            self._tokens, self._parts = tokens, {}
        if (slices, splits) not in self._parts:
            shapes = [
                (tokens, splits, slices * MAX_RANK),
                (tokens, splits, slices * MAX_EXPERTS),
                (tokens, 1, slices * MAX_EXPERTS),
            ]
            sizes = [math.prod(shape) for shape in shapes]
            if sum(sizes) > len(self._memory):
                self._memory, self._parts = self._memory.new_empty(sum(sizes)), {}
            parts = self._memory[: sum(sizes)].split(sizes)
            self._parts[slices, splits] = [p.view(s) for p, s in zip(parts, shapes, strict=True)]
        return self._parts[slices, splits]


@dataclass(frozen=True)
class _Slice:
    lora_b: int
    first_row: int
    end_row: int
    first_expert: int
    end_expert: int
    first_column: int
    end_column: int


@dataclass(frozen=True)
class _Row:
    """A slot's row of the table, with the slices that its adapter adapts."""

    lora_a: int
    router: int
    gate_rows: int
    rows: int
    experts: int
    top_k: int
    slices: tuple[tuple[int, _Slice], ...]  # with their numbers

    @classmethod
    def of(cls, table: torch.Tensor, slot: int) -> _Row:
        values = table[slot].tolist()
        rest, width = values[len(LAYER_FIELDS) :], len(SLICE_FIELDS)
        slices = [_Slice(*rest[i : i + width]) for i in range(0, len(rest), width)]
        adapted = tuple((i, s) for i, s in enumerate(slices) if s.end_row > s.first_row)
        return cls(**dict(zip(LAYER_FIELDS, values, strict=False)), slices=adapted)


def _count(load: torch.Tensor, logits: torch.Tensor, top_k: int) -> None:
    counted = router_load([logits], top_k)
    experts = logits.shape[1]
    load[:experts] += counted.chosen[0]
    load[MAX_EXPERTS] += counted.entropy[0]
    load[MAX_EXPERTS + 1] += counted.tokens[0]


def _filled(blocks: torch.Tensor) -> list[list[int]]:
    return [[slot, begin, end] for slot, begin, end in blocks.tolist() if end > begin]


def _at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The tensor in host memory at an address."""
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    buffer = (ctypes.c_byte * size).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype).view(shape)
