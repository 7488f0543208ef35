"""vLLM's LoRA layers with the routed product in place of its padded one.

vLLM's classes know how a base layer packs modules and how its forward pass runs; they are kept,
and only storage and the adapter's product are replaced. Storage is ragged: a slot of a layer holds
exactly what the adapter in it weighs, so neither memory nor time depends on
`max_lora_rank`.

Under tensor parallelism a process has the outputs of some columns (column-parallel layers: its
rows of B, all of A and of the router) or the inputs of some (row-parallel layers: its columns of
A and of the router, all of B). In the second case its product is a part of a sum that vLLM takes
over the processes anyway; only the router's logits have to be summed before, since the gate is not
linear in them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.lora.layers import (
    ColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
)
from vllm.lora.layers.classifier import ClassificationHeadWithLoRA
from vllm.lora.layers.utils import _get_lora_device
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.utils.torch_utils import (
    LayerNameType,
    _encode_layer_name,
    _resolve_layer_name,
    direct_register_custom_op,
)

from guilomo_serve.ops.layer import LayerWeights, SplitSlots
from guilomo_serve.ops.slots import make_slots
from guilomo_serve.runtime.loading import ModulePart
from guilomo_serve.runtime.unsupported import UnsupportedError


def device_of(base_layer: torch.nn.Module) -> torch.device:
    """Where a layer is; vLLM asks its weight, which oneDNN's int8 kernel has taken into its own.

    Raises:
        UnsupportedError: the layer is quantised in a way with which vLLM has no adapters.
    """
    if getattr(base_layer, "weight", base_layer) is None:
        return next(base_layer.parameters()).device  # its scales
    try:
        return _get_lora_device(base_layer)
    except ValueError:
        method = type(getattr(base_layer, "quant_method", base_layer)).__name__
        raise UnsupportedError(
            f"vLLM takes no adapters on a layer quantised by {method}: leave its modules out with "
            "--lora-target-modules, or take another base"
        ) from None


class RoutedLayer:
    """What is ours in a LoRA layer; the other base class is one of vLLM's.

    Attributes:
        output_slices: the output columns of each module that the layer packs.
        filled: the slots whose adapter has something in this layer, or may have when a CUDA graph
            that is captured now is replayed.
        served_name: vLLM's name of the layer; see `place`.
    """

    # vLLM's half of the class sets these.
    base_layer: Any
    device: torch.device
    n_slices: int
    input_size: int
    output_size: int
    punica_wrapper: Any
    slice_lora_b: Callable[[Any], Any]
    tp_rank: int
    tp_size: int
    served_name: str

    def create_lora_weights(
        self, max_loras: int, lora_config: Any, model_config: Any = None
    ) -> None:
        self.lora_config = lora_config
        if self.n_slices == 1:
            self.output_slices = (self.output_size,)
        self.filled: set[int] = set()
        self.slots = make_slots(
            max_loras,
            self.input_size,
            self.output_slices,
            lora_config.lora_dtype,
            self.device,
            tensor_model_parallel_all_reduce if self.splits_inputs else None,
        )

    def place(self, name: str, static_forward_context: dict[str, Any]) -> None:
        """Names the layer where the custom op of a compiled model finds it: in its own engine.

        Args:
            name: vLLM's, of the layer in the model.
            static_forward_context: of the engine's compilation config.
        """
        self.served_name = name
        static_forward_context[_op_name(name)] = self

    @property
    def splits_inputs(self) -> bool:
        """Whether this process sees only some columns of the layer's input."""
        return self.tp_size > 1 and isinstance(self, RowParallelLinearWithLoRA)

    def parts(self) -> tuple[ModulePart, ...]:
        """What this process has of each module that the layer packs."""
        base = self.base_layer
        if isinstance(base, QKVParallelLinear):
            # Its own output_sizes count heads of k and v once for each process that has a copy.
            kv = base.total_num_kv_heads * base.head_size
            sizes = [base.total_num_heads * base.head_size, kv, kv]
        elif self.n_slices > 1:
            sizes = list(base.output_sizes)
        else:
            sizes = [base.output_size]
        if self.n_slices == 1:
            sizes = [sum(sizes)]
        if self.tp_size == 1:
            return tuple(ModulePart((size, base.input_size)) for size in sizes)
        if self.splits_inputs:
            width = base.input_size_per_partition
            columns = torch.arange(self.tp_rank * width, (self.tp_rank + 1) * width)
            return (ModulePart((sizes[0], base.input_size), inputs=columns),)
        # vLLM knows how it splits B's rows; it is shown their numbers.
        rows = [torch.arange(size)[:, None] for size in sizes]
        taken = self.slice_lora_b(rows) if self.n_slices > 1 else [self.slice_lora_b(rows[0])]
        return tuple(
            ModulePart((size, base.input_size), outputs=of_module.flatten())
            for size, of_module in zip(sizes, taken, strict=True)
        )

    def set_lora(self, index: int, lora_a: LayerWeights, lora_b: None) -> None:
        """Puts an adapter into a slot; `lora_b` is vLLM's, `lora_a` holds both factors.

        Kernels' slots get it in all layers at once, by the manager's `AdapterSlots`.
        """
        self.filled.discard(index)  # until all of it is there
        if not self.slots.capturable:
            self.slots.set(index, lora_a.to(self.device))
        self.filled.add(index)

    def reset_lora(self, index: int) -> None:
        self.filled.discard(index)
        if not self.slots.capturable:
            self.slots.set(index, None)

    def _apply_lora_to_output(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        # The transformers backend has a batch dimension of one in front.
        flat_x, flat_output = x.view(-1, x.shape[-1]), output.view(-1, output.shape[-1])
        if torch.compiler.is_compiling():
            name = _encode_layer_name(_op_name(self.served_name))
            torch.ops.vllm.guilomo_routed_linear(flat_output, flat_x, name)
        else:
            self.add_routed_(flat_output, flat_x)
        return output

    def add_routed_(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Adds what the step's adapters have for this layer. Args: y: [T, out]; x: [T, in]."""
        batch = self.punica_wrapper.batch
        if self.filled.isdisjoint(batch.slots):
            return  # base requests alone, or adapters that leave this layer as it is
        if batch.size > x.shape[0]:
            raise RuntimeError(
                f"the batch has {batch.size} tokens, its layer was given {x.shape[0]}: "
                "vLLM ran a layer on other tokens than it announced"
            )
        dtype = self.lora_config.lora_dtype
        if y.dtype != dtype or x.dtype != dtype:  # of a quantised layer with its own precision
            added = torch.zeros_like(y, dtype=dtype, memory_format=torch.contiguous_format)
            self.add_routed_(added, x.to(dtype))
            y += added
            return
        x = x if x.stride(-1) == 1 else x.contiguous()
        sample = self.punica_wrapper.sample
        if sample is None:
            self.slots.apply_(y, x, batch)
        elif isinstance(self.slots, SplitSlots):
            sample.keep_summed(self.served_name, self.slots.apply_with_logits_(y, x, batch))
        else:
            sample.keep(self.served_name, x, self.slots)
            self.slots.apply_(y, x, batch)


def _op_name(layer: str) -> str:
    """The base's layers have the plain names, as vLLM gives its own LoRA layers a suffix."""
    return f"{layer}.guilomo"


def _routed_linear(y: torch.Tensor, x: torch.Tensor, layer_name: LayerNameType) -> None:
    # Which layer is an argument of the compiled code, not a constant in it, so that layers of one
    # shape share it, and another engine with this code in its cache has its own layers.
    layers = get_forward_context().no_compile_layers
    layers[_resolve_layer_name(layer_name)].add_routed_(y, x)


def _no_result(y: torch.Tensor, x: torch.Tensor, layer_name: LayerNameType) -> None:
    """What torch.compile is to know of the op: it changes `y` and returns nothing."""


direct_register_custom_op(
    op_name="guilomo_routed_linear",
    op_func=_routed_linear,
    mutates_args=["y"],
    fake_impl=_no_result,
)


class ClassificationHead(ClassificationHeadWithLoRA):
    """A classifier's last layer, of which an adapter brings a whole one of its own.

    vLLM's has factors A and B too, and pads what its kernels take; here a slot holds the weights as
    they are.
    """

    def create_lora_weights(
        self, max_loras: int, lora_config: Any, model_config: Any = None
    ) -> None:
        self.max_lora_cls_labels = lora_config.max_lora_cls_labels or self.output_size
        self._heads: list[tuple[torch.Tensor, torch.Tensor | None] | None] = [None] * max_loras
        self._slots_of_rows: tuple[int, ...] = ()

    def set_output_mapping(self, slot_indices: tuple[int, ...]) -> None:
        """Args: slot_indices: of each request of the step, -1 for none."""
        self._slots_of_rows = slot_indices

    def set_module_to_save(
        self, index: int, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        dtype = self.base_layer.weight.dtype
        placed = None if bias is None else bias.to(self.device, dtype)
        self._heads[index] = (weight.to(self.device, dtype), placed)

    def reset_module_to_save(self, index: int) -> None:
        self._heads[index] = None

    def reset_lora(self, index: int) -> None:
        """There are no factors here."""

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Args: x: [requests, in]. Returns: of each request its head's outputs."""
        output = self.base_layer(x)
        rows = list(output[0] if isinstance(output, tuple) else output)
        for row, slot in enumerate(self._slots_of_rows):
            head = self._heads[slot] if slot >= 0 else None
            if head is not None:
                rows[row] = torch.nn.functional.linear(x[row].to(head[0].dtype), *head)
        alike = len({len(row) for row in rows}) == 1
        return torch.stack(rows) if alike else rows


# In vLLM's order: the first class that can replace a layer is taken. Layers of other kinds
# (embeddings, heads, mixtures of experts) stay unwrapped; an adapter that names one is refused.
LAYER_CLASSES = tuple(
    type(f"Routed{theirs.__name__}", (RoutedLayer, theirs), {})
    for theirs in (
        ColumnParallelLinearWithLoRA,
        MergedColumnParallelLinearWithLoRA,
        QKVParallelLinearWithLoRA,
        MergedQKVParallelLinearWithLoRA,
        RowParallelLinearWithLoRA,
        ReplicatedLinearWithLoRA,
    )
)
