"""The routed product of a layer on a GPU: adapters in memory that layers share, two kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from guilomo_serve.ops import kernels
from guilomo_serve.ops.layer import Batch, LayerWeights, TokenBlocks
from guilomo_serve.ops.load import RouterLoad
from guilomo_serve.ops.memory import AdapterMemory, Range
from guilomo_serve.ops.tuning import TOKEN_CLASSES, tuning_for
from guilomo_serve.ops.two_steps import LOAD_WIDTH, MAX_EXPERTS, check_size, table_width

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class TritonSlots:
    """The slots of one layer as the kernels read them: in ranges of memory, and a table of where.

    The weights given to `set` are copied and not kept. They take what they weigh, see `memory.py`.

    Attributes:
        table: [slots, ...] int64 on the device, see `two_steps.py`.
        load: [slots, slices, LOAD_WIDTH] float64 on the device, what the routers chose in steps
            with `TokenBlocks.sampled`; a slot's is 0 when an adapter is put there.
    """

    capturable = True

    def __init__(
        self,
        count: int,
        in_features: int,
        widths: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Args:
        count: of slots.
        in_features: of the layer.
        widths: the output columns of each slice.
        dtype: of A and B, one of `DTYPES`.
        device: of the layer.
        all_reduce: gives the sum of a tensor over the processes that share the layer's input
            features; None where one process has them all.
        """
        self.widths = tuple(widths)
        self._in_features, self._dtype = in_features, dtype
        self._memory = AdapterMemory(None, device)
        self._in_slot: list[_Placed | None] = [None] * count
        self.table = torch.zeros(
            count, table_width(len(self.widths)), dtype=torch.int64, device=device
        )
        self.load = torch.zeros(
            count, len(self.widths), LOAD_WIDTH, dtype=torch.float64, device=device
        )
        self._all_reduce = all_reduce

    @property
    def nbytes(self) -> int:
        """Memory of all adapters in the slots."""
        return sum(len(placed.range.data) for placed in self._in_slot if placed is not None)

    def keep_in(self, memory: AdapterMemory) -> None:
        """Has weights kept in memory that layers share. All slots are empty."""
        assert not any(self._in_slot)
        self._memory = memory
        memory.tell(self)

    def moved(self) -> None:
        """Writes the table anew: weights have other addresses."""
        self.table.copy_(torch.tensor([self._table_row(s) for s in range(len(self._in_slot))]))

    def set(self, slot: int, weights: LayerWeights | None) -> None:
        """Puts a copy of an adapter's weights into a slot, or empties it.

        They may be on any device. Not while a CUDA graph is captured.

        Raises:
            UnsupportedAdapterError: more rows or experts in a slice than the kernels take.
            torch.OutOfMemoryError: the memory is full. The slot is empty after either.
        """
        placed, self._in_slot[slot] = self._in_slot[slot], None
        self.load[slot] = 0
        if placed is not None:
            self._memory.free(placed.range)
        try:
            if weights is not None:
                check_size(weights)
                self._in_slot[slot] = _Placed(weights, self.widths, self._put(weights))
        finally:
            row = torch.tensor(self._table_row(slot))
            if self.table.is_cuda:
                row = row.pin_memory()  # kept by torch until the copy is done
            self.table[slot].copy_(row, non_blocking=True)

    def apply_(self, y: torch.Tensor, x: torch.Tensor, batch: Batch) -> None:
        """As `Slots.apply_`; y, x and the weights have one dtype, the rows of y and x may be apart.

        Where the layer's inputs are split, what is added is this process's part of a sum.
        """
        tuning, blocks = tuning_for(x.device, x.shape[0]), batch.blocks(x.device)
        h, z = kernels.shrink(
            x,
            blocks.order,
            blocks.of_size[tuning.shrink.block_tokens],
            self.table,
            len(self.widths),
            tuning.shrink,
        )
        if self._all_reduce is not None:
            z = self._all_reduce(z.sum(1, keepdim=True))
        kernels.expand(
            y,
            h,
            z,
            blocks.order,
            blocks.of_size[tuning.expand.block_tokens],
            self.table,
            blocks.sampled,
            self.load,
            self.widths,
            tuning.expand,
        )

    def router(self, slot: int) -> torch.Tensor:
        """As `Slots.router`; a view, until the next `set`."""
        placed = self._in_slot[slot]
        if placed is None:
            return torch.empty(0, self._in_features, device=self.table.device)
        return (
            _parts(placed.range.data, placed.sizes)[1]
            .view(torch.float32)
            .view(-1, self._in_features)
        )

    def load_of(self, slot: int) -> RouterLoad | None:
        """What the routers of the adapter in a slot chose in sampled steps since it was put there.

        Waits for no device.

        Returns:
            The counts of its M slices with a router, in their order; None where there are none.
        """
        placed = self._in_slot[slot]
        if placed is None or not placed.routed:
            return None
        # Not by a list: an index would be copied to the device, and the copy waited for.
        counted = torch.stack([self.load[slot, of_slice] for of_slice in placed.routed])
        chosen, entropy, tokens = counted.split((MAX_EXPERTS, 1, 1), dim=1)
        return RouterLoad(chosen.long(), entropy[:, 0], tokens[:, 0].long())

    def warm_up(self, max_tokens: int) -> None:
        """Compiles the kernels for batches of up to so many tokens, which takes seconds."""
        x = torch.zeros(max_tokens, self._in_features, dtype=self._dtype, device=self.table.device)
        y = x.new_zeros(max_tokens, sum(self.widths))
        for tokens in {min(most, max_tokens) for most in (*TOKEN_CLASSES, max_tokens)}:
            nothing = Batch(np.full(tokens, -1))
            TokenBlocks(tokens, slots=1, device=x.device).update(nothing)
            self.apply_(y[:tokens], x[:tokens], nothing)

    def _put(self, weights: LayerWeights) -> Range:
        gate_rows = torch.stack([weights.row_scale, weights.expert_of_row.float()], dim=1)
        lora_b = [_bytes(b.to(self._dtype)) for b in weights.lora_b]
        parts = [
            [_bytes(weights.lora_a.to(self._dtype))],
            [_bytes(weights.router)],
            [_bytes(gate_rows)],
            lora_b,
        ]
        sizes = tuple(sum(map(len, part)) for part in parts)
        taken = self._memory.take(sum(map(_padded, sizes)))
        # Together first, so that they travel in one copy, which nobody waits for.
        together = _gathering(len(taken.data), weights.lora_a.device, taken.data.device)
        for place, part in zip(_parts(together, sizes), parts, strict=True):
            for target, source in zip(place.split([len(p) for p in part]), part, strict=True):
                target.copy_(source)
        taken.data.copy_(together, non_blocking=True)
        return taken

    def _table_row(self, slot: int) -> list[int]:
        """See `two_steps.LAYER_FIELDS` and `SLICE_FIELDS`."""
        placed = self._in_slot[slot]
        if placed is None:
            return [0] * self.table.shape[1]
        *first, lora_b = (part.data_ptr() for part in _parts(placed.range.data, placed.sizes))
        row = [*first, *placed.counts]
        for values, elements in zip(placed.slices, placed.lora_b_elements, strict=True):
            row += [lora_b if elements else 0, *values]
            lora_b += elements * self._dtype.itemsize
        return row


class _Placed:
    """What a table's row says of an adapter, and where its weights are.

    Attributes:
        range: A, routers, gate rows and B, one after another, see `_parts`.
        sizes: of these, in bytes.
    """

    def __init__(self, weights: LayerWeights, widths: Sequence[int], range_: Range) -> None:
        self.range = range_
        item = weights.lora_a.element_size()
        self.sizes = (
            weights.lora_a.numel() * item,
            weights.router.numel() * 4,
            len(weights.lora_a) * 2 * 4,
            sum(b.numel() for b in weights.lora_b) * item,
        )
        self.counts = (len(weights.lora_a), len(weights.router), weights.top_k)
        self.slices: list[tuple[int, ...]] = []
        self.routed: list[int] = []  # slices with a router
        self.lora_b_elements: list[int] = []
        by_column = {layout.columns[0]: layout for layout in weights.layout}
        column = 0
        for width in widths:
            layout = by_column.get(column)
            rows, experts = (layout.rows, layout.experts) if layout else ((0, 0), (0, 0))
            columns = layout.columns if layout else (0, 0)
            self.slices.append((*rows, *experts, *columns))
            self.lora_b_elements.append((rows[1] - rows[0]) * width)
            if experts[1] > experts[0]:
                self.routed.append(len(self.slices) - 1)
            column += width


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _gathering(size: int, device: torch.device, target: torch.device) -> torch.Tensor:
    """Bytes on `device` that go to `target`: pinned if they leave the host."""
    pinned = device.type == "cpu" and target.type == "cuda"
    return torch.empty(size, dtype=torch.uint8, device=device, pin_memory=pinned)


def _padded(size: int) -> int:
    """Kernels load 16 bytes at a time."""
    return -(-size // 16) * 16


def _parts(data: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """The bytes of each part of a range."""
    begins = [0]
    for size in sizes:
        begins.append(begins[-1] + _padded(size))
    return [data[b : b + size] for b, size in zip(begins, sizes, strict=False)]
