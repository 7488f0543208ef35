"""The two ops of `two_steps.py` as Triton kernels, one launch each for all slots and slices.

`shrink` and `expand` launch them on a GPU; on a CPU they are those of `two_steps.py`. The launches
depend on shapes alone and nothing is read back to the host, so CUDA graphs take them. With
TRITON_INTERPRET=1 set before Triton is imported the kernels run on a CPU, for tests.

shrink: a program takes a block of tokens, every `row_programs`-th piece of the slot's rows and
every `splits`-th piece of the input features. Pieces behind the last row of A are the routers',
in float32's precision throughout. expand: a program takes a block of tokens and some tiles of
columns of one slice, computes the gates of its tokens once (some sixteen logits a token), and is
the only one that writes these values of y.

On GPUs that can (Hopper and later) expand starts while shrink still runs: it finds its weights and
fetches the first of B, and waits for shrink before it takes its results (OVERLAPS).
"""

# Triton infers the types of a kernel's arguments; only constants are declared.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs

from guilomo_serve.ops import two_steps
from guilomo_serve.ops.tuning import ExpandTuning, ShrinkTuning
from guilomo_serve.ops.two_steps import LAYER_FIELDS, LOAD_WIDTH, MAX_EXPERTS, SLICE_FIELDS

INTERPRETED = bool(knobs.runtime.interpret)

_ROUTER = tl.constexpr(LAYER_FIELDS.index("router"))
_GATE_ROWS = tl.constexpr(LAYER_FIELDS.index("gate_rows"))
_ROWS = tl.constexpr(LAYER_FIELDS.index("rows"))
_EXPERTS = tl.constexpr(LAYER_FIELDS.index("experts"))
_TOP_K = tl.constexpr(LAYER_FIELDS.index("top_k"))
_SLICES = tl.constexpr(len(LAYER_FIELDS))
_SLICE_WIDTH = tl.constexpr(len(SLICE_FIELDS))
_FIRST_ROW = tl.constexpr(SLICE_FIELDS.index("first_row"))
_END_ROW = tl.constexpr(SLICE_FIELDS.index("end_row"))
_FIRST_EXPERT = tl.constexpr(SLICE_FIELDS.index("first_expert"))
_END_EXPERT = tl.constexpr(SLICE_FIELDS.index("end_expert"))
_FIRST_COLUMN = tl.constexpr(SLICE_FIELDS.index("first_column"))
_LOAD_WIDTH = tl.constexpr(LOAD_WIDTH)
# Experts of a piece in shrink; a product's sides are at least 16.
_BLOCK_EXPERTS = tl.constexpr(16)
# The bits of a float32 that a tensor core reads (tf32): sign, exponent and 10 of the mantissa.
_TF32 = tl.constexpr(-(1 << 13))


@triton.jit
def _dot(a, b, sum_, UPCAST: tl.constexpr):
    # Triton's interpreter multiplies the bit patterns of bfloat16; "ieee" is for float32, which
    # would be rounded to 10 bits of mantissa otherwise.
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum_, input_precision="ieee")
    return tl.dot(a, b, sum_, input_precision="ieee")


@triton.jit
def _dot_float32(a, b, sum_):
    # a [M, K] of any dtype with b [K, N] float32. Many tokens of 2-byte dtypes are for tensor
    # cores: tf32 holds such an a whole, and b's 24 bits in two parts but for the last two. Few
    # tokens would only cost registers there.
    few: tl.constexpr = a.shape[0] < 64
    if few or a.dtype == tl.float32:
        return tl.dot(a.to(tl.float32), b, sum_, input_precision="ieee")
    a = a.to(tl.float32)
    high = (b.to(tl.int32, bitcast=True) & _TF32).to(tl.float32, bitcast=True)
    sum_ = tl.dot(a, b - high, sum_, input_precision="tf32")
    return tl.dot(a, high, sum_, input_precision="tf32")


@triton.jit
def _pointer(table, dtype, ALIGNED: tl.constexpr):
    pointer = tl.load(table).to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _product(
    x, weights, first, count, in_features, in_block, pid_split,
    BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_IN: tl.constexpr,
    SPLITS: tl.constexpr, FLOAT32: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # x: pointers [BLOCK_TOKENS] to the inputs; the rows are first + 0..BLOCK_ROWS of `weights`.
    rows = first + tl.arange(0, BLOCK_ROWS)
    starts = rows.to(tl.int64)[None, :] * in_features
    sum_ = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS], tl.float32)
    for k in range(pid_split * BLOCK_IN, in_features, SPLITS * BLOCK_IN):
        features = k + tl.arange(0, BLOCK_IN)
        inside = features < in_features
        inputs = tl.load(
            x[:, None] + features[None, :], mask=in_block[:, None] & inside[None, :], other=0.0
        )
        factors = tl.load(
            weights + starts + features[:, None],
            mask=(rows < count)[None, :] & inside[:, None],
            other=0.0,
        )
        if FLOAT32:
            sum_ = _dot_float32(inputs, factors, sum_)
        else:
            sum_ = _dot(inputs, factors, sum_, UPCAST)
    return sum_, rows


@triton.jit(
    do_not_specialize=["in_features", "x_stride", "h_stride", "z_stride", "table_stride"],
    do_not_specialize_on_alignment=["order", "blocks", "table", "h", "z"],
)
def _shrink(
    x, order, blocks, table, h, z,
    in_features, x_stride, h_stride, z_stride, table_stride,
    BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_IN: tl.constexpr,
    SPLITS: tl.constexpr, ALIGNED: tl.constexpr, UPCAST: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    block = blocks + tl.program_id(0) * 3
    begin, end = tl.load(block + 1), tl.load(block + 2)
    weights = table + tl.load(block) * table_stride
    rows = tl.load(weights + _ROWS).to(tl.int32)
    if (begin >= end) | (rows == 0):
        return
    experts = tl.load(weights + _EXPERTS).to(tl.int32)
    lora_a = _pointer(weights, x.dtype.element_ty, ALIGNED)
    router = _pointer(weights + _ROUTER, tl.float32, ALIGNED)
    if ALIGNED:
        x_stride = x_stride // 8 * 8
        in_features = in_features // 8 * 8
    position = begin + tl.arange(0, BLOCK_TOKENS)
    in_block = position < end
    token = tl.load(order + position, mask=in_block, other=0).to(tl.int64)
    inputs = x + token * x_stride
    pid_split = tl.program_id(2)
    result = position.to(tl.int64) * SPLITS + pid_split

    row_pieces = tl.cdiv(rows, BLOCK_ROWS)
    pieces = row_pieces + tl.cdiv(experts, _BLOCK_EXPERTS)
    for piece in range(tl.program_id(1), pieces, tl.num_programs(1)):
        if piece < row_pieces:
            part, row = _product(
                inputs, lora_a, piece * BLOCK_ROWS, rows, in_features, in_block, pid_split,
                BLOCK_TOKENS, BLOCK_ROWS, BLOCK_IN, SPLITS, False, UPCAST,
            )  # fmt: skip
            tl.store(
                h + result[:, None] * h_stride + row[None, :],
                part,
                mask=in_block[:, None] & (row < rows)[None, :],
            )
        else:
            first = (piece - row_pieces) * _BLOCK_EXPERTS
            logits, expert = _product(
                inputs, router, first, experts, in_features, in_block, pid_split,
                BLOCK_TOKENS, _BLOCK_EXPERTS, BLOCK_IN, SPLITS, True, False,
            )  # fmt: skip
            tl.store(
                z + result[:, None] * z_stride + expert[None, :],
                logits,
                mask=in_block[:, None] & (expert < experts)[None, :],
            )


@triton.jit
def _gates(
    z, position, in_block, first_expert, end_expert, top_k, WIDTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, EXPERTS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    # Softmax over the top_k largest logits, [BLOCK_TOKENS, EXPERTS]; of equal ones the lower
    # index is taken. Without a router there is one expert with one logit: its gate is 1.
    expert = tl.arange(0, EXPERTS)
    has_logit = in_block[:, None] & (expert < end_expert - first_expert)[None, :]
    logits = tl.zeros([BLOCK_TOKENS, EXPERTS], tl.float32)
    at = z + position.to(tl.int64)[:, None] * (SPLITS * WIDTH) + (first_expert + expert)[None, :]
    for split in tl.static_range(SPLITS):
        logits += tl.load(at + split * WIDTH, mask=has_logit, other=0.0)
    count = tl.maximum(end_expert - first_expert, 1)
    logits = tl.where((expert < count)[None, :], logits, float("-inf"))
    left = logits
    for _ in range(tl.minimum(top_k, count)):
        largest = tl.max(left, 1)
        is_largest = left == largest[:, None]
        lowest = tl.min(tl.where(is_largest, expert[None, :], EXPERTS), 1)
        left = tl.where(expert[None, :] == lowest[:, None], float("-inf"), left)
    chosen = (left == float("-inf")) & (expert < count)[None, :]
    weights = tl.where(chosen, tl.exp(logits - tl.max(logits, 1)[:, None]), 0.0)
    return weights / tl.sum(weights, 1)[:, None], chosen, logits


@triton.jit
def _count(load, chosen, logits, in_block, experts, EXPERTS: tl.constexpr):
    # Adds what `load.router_load` counts to a router's row of the load.
    expert = tl.arange(0, EXPERTS)
    there = (expert < experts)[None, :]
    odd = there & ((logits != logits) | (tl.abs(logits) == float("inf")))
    counted = in_block & (tl.max(odd.to(tl.int32), 1) == 0)
    logits = tl.where(there & counted[:, None], logits - tl.max(logits, 1)[:, None], 0.0)
    parts = tl.where(there, tl.exp(logits), 0.0)
    whole = tl.sum(parts, 1)
    entropy = tl.log(whole) - tl.sum(parts * logits, 1) / whole
    entropy = tl.sum(tl.where(counted, entropy, 0.0), 0)
    entropy /= tl.log(tl.maximum(experts, 2).to(tl.float32))
    uses = tl.sum((chosen & counted[:, None]).to(tl.int32), 0)
    tl.atomic_add(load + expert, uses.to(tl.float64), mask=expert < experts, sem="relaxed")
    tl.atomic_add(load + EXPERTS, entropy.to(tl.float64), sem="relaxed")
    count = tl.sum(counted.to(tl.int32), 0)
    tl.atomic_add(load + EXPERTS + 1, count.to(tl.float64), sem="relaxed")


@triton.jit
def _factors(lora_b, row, column, width, rows):
    # Of B transposed, [rows, columns]; 0 outside.
    return tl.load(
        lora_b + row.to(tl.int64)[:, None] * width + column[None, :],
        mask=(row < rows)[:, None] & (column < width)[None, :],
        other=0.0,
    )


@triton.jit(
    do_not_specialize=["y_stride", "table_stride"],
    do_not_specialize_on_alignment=["h", "z", "order", "blocks", "table", "sampled", "load"],
)
def _expand(
    y, h, z, order, blocks, table, sampled, load, y_stride, table_stride,
    BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    TILES: tl.constexpr, EXPERTS: tl.constexpr, H_WIDTH: tl.constexpr, SPLITS: tl.constexpr,
    Z_SPLITS: tl.constexpr, WIDTHS: tl.constexpr,
    ALIGNED: tl.constexpr, UPCAST: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    block = blocks + tl.program_id(0) * 3
    slot, begin, end = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    weights = table + slot * table_stride
    if (begin >= end) | (tl.load(weights + _ROWS) == 0):
        return

    # Which slice the program's columns are of, and which of its tiles.
    program = tl.program_id(1)
    slice_, first_tile, width, before = 0, 0, 0, 0
    for i in tl.static_range(len(WIDTHS)):
        programs = (WIDTHS[i] + BLOCK_COLUMNS * TILES - 1) // (BLOCK_COLUMNS * TILES)
        if (program >= before) & (program < before + programs):
            slice_, first_tile, width = i, (program - before) * TILES, WIDTHS[i]
        before += programs
    of_slice = weights + _SLICES + slice_ * _SLICE_WIDTH
    first_row = tl.load(of_slice + _FIRST_ROW).to(tl.int32)
    end_row = tl.load(of_slice + _END_ROW).to(tl.int32)
    if first_row == end_row:
        return
    first_expert = tl.load(of_slice + _FIRST_EXPERT).to(tl.int32)
    end_expert = tl.load(of_slice + _END_EXPERT).to(tl.int32)
    first_column = tl.load(of_slice + _FIRST_COLUMN)
    top_k = tl.load(weights + _TOP_K).to(tl.int32)
    lora_b = _pointer(of_slice, y.dtype.element_ty, ALIGNED)
    gate_rows = tl.load(weights + _GATE_ROWS).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        y_stride = y_stride // 8 * 8
        width = tl.multiple_of(width, 8)
        first_column = tl.multiple_of(first_column, 8)

    position = begin + tl.arange(0, BLOCK_TOKENS)
    in_block = position < end
    token = tl.load(order + position, mask=in_block, other=0).to(tl.int64)
    rows = end_row - first_row
    in_piece = tl.arange(0, BLOCK_ROWS)
    in_tile = tl.arange(0, BLOCK_COLUMNS)
    # B is fetched ahead: the first piece while shrink still runs, the next ones during a product.
    factors = _factors(lora_b, in_piece, first_tile * BLOCK_COLUMNS + in_tile, width, rows)
    # Whoever has a block of shrink's to wait for waits, so what follows expand follows shrink too.
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    gates, chosen, logits = _gates(
        z, position, in_block, first_expert, end_expert,
        top_k, len(WIDTHS) * EXPERTS, BLOCK_TOKENS, EXPERTS, Z_SPLITS,
    )  # fmt: skip
    if (tl.load(sampled) != 0) & (first_tile == 0) & (end_expert > first_expert):
        of_router = load + (slot * len(WIDTHS) + slice_) * _LOAD_WIDTH
        _count(of_router, chosen, logits, in_block, end_expert - first_expert, EXPERTS)

    end_tile = tl.minimum(first_tile + TILES, tl.cdiv(width, BLOCK_COLUMNS))
    for tile in range(first_tile, end_tile):
        sum_ = tl.zeros([BLOCK_TOKENS, BLOCK_COLUMNS], tl.float32)
        for first in range(0, rows, BLOCK_ROWS):
            row = first_row + first + in_piece
            in_rows = row < end_row
            gated = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS], tl.float32)
            at = h + position.to(tl.int64)[:, None] * (SPLITS * H_WIDTH) + row[None, :]
            for split in tl.static_range(SPLITS):
                gated += tl.load(
                    at + split * H_WIDTH, mask=in_block[:, None] & in_rows[None, :], other=0.0
                )
            scale = tl.load(gate_rows + row * 2, mask=in_rows, other=0.0)
            of_row = tl.load(gate_rows + row * 2 + 1, mask=in_rows, other=0.0).to(tl.int32)
            of_row = tl.maximum(of_row - first_expert, 0)
            of_row = tl.broadcast_to(of_row[None, :], [BLOCK_TOKENS, BLOCK_ROWS])
            gated = gated * scale[None, :] * tl.gather(gates, of_row, 1)
            sum_ = _dot(gated.to(y.dtype.element_ty), factors, sum_, UPCAST)
            is_last = first + BLOCK_ROWS >= rows
            next_row = tl.where(is_last, 0, first + BLOCK_ROWS) + in_piece
            next_tile = tl.where(is_last, tile + 1, tile)
            next_rows = tl.where(next_tile < end_tile, rows, 0)
            column = next_tile * BLOCK_COLUMNS + in_tile
            factors = _factors(lora_b, next_row, column, width, next_rows)
        column = tile * BLOCK_COLUMNS + in_tile
        outputs = y + token[:, None] * y_stride + (first_column + column)[None, :]
        mask = in_block[:, None] & (column < width)[None, :]
        sum_ += tl.load(outputs, mask=mask, other=0.0).to(tl.float32)
        tl.store(outputs, sum_.to(y.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Launch:
    """A kernel with all that its launch needs; made from shapes, so also where there is no GPU.

    Attributes:
        kernel: of Triton.
        grid: programs by axis.
        arguments: in the kernel's order.
        constants: what it is compiled for, by name.
        options: Triton's: warps, stages, and whether it may start before its predecessor ends.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]

    def run(self) -> None:
        if all(self.grid):
            self.kernel[self.grid](*self.arguments, **self.constants, **self.options)


def shrink_launch(
    x: torch.Tensor,
    order: torch.Tensor,
    blocks: torch.Tensor,
    table: torch.Tensor,
    h: torch.Tensor,
    z: torch.Tensor,
    tuning: ShrinkTuning,
) -> Launch:
    """`two_steps.shrink` with these settings; `blocks`, h and z are of theirs."""
    in_features = x.shape[1]
    aligned = in_features * x.element_size() % 16 == 0
    if aligned:
        x = _aligned(x)
    return Launch(
        _shrink,
        (len(blocks), tuning.row_programs, tuning.splits),
        (
            *(x, order, blocks, table, h, z),
            *(in_features, x.stride(0), h.stride(1), z.stride(1), table.stride(0)),
        ),
        {
            "BLOCK_TOKENS": tuning.block_tokens,
            "BLOCK_ROWS": tuning.block_rows,
            "BLOCK_IN": tuning.block_in * 2 // x.element_size(),
            "SPLITS": tuning.splits,
            "ALIGNED": aligned,
            "UPCAST": _upcast(x),
            "OVERLAPS": overlaps(x.device),
        },
        {"num_warps": tuning.warps, "num_stages": tuning.stages},
    )


def expand_launch(
    y: torch.Tensor,
    h: torch.Tensor,
    z: torch.Tensor,
    order: torch.Tensor,
    blocks: torch.Tensor,
    table: torch.Tensor,
    sampled: torch.Tensor,
    load: torch.Tensor,
    widths: Sequence[int],
    tuning: ExpandTuning,
) -> Launch:
    """`two_steps.expand` with these settings; `blocks` are of the settings' size."""
    splits = h.shape[1]
    block_columns = tuning.block_columns * 2 // y.element_size()
    tiles = sum(triton.cdiv(width, block_columns * tuning.tiles) for width in widths)
    # With a sum over processes between the two, shrink is not what comes before.
    early = overlaps(y.device) and z.shape[1] == splits
    return Launch(
        _expand,
        (len(blocks), tiles),
        (y, h, z, order, blocks, table, sampled, load, y.stride(0), table.stride(0)),
        {
            "BLOCK_TOKENS": tuning.block_tokens,
            "BLOCK_ROWS": tuning.block_rows,
            "BLOCK_COLUMNS": block_columns,
            "TILES": tuning.tiles,
            "EXPERTS": MAX_EXPERTS,
            "H_WIDTH": h.stride(1),
            "SPLITS": splits,
            "Z_SPLITS": z.shape[1],
            "WIDTHS": tuple(widths),
            "ALIGNED": all(count * y.element_size() % 16 == 0 for count in (*widths, y.stride(0)))
            and y.data_ptr() % 16 == 0,
            "UPCAST": _upcast(y),
            "OVERLAPS": early,
        },
        {"num_warps": tuning.warps, "num_stages": tuning.stages, "launch_pdl": early},
    )


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel may start before its predecessor ends: Hopper and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    is_aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return x if is_aligned else x.clone(memory_format=torch.contiguous_format)


def _upcast(x: torch.Tensor) -> bool:
    return INTERPRETED and x.dtype == torch.bfloat16


def shrink(
    x: torch.Tensor,
    order: torch.Tensor,
    blocks: torch.Tensor,
    table: torch.Tensor,
    h: torch.Tensor,
    z: torch.Tensor,
    tuning: ShrinkTuning,
) -> None:
    """`two_steps.shrink` with these settings; `blocks`, h and z are of theirs."""
    if not (x.is_cuda or INTERPRETED):
        two_steps.shrink(x, order, blocks, table, h, z)
        return
    shrink_launch(x, order, blocks, table, h, z, tuning).run()


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
    tuning: ExpandTuning,
) -> None:
    """`two_steps.expand` with these settings; `blocks` are of the settings' size."""
    if not (y.is_cuda or INTERPRETED):
        two_steps.expand(y, h, z, order, blocks, table, sampled, load, widths)
        return
    expand_launch(y, h, z, order, blocks, table, sampled, load, widths, tuning).run()
