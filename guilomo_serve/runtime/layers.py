"""vLLM's LoRA layers with the routed product in place of its padded one.

vLLM's classes know how a base layer packs modules and how its forward pass runs; they are kept,
and only storage and the adapter's product are replaced. Storage is ragged: a slot of a layer holds
exactly what the adapter in it weighs, so neither memory nor time depends on
`max_lora_rank`.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from vllm.lora.layers import (
    ColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
)
from vllm.utils.torch_utils import direct_register_custom_op

from guilomo_serve.ops.layer import LayerWeights
from guilomo_serve.ops.slots import make_slots

_layers: WeakValueDictionary[int, RoutedLayer] = WeakValueDictionary()
_indices = itertools.count()


class RoutedLayer:
    """What is ours in a LoRA layer; the other base class is one of vLLM's.

    Attributes:
        layer_index: names the layer in the custom op.
        output_slices: the output columns of each module that the layer packs.
    """

    # vLLM's half of the class sets these.
    device: torch.device
    n_slices: int
    input_size: int
    output_size: int
    punica_wrapper: Any

    def create_lora_weights(
        self, max_loras: int, lora_config: Any, model_config: Any = None
    ) -> None:
        self.lora_config = lora_config
        if self.n_slices == 1:
            self.output_slices = (self.output_size,)
        self.layer_index = next(_indices)
        _layers[self.layer_index] = self
        self.slots = make_slots(
            max_loras, self.input_size, self.output_slices, lora_config.lora_dtype, self.device
        )

    def set_lora(self, index: int, lora_a: LayerWeights, lora_b: None) -> None:
        """Puts an adapter into a slot; `lora_b` is vLLM's, `lora_a` holds both factors."""
        self.slots.set(index, lora_a.to(self.device))

    def reset_lora(self, index: int) -> None:
        self.slots.set(index, None)

    def _apply_lora_to_output(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        # The transformers backend has a batch dimension of one in front.
        flat_x, flat_output = x.view(-1, x.shape[-1]), output.view(-1, output.shape[-1])
        if torch.compiler.is_compiling():
            torch.ops.vllm.guilomo_routed_linear(flat_output, flat_x, self.layer_index)
        else:
            _routed_linear(flat_output, flat_x, self.layer_index)
        return output


def _routed_linear(y: torch.Tensor, x: torch.Tensor, layer_index: int) -> None:
    layer = _layers[layer_index]
    batch = layer.punica_wrapper.batch
    if not len(batch.segments):
        return
    if batch.size > x.shape[0]:
        raise RuntimeError(
            f"the batch has {batch.size} tokens, its layer was given {x.shape[0]}: "
            "vLLM ran a layer on other tokens than it announced"
        )
    layer.slots.apply_(y, x if x.stride(-1) == 1 else x.contiguous(), batch)


def _no_result(y: torch.Tensor, x: torch.Tensor, layer_index: int) -> None:
    """What torch.compile is to know of the op: it changes `y` and returns nothing."""


direct_register_custom_op(
    op_name="guilomo_routed_linear",
    op_func=_routed_linear,
    mutates_args=["y"],
    fake_impl=_no_result,
)

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
