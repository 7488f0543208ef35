"""The routed product of one layer of a served model, for a batch with several adapters.

A served layer may pack several modules of the trained model (q, k and v in one product); these are
its slices, each with its own experts and router. An adapter's slices are stacked, so that a layer
costs one product with A and one with the routers whatever it packs:

    h = A x        [T, R]   R: the rows of all slices
    z = W_r x      [T, E]   E: the experts of all slices that have a router, float32
    y[:, columns of slice] += (h * gate(z) * scale)[:, rows of slice] @ B_slice

`Slots` has the op in torch, on any device; `native.py` the same for the CPU in C++, and
`triton_slots.py` for a GPU in two kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from guilomo_serve.adapter import Expert, ModuleWeights
from guilomo_serve.ops.torch_ops import route


@dataclass(frozen=True)
class SliceLayout:
    """Where a slice is found in the stacked tensors; ranges are half open.

    Attributes:
        rows: of `lora_a`.
        experts: of `router`; empty where the slice has a single expert.
        columns: of the layer's output.
    """

    rows: tuple[int, int]
    experts: tuple[int, int]
    columns: tuple[int, int]


@dataclass(frozen=True)
class SliceWeights:
    """An adapter's weights for one module.

    `lora_a [R, in]`, `lora_b [out, R]`, `router [E, in]` float32 or None for a single expert,
    `ranks` and `scalings` of its experts.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    router: torch.Tensor | None
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]

    @classmethod
    def of(cls, weights: ModuleWeights, experts: Sequence[Expert]) -> SliceWeights:
        """Those of one module of an adapter that was read."""
        return cls(
            weights.lora_a,
            weights.lora_b,
            weights.router,
            tuple(e.rank for e in experts),
            tuple(e.scaling for e in experts),
        )


@dataclass(frozen=True)
class LayerWeights:
    """One adapter's weights for one layer, stacked over the slices that it adapts.

    Attributes:
        lora_a: [R, in].
        lora_b: for each slice of `layout`, [its rows, its columns] (B transposed).
        router: [E, in] float32; E may be 0.
        row_scale: [R] float32, the scaling of each row's expert.
        expert_of_row: [R] int32, the row of `router`, -1 for a slice with a single expert.
        top_k: experts that a token uses in a slice.
        layout: the slices.
    """

    lora_a: torch.Tensor
    lora_b: tuple[torch.Tensor, ...]
    router: torch.Tensor
    row_scale: torch.Tensor
    expert_of_row: torch.Tensor
    top_k: int
    layout: tuple[SliceLayout, ...]

    @classmethod
    def stack(
        cls,
        slices: Sequence[SliceWeights | None],
        widths: Sequence[int],
        top_k: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> LayerWeights:
        """Stacks an adapter's modules in the order in which the layer packs them.

        Args:
            slices: one for each slice of the layer, None where the adapter leaves it alone.
            widths: the output columns of each slice.
            top_k: experts that a token uses.
            dtype: of A and B, the layer's own.
            device: where the layer is.
        """
        rows, experts, column = 0, 0, 0
        layout = []
        expert_of_row: list[int] = []
        row_scale: list[float] = []
        for weights, width in zip(slices, widths, strict=True):
            if weights is not None:
                routed = len(weights.ranks) if weights.router is not None else 0
                rank = sum(weights.ranks)
                layout.append(
                    SliceLayout(
                        (rows, rows + rank), (experts, experts + routed), (column, column + width)
                    )
                )
                for e, (r, s) in enumerate(zip(weights.ranks, weights.scalings, strict=True)):
                    expert_of_row += [experts + e if routed else -1] * r
                    row_scale += [s] * r
                rows, experts = rows + rank, experts + routed
            column += width
        present = [w for w in slices if w is not None]
        routers = [w.router for w in present if w.router is not None]
        in_features = present[0].lora_a.shape[1]
        return cls(
            lora_a=torch.cat([w.lora_a.to(device, dtype) for w in present]),
            lora_b=tuple(w.lora_b.to(device, dtype).t().contiguous() for w in present),
            router=torch.cat([torch.empty(0, in_features), *routers]).to(device),
            row_scale=torch.tensor(row_scale, device=device),
            expert_of_row=torch.tensor(expert_of_row, dtype=torch.int32, device=device),
            top_k=top_k,
            layout=tuple(layout),
        )

    def slices(self) -> list[SliceWeights]:
        """The weights of each slice of `layout` by themselves: `stack` undone."""
        slices = []
        for layout, lora_b in zip(self.layout, self.lora_b, strict=True):
            rows, (first, last) = slice(*layout.rows), layout.experts
            # Rows of one expert lie together, in the order of the experts.
            ranks = torch.unique_consecutive(self.expert_of_row[rows], return_counts=True)[1]
            begins = ranks.cumsum(0) - ranks
            slices.append(
                SliceWeights(
                    self.lora_a[rows],
                    lora_b.t(),
                    self.router[first:last] if last > first else None,
                    tuple(ranks.tolist()),
                    tuple(self.row_scale[rows][begins].tolist()),
                )
            )
        return slices

    def to(self, device: torch.device) -> LayerWeights:
        """The same on `device`; these themselves if they are there."""
        if self.lora_a.device == device:
            return self
        return replace(
            self,
            lora_a=self.lora_a.to(device),
            lora_b=tuple(b.to(device) for b in self.lora_b),
            router=self.router.to(device),
            row_scale=self.row_scale.to(device),
            expert_of_row=self.expert_of_row.to(device),
        )


class Batch:
    """Which tokens of a batch use which slot.

    Attributes:
        order: [n] int32, the tokens that use an adapter, those of one adapter together.
        segments: [s, 3] int32, rows (slot, begin, end) into `order`.
        slots: of the segments.
        size: tokens in the batch.
    """

    def __init__(
        self, slot_of_token: np.ndarray, adapter_of_token: np.ndarray | None = None
    ) -> None:
        """Args:
        slot_of_token: [T] the slot of each token, -1 for the base model.
        adapter_of_token: [T] a number of its adapter, -1 for the base model. Adapters come in this
            order: processes that share a layer sum what they have by place, and one may have an
            adapter in another slot than the other. None: in the order of slots.
        """
        self.size = len(slot_of_token)
        key = slot_of_token if adapter_of_token is None else adapter_of_token
        order = np.argsort(key, kind="stable")
        order = order[np.searchsorted(key[order], 0) :]
        slots = slot_of_token[order]
        begins = np.flatnonzero(np.diff(key[order], prepend=-1))
        ends = np.append(begins, len(slots))[1:]
        self.order = np.ascontiguousarray(order, dtype=np.int32)
        self.segments = np.ascontiguousarray(
            np.stack([slots[begins], begins, ends], axis=1), dtype=np.int32
        )
        self.slots: list[int] = self.segments[:, 0].tolist()
        # What the C++ op takes of it; the arrays live as long as the batch does.
        self.addresses = (
            self.segments.ctypes.data,
            len(self.segments),
            self.order.ctypes.data,
        )
        self._indices: dict[torch.device, list[torch.Tensor]] = {}
        self._blocks: dict[torch.device, TokenBlocks] = {}

    def cut(self, size: int) -> np.ndarray:
        """The segments in pieces of at most `size` tokens, rows (slot, begin, end)."""
        slots, begins, ends = self.segments.T
        pieces = -(-(ends - begins) // size)
        of_segment = np.repeat(np.arange(len(self.segments)), pieces)
        number = np.arange(len(of_segment)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        begin = begins[of_segment] + number * size
        end = np.minimum(begin + size, ends[of_segment])
        return np.stack([slots[of_segment], begin, end], axis=1).astype(np.int32)

    def tokens(self, device: torch.device) -> list[torch.Tensor]:
        """The tokens of each segment as an index on `device`; made once a batch."""
        if device not in self._indices:
            order = torch.from_numpy(self.order).to(device, torch.int64)
            self._indices[device] = [order[b:e] for _, b, e in self.segments.tolist()]
        return self._indices[device]

    def blocks(self, device: torch.device) -> TokenBlocks:
        """The segments in blocks on `device`: those that `TokenBlocks.update` has written, or new.

        New ones are made once a batch; a CUDA graph needs the former, which keep their place.

        Raises:
            RuntimeError: there are none while a CUDA graph is captured.
        """
        if device not in self._blocks:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "a CUDA graph would keep the tokens of the batch with which it is captured: "
                    "write the batch with TokenBlocks.update first"
                )
            TokenBlocks(self.size, len(self.segments), device).update(self)
        return self._blocks[device]


class TokenBlocks:
    """A batch's segments in blocks of few tokens, in device tensors that keep their place.

    A kernel's program takes one block, which says in which slot its adapter is. How many there can
    be follows from the number of tokens and of adapters in a batch, so a launch is the same
    whatever the batch holds, and however many slots there are; blocks that it has not are empty.

    Attributes:
        order: [max_tokens] int32, as `Batch.order`; what is behind the batch's tokens is old.
        of_size: block size -> [blocks, 3] int32, rows (slot, begin, end) into `order`.
        sampled: [1] int32, 1 in a step whose routers' choices are counted.
    """

    SIZES = (16, 64)  # for decode, where most segments are short, and for prefill
    _AHEAD = 4  # steps that the host may be ahead of the device before it waits

    def __init__(self, max_tokens: int, adapters: int, device: torch.device | str) -> None:
        """Args:
        max_tokens: of a batch.
        adapters: different ones that a batch may have.
        device: of the kernels.
        """
        self.max_tokens, self.adapters = max_tokens, adapters
        counts = [self.count(max_tokens, adapters, size) for size in self.SIZES]
        self._lengths = [1, max_tokens, *(3 * count for count in counts)]
        # One tensor, so that a step costs one copy.
        self._all = torch.zeros(sum(self._lengths), dtype=torch.int32, device=device)
        self.sampled, self.order, *blocks = self._all.split(self._lengths)
        self.of_size = {s: b.view(-1, 3) for s, b in zip(self.SIZES, blocks, strict=True)}
        sources = [_Source(self._all) for _ in range(self._AHEAD)]
        self._sources = itertools.cycle(sources)
        self._tokens = 0
        self._cut: dict[int, torch.Tensor] = {}

    @staticmethod
    def count(tokens: int, adapters: int, size: int) -> int:
        """The most blocks that so many tokens of so many adapters can fill."""
        return min(tokens, (tokens + adapters * (size - 1)) // size)

    def cut(self, tokens: int, size: int) -> torch.Tensor:
        """The blocks of a size that so many tokens can fill: those that a launch takes."""
        if tokens != self._tokens:
            self._tokens, self._cut = tokens, {}
        if size not in self._cut:
            self._cut[size] = self.of_size[size][: self.count(tokens, self.adapters, size)]
        return self._cut[size]

    def update(self, batch: Batch, sampled: bool = False) -> None:
        """Writes a batch; `batch.blocks` gives these from now on.

        Waits for the device only where it is `_AHEAD` steps behind. Nothing is allocated.

        Raises:
            ValueError: the batch has more tokens or adapters than there is room for.
        """
        if batch.size > self.max_tokens or len(batch.segments) > self.adapters:
            raise ValueError(
                f"a batch of {batch.size} tokens of {len(batch.segments)} adapters, expected at "
                f"most {self.max_tokens} of {self.adapters}"
            )
        source = next(self._sources)
        values = source.writable()
        values[0] = sampled
        values[1 : 1 + len(batch.order)] = batch.order
        begin = 1 + self.max_tokens
        values[begin:] = 0
        for size, length in zip(self.SIZES, self._lengths[2:], strict=True):
            blocks = batch.cut(size).reshape(-1)
            values[begin : begin + len(blocks)] = blocks
            begin += length
        source.copy_to(self._all)
        batch._blocks[self._all.device] = self


class _Source:
    """Values on the host that go to a device tensor: pinned for a GPU, made once."""

    def __init__(self, target: torch.Tensor) -> None:
        self._tensor = torch.zeros(
            target.shape, dtype=target.dtype, device="cpu", pin_memory=target.is_cuda
        )
        self._values = self._tensor.numpy()
        self._copied = torch.cuda.Event() if target.is_cuda else None

    def writable(self) -> np.ndarray:
        """The values, once the last copy of them is done."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values

    def copy_to(self, target: torch.Tensor) -> None:
        """Begins a copy."""
        target.copy_(self._tensor, non_blocking=True)
        if self._copied is not None:
            self._copied.record()


class Slots:
    """The adapters' weights of one layer, by slot, and the layer's op in torch.

    Attributes:
        capturable: whether a CUDA graph that was captured before adapters were loaded is right
            for any that are loaded later.
    """

    capturable = False

    def __init__(self, count: int) -> None:
        self.weights: list[LayerWeights | None] = [None] * count

    def set(self, slot: int, weights: LayerWeights | None) -> None:
        """Puts an adapter's weights into a slot, or empties it."""
        self.weights[slot] = weights

    def router(self, slot: int) -> torch.Tensor:
        """The routers of the adapter in a slot, [E, in] float32 on the layer's device.

        E is 0 where the slot is empty, or the adapter has no router in this layer.
        """
        weights = self.weights[slot]
        return torch.empty(0, 0) if weights is None else weights.router

    def warm_up(self, max_tokens: int) -> None:
        """Prepares for batches of up to so many tokens; nothing to do without kernels."""

    def apply_(self, y: torch.Tensor, x: torch.Tensor, batch: Batch) -> None:
        """Adds the routed product of each token's adapter to `y`, in place.

        Args:
            y: [T, out], the layer's output so far.
            x: [T, in], its input.
            batch: the slot of each token; its size is at most T.
        """
        for (slot, _, _), tokens in zip(
            batch.segments.tolist(), batch.tokens(x.device), strict=True
        ):
            weights = self.weights[slot]
            if weights is not None:
                add_routed_(y, x, tokens, weights, router_logits(x, tokens, weights))


class SplitSlots(Slots):
    """The slots of a layer whose input features are spread over processes."""

    def __init__(self, count: int, all_reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Args: all_reduce: gives the sum of a tensor over the processes."""
        super().__init__(count)
        self._all_reduce = all_reduce

    def apply_(self, y: torch.Tensor, x: torch.Tensor, batch: Batch) -> None:
        """As `Slots.apply_`, but what is added is this process's part of a sum."""
        self.apply_with_logits_(y, x, batch)

    def apply_with_logits_(
        self, y: torch.Tensor, x: torch.Tensor, batch: Batch
    ) -> dict[int, torch.Tensor]:
        """As `apply_`; returns the logits [its tokens, E] of each slot in the batch.

        One sum over the processes for all adapters of the batch; none where no adapter has a
        router. All processes have the same adapters in the same order, so all of them take it.
        """
        present = [
            (slot, tokens, weights)
            for (slot, _, _), tokens in zip(
                batch.segments.tolist(), batch.tokens(x.device), strict=True
            )
            if (weights := self.weights[slot]) is not None
        ]
        logits = [router_logits(x, tokens, weights) for _, tokens, weights in present]
        if any(part.numel() for part in logits):
            sizes = [part.numel() for part in logits]
            summed = self._all_reduce(torch.cat([part.flatten() for part in logits]))
            logits = [
                part.view_as(own) for part, own in zip(summed.split(sizes), logits, strict=True)
            ]
        for (_, tokens, weights), of_tokens in zip(present, logits, strict=True):
            add_routed_(y, x, tokens, weights, of_tokens)
        return {slot: of for (slot, _, _), of in zip(present, logits, strict=True)}


def router_logits(x: torch.Tensor, tokens: torch.Tensor, weights: LayerWeights) -> torch.Tensor:
    """`z = W_r x` [n, E] in float32, for the n tokens of one segment."""
    return torch.nn.functional.linear(x[tokens].float(), weights.router)


def add_routed_(
    y: torch.Tensor,
    x: torch.Tensor,
    tokens: torch.Tensor,
    weights: LayerWeights,
    logits: torch.Tensor,
) -> None:
    """Adds the product of one adapter to its tokens' rows of `y`, in place; logits [n, E]."""
    h = torch.nn.functional.linear(x[tokens], weights.lora_a).float() * weights.row_scale
    for slice_, lora_b in zip(weights.layout, weights.lora_b, strict=True):
        of_slice = h[:, slice(*slice_.rows)]
        first, last = slice_.experts
        if last > first:
            gates = route(logits[:, first:last], weights.top_k)
            of_slice = of_slice * gates[:, weights.expert_of_row[slice(*slice_.rows)] - first]
        y[:, slice(*slice_.columns)].index_add_(0, tokens, of_slice.to(x.dtype) @ lora_b)
