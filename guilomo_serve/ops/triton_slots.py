"""The routed product of layers on a GPU: adapters in memory that layers share, two kernels.

An adapter is packed once, on the host, beside the steps: the weights of all its layers lie in one
piece of pinned memory as kernels read them. Putting it into a slot between two steps is then one
copy of that, beside the steps, and one of what the layers' tables say of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from guilomo_serve.ops import kernels
from guilomo_serve.ops.layer import Batch, LayerWeights, TokenBlocks
from guilomo_serve.ops.load import RouterLoad
from guilomo_serve.ops.memory import AdapterMemory, Range
from guilomo_serve.ops.tuning import TOKEN_CLASSES, tuning_for
from guilomo_serve.ops.two_steps import (
    LAYER_FIELDS,
    LOAD_WIDTH,
    MAX_EXPERTS,
    SLICE_FIELDS,
    Results,
    check_size,
    packed_bytes,
    padded,
    table_width,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LAYER_ADDRESSES = ("lora_a", "router", "gate_rows")


class TritonSlots:
    """The slots of one layer as the kernels read them: a table of where weights are.

    Weights come by `AdapterSlots`, for all layers at once.

    Attributes:
        table: [slots, ...] int64 on the device, see `two_steps.py`.
        load: [slots, slices, LOAD_WIDTH] float64 on the device, what the routers chose in steps
            with `TokenBlocks.sampled`.
        results: memory between the two kernels; one for all layers of a model.
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
        self.table = torch.zeros(
            count, table_width(len(self.widths)), dtype=torch.int64, device=device
        )
        self.load = torch.zeros(
            count, len(self.widths), LOAD_WIDTH, dtype=torch.float64, device=device
        )
        self.results = Results(device)
        self._all_reduce = all_reduce
        self._alone: AdapterSlots | None = None

    def set(self, slot: int, weights: LayerWeights | None) -> None:
        """As `Slots.set`, for a layer by itself; a copy is kept.

        Raises:
            UnsupportedAdapterError: see `AdapterSlots.pack`. The slot is as it was.
        """
        if self._alone is None:
            self._alone = AdapterSlots({"": self}, AdapterMemory(None, self.table.device))
        self._alone.set(slot, None if weights is None else self._alone.pack({"": weights}))
        self._alone.use([slot])

    def apply_(self, y: torch.Tensor, x: torch.Tensor, batch: Batch) -> None:
        """As `Slots.apply_`; y, x and the weights have one dtype, the rows of y and x may be apart.

        Where the layer's inputs are split, what is added is this process's part of a sum.
        """
        tuning, blocks = tuning_for(x.device, x.shape[0]), batch.blocks(x.device)
        shape = (x.shape[0], len(self.widths), tuning.shrink.splits)
        h, z = self.results.of(*shape)
        kernels.shrink(
            x,
            blocks.order,
            blocks.cut(x.shape[0], tuning.shrink.block_tokens),
            self.table,
            h,
            z,
            tuning.shrink,
        )
        if self._all_reduce is not None:
            z = self._all_reduce(torch.sum(z, 1, keepdim=True, out=self.results.total(*shape)))
        kernels.expand(
            y,
            h,
            z,
            blocks.order,
            blocks.cut(x.shape[0], tuning.expand.block_tokens),
            self.table,
            blocks.sampled,
            self.load,
            self.widths,
            tuning.expand,
        )

    def warm_up(self, max_tokens: int) -> None:
        """Compiles the kernels for batches of up to so many tokens, which takes seconds."""
        x = torch.zeros(max_tokens, self._in_features, dtype=self._dtype, device=self.table.device)
        y = x.new_zeros(max_tokens, sum(self.widths))
        for tokens in {min(most, max_tokens) for most in (*TOKEN_CLASSES, max_tokens)}:
            nothing = Batch(np.full(tokens, -1))
            TokenBlocks(tokens, adapters=1, device=x.device).update(nothing)
            self.apply_(y[:tokens], x[:tokens], nothing)


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter's weights in one piece of memory, as kernels read them.

    Attributes:
        data: [bytes] uint8, on the host; pinned if they are for a GPU.
        rows: [layers, ...] int64, what the tables of all layers say of it (`two_steps.py`), with
            places in `data` as addresses; zeros in layers that it leaves alone.
        is_address: which values of `rows` are, 0 or 1.
        routed: layer -> its slices with a router.
        weights: the same weights by layer, as views of `data`.
    """

    data: torch.Tensor
    rows: np.ndarray
    is_address: np.ndarray
    routed: Mapping[str, Sequence[int]]
    weights: Mapping[str, LayerWeights]

    def at(self, address: int) -> np.ndarray:
        """The rows where its memory begins there."""
        return self.rows + address * self.is_address


class AdapterSlots:
    """The slots of all layers of a model: an adapter is in all of its layers, or in none.

    Nothing here waits for the device: what goes there is pinned, and torch keeps it until it is
    there. To be used between steps, on the thread that starts these, and not while a CUDA graph is
    captured.
    """

    def __init__(self, layers: Mapping[str, TritonSlots], memory: AdapterMemory) -> None:
        """Args:
        layers: by name, of one device, with as many slots each. Their tables, loads and results
            find another place here, for good: before any CUDA graph is captured.
        memory: for the weights.
        """
        self._layers, self._memory = layers, memory
        memory.tell(self)
        tables = [layer.table for layer in layers.values()]
        widest, self._device = max(table.shape[1] for table in tables), tables[0].device
        self._in_slot: list[tuple[PackedAdapter, Range] | None] = [None] * len(tables[0])
        self._coming: set[int] = set()  # slots whose weights no step has waited for
        # A slot's rows of all tables are one piece.
        self._table = torch.zeros(
            len(self._in_slot), len(tables), widest, dtype=torch.int64, device=self._device
        )
        rows = [len(self._in_slot) * len(layer.widths) for layer in layers.values()]
        self._load = torch.zeros(sum(rows), LOAD_WIDTH, dtype=torch.float64, device=self._device)
        self._first_row: dict[str, int] = {}  # of each layer in `_load`
        first, results = 0, Results(self._device)
        for i, (name, layer) in enumerate(layers.items()):
            layer.results = results
            layer.table = self._table[:, i, : layer.table.shape[1]]
            layer.load = self._load[first : first + rows[i]].view(layer.load.shape)
            self._first_row[name] = first
            first += rows[i]

    def pack(self, weights: Mapping[str, LayerWeights]) -> PackedAdapter:
        """Packs an adapter, which takes about a millisecond a layer, in whatever thread.

        Args:
            weights: by layer.

        Raises:
            UnsupportedAdapterError: more rows or experts in a slice than the kernels take.
        """
        for of_layer in weights.values():
            check_size(of_layer)
        writer = _Writer(sum(map(_size, weights.values())), self._device.type == "cuda")
        rows, is_address = np.zeros((2, *self._table.shape[1:]), dtype=np.int64)
        routed: dict[str, Sequence[int]] = {}
        views: dict[str, LayerWeights] = {}
        for i, (name, layer) in enumerate(self._layers.items()):
            if name in weights:
                packed = _pack(weights[name], layer.widths, writer)
                rows[i, : len(packed.row)] = packed.row
                is_address[i, : len(packed.row)] = packed.is_address
                routed[name], views[name] = packed.routed, packed.views
        return PackedAdapter(writer.data, rows, is_address, routed, views)

    def check_room(self, adapters: Iterable[PackedAdapter]) -> None:
        """Refuses adapters that would not fit together, whatever is in slots now.

        Raises:
            AdapterMemoryError: has the figures.
        """
        self._memory.check([len(adapter.data) for adapter in adapters])

    def has_room(self, adapter: PackedAdapter) -> bool:
        """Whether it fits beside what is in slots now."""
        return self._memory.has_room(len(adapter.data))

    def set(self, slot: int, adapter: PackedAdapter | None) -> None:
        """Puts a copy of an adapter into a slot, or empties it, for the steps from now on.

        Steps that use the slot have to be announced (`use`).

        Raises:
            torch.OutOfMemoryError: the memory is full. The slot is empty then.
        """
        self._coming.discard(slot)
        placed, self._in_slot[slot] = self._in_slot[slot], None
        if placed is None and adapter is None:
            return
        if placed is not None:
            self._memory.free(placed[1])
        try:
            if adapter is not None:
                taken = self._memory.take(len(adapter.data))
                self._memory.fill(taken, adapter.data)
                self._in_slot[slot] = (adapter, taken)
                self._coming.add(slot)
                self._load.index_fill_(0, self._rows(slot, adapter, adapter.routed), 0)
        finally:
            self._write(slot)

    def use(self, slots: Iterable[int]) -> None:
        """The next steps use these slots: they wait for weights that are still coming."""
        for slot in self._coming.intersection(slots):
            placed = self._in_slot[slot]
            assert placed is not None
            self._memory.arrive(placed[1])
            self._coming.remove(slot)

    def load_of(self, slot: int, layers: Sequence[str]) -> RouterLoad | None:
        """What the routers of the adapter in a slot chose in sampled steps since it was put there.

        Returns:
            The counts of its slices with a router, in the order of `layers`; None where there are
            none.
        """
        placed = self._in_slot[slot]
        if placed is None:
            return None
        counted = self._load.index_select(0, self._rows(slot, placed[0], layers))
        if not len(counted):
            return None
        chosen, entropy, tokens = counted.split((MAX_EXPERTS, 1, 1), dim=1)
        return RouterLoad(chosen.long(), entropy[:, 0], tokens[:, 0].long())

    def moved(self, ranges: Sequence[Range]) -> None:
        """Writes tables anew: weights have other addresses."""
        for slot, placed in enumerate(self._in_slot):
            if placed is not None and placed[1] in ranges:
                self._write(slot)

    def _rows(self, slot: int, adapter: PackedAdapter, layers: Iterable[str]) -> torch.Tensor:
        """Of `_load`, those of the adapter's routers, on the device."""
        rows = [
            self._first_row[name] + slot * len(self._layers[name].widths) + of_slice
            for name in layers
            for of_slice in adapter.routed.get(name, ())
        ]
        return self._on_device(torch.tensor(rows, dtype=torch.int64))

    def _write(self, slot: int) -> None:
        """What the tables of all layers say of a slot, in one copy."""
        placed, target = self._in_slot[slot], self._table[slot]
        if placed is None:
            target.zero_()
            return
        adapter, taken = placed
        target.copy_(self._on_device(torch.from_numpy(adapter.at(taken.data.data_ptr()))))

    def _on_device(self, values: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda":
            values = values.pin_memory()
        return values.to(self._device, non_blocking=True)


class _Writer:
    """Bytes that are filled from the front."""

    def __init__(self, size: int, pinned: bool) -> None:
        self.data = torch.empty(size, dtype=torch.uint8, pin_memory=pinned, device="cpu")
        self._end = 0

    def put(self, tensor: torch.Tensor) -> tuple[int, torch.Tensor]:
        """Copies a tensor. Returns: where it begins, and a view of it there."""
        begin, size = self._end, tensor.numel() * tensor.element_size()
        view = self.data[begin : begin + size].view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor)
        self._end += padded(size)
        return begin, view


def _size(weights: LayerWeights) -> int:
    slices = [
        (len(lora_b), layout.experts[1] - layout.experts[0], lora_b.shape[1])
        for layout, lora_b in zip(weights.layout, weights.lora_b, strict=True)
    ]
    return packed_bytes(weights.lora_a.shape[1], slices, weights.lora_a.dtype)


class _PackedLayer(NamedTuple):
    """One layer's part of a `PackedAdapter`."""

    row: list[int]
    is_address: list[bool]
    routed: list[int]
    views: LayerWeights


def _pack(weights: LayerWeights, widths: Sequence[int], writer: _Writer) -> _PackedLayer:
    """Args: widths: the output columns of all of the layer's slices."""
    at_a, lora_a = writer.put(weights.lora_a)
    at_router, router = writer.put(weights.router)
    gate_rows = torch.stack([weights.row_scale, weights.expert_of_row.float()], dim=1)
    at_gate_rows, _ = writer.put(gate_rows)
    row = [at_a, at_router, at_gate_rows, len(lora_a), len(router), weights.top_k]
    is_address = [name in _LAYER_ADDRESSES for name in LAYER_FIELDS]
    slices = {p.columns[0]: i for i, p in enumerate(weights.layout)}
    lora_b, routed, column = [], [], 0
    for number, width in enumerate(widths):
        i = slices.get(column)
        column += width
        if i is None:
            row += [0] * len(SLICE_FIELDS)
            is_address += [False] * len(SLICE_FIELDS)
            continue
        layout = weights.layout[i]
        at_b, factor = writer.put(weights.lora_b[i])
        lora_b.append(factor)
        row += [at_b, *layout.rows, *layout.experts, *layout.columns]
        is_address += [name == "lora_b" for name in SLICE_FIELDS]
        if layout.experts[1] > layout.experts[0]:
            routed.append(number)
    views = replace(weights, lora_a=lora_a, router=router, lora_b=tuple(lora_b))
    return _PackedLayer(row, is_address, routed, views)
