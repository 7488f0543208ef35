"""Which adapter is in which slot, and which token of a batch uses which slot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode
from vllm.lora import model_manager, utils
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager

from guilomo_serve.adapter import AdapterError, BaseFingerprint
from guilomo_serve.catalogue import Settings
from guilomo_serve.ops.layer import Batch, LayerWeights, TokenBlocks
from guilomo_serve.ops.load import RouterLoad
from guilomo_serve.ops.memory import AdapterMemory
from guilomo_serve.ops.selfcheck import PRODUCT_TOLERANCE, slot_error
from guilomo_serve.room import default_memory
from guilomo_serve.runtime.experts import left_alone
from guilomo_serve.runtime.graph_check import random_adapter_bytes
from guilomo_serve.runtime.layers import LAYER_CLASSES, ClassificationHead, RoutedLayer
from guilomo_serve.runtime.loading import LayerPlan, ModelPlan
from guilomo_serve.runtime.report import ExpertLoad, SampledStep, nbytes
from guilomo_serve.runtime.stages import shapes_elsewhere
from guilomo_serve.runtime.unsupported import UnsupportedError

if TYPE_CHECKING:  # needs Triton
    from guilomo_serve.ops.triton_slots import AdapterSlots, PackedAdapter


# Adapters that may be in slots, where --max-cpu-loras says no less. What a slot takes by itself
# (its rows of all tables and counts, some 60 KB on an 8B base) is little beside an adapter's
# weights, so the memory for these is full first; and no step costs more for slots that others use.
SLOTS = 1024


@dataclass(frozen=True)
class LayerEntry:
    """A layer's weights in the form in which vLLM hands them to `RoutedLayer.set_lora`."""

    lora_a: LayerWeights
    lora_b: None = None


class ReadAdapter(LoRAModel):
    """An adapter that was read.

    Attributes:
        packed: for slots of kernels; None where there are none, and for vLLM's dummies.
    """

    def __init__(self, *args: Any, packed: PackedAdapter | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.packed = packed

    @property
    def nbytes(self) -> int:
        """Of its weights in this process."""
        return nbytes({name: entry.lora_a for name, entry in self.loras.items()})


class TokenSlots:
    """The slot of each token of the batch, set once a step; in the place of a punica wrapper.

    Attributes:
        sample: what layers are to keep of this step, None for nothing.
    """

    def __init__(self, blocks: TokenBlocks | None, slot_of: Mapping[int, int]) -> None:
        """Args:
        blocks: where a GPU's kernels find the batch; None on a CPU.
        slot_of: adapter id -> its slot, as it is when a batch comes.
        """
        self.blocks, self._slot_of = blocks, slot_of
        self.batch = Batch(np.empty(0, dtype=np.int64))
        self.sample: SampledStep | None = None

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int
    ) -> None:
        """Args: mapping: vLLM's `LoRAMapping`, with an adapter id (0 for none) for each token."""
        ids = np.asarray(mapping.index_mapping, dtype=np.int64)
        adapters, of_token = np.unique(ids, return_inverse=True)
        slots = [self._slot_of[n] if n > 0 else -1 for n in adapters.tolist()]
        slot_of_token = np.array(slots, dtype=np.int64)[of_token]
        # vLLM activates what a step needs in the order of a set, which differs by process.
        self.batch = Batch(slot_of_token, np.where(ids > 0, ids, -1))
        if self.blocks is not None:
            self.blocks.update(self.batch)


class RoutedModelManager(LRUCacheLoRAModelManager):
    """vLLM's manager of slots, over layers that hold ragged weights.

    vLLM has as many slots as a batch may have different adapters (`max_loras`, which its scheduler
    keeps to). Here these are two numbers: an adapter stays in its slot while there is memory, and
    goes from it by last use.

    Attributes:
        slot_of: adapter id -> its slot.
    """

    punica_wrapper_mapping: dict[str, Any]
    _last_mapping: Any
    supported_lora_modules: list[str]

    def __init__(self, model: torch.nn.Module, *args: Any, vllm_config: Any, **kwargs: Any) -> None:
        self._left_alone = left_alone(model)
        self.slot_of: dict[int, int] = {}
        self._slots_changed = True
        with _our_layers():
            super().__init__(model, *args, vllm_config=vllm_config, **kwargs)
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        mapper = mapper.get_rename_mapper() if mapper is not None else None
        layers, module_at = self._places()
        self.plan = ModelPlan(
            layers=layers,
            module_at=module_at,
            elsewhere=shapes_elsewhere(
                {m: layers[layer].slices[i].shape for m, (layer, i) in module_at.items()}
            ),
            fingerprint=BaseFingerprint.from_config(vllm_config.model_config.hf_config),
            dtype=self.lora_config.lora_dtype,
            device=torch.device("cpu"),  # slots on a GPU are the only copy there
            rename=lambda name: name if mapper is None else mapper._map_name(name) or name,
            **self._parts(),
        )
        self._check_graphs(vllm_config)
        self._slots = self._reserve_memory()
        # Layers of one shape share their kernels; the first requests should not wait for them.
        shapes = {
            (layer.input_size, layer.output_slices, layer.splits_inputs): layer
            for layer in self._routed.values()
        }
        for layer in shapes.values():
            layer.slots.warm_up(self.max_num_batched_tokens)
        for name, layer in self._routed.items():
            layer.place(name, vllm_config.compilation_config.static_forward_context)
        self.expert_load = ExpertLoad()

    @property
    def _routed(self) -> dict[str, RoutedLayer]:
        """The layers that take experts; a classifier's head takes a whole one in its place."""
        return {name: m for name, m in self.modules.items() if isinstance(m, RoutedLayer)}

    @property
    def lora_slots(self) -> int:
        """How many there are; vLLM asks for it when it makes them."""
        return min(self.capacity, max(SLOTS, self.lora_config.max_loras))

    def set_adapter_mapping(self, mapping: Any) -> None:
        """As vLLM's, which looks through all slots in each step for a change."""
        if self._slots_changed or self._last_mapping != mapping:
            self._set_adapter_mapping(mapping)
            self._last_mapping, self._slots_changed = mapping, False

    def begin_step(self) -> None:
        """To be called once a step, when `TokenSlots` has its batch."""
        for slots in self.punica_wrapper_mapping.values():
            if self._slots is not None:
                self._slots.use(slots.batch.slots)
            if slots.blocks is None:
                slots.sample = self.expert_load.begin_step(slots.batch, self.lora_index_to_id)
            else:
                self.expert_load.begin_counted_step(
                    slots.batch, slots.blocks, self.lora_index_to_id
                )

    def load_of(self, version: int) -> RouterLoad | None:
        """What kernels have counted of a version since it is in a slot; None where none count."""
        if self._slots is None or version not in self.slot_of:
            return None
        return self.expert_load.of_slot(version, self._slots, self.slot_of[version])

    def _places(self) -> tuple[dict[str, LayerPlan], dict[str, tuple[str, int]]]:
        layers, module_at = {}, {}
        for name, layer in self._routed.items():
            modules = self.packed_modules.get(name, [name])
            if len(modules) != layer.n_slices:
                continue  # a layer that splits modules in a way of its own takes no adapters
            layers[name] = LayerPlan(layer.parts())
            module_at.update({module: (name, i) for i, module in enumerate(modules)})
        return layers, module_at

    def _parts(self) -> dict[str, Any]:
        """What the plan says of a multimodal base's parts."""
        if not self.supports_mm:
            return {}
        (language_model,) = self.mm_mapping.language_model
        others = (*self.mm_mapping.tower_model, *(self.mm_mapping.connector or ()))
        return {"language_model": language_model, "other_parts": others}

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: Any) -> None:
        super()._init_punica_wrapper(max_num_batched_tokens, vllm_config)
        blocks = None
        if self.device.type == "cuda":
            most = self.lora_config.max_loras
            blocks = TokenBlocks(max_num_batched_tokens, most, self.device)
        # One entry, the language model's: adapters of towers are refused at start.
        self.punica_wrapper_mapping = {
            key: TokenSlots(blocks, self.slot_of) for key in self.punica_wrapper_mapping
        }

    def _create_lora_modules(self) -> None:
        self.supported_lora_modules = [
            module for module in self.supported_lora_modules if module not in self._left_alone
        ]
        super()._create_lora_modules()

    def _match_target_modules(self, module_name: str) -> bool:
        """With --lora-target-modules this alone says what is wrapped."""
        if module_name.rpartition(".")[2] in self._left_alone:
            return False
        return super()._match_target_modules(module_name)

    def _check_graphs(self, vllm_config: Any) -> None:
        """Refuses CUDA graphs where a layer's op is not in them: adapters would do nothing.

        Raises:
            UnsupportedError: names the layer.
        """
        if vllm_config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE:
            return
        for name, layer in self._routed.items():
            if not layer.slots.capturable:
                raise UnsupportedError(
                    f"CUDA graphs: adapters are not computed by kernels in {name} "
                    f"({self.lora_config.lora_dtype} on {self.device.type}); add --enforce-eager"
                )

    def use_again(self, lora_id: int) -> bool:
        """Has an adapter that is in a slot leave it later than others; False if it is in none."""
        self._registered_adapters.touch(lora_id)
        self._active_adapters.touch(lora_id)
        return lora_id in self.slot_of

    def activate_adapter(self, lora_id: int) -> bool:
        """Puts an adapter into a slot, unless it is in one.

        Where its weights do not fit beside those of the others, these leave their slots, those
        first that were not used for longest (`check_room` has left it room beside a step's).
        """
        packed = self.get_adapter(lora_id).packed
        if self._slots is not None and packed is not None and lora_id not in self.slot_of:
            while not self._slots.has_room(packed):
                self._active_adapters.remove_oldest()
        activated = super().activate_adapter(lora_id)
        if activated:
            self.slot_of[lora_id] = self.lora_index_to_id.index(lora_id)
            self._slots_changed = True
        if activated and self._slots is not None:
            slot, adapter = self.slot_of[lora_id], self.get_adapter(lora_id)
            self._slots.set(slot, adapter.packed)
            if not adapter.loras:
                # vLLM captures graphs with adapters that have no weights. What is to be replayed
                # for those that come has to run for these too, in every layer.
                for layer in self._routed.values():
                    layer.filled.add(slot)
        return activated

    def _reserve_memory(self) -> AdapterSlots | None:
        """Takes a GPU's memory for adapters, before vLLM measures what is left for its cache.

        The front end loads no more than this (server/residency.py), and a worker lets no adapter
        in that might not fit beside the others (`check_room`), so no step finds it full.

        Returns:
            The slots of all layers; None where no kernels compute them.

        Raises:
            UnsupportedError: there is not so much.
        """
        layers: dict[str, Any] = {
            name: layer.slots for name, layer in self._routed.items() if layer.slots.capturable
        }
        if not layers:
            return None
        from guilomo_serve.ops.triton_slots import AdapterSlots  # needs Triton

        settings = Settings.from_environment()
        given = None if settings is None else settings.memory
        room = default_memory() if given is None else given
        # An adapter takes less of it than the front end counts (inspection.py).
        room = max(room, random_adapter_bytes(self.plan))
        try:
            memory = AdapterMemory(room, self.device)
        except torch.OutOfMemoryError:
            raise UnsupportedError(
                f"beside the base there is no room for {room / 2**30:.2f} GiB of adapters on "
                f"{self.device}: take another --adapter-memory, or a larger GPU"
            ) from None
        return AdapterSlots(layers, memory)

    def pack(self, layers: dict[str, LayerWeights]) -> PackedAdapter | None:
        """An adapter for `activate_adapter`, in the reader's thread; None on a CPU."""
        return None if self._slots is None else self._slots.pack(layers)

    def check_room(self, adapters: Iterable[ReadAdapter], pinned: Iterable[int] = ()) -> None:
        """Refuses adapters that a batch might use together, beside pinned ones, and do not fit.

        Args:
            adapters: all that are read.
            pinned: those to be pinned, beside those that are.

        Raises:
            AdapterMemoryError: has the figures.
        """
        if self._slots is None:
            return
        stay = {*self._active_adapters.pinned_items, *pinned}
        packed = {a.id: a.packed for a in adapters if a.packed is not None}
        others = sorted(packed.keys() - stay, key=lambda n: len(packed[n].data), reverse=True)
        together = [*(stay & packed.keys()), *others[: self.lora_config.max_loras]]
        self._slots.check_room(packed[number] for number in together)

    def pin_adapter(self, lora_id: int) -> bool:
        """As vLLM's; a step's adapters still have room beside what is pinned.

        Raises:
            AdapterMemoryError: they have not.
        """
        self.check_room(self.list_adapters().values(), [lora_id])
        return super().pin_adapter(lora_id)

    def _create_merged_loras_inplace(self, lora_model: LoRAModel) -> None:
        """Nothing to do: weights are stacked by layer when they are read."""

    def create_dummy_lora(
        self, lora_id: int, rank: int, embedding_modules: dict[str, str] | None = None
    ) -> ReadAdapter:
        """vLLM's warm-up adapter: without weights, as storage does not depend on it."""
        return ReadAdapter(lora_id, rank, {})

    def check_products(self, lora_id: int) -> None:
        """Compares what an active adapter adds in each layer with the formula.

        A row-parallel layer under tensor parallelism has a part of the product alone and is
        left out.

        Raises:
            AdapterError: names the first layer that differs.
        """
        slot = self.slot_of[lora_id]
        if self._slots is not None:
            self._slots.use([slot])
        for name, entry in self.get_adapter(lora_id).loras.items():
            layer = self.modules[name]
            if layer.splits_inputs:
                continue
            weights = entry.lora_a.to(self.device)
            error = slot_error(layer.slots, slot, weights, sum(layer.output_slices))
            if not error <= PRODUCT_TOLERANCE[weights.lora_a.dtype]:
                raise AdapterError(
                    f"{name}: this server's product differs from the formula by {error:.2%}; "
                    "guilomo-serve check tells more"
                )

    def _deactivate_adapter(self, lora_id: int) -> None:
        if lora_id in self.slot_of:
            self.expert_load.keep(lora_id, self.load_of(lora_id))
            slot = self.slot_of.pop(lora_id)
            self._slots_changed = True
            for layer in self.modules.values():  # frees the weights of one that was unloaded
                layer.reset_lora(slot)
                if isinstance(layer, ClassificationHead):
                    layer.reset_module_to_save(slot)
            if self._slots is not None:
                self._slots.set(slot, None)
        super()._deactivate_adapter(lora_id)


@contextmanager
def _our_layers() -> Iterator[None]:
    """vLLM makes our layers in the place of its own, and takes no base for a mixture of experts.

    For our manager alone: a program that makes vLLM's (vllm.lora.model_manager) has vLLM's layers.
    """
    ours = (
        (utils, "_all_lora_classes", LAYER_CLASSES),
        (utils, "is_moe_model", lambda model: False),
        (model_manager, "is_moe_model", lambda model: False),
        (model_manager, "from_layer_classification", _classification_head),
    )
    theirs = [getattr(module, name) for module, name, _ in ours]
    for module, name, value in ours:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(ours, theirs, strict=True):
            setattr(module, name, value)


def _classification_head(layer: torch.nn.Module, *args: Any) -> ClassificationHead:
    head = ClassificationHead(layer)
    head.create_lora_weights(*args)
    return head
