"""From an adapter folder to the weights of each layer of the served model.

Everything in an adapter has a place in a layer, or the adapter is refused: one that is applied in
part would answer like a good one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.lora.peft_helper import PEFTHelper

from guilomo_serve.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterError,
    AdapterSpec,
    BaseFingerprint,
    BaseModel,
    is_finite,
    read_config,
    read_spec,
    read_weights,
)
from guilomo_serve.adapter.plain import GENERATING, POOLING, check_plain_config
from guilomo_serve.adapter.spec import TENSOR_PREFIX
from guilomo_serve.ops.layer import LayerWeights, SliceWeights
from guilomo_serve.ops.two_steps import UnsupportedAdapterError, check_size


@dataclass(frozen=True)
class ModulePart:
    """What of a module's matrices this process has; less than all under tensor parallelism.

    Attributes:
        shape: (out, in) of the whole module.
        outputs: the rows of B, None for all of them.
        inputs: the columns of A and of the router, None for all of them.
    """

    shape: tuple[int, int]
    outputs: torch.Tensor | None = None
    inputs: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """The output columns of the layer that are this module's."""
        return self.shape[0] if self.outputs is None else len(self.outputs)

    @property
    def in_width(self) -> int:
        """The input columns that this process has."""
        return self.shape[1] if self.inputs is None else len(self.inputs)

    def of(self, weights: SliceWeights) -> SliceWeights:
        """Takes this process's part of a module's weights."""
        lora_a, lora_b, router = weights.lora_a, weights.lora_b, weights.router
        if self.inputs is not None:
            lora_a = lora_a[:, self.inputs]
            router = None if router is None else router[:, self.inputs]
        if self.outputs is not None:
            lora_b = lora_b[self.outputs]
        return SliceWeights(lora_a, lora_b, router, weights.ranks, weights.scalings)


@dataclass(frozen=True)
class LayerPlan:
    """A layer of the served model: the modules that it packs, in its order."""

    slices: tuple[ModulePart, ...]


@dataclass(frozen=True)
class ModelPlan:
    """Where adapters go in the served model.

    Attributes:
        layers: the adaptable layers of this process, by vLLM's name.
        module_at: module name -> its layer and its place among the layer's slices.
        elsewhere: module name -> (out, in) of what other stages of a pipeline have; see stages.py.
        fingerprint: of the base model.
        dtype: of A and B in the layers.
        device: where adapters that were read are kept; layers take them from there.
        rename: from a module's name in the trained model to vLLM's.
        language_model: how names of modules begin in the part of a multimodal base that takes
            adapters, by vLLM's name; None where the base is nothing else.
        other_parts: the same of its other parts, which do not.
    """

    layers: Mapping[str, LayerPlan]
    module_at: Mapping[str, tuple[str, int]]
    elsewhere: Mapping[str, tuple[int, int]]
    fingerprint: BaseFingerprint
    dtype: torch.dtype
    device: torch.device
    rename: Callable[[str], str]
    language_model: str | None = None
    other_parts: tuple[str, ...] = ()

    def check_parts(self, modules: Iterable[str], where: str) -> None:
        """Refuses modules of a base's towers. Args: modules: by their names in the trained model.

        Raises:
            AdapterError: names the first one, and what would be right.
        """
        for module in modules:
            in_tower = self.rename(module).startswith(self.other_parts)
            if in_tower and self.shape_of(module) is None:
                raise AdapterError(
                    f"{where}: adapts {module!r}, in a part of the base that reads images or "
                    "sounds, where servers apply no adapters: train one of the language model "
                    f"alone, {self.language_model}"
                )

    def shape_of(self, module: str) -> tuple[int, int] | None:
        """[out, in] of a module by its name in the trained model, None if it has no place.

        The whole model's: a stage of a pipeline knows what the others have, too.
        """
        return self.shape_at(self.rename(module))

    def shape_at(self, name: str) -> tuple[int, int] | None:
        """The same by vLLM's name for it."""
        place = self.module_at.get(name)
        if place is None:
            return self.elsewhere.get(name)
        return self.layers[place[0]].slices[place[1]].shape

    def stack(self, modules: Mapping[str, SliceWeights], top_k: int) -> dict[str, LayerWeights]:
        """Sorts this process's part of an adapter's modules into layers. All have a place."""
        by_layer: dict[str, list[SliceWeights | None]] = {}
        for module, weights in modules.items():
            place = self.module_at.get(self.rename(module))
            if place is None:
                continue  # another stage's
            layer, index = place
            parts = self.layers[layer].slices
            by_layer.setdefault(layer, [None] * len(parts))[index] = parts[index].of(weights)
        return {
            layer: LayerWeights.stack(
                slices,
                [part.width for part in self.layers[layer].slices],
                top_k,
                self.dtype,
                self.device,
            )
            for layer, slices in by_layer.items()
        }


def load_routed(folder: str | Path, plan: ModelPlan) -> tuple[AdapterSpec, dict[str, LayerWeights]]:
    """Reads a LoRA-MoE adapter for the served model.

    Raises:
        AdapterError: the adapter is malformed, or made for another base.
    """
    spec = read_spec(folder)
    plan.check_parts(spec.experts, str(folder))
    shapes = {module: plan.shape_of(module) for module in spec.experts}
    known = {module: shape for module, shape in shapes.items() if shape is not None}
    adapter = read_weights(folder, spec, BaseModel(plan.fingerprint, known))
    modules = {
        module: SliceWeights.of(adapter.weights[module], experts)
        for module, experts in adapter.spec.experts.items()
    }
    return adapter.spec, plan.stack(modules, adapter.spec.top_k)


def check_fits(layers: Mapping[str, LayerWeights], device: torch.device, where: str) -> None:
    """Refuses an adapter that the layers' device has no kernels for.

    Args:
        layers: the adapter's weights.
        device: of the served model's layers.
        where: the adapter's folder, for messages.

    Raises:
        AdapterError: names the layer, and what there is too much of.
    """
    if device.type != "cuda":
        return
    for layer, weights in layers.items():
        try:
            check_size(weights)
        except UnsupportedAdapterError as e:
            raise AdapterError(f"{where}: {layer}: {e}") from None


def check_plain(folder: Path, limits: Any, tasks: Collection[str]) -> list[str]:
    """Checks a plain LoRA's config: for itself, and against vLLM's limits.

    Args:
        folder: the adapter folder.
        limits: vLLM's `LoRAConfig`.
        tasks: see `tasks_of`.

    Returns:
        Warnings: what cannot be known.

    Raises:
        AdapterError: it is malformed, or would not be applied as it is.
    """
    path = folder / CONFIG_FILE
    try:
        warnings = check_plain_config(read_config(path), str(path), tasks)
        PEFTHelper.from_local_dir(str(folder), None).validate_legal(limits)
    except AdapterError:
        raise
    except (KeyError, OSError, TypeError, ValueError) as e:
        raise AdapterError(f"{folder}: no adapter that can be served: {e}") from None
    return warnings


def check_parts_of_plain(folder: Path, plan: ModelPlan) -> None:
    """See `ModelPlan.check_parts`; to be called before vLLM reads it, which knows no towers."""
    path = folder / WEIGHTS_FILE
    if plan.other_parts and path.is_file():
        with safe_open(path, framework="pt") as file:
            names = [name.removeprefix(TENSOR_PREFIX) for name in file.keys()]  # noqa: SIM118
        plan.check_parts([name.partition(".lora_")[0] for name in names], str(folder))


def tasks_of(model_config: Any) -> Collection[str]:
    """What a plain LoRA may have been trained for. Args: model_config: vLLM's, of the base."""
    return POOLING if model_config.runner_type == "pooling" else GENERATING


def convert_plain(loras: Mapping[str, Any], plan: ModelPlan, where: str) -> dict[str, LayerWeights]:
    """Takes over a plain LoRA that vLLM has read: one expert, no router.

    Args:
        loras: vLLM's `LoRALayerWeights` by module, in vLLM's names.
        plan: of the served model.
        where: the adapter's folder, for messages.

    Raises:
        AdapterError: something in it would not be applied.
    """
    modules = {}
    for module, lora in loras.items():
        shape = plan.shape_at(module)
        if shape is None:
            raise AdapterError(
                f"{where}: adapts {module!r}, no linear layer of the served model that takes "
                "adapters"
            )
        out_features, in_features = shape
        for name, tensor, size, dim in (
            ("lora_A", lora.lora_a, in_features, 1),
            ("lora_B", lora.lora_b, out_features, 0),
        ):
            if tensor is None:
                raise AdapterError(f"{where}: {module} has no {name}")
            if tensor.ndim != 2 or tensor.shape[dim] != size or tensor.shape[1 - dim] != lora.rank:
                expected = [lora.rank, in_features] if dim == 1 else [out_features, lora.rank]
                raise AdapterError(
                    f"{where}: {name} of {module} has shape {list(tensor.shape)}, "
                    f"expected {expected}"
                )
            if not is_finite(tensor):
                raise AdapterError(f"{where}: {name} of {module} has values that are not finite")
        modules[module] = SliceWeights(
            lora.lora_a, lora.lora_b, None, (lora.rank,), (float(lora.scaling),)
        )
    if not modules:
        raise AdapterError(f"{where}: adapts nothing")
    return plan.stack(modules, top_k=1)
