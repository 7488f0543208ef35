"""Which adapters a worker has read, from where, and for how long it keeps them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from guilomo_serve.adapter import CONFIG_FILE, AdapterError, is_guilomo_adapter
from guilomo_serve.catalogue import Settings
from guilomo_serve.ops.layer import LayerWeights
from guilomo_serve.room import default_memory
from guilomo_serve.runtime.loading import (
    ModelPlan,
    check_fits,
    check_parts_of_plain,
    check_plain,
    convert_plain,
    load_routed,
    tasks_of,
)
from guilomo_serve.runtime.model_manager import LayerEntry, ReadAdapter, RoutedModelManager
from guilomo_serve.runtime.reading import Reader
from guilomo_serve.runtime.report import Routers


class RoutedWorkerManager(LRUCacheWorkerLoRAManager):
    """vLLM's manager of adapters in a worker; reads our format and keeps what it has read.

    An adapter that a server loads stays in host memory until it unloads it, whatever the LRU does:
    a request keeps the weights it began with, and a folder that has changed or gone cannot hurt it.
    Others come with a request, or with `add_lora`, in programs that have vLLM's engine and no
    server (`vllm.LLM`). They go by last use, to keep to `--max-cpu-loras` and to this process's
    part of `default_memory`, but for those of the step at hand; as in vLLM alone they are read
    again when they are asked for.
    """

    _manager_cls = RoutedModelManager

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._read: dict[int, ReadAdapter] = {}
        self._of_server: set[int] = set()  # which it has loaded, and unloads
        self._of_requests: OrderedDict[int, int] = OrderedDict()  # their bytes, by last use
        self._in_step: set[int] = set()
        self._room = default_memory() // vllm_config.parallel_config.world_size_across_dp
        self._reader: Reader[tuple[ReadAdapter, Routers | None]] = Reader()
        self._tasks = tasks_of(vllm_config.model_config)
        self._engine = vllm_config.parallel_config.data_parallel_index
        settings = Settings.from_environment()
        self._checks = settings is not None and settings.check_adapters
        wanted = settings is not None and settings.expert_load != "off"
        self._samples = wanted and get_tensor_model_parallel_rank() == 0

    def add_adapter(self, lora_request: Any) -> bool:
        if lora_request.lora_int_id in self._of_requests:
            self._of_requests.move_to_end(lora_request.lora_int_id)
        is_new = self._checks and lora_request.lora_int_id not in self.list_adapters()
        loaded = super().add_adapter(lora_request)
        if is_new:
            try:
                self.check_products(lora_request.lora_int_id)
            except AdapterError as e:
                self.remove_adapter(lora_request.lora_int_id)
                raise AdapterError(f"{lora_request.lora_path}: {e}") from None
        return loaded

    def set_active_adapters(self, requests: set[Any], mapping: Any | None) -> None:
        self._in_step = {request.lora_int_id for request in requests}
        super().set_active_adapters(requests, mapping)
        self._adapter_manager.begin_step()

    def _apply_adapters(self, lora_requests: set[Any]) -> None:
        """As vLLM's, which lists all adapters anew for each one of a step.

        Those of the step that are in slots become the last ones to leave them before others come.
        """
        others = set()
        for request in lora_requests:
            number = request.lora_int_id
            if request.load_inplace or not self._adapter_manager.use_again(number):
                others.add(request)
            elif number in self._of_requests:
                self._of_requests.move_to_end(number)
        super()._apply_adapters(others)

    @property
    def plan(self) -> ModelPlan:
        """Where adapters go in this process's part of the model."""
        return self._adapter_manager.plan

    def keep_weights(self, number: int, layers: dict[str, LayerWeights]) -> None:
        """Keeps an adapter that no folder has, for `add_adapter`; see graph_check.py."""
        self._keep(number, self._packed(number, 1, layers), None)

    def check_products(self, number: int) -> None:
        """See `RoutedModelManager.check_products`."""
        self._adapter_manager.check_products(number)

    def begin_reading(self, name: str, number: int, path: str) -> None:
        """Reads an adapter beside the steps, for `add_adapter` later."""
        self._of_server.add(number)
        request = LoRARequest(lora_name=name, lora_int_id=number, lora_path=path)
        if number not in self._read:
            self._reader.begin(number, partial(self._read_adapter, request))

    def outcome_of_reading(self, number: int) -> dict[str, Any] | None:
        """What became of it: None while it is read, then nothing, or as `_refused` has it."""
        if self._reader.is_reading(number):
            return None
        try:
            read = self._reader.take(number)
            if read is not None:
                self._keep(number, *read)
        except Exception as e:
            return _refused(e)
        return {}

    def outcome_of_adding(self, name: str, number: int, path: str) -> dict[str, Any]:
        """Puts an adapter into the layers; `bytes` and `rank` of it, or as `_refused` has it."""
        self._of_server.add(number)
        try:
            self.add_adapter(LoRARequest(lora_name=name, lora_int_id=number, lora_path=path))
        except Exception as e:
            return _refused(e)
        read = self._read[number]
        return {"bytes": read.nbytes, "rank": read.rank}

    def _load_adapter(self, lora_request: Any) -> ReadAdapter:
        number = lora_request.lora_int_id
        if number not in self._read or lora_request.load_inplace:
            self._keep(number, *self._read_adapter(lora_request))
        return self._read[number]

    def _keep(self, number: int, read: ReadAdapter, routers: Routers | None) -> None:
        if number not in self._of_server:
            self._make_room(number, read.nbytes)
        self._adapter_manager.check_room([*self._read.values(), read])
        self._read[number] = read
        if number not in self._of_server:
            self._of_requests[number] = read.nbytes
        if routers is not None:
            self._adapter_manager.expert_load.add(number, routers)

    def _make_room(self, number: int, size: int) -> None:
        """Frees adapters that no server has loaded, for one that takes `size` bytes."""
        manager = self._adapter_manager
        pinned = manager._registered_adapters.pinned_items
        others = {n: bytes_ for n, bytes_ in self._of_requests.items() if n != number}
        for other in [n for n in others if n not in self._in_step and n not in pinned]:
            if sum(others.values()) + size <= self._room and len(others) < manager.capacity:
                break
            del others[other]
            self.remove_adapter(other)

    def _read_adapter(self, lora_request: Any) -> tuple[ReadAdapter, Routers | None]:
        """Only reads: it runs in a thread of its own."""
        folder = get_adapter_absolute_path(lora_request.lora_path)
        plan = self.plan
        spec, heads = None, None
        if is_guilomo_adapter(folder):
            spec, layers = load_routed(folder, plan)
            rank = spec.max_total_rank
        else:
            if (Path(folder) / CONFIG_FILE).exists():  # or vLLM says that there is none
                check_plain(Path(folder), self.lora_config, self._tasks)
                check_parts_of_plain(Path(folder), plan)
            theirs = super()._load_adapter(lora_request)
            layers, rank = convert_plain(theirs.loras, plan, folder), theirs.rank
            heads = theirs.modules_to_save
        check_fits(layers, self._adapter_manager.device, folder)
        routers = None if spec is None or not self._samples else Routers.of(spec, plan, layers)
        return self._packed(lora_request.lora_int_id, rank, layers, heads), routers

    def _packed(
        self, number: int, rank: int, layers: dict[str, LayerWeights], heads: Any = None
    ) -> ReadAdapter:
        """An adapter with the only copy of its weights. Args: heads: whole modules of it."""
        packed = self._adapter_manager.pack(layers)
        weights = layers if packed is None else packed.weights
        entries = {name: LayerEntry(of_layer) for name, of_layer in weights.items()}
        return ReadAdapter(number, rank, entries, modules_to_save=heads, packed=packed)

    def remove_adapter(self, adapter_id: int) -> bool:
        self._reader.forget(adapter_id)
        self._read.pop(adapter_id, None)
        self._of_server.discard(adapter_id)
        self._of_requests.pop(adapter_id, None)
        self._adapter_manager.expert_load.remove(adapter_id)
        return super().remove_adapter(adapter_id)

    def remove_all_adapters(self) -> None:
        """vLLM's, after each run of a batch that is none: what was read stays.

        Engines that wait for one another (a mixture of experts under data parallelism) have such
        a batch whenever another one has a real one.
        """
        for adapter_id in self.list_adapters() - self._read.keys():
            self._adapter_manager.remove_adapter(adapter_id)

    def in_slots(self) -> list[int]:
        """The versions whose weights are where layers compute with them."""
        return list(self._adapter_manager.slot_of)

    def report(self, versions: Sequence[int], modules: bool) -> list[dict[str, Any]]:
        """The load of those versions that have any; see `ExpertLoad.report`."""
        load = self._adapter_manager.expert_load
        found = [
            {
                "version": v,
                "engine": self._engine,
                **load.report(v, modules, self._adapter_manager.load_of(v)),
            }
            for v in versions
        ]
        return [of_version for of_version in found if of_version["tokens"]]


def _refused(error: Exception) -> dict[str, Any]:
    """The reason, and whether it is that memory is full: there may be room later."""
    return {"refused": str(error), "is_full": isinstance(error, torch.OutOfMemoryError)}
