"""Loading, replacing and unloading adapters while serving."""

from __future__ import annotations

import asyncio
import re
from http import HTTPStatus
from typing import Any

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.v1.engine.exceptions import EngineDeadError

from guilomo_serve.adapter import AdapterError

logger = init_logger("vllm.guilomo")  # below vLLM's root logger, or nobody would see it

# A request that has looked its adapter up may still be on its way to the engine.
_GRACE_S = 5.0
_POLL_S = 0.5
# How vLLM wraps an error on its way from a worker to the front end.
_WRAPPING = re.compile(
    r"^Call to \w+ method failed: (?:Worker failed with error ['\"](.*)['\"], please check|(.*)$)",
    re.DOTALL,
)


class VersionedServingModels(OpenAIServingModels):
    """vLLM's list of models, in which a name is a sequence of versions.

    `lora_requests[name]` is the latest version's request; its `lora_name` is `name@version`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._names: dict[int, str] = {}  # version -> public name
        self._retiring: dict[asyncio.Task[None], int] = {}  # what frees a version -> the version

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        if lora_request is None:
            return super().model_name()
        return self._names.get(lora_request.lora_int_id, lora_request.lora_name)

    async def show_available_models(self) -> Any:
        models = await super().show_available_models()
        public = {request.lora_name: name for name, request in self.lora_requests.items()}
        for card in models.data:
            card.id = public.get(card.id, card.id)
        return models

    async def load_lora_adapter(self, request: Any, base_model_name: str | None = None) -> Any:
        """Loads an adapter under a name; with `load_inplace` the name may be in use.

        Returns:
            A message, or an error response: 400 with the reason if the adapter is refused, 404
            if there is none at the path.
        """
        name = request.lora_name
        async with self.lora_resolver_lock[name]:
            error = await self._check_load_lora_adapter_request(request)
            if error is not None:
                return error
            version = self.lora_id_counter.inc(1)
            loaded = LoRARequest(
                lora_name=f"{name}@{version}",
                lora_int_id=version,
                lora_path=request.lora_path,
                is_3d_lora_weight=request.is_3d_lora_weight,
            )
            if base_model_name is not None and self.is_base_model(base_model_name):
                loaded.base_model_name = base_model_name
            try:
                await self._add_to_engine(loaded)
            except LoRAAdapterNotFoundError:
                return create_error_response(LoRAAdapterNotFoundError(name, request.lora_path))
            except AdapterError as e:
                return create_error_response(
                    message=f"The adapter '{name}' is refused: {e}",
                    err_type="BadRequestError",
                    status_code=HTTPStatus.BAD_REQUEST,
                )
            self._switch(name, loaded)
            logger.info("Adapter '%s': version %d from %s", name, version, request.lora_path)
            return f"Success: LoRA adapter '{name}' added successfully."

    async def unload_lora_adapter(self, request: Any) -> Any:
        previous = self.lora_requests.get(request.lora_name)
        response = await super().unload_lora_adapter(request)
        if previous is not None and request.lora_name not in self.lora_requests:
            self._retire(previous)
        return response

    async def _add_to_engine(self, version: LoRARequest) -> None:
        """Loads a version's weights; requests do not get it yet.

        Raises:
            LoRAAdapterNotFoundError: there is none at its path.
            AdapterError: the engine refuses it, with the reason.
            EngineDeadError: the engine has ended.
        """
        try:
            await self.engine_client.add_lora(version)
        except EngineDeadError:
            raise
        except Exception as e:
            missing = LoRAAdapterNotFoundError(version.lora_name, version.lora_path)
            if str(missing) in str(e):
                raise missing from None
            raise AdapterError(_reason(e)) from None

    async def _remove(self, version: LoRARequest) -> None:
        """Takes a version's weights out of the engine."""
        await self.engine_client.remove_lora(version.lora_int_id)

    def _switch(self, name: str, version: LoRARequest) -> None:
        """Gives requests that come from now on a version that is loaded."""
        self._names[version.lora_int_id] = name
        previous = self.lora_requests.get(name)
        self.lora_requests[name] = version
        if previous is not None:
            self._retire(previous)

    def _in_flight(self, version: int) -> int:
        """How many requests are running or waiting that use a version."""
        states = list(self.engine_client.output_processor.request_states.values())
        used = [state.lora_request for state in states if state.lora_request is not None]
        return sum(request.lora_int_id == version for request in used)

    def _retire(self, version: LoRARequest) -> None:
        """Frees a version's weights once no request uses it."""
        task = asyncio.create_task(self._free_when_idle(version))
        self._retiring[task] = version.lora_int_id
        task.add_done_callback(self._retiring.pop)

    async def _free_when_idle(self, version: LoRARequest) -> None:
        await asyncio.sleep(_GRACE_S)
        while self._in_flight(version.lora_int_id):
            await asyncio.sleep(_POLL_S)
        if version in self.lora_requests.values():
            return  # it is in use again
        await self._remove(version)
        self._names.pop(version.lora_int_id, None)
        logger.info("Adapter '%s' is no longer in use and was freed", version.lora_name)


def _reason(error: Exception) -> str:
    found = _WRAPPING.search(str(error))
    return (found[1] or found[2]) if found else str(error)
