"""The routed product of a layer on a GPU: adapters' rows in pools, two kernels for a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from guilomo_serve.ops import kernels as _registers_the_ops  # noqa: F401
from guilomo_serve.ops.layer import Batch, LayerWeights, TokenBlocks
from guilomo_serve.ops.load import RouterLoad
from guilomo_serve.ops.pool import RowPool
from guilomo_serve.ops.tuning import TOKEN_CLASSES, tuning_for
from guilomo_serve.ops.two_steps import LOAD_WIDTH, MAX_EXPERTS, check_size, table_width

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class TritonSlots:
    """The slots of one layer as the kernels read them: rows in pools, and a table of where.

    The weights given to `set` are copied and not kept. The pools' memory is what the adapters
    in the slots weigh, see `pool.py`.

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
        # B's rows are as wide as their slice, so they are kept in pieces that divide all widths.
        self._piece = math.gcd(*self.widths)
        self._lora_a = RowPool(in_features, dtype, device)
        self._lora_b = RowPool(self._piece, dtype, device)
        self._router = RowPool(in_features, torch.float32, device)
        self._gate_rows = RowPool(2, torch.float32, device)
        self._pools = (self._lora_a, self._lora_b, self._router, self._gate_rows)
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
        return sum(pool.rows.numel() * pool.rows.element_size() for pool in self._pools)

    def set(self, slot: int, weights: LayerWeights | None) -> None:
        """Puts a copy of an adapter's weights into a slot, or empties it.

        They may be on any device. Not while a CUDA graph is captured.

        Raises:
            UnsupportedAdapterError: more rows or experts in a slice than the kernels take.
            torch.OutOfMemoryError: the device is full. The slot is empty after either.
        """
        self._in_slot[slot] = None
        self.load[slot] = 0
        for pool in self._pools:
            pool.free(slot)
        try:
            if weights is not None:
                check_size(weights)
                self._put(slot, weights)
                self._in_slot[slot] = _Placed(weights, self.widths)
        except BaseException:
            for pool in self._pools:
                pool.free(slot)
            raise
        finally:
            # Rows of other slots may have moved.
            self.table.copy_(torch.tensor([self._table_row(s) for s in range(len(self._in_slot))]))

    def apply_(self, y: torch.Tensor, x: torch.Tensor, batch: Batch) -> None:
        """As `Slots.apply_`; y, x and the weights have one dtype, the rows of y and x may be apart.

        Where the layer's inputs are split, what is added is this process's part of a sum.
        """
        tuning, blocks = tuning_for(x.device, x.shape[0]), batch.blocks(x.device)
        h, z = torch.ops.guilomo.shrink(
            x,
            blocks.order,
            blocks.of_size[tuning.shrink.block_tokens],
            self.table,
            len(self.widths),
            tuning.shrink.splits,
        )
        if self._all_reduce is not None:
            z = self._all_reduce(z.sum(1, keepdim=True))
        torch.ops.guilomo.expand(
            y,
            h,
            z,
            blocks.order,
            blocks.of_size[tuning.expand.block_tokens],
            self.table,
            blocks.sampled,
            self.load,
            self.widths,
        )

    def router(self, slot: int) -> torch.Tensor:
        """As `Slots.router`; a view, until the next `set`."""
        return self._router.rows[slice(*self._router.range_of(slot))]

    def load_of(self, slot: int) -> RouterLoad | None:
        """What the routers of the adapter in a slot chose in sampled steps since it was put there.

        Waits for no device.

        Returns:
            The counts of its M slices with a router, in their order; None where there are none.
        """
        placed = self._in_slot[slot]
        if placed is None or not placed.routed:
            return None
        counted = self.load[slot, placed.routed]
        chosen, entropy, tokens = counted.split((MAX_EXPERTS, 1, 1), dim=1)
        return RouterLoad(chosen.long(), entropy[:, 0], tokens[:, 0].long())

    def warm_up(self, max_tokens: int) -> None:
        """Compiles the kernels for batches of up to so many tokens, which takes seconds."""
        x = self._lora_a.rows.new_zeros(max_tokens, self._lora_a.rows.shape[1])
        y = x.new_zeros(max_tokens, sum(self.widths))
        for tokens in {min(most, max_tokens) for most in (*TOKEN_CLASSES, max_tokens)}:
            nothing = Batch(np.full(tokens, -1))
            TokenBlocks(tokens, slots=1, device=x.device).update(nothing)
            self.apply_(y[:tokens], x[:tokens], nothing)

    def _put(self, slot: int, weights: LayerWeights) -> None:
        self._lora_a.put(slot, weights.lora_a)
        self._lora_b.put(slot, torch.cat([b.reshape(-1, self._piece) for b in weights.lora_b]))
        self._router.put(slot, weights.router)
        self._gate_rows.put(
            slot, torch.stack([weights.row_scale, weights.expert_of_row.float()], dim=1)
        )

    def _table_row(self, slot: int) -> list[int]:
        """See `two_steps.LAYER_FIELDS` and `SLICE_FIELDS`."""
        placed = self._in_slot[slot]
        if placed is None:
            return [0] * self.table.shape[1]
        row = [
            self._lora_a.address(slot),
            self._router.address(slot),
            self._gate_rows.address(slot),
            *placed.counts,
        ]
        address = self._lora_b.address(slot)
        for values, elements in zip(placed.slices, placed.lora_b_elements, strict=True):
            row += [address if elements else 0, *values]
            address += elements * self._lora_b.rows.element_size()
        return row


class _Placed:
    """What a table's row says of an adapter besides addresses."""

    def __init__(self, weights: LayerWeights, widths: Sequence[int]) -> None:
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
