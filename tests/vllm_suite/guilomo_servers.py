"""A pytest plugin: vLLM's own tests, with the plugin in their process and guilomo-serve as server.

Where a test asks for completions, chats or tokens, the model that it names is an adapter, beside a
base that it does not know. What vLLM's tests expect and guilomo does otherwise, or what they need
and small local models are not, is listed with its reason, and has to fail.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import types
from dataclasses import dataclass
from typing import Any

import openai
import pytest
import requests

KEY = "of-vllm-s-own-tests"  # that their clients send to any server, and here the administrator's
AS_ADAPTER = ("/completion/", "/chat_completion/", "/tokenize/")
PLAIN = "typeof/zephyr-7b-beta-lora"


@dataclass(frozen=True)
class Difference:
    """Tests that fail here, with these errors, and why that is wanted."""

    tests: str  # a pattern of their ids
    errors: type[Exception] | tuple[type[Exception], ...]
    reason: str
    always: bool = True  # False: they may pass by luck


DIFFERENT = (
    # What guilomo does otherwise.
    Difference(
        "test_load_lora_adapter_with_load_inplace_false_errors",
        pytest.fail.Exception,
        "to load what a name has already is no error: nothing would change",
    ),
    Difference(
        "test_dynamic_lora_badrequests|test_dynamic_lora_invalid_files|"
        "test_loading_invalid_adapters_does_not_break_others",
        openai.BadRequestError,
        "a malformed adapter is the client's error, 400, and not the server's, 500",
    ),
    Difference(
        "test_sagemaker_load_adapter_invalid_files",
        AssertionError,
        "a malformed adapter is the client's error, 400, and not the server's, 500",
    ),
    # What small local models, stand-ins and a machine without a GPU are not.
    Difference(
        r"test_lora_resolvers\.py::|test_serving_models\.py::(?!test_pooling)",
        AttributeError,
        "its stand-in of an engine has no configuration, in which we look for --max-cpu-loras",
    ),
    Difference("test_worker_apply_lora", RuntimeError, "it makes the worker of GPUs"),
    Difference(
        "test_peft_helper_pass", AssertionError, "it wants the modules of an adapter on the Hub"
    ),
    Difference(
        r"test_filesystem_resolver\.py::test_nonlora_adapter",
        OSError,
        "it wants an adapter of prompt tuning, which is on the Hub",
    ),
    Difference(
        "test_load_lora_adapter_with_same_name_replaces",
        AssertionError,
        "it wants the words of trained adapters",
    ),
    Difference(
        r"test_completion\.py::test_single_completion",
        AssertionError,
        "it counts the prompt's tokens as OPT's tokenizer has them",
    ),
    Difference(
        r"test_chat\.py::test_(single_chat_session|more_than_one_prompt_logprobs_chat)",
        AssertionError,
        "it counts and guesses the prompt's tokens as Zephyr does",
    ),
    Difference(
        r"test_chat\.py::test_(structured_outputs_(choice|json)_chat$|response_format_json|"
        "complex_message_content)",
        (AssertionError, ValueError),
        "it wants the right answers of a model of billions of parameters",
        always=False,
    ),
    Difference(
        r"test_kv_cache_utils\.py::test_(kv_tp_replicas|estimate_max_model_len\[Qwen|"
        r"hisparse_pool_must_fit_max_model_len\[32768|get_max_concurrency_for_kv_cache_config|"
        r"\w+_respects_num_gpu_blocks_override)",
        (AssertionError, ValueError),
        "it wants the layers, heads and length of Qwen's models",
    ),
)


# Their clean-up after each test ends Ray, which is no dependency of ours.
sys.modules.setdefault("ray", types.SimpleNamespace(shutdown=lambda: None))  # type: ignore[arg-type]


def pytest_configure(config: pytest.Config) -> None:
    from guilomo_serve.runtime import register
    from tests import utils  # vLLM's

    register()
    utils.RemoteOpenAIServer._start_server = _start
    utils.RemoteOpenAIServer.DUMMY_API_KEY = KEY
    request = requests.Session.request

    def with_key(session: Any, method: str, url: str, **kwargs: Any) -> Any:
        headers = {"Authorization": f"Bearer {KEY}", **(kwargs.pop("headers", None) or {})}
        return request(session, method, url, headers=headers, **kwargs)

    requests.Session.request = with_key  # type: ignore[method-assign]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.endswith(("::test_lora_functions_sync", "::test_lora_functions_async")):
            _keep_four(item.module)
        if "/v1/core/" in item.nodeid:  # on plain objects, and most of the time is cleaning up
            item.add_marker(pytest.mark.skip_global_cleanup)
        for known in DIFFERENT:
            if re.search(known.tests, item.nodeid):
                mark = pytest.mark.xfail(
                    reason=known.reason, raises=known.errors, strict=known.always
                )
                item.add_marker(mark)


def _keep_four(module: Any) -> None:
    """Says what a module of tests leaves to vLLM's default, which is --max-loras and not ours."""
    for name in ("EngineArgs", "AsyncEngineArgs"):
        setattr(module, name, functools.partial(getattr(module, name), max_cpu_loras=4))


def _start(server: Any, model: str, args: list[str], env: dict[str, str] | None) -> None:
    """As `RemoteOpenAIServer._start_server`, with guilomo-serve."""
    rest, adapters = _without_modules(args)
    if any(part in os.environ["PYTEST_CURRENT_TEST"] for part in AS_ADAPTER):
        from huggingface_hub import snapshot_download

        adapters[model] = snapshot_download(PLAIN)
        rest += ["--served-model-name", "base"]
        # A small model's answer without a limit goes on to the longest context.
        rest += ["--override-generation-config", '{"max_new_tokens": 256}']
    for name, folder in adapters.items():
        rest += ["--adapter", f"{name}={folder}"]
    server.proc = subprocess.Popen(
        [sys.executable, "-m", "guilomo_serve.cli", model, *rest],
        env={**os.environ, **(env or {}), "GUILOMO_ADMIN_KEY": KEY},
        stdout=sys.stdout,
        stderr=sys.stderr,
        start_new_session=True,
    )


def _without_modules(args: list[str]) -> tuple[list[str], dict[str, str]]:
    """A command line for guilomo-serve, and the adapters that vLLM's own names."""
    rest, adapters = [], {}
    left = iter(args)
    for arg in left:
        if arg == "--lora-modules":
            module = next(left)
            if module.startswith("{"):
                about = json.loads(module)
                adapters[about["name"]] = about["path"]
            else:
                name, _, adapters_path = module.partition("=")
                adapters[name] = adapters_path
        else:
            rest.append(arg)
    return rest, adapters
