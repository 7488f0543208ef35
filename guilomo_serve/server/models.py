"""vLLM's list of models where names are sequences of versions: loading and replacing by vLLM's
own routes, in any server that has the plugin."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from http import HTTPStatus
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path

from guilomo_serve.adapter import AdapterError
from guilomo_serve.catalogue import digest_of
from guilomo_serve.room import default_memory
from guilomo_serve.runtime.identity import digest_in, public_name, request_of
from guilomo_serve.server import model_names
from guilomo_serve.server.errors import status_of
from guilomo_serve.server.inspection import memory_of
from guilomo_serve.server.leases import leases
from guilomo_serve.server.residency import Residency

logger = init_logger("vllm.guilomo")


class VersionedServingModels(OpenAIServingModels):
    """vLLM's list of models, in which a name is a sequence of versions.

    `lora_requests[name]` is the latest version's request; its `lora_name` is `name@digest`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model_names.install()  # here, where vLLM has its routes by now
        self._kept: set[str] = set()  # names whose files, read again, could be others
        self.residency = self._make_residency()
        self.lora_requests = self.residency.current

    def _make_residency(self) -> Residency:
        return Residency(
            self.engine_client,
            leases,
            default_memory(),
            self.engine_client.vllm_config.lora_config.max_cpu_loras,
            pinned=lambda: self._kept,
            keeps_names=True,
        )

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        if lora_request is None:
            return super().model_name()
        return public_name(lora_request.lora_name)

    async def show_available_models(self) -> Any:
        """vLLM's list, with each adapter's digest."""
        models = await super().show_available_models()
        for card in models.data:
            card.digest = digest_in(card.id)
            card.id = public_name(card.id)
        return models

    async def load_lora_adapter(self, request: Any, base_model_name: str | None = None) -> Any:
        """Loads an adapter under a name; with `load_inplace` the name may be in use.

        Returns:
            A message, or an error response: 400 with the reason if the adapter is refused, 404
            if there is none at the path, 503 if there is no room for it.
        """
        name = request.lora_name
        async with self.lora_resolver_lock[name]:
            digest, size = await asyncio.to_thread(self._look_at, request.lora_path)
            known = self.residency.current.get(name)
            if digest and known is not None and digest == digest_in(known.lora_name):
                return f"Success: LoRA adapter '{name}' added successfully."
            error = await self._check_load_lora_adapter_request(request)
            if error is not None:
                return error
            # Of what has not just the two files of an adapter, blocks are shared with nothing.
            loaded = request_of(name, digest or secrets.token_hex(32), request.lora_path)
            if base_model_name is not None and self.is_base_model(base_model_name):
                loaded.base_model_name = base_model_name
            try:
                await self.residency.load(name, loaded, size)
                if digest != await asyncio.to_thread(_digest_of, request.lora_path):
                    self.residency.unload(loaded)
                    raise AdapterError("its files were written while they were read")
            except LoRAAdapterNotFoundError:
                return create_error_response(LoRAAdapterNotFoundError(name, request.lora_path))
            except AdapterError as e:
                return _refused(name, e)
            self.residency.switch(name, loaded)
            (self._kept.discard if digest else self._kept.add)(name)
            logger.info("Adapter '%s': %s from %s", name, loaded.lora_name, request.lora_path)
            return f"Success: LoRA adapter '{name}' added successfully."

    async def bring_in(self, name: str | None) -> ErrorResponse | None:
        """Reads a name's weights again, if they went for others (--max-cpu-loras).

        To be called when a request has its version, before it reaches the engine.

        Returns:
            Why not, if its files are not what they were.
        """
        if name is None or name not in self.residency.current:
            return None
        if self.residency.is_resident(self.residency.current[name]):
            return None  # without the lock, which whoever loads the name anew has meanwhile
        async with self.lora_resolver_lock[name]:
            version = self.residency.current[name]
            if self.residency.is_resident(version):
                return None
            digest = digest_in(version.lora_name)
            try:
                found, size = await asyncio.to_thread(self._look_at, version.lora_path)
                if digest == found:
                    await self.residency.load(name, version, size)
                    if digest == await asyncio.to_thread(_digest_of, version.lora_path):
                        return None
                    self.residency.free(version)
                raise AdapterError(
                    f"its files in {version.lora_path} are not those that were loaded; load it "
                    "again"
                )
            except LoRAAdapterNotFoundError as e:
                return _refused(name, AdapterError(str(e)))
            except AdapterError as e:
                return _refused(name, e)

    def _look_at(self, path: str) -> tuple[str | None, int]:
        """An adapter's digest, and the memory that it takes; 0 where that cannot be told."""
        digest = _digest_of(path)
        size = 0
        if digest is not None:
            with contextlib.suppress(OSError, SafetensorError):  # the engine says what is wrong
                folder = Path(get_adapter_absolute_path(path))
                size = memory_of(folder, self.model_config.dtype.itemsize)
        return digest, size

    async def unload_lora_adapter(self, request: Any) -> Any:
        name = request.lora_name
        async with self.lora_resolver_lock[name]:
            error = await self._check_unload_lora_adapter_request(request)
            if error is not None:
                return error
            self.residency.withdraw(name)
            return f"Success: LoRA adapter '{name}' removed successfully."


def has_been_loaded(name: str) -> ErrorResponse:
    """The answer to a load of a name that has other weights: vLLM's, which controllers look for."""
    return create_error_response(
        f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in "
        "place, set 'load_inplace' to True.",
        "InvalidUserInput",
    )


def cannot_be_found(name: str) -> ErrorResponse:
    """The answer to an unload of a name that nobody has: vLLM's."""
    return create_error_response(
        f"The lora adapter '{name}' cannot be found.", "NotFoundError", HTTPStatus.NOT_FOUND
    )


def _refused(name: str, error: Exception) -> ErrorResponse:
    status = status_of(error)
    return create_error_response(
        message=f"The adapter '{name}' is refused: {error}",
        err_type="BadRequestError" if status < 500 else "InternalServerError",
        status_code=status,
    )


def _digest_of(path: str) -> str | None:
    """Of an adapter folder's files; None where there are not just these."""
    try:
        return digest_of(Path(get_adapter_absolute_path(path)))
    except (AdapterError, OSError):
        return None
