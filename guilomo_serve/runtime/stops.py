"""A request of an adapter stops at the adapter's own tokens too (`stop_token_ids` of its config).

The seams, for vLLM 0.32; if one is renamed, answers of such adapters do not end, which
tests/serve/test_serving.py would say:

- `InputProcessor.process_inputs` (vllm/v1/engine/input_processor.py), which makes the engine's
  request of every prompt, in the server and in `vllm.LLM`, with a copy of its sampling parameters
  that nobody else has.
- `beam_search` of `BeamSearchOnlineMixin` and `BeamSearchOfflineMixin`
  (vllm/entrypoints/generate/beam_search/). A search ends its beams itself, at the tokenizer's end
  token alone, a variable within the method. Such a search is refused.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

from guilomo_serve.adapter import is_guilomo_adapter, read_spec


def install() -> None:
    """Has requests stop there; calling it again changes nothing."""
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.v1.engine.input_processor import InputProcessor

    process = InputProcessor.process_inputs
    if hasattr(process, "stops"):
        return

    def process_with_stops(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process(self, *args, **kwargs)
        adapter, sampling = request.lora_request, request.sampling_params
        # A trace that is replayed has an end of its own.
        if adapter is not None and sampling is not None and not sampling.trace_decode_token_ids:
            _stop_at(sampling, _stops_of(adapter.lora_int_id, adapter.lora_path))
        return request

    process_with_stops.stops = True  # type: ignore[attr-defined]
    setattr(InputProcessor, "process_inputs", process_with_stops)  # noqa: B010
    mixins: list[Any] = [BeamSearchOnlineMixin]
    # Whose process has no `vllm.LLM` is spared the second that this takes to import.
    if offline := sys.modules.get("vllm.entrypoints.generate.beam_search.offline"):
        mixins.append(offline.BeamSearchOfflineMixin)
    for mixin in mixins:
        mixin.beam_search = _ending(mixin.beam_search)


def _ending(search: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's `beam_search`, refused where beams would not end where the adapter's answers do."""
    from vllm.exceptions import VLLMValidationError

    signature = inspect.signature(search)

    @wraps(search)
    def ending(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        adapters = given.get("lora_request")
        for adapter in adapters if isinstance(adapters, list) else [adapters]:
            if adapter is None or given["params"].ignore_eos:
                continue
            if tokens := _stops_of(adapter.lora_int_id, adapter.lora_path):
                raise VLLMValidationError(
                    "a beam search ends at the base's end token alone, but this adapter's answers "
                    f"end with the token ids {list(tokens)}: ask without beam search, or with "
                    "ignore_eos",
                    parameter="use_beam_search",
                )
        return search(*args, **kwargs)

    return ending


def _stop_at(sampling: Any, tokens: tuple[int, ...]) -> None:
    """As `SamplingParams.update_from_generation_config` has it for end tokens of the base."""
    sampling._all_stop_token_ids.update(tokens)  # which min_tokens keeps from being sampled
    if tokens and not sampling.ignore_eos:
        sampling.stop_token_ids = list({*sampling.stop_token_ids, *tokens})


@lru_cache(maxsize=4096)
def _stops_of(version: int, path: str) -> tuple[int, ...]:
    """The stop tokens of a version: one id stands for the same files as long as the process lives.

    It is asked when the version was loaded, so its folder is there and has been checked.
    """
    from vllm.lora.utils import get_adapter_absolute_path

    folder = get_adapter_absolute_path(path)
    return read_spec(folder).stop_token_ids if is_guilomo_adapter(folder) else ()
