"""A program: Ray Serve LLM on this machine with deploy/examples/ray_serve.yaml.

    python -m tests.serve.ray_serve_llm MODEL ADAPTER

Of the example it changes what a test has to: where the model lies, a CPU for the accelerator, one
replica, float32. `ADAPTER` is the folder `support` of a bucket. Its last line is JSON:
the prompt's tokens and those that the base and the adapter, which nothing has loaded, answer.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import boto3
import ray
import requests
import yaml
from moto.server import ThreadedMotoServer
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

from tests.serve.test_parallel_modes import PROMPTS, TOKENS

EXAMPLE = Path(__file__).parents[2] / "deploy" / "examples" / "ray_serve.yaml"


def store(adapter: Path) -> None:
    """Starts a storage that has the adapter, for this process and those that Ray starts."""
    storage = ThreadedMotoServer(port=0)
    storage.start()
    os.environ["AWS_ENDPOINT_URL"] = "http://{}:{}".format(*storage.get_host_and_port())
    os.environ |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
    client = boto3.client("s3")
    client.create_bucket(Bucket="adapters")
    for file in adapter.iterdir():
        client.upload_file(str(file), "adapters", f"support/{file.name}")


def answer(model: str) -> dict[str, Any]:
    body = {"model": model, "prompt": PROMPTS[0], "max_tokens": TOKENS, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True}
    answered = requests.post("http://127.0.0.1:8000/v1/completions", json=body, timeout=120)
    answered.raise_for_status()
    choice: dict[str, Any] = answered.json()["choices"][0]
    return choice


def main(model: str, adapter: str) -> None:
    store(Path(adapter))
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    (config,) = yaml.safe_load(EXAMPLE.read_text())["applications"][0]["args"]["llm_configs"]
    config["model_loading_config"]["model_source"] = model
    config["accelerator_config"] = {"kind": "cpu"}
    config["deployment_config"] = {"num_replicas": 1}
    config["engine_kwargs"] |= {"max_model_len": 512, "dtype": "float32", "enforce_eager": True}
    serve.run(build_openai_app({"llm_configs": [LLMConfig(**config)]}))
    found = {name: answer(name) for name in ("base", "base:support")}
    serve.shutdown()
    ray.shutdown()
    of_prompt = found["base"]["prompt_token_ids"]
    print(json.dumps({"prompt": of_prompt, **{n: a["token_ids"] for n, a in found.items()}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
