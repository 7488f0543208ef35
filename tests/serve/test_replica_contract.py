"""docs/replica-contract.md: what controllers ask, and the answers that they read.

Each request is as its controller's source makes it; which file that is stands in the document.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests

from guilomo_serve.catalogue import digest_of
from tests.serve import hf_reference
from tests.serve.helpers import Server, text_of

pytestmark = pytest.mark.slow

PROMPT = "A customer writes: my card has not arrived."


def ask(server: Server, path: str, body: dict[str, Any] | None = None) -> requests.Response:
    """What Go's controllers send: a JSON body, and one key for all that they ask."""
    headers = {"Content-Type": "application/json", **server.admin_headers}
    method = "GET" if body is None else "POST"
    return requests.request(method, f"{server.url}{path}", json=body, headers=headers, timeout=120)


def load(server: Server, name: str, path: object) -> requests.Response:
    return ask(server, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})


def unload(server: Server, name: str) -> requests.Response:
    return ask(server, "/v1/unload_lora_adapter", {"lora_name": name})


def test_a_load_is_idempotent_and_other_weights_are_refused_in_vllms_words(opened, root):
    for _ in range(2):
        assert load(opened, "loaded", root / "first").status_code == 200
    text = text_of(opened, "loaded", PROMPT)
    other = load(opened, "loaded", root / "second")
    assert other.status_code == 400
    error = other.json()["error"]
    assert (error["type"], error["code"]) == ("InvalidUserInput", 400)
    assert error["message"] == (
        "The lora adapter 'loaded' has already been loaded. If you want to load the adapter in "
        "place, set 'load_inplace' to True."
    )
    assert text_of(opened, "loaded", PROMPT) == text
    assert len(opened.admin("GET", "/loaded").json()["versions"]) == 1
    assert unload(opened, "loaded").status_code == 200


def test_an_unload_of_an_unknown_name_is_answered_as_vllm_does(opened):
    answer = unload(opened, "nobody")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["type"] == "NotFoundError"
    assert error["message"] == "The lora adapter 'nobody' cannot be found."


def test_models_have_what_controllers_read_and_our_digest_and_version(opened, root):
    assert load(opened, "team/listed", root / "first").status_code == 200
    models = {model["id"]: model for model in ask(opened, "/v1/models").json()["data"]}
    assert models["base"]["parent"] is None
    found = models["team/listed"]
    assert (found["object"], found["parent"]) == ("model", "base")
    assert found["root"] == str(root / "first")
    assert found["digest"] == digest_of(root / "first")
    assert found["version"] == opened.admin("GET", "/team/listed").json()["version"]
    assert unload(opened, "team/listed").status_code == 200


def test_one_adapter_has_a_short_and_a_long_name(opened, root):
    """KServe passes each as `name` and as `namespace/name`."""
    for name in ("support-a", "team-a/support-a"):
        assert load(opened, name, root / "first").status_code == 200
    texts = {text_of(opened, name, PROMPT) for name in ("support-a", "team-a/support-a", "first")}
    assert len(texts) == 1
    assert unload(opened, "support-a").status_code == 200
    assert text_of(opened, "team-a/support-a", PROMPT) in texts  # its weights stay
    assert unload(opened, "team-a/support-a").status_code == 200


def test_a_name_of_the_root_is_pulled_on_a_miss(opened):
    assert requests.get(f"{opened.url}/ready", timeout=30).status_code == 200
    answer = ask(opened, "/v1/completions", {"model": "second", "prompt": "a", "max_tokens": 1})
    assert answer.status_code == 200


def test_ray_serve_loads_in_the_process_and_gives_nobody_else_rights(
    tiny_model: Path, adapters: dict[str, Path]
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.serve.ray_serve", str(tiny_model), str(adapters["first"])],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"plugin", "catalogue"}
    model = hf_reference.model_with(tiny_model, adapters["first"])
    for of_kind in found.values():
        wanted = hf_reference.greedy(model, of_kind["prompt"], len(of_kind["called"]))
        assert of_kind["called"] == of_kind["asked"] == wanted
    # vLLM has no such routes unless it is told to; ours are open to who administers alone.
    assert (found["plugin"]["load"], found["plugin"]["list"]) == (404, 404)
    assert (found["catalogue"]["load"], found["catalogue"]["list"]) == (404, 403)
