"""A program: a replica as Ray Serve LLM makes it, in one process and without an HTTP server.

    python -m tests.serve.ray_serve MODEL ADAPTER

It does what `VLLMEngine` of ray 2.60 does (python/ray/llm/_internal/serve/engines/vllm/
vllm_engine.py: `start`, `build_asgi_app`, `resolve_lora`, `completions`): once with the plugin
alone and once with a catalogue, on one engine. It prints as its last line, as JSON, the greedy
tokens of an adapter that is loaded on a miss: by a call of the serving object, and over the ASGI
app that Ray mounts; and the statuses of loads over that app, with no key.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from typing import Any

import httpx
from starlette.datastructures import State
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import FrontendArgs
from vllm.entrypoints.openai.api_server import build_app, init_app_state
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from vllm.v1.engine.async_llm import AsyncLLM

PROMPT = "A customer writes: my card has not arrived."
TOKENS = 6
MODEL_ID = "base:support"  # Ray's name of an adapter: its base's, and what comes after a colon


async def replica(engine: AsyncLLM, args: argparse.Namespace, adapter: str) -> dict[str, Any]:
    """One replica's answers."""
    state = State()
    tasks = await engine.get_supported_tasks()
    await init_app_state(engine, state=state, args=args, supported_tasks=tasks)
    models = state.openai_serving_models
    assert MODEL_ID not in models.lora_requests
    loaded = await models.load_lora_adapter(
        request=LoadLoRAAdapterRequest(lora_name=MODEL_ID, lora_path=adapter)
    )
    assert MODEL_ID in models.lora_requests, loaded

    wanted = {"model": MODEL_ID, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    wanted |= {"ignore_eos": True, "return_token_ids": True}
    called = await state.openai_serving_completion.create_completion(CompletionRequest(**wanted))

    app = build_app(args, supported_tasks=tasks, model_config=engine.model_config)
    app.state._state.update(state._state)
    for plugin in app.state.endpoint_plugins:
        await plugin.init_state(engine, app.state, args)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
        asked = await client.post("/v1/completions", json=wanted, timeout=60)
        load = {"lora_name": "another", "lora_path": adapter}
        refused = await client.post("/v1/load_lora_adapter", json=load, timeout=60)
        listed = await client.get("/v1/adapters", timeout=60)
    return {
        "called": called.choices[0].token_ids,
        "asked": asked.json()["choices"][0]["token_ids"],
        "prompt": called.choices[0].prompt_token_ids,
        "load": refused.status_code,
        "list": listed.status_code,
    }


async def main(model: str, adapter: str) -> None:
    engine_args = AsyncEngineArgs(
        model,
        enable_lora=True,
        enforce_eager=True,
        max_model_len=512,
        dtype="float32",
        served_model_name=["base"],
    )
    engine = AsyncLLM.from_vllm_config(engine_args.create_engine_config())
    args = argparse.Namespace(**(vars(FrontendArgs()) | vars(engine_args)))
    found = {"plugin": await replica(engine, args, adapter)}

    from guilomo_serve import server
    from guilomo_serve.catalogue.settings import Settings

    Settings(admin_key="a-key").export(os.environ)
    server.install()
    found["catalogue"] = await replica(engine, args, adapter)
    engine.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
