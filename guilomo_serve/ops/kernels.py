"""The two ops of `two_steps.py` as Triton kernels, one launch each for all slots and slices.

    torch.ops.guilomo.shrink, .expand    on a GPU the kernels, on a CPU `two_steps.py`

The launches depend on shapes alone, nothing is read back to the host, and fakes are registered:
torch.compile and CUDA graphs take them. With TRITON_INTERPRET=1 set before Triton is imported the
kernels run on a CPU, for tests.

shrink: a program takes a block of tokens, every `row_programs`-th piece of the slot's rows and
every `splits`-th piece of the input features. Pieces behind the last row of A are the routers',
whose sums are in float32 throughout. expand: a program takes a block of tokens and some columns of
one slice, computes the gate of its tokens anew (some sixteen logits a token), and is the only one
that writes these values of y.
"""

# Triton infers the types of a kernel's arguments; only constants are declared.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton import knobs

from guilomo_serve.ops import two_steps
from guilomo_serve.ops.layer import TokenBlocks
from guilomo_serve.ops.tuning import ExpandTuning, ShrinkTuning, tuning_for
from guilomo_serve.ops.two_steps import LAYER_FIELDS, MAX_EXPERTS, MAX_RANK, SLICE_FIELDS

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
# Experts of a piece in shrink; a product's sides are at least 16.
_BLOCK_EXPERTS = tl.constexpr(16)


@triton.jit
def _dot(a, b, sum_, UPCAST: tl.constexpr):
    # Triton's interpreter multiplies the bit patterns of bfloat16; "ieee" is for float32, which
    # would be rounded to 10 bits of mantissa otherwise.
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum_, input_precision="ieee")
    return tl.dot(a, b, sum_, input_precision="ieee")


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
            inputs = inputs.to(tl.float32)
        sum_ = _dot(inputs, factors, sum_, UPCAST)
    return sum_, rows


@triton.jit(do_not_specialize=["tokens"])
def _shrink(
    x, order, blocks, table, h, z,
    tokens, in_features, x_stride, h_stride, z_stride, table_stride,
    BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_IN: tl.constexpr,
    SPLITS: tl.constexpr, ALIGNED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    block = blocks + tl.program_id(0) * 3
    begin, end = tl.load(block + 1), tl.load(block + 2)
    weights = table + tl.load(block) * table_stride
    rows = tl.load(weights + _ROWS).to(tl.int32)
    if (begin >= end) | (rows == 0):
        return
    experts = tl.load(weights + _EXPERTS).to(tl.int32)
    lora_a = _pointer(weights, x.dtype.element_ty, ALIGNED)
    router = _pointer(weights + _ROUTER, tl.float32, ALIGNED)
    position = begin + tl.arange(0, BLOCK_TOKENS)
    in_block = position < end
    token = tl.load(order + position, mask=in_block, other=0).to(tl.int64)
    inputs = x + token * x_stride
    pid_split = tl.program_id(2)
    result = (pid_split * tokens + position).to(tl.int64)

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
    z, tokens, position, in_block, z_stride, first_expert, end_expert, top_k,
    BLOCK_TOKENS: tl.constexpr, EXPERTS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    # Softmax over the top_k largest logits, [BLOCK_TOKENS, EXPERTS]; of equal ones the lower
    # index is taken. Without a router there is one expert with one logit: its gate is 1.
    expert = tl.arange(0, EXPERTS)
    has_logit = in_block[:, None] & (expert < end_expert - first_expert)[None, :]
    logits = tl.zeros([BLOCK_TOKENS, EXPERTS], tl.float32)
    for split in tl.static_range(SPLITS):
        at = (split * tokens + position).to(tl.int64)[:, None] * z_stride
        logits += tl.load(z + at + (first_expert + expert)[None, :], mask=has_logit, other=0.0)
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
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit(do_not_specialize=["tokens"])
def _expand(
    y, h, z, order, blocks, table,
    tokens, y_stride, h_stride, z_stride, table_stride,
    BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    EXPERTS: tl.constexpr, SPLITS: tl.constexpr, WIDTHS: tl.constexpr,
    ALIGNED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    block = blocks + tl.program_id(0) * 3
    begin, end = tl.load(block + 1), tl.load(block + 2)
    weights = table + tl.load(block) * table_stride
    if (begin >= end) | (tl.load(weights + _ROWS) == 0):
        return

    # Which slice the program's columns are of, and which of its tiles.
    program = tl.program_id(1)
    slice_, tile, width, before = 0, 0, 0, 0
    for i in tl.static_range(len(WIDTHS)):
        tiles = (WIDTHS[i] + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
        if (program >= before) & (program < before + tiles):
            slice_, tile, width = i, program - before, WIDTHS[i]
        before += tiles
    of_slice = weights + _SLICES + slice_ * _SLICE_WIDTH
    first_row = tl.load(of_slice + _FIRST_ROW).to(tl.int32)
    end_row = tl.load(of_slice + _END_ROW).to(tl.int32)
    if first_row == end_row:
        return
    first_expert = tl.load(of_slice + _FIRST_EXPERT).to(tl.int32)
    end_expert = tl.load(of_slice + _END_EXPERT).to(tl.int32)
    lora_b = _pointer(of_slice, y.dtype.element_ty, ALIGNED)
    gate_rows = tl.load(weights + _GATE_ROWS).to(tl.pointer_type(tl.float32))

    position = begin + tl.arange(0, BLOCK_TOKENS)
    in_block = position < end
    gates = _gates(
        z, tokens, position, in_block, z_stride, first_expert, end_expert,
        tl.load(weights + _TOP_K).to(tl.int32), BLOCK_TOKENS, EXPERTS, SPLITS,
    )  # fmt: skip
    column = tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_width = column < width
    expert = tl.arange(0, EXPERTS)
    sum_ = tl.zeros([BLOCK_TOKENS, BLOCK_COLUMNS], tl.float32)
    for first in range(first_row, end_row, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        in_rows = row < end_row
        gated = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS], tl.float32)
        for split in tl.static_range(SPLITS):
            at = (split * tokens + position).to(tl.int64)[:, None] * h_stride
            gated += tl.load(
                h + at + row[None, :], mask=in_block[:, None] & in_rows[None, :], other=0.0
            )
        scale = tl.load(gate_rows + row * 2, mask=in_rows, other=0.0)
        of_row = tl.load(gate_rows + row * 2 + 1, mask=in_rows, other=0.0).to(tl.int32)
        of_row = tl.maximum(of_row - first_expert, 0)
        # The gates of the rows' experts, [BLOCK_TOKENS, BLOCK_ROWS]: each sum has one term.
        spread = tl.where(expert[:, None] == of_row[None, :], 1.0, 0.0)
        gated = gated * scale[None, :] * tl.dot(gates, spread, input_precision="ieee")
        factors = tl.load(
            lora_b + (row - first_row).to(tl.int64)[:, None] * width + column[None, :],
            mask=in_rows[:, None] & in_width[None, :],
            other=0.0,
        )
        sum_ = _dot(gated.to(y.dtype.element_ty), factors, sum_, UPCAST)

    token = tl.load(order + position, mask=in_block, other=0).to(tl.int64)
    first_column = tl.load(of_slice + _FIRST_COLUMN)
    outputs = y + token[:, None] * y_stride + (first_column + column)[None, :]
    mask = in_block[:, None] & in_width[None, :]
    sum_ += tl.load(outputs, mask=mask, other=0.0).to(tl.float32)
    tl.store(outputs, sum_.to(y.dtype.element_ty), mask=mask)


def launch_shrink(
    x: torch.Tensor,
    order: torch.Tensor,
    blocks: torch.Tensor,
    table: torch.Tensor,
    slices: int,
    tuning: ShrinkTuning,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`two_steps.shrink` with these settings; `blocks` are of the settings' size."""
    tokens, in_features = x.shape
    h, z = two_steps.empty_results(x, slices, tuning.splits)
    programs = TokenBlocks.count(tokens, len(table), tuning.block_tokens)
    grid = (min(programs, len(blocks)), tuning.row_programs, tuning.splits)
    if grid[0]:
        _shrink[grid](
            *(x, order, blocks, table, h, z),
            *(tokens, in_features, x.stride(0), h.stride(1), z.stride(1), table.stride(0)),
            BLOCK_TOKENS=tuning.block_tokens,
            BLOCK_ROWS=tuning.block_rows,
            BLOCK_IN=tuning.block_in * 2 // x.element_size(),
            SPLITS=tuning.splits,
            ALIGNED=in_features * x.element_size() % 16 == 0,
            UPCAST=_upcast(x),
            num_warps=tuning.warps,
            num_stages=tuning.stages,
        )
    return h, z


def launch_expand(
    y: torch.Tensor,
    h: torch.Tensor,
    z: torch.Tensor,
    order: torch.Tensor,
    blocks: torch.Tensor,
    table: torch.Tensor,
    widths: Sequence[int],
    tuning: ExpandTuning,
) -> None:
    """`two_steps.expand` with these settings; `blocks` are of the settings' size."""
    splits, tokens, _ = h.shape
    programs = TokenBlocks.count(tokens, len(table), tuning.block_tokens)
    tiles = sum(triton.cdiv(width, tuning.block_columns) for width in widths)
    grid = (min(programs, len(blocks)), tiles)
    if grid[0]:
        _expand[grid](
            *(y, h, z, order, blocks, table),
            *(tokens, y.stride(0), h.stride(1), z.stride(1), table.stride(0)),
            BLOCK_TOKENS=tuning.block_tokens,
            BLOCK_ROWS=tuning.block_rows,
            BLOCK_COLUMNS=tuning.block_columns,
            EXPERTS=MAX_EXPERTS,
            SPLITS=splits,
            WIDTHS=tuple(widths),
            ALIGNED=all(width * y.element_size() % 16 == 0 for width in widths),
            UPCAST=_upcast(y),
            num_warps=tuning.warps,
            num_stages=tuning.stages,
        )


def _upcast(x: torch.Tensor) -> bool:
    return INTERPRETED and x.dtype == torch.bfloat16


def _shrink_tuned(x, order, blocks, table, slices, splits):
    tuning = tuning_for(x.device, x.shape[0]).shrink
    assert splits == tuning.splits, "splits are part of the settings"
    return launch_shrink(x, order, blocks, table, slices, tuning)


def _expand_tuned(y, h, z, order, blocks, table, widths):
    tuning = tuning_for(y.device, h.shape[1]).expand
    launch_expand(y, h, z, order, blocks, table, widths, tuning)


def _shrink_fake(x, order, blocks, table, slices, splits):
    shape = (splits, x.shape[0])
    return (
        x.new_empty((*shape, slices * MAX_RANK), dtype=torch.float32),
        x.new_empty((*shape, slices * MAX_EXPERTS), dtype=torch.float32),
    )


def _expand_fake(y, h, z, order, blocks, table, widths) -> None:
    """Changes y, returns nothing."""


_library = torch.library.Library("guilomo", "FRAGMENT")
_library.define(
    "shrink(Tensor x, Tensor order, Tensor blocks, Tensor table, int slices, int splits)"
    " -> (Tensor, Tensor)"
)
_library.define(
    "expand(Tensor(a!) y, Tensor h, Tensor z, Tensor order, Tensor blocks, Tensor table,"
    " int[] widths) -> ()"
)
_library.impl("shrink", _shrink_tuned, "CUDA")
_library.impl("expand", _expand_tuned, "CUDA")
_library.impl("shrink", _shrink_tuned if INTERPRETED else two_steps.shrink, "CPU")
_library.impl("expand", _expand_tuned if INTERPRETED else two_steps.expand, "CPU")
torch.library.register_fake("guilomo::shrink", _shrink_fake)
torch.library.register_fake("guilomo::expand", _expand_fake)
