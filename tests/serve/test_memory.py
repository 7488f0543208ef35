"""A server that may hold two adapters at once serves many, and says when there is no room."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from safetensors.torch import load_file

from guilomo_serve.adapter import WEIGHTS_FILE
from guilomo_serve.server.inspection import memory_of
from tests.serve.helpers import (
    Server,
    eventually,
    guilomo_serve,
    random_adapter,
    serving,
    text_of,
)

pytestmark = pytest.mark.slow

PROMPT = "My card has not arrived."
LONG = 4_000_000 * "x"
SEED = 5
FLOAT32 = 4  # bytes
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def root(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of one size, and one that is larger than two of them."""
    folder = tmp_path_factory.mktemp("root")
    for name in NAMES:
        random_adapter(tiny_model, folder / name, SEED, ("q_proj",))
    random_adapter(tiny_model, folder / "large", SEED)
    return folder


@pytest.fixture(scope="module")
def server(tiny_model, root, tmp_path_factory) -> Iterator[Server]:
    size = memory_of(root / "a", FLOAT32)
    assert memory_of(root / "large", FLOAT32) > 2.5 * size
    command = guilomo_serve(
        tiny_model,
        {},
        *("--adapter-root", str(root), "--adapter-memory", str(2.5 * size / 2**30)),
        *("--enforce-eager", "--dtype", "float32", "--served-model-name", "base"),
        *("--list-models", "0"),
    )
    with serving(command, tmp_path_factory.mktemp("log") / "memory.log") as running:
        yield running


@pytest.mark.parametrize("itemsize", [2, FLOAT32])
def test_memory_is_counted_in_the_models_precision(adapters, itemsize):
    """But for routers, which are in float32 everywhere."""
    for name in ("first", "plain"):
        tensors = load_file(adapters[name] / WEIGHTS_FILE)
        routers = sum(t.numel() for n, t in tensors.items() if "router" in n)
        others = sum(t.numel() for n, t in tensors.items() if "router" not in n)
        modules = sum("lora_A" in n for n in tensors)
        beside = memory_of(adapters[name], itemsize) - others * itemsize - routers * FLOAT32
        assert 0 < beside / modules <= 2**13
        assert (routers > 0) == (name == "first")


def resident(server: Server) -> set[str]:
    listed = server.admin("GET").json()["data"]
    return {entry["name"] for entry in listed if entry["resident"]}


def test_what_was_not_used_for_longest_makes_room(server):
    texts = {name: text_of(server, name, PROMPT) for name in ("a", "b")}
    assert resident(server) == {"a", "b"}
    assert text_of(server, "a", PROMPT) == texts["a"]
    text_of(server, "c", PROMPT)
    assert resident(server) == {"a", "c"}, "b was not used for longest"
    assert server.admin("POST", "/a/pin").status_code == 200
    text_of(server, "c", PROMPT)
    assert text_of(server, "b", PROMPT) == texts["b"]
    assert resident(server) == {"a", "b"}, "a is pinned"


def test_models_lists_what_is_in_memory_if_that_is_wanted(server):
    text_of(server, "a", PROMPT)
    listed = {model.id for model in server.client.models.list().data}
    assert listed == {"base"} | resident(server)


def test_what_is_in_use_or_pinned_stays_and_a_client_hears_of_it(server):
    for name in ("a", "b"):
        text_of(server, name, PROMPT)
        assert server.admin("POST", f"/{name}/pin").status_code == 200
    answer = server.put("new", "c")
    assert answer.status_code == 503
    assert "--adapter-memory" in answer.json()["error"]["message"]
    with pytest.raises(openai.InternalServerError) as refused:
        text_of(server, "c", PROMPT)
    assert refused.value.status_code == 503
    assert "no room" in str(refused.value)
    assert resident(server) == {"a", "b"}
    refused = server.admin("POST", "/c/pin")
    assert refused.status_code == 503
    assert "no room" in refused.json()["error"]["message"]
    assert not server.admin("GET", "/c").json()["pinned"]
    assert server.admin("POST", "/b/unpin").status_code == 200
    text_of(server, "c", PROMPT)  # and is not remembered as refused


def test_what_is_pinned_is_loaded(server):
    assert server.admin("POST", "/a/unpin").status_code == 200
    for name in ("c", "a", "b"):
        text_of(server, name, PROMPT)
    assert resident(server) == {"a", "b"}
    answer = server.admin("POST", "/c/pin").json()
    assert answer["pinned"]
    assert answer["resident"]
    assert resident(server) == {"b", "c"}
    assert server.admin("POST", "/c/unpin").status_code == 200


def test_what_is_being_rendered_is_in_use(server):
    """A prompt so long that it is read for a while: other adapters come and take the room."""
    text = text_of(server, "a", PROMPT)
    long = {"prompt": LONG + PROMPT, "truncate_prompt_tokens": len(PROMPT), "max_tokens": 12}
    with ThreadPoolExecutor(1) as pool:
        asked = {"model": "a", "temperature": 0, "ignore_eos": True, **long}
        rendered = pool.submit(server.post, "/v1/completions", **asked)
        eventually(lambda: server.in_flight("a") == 1 or rendered.done(), "it is being rendered")
        for name in ("b", "c"):  # the second of them would evict a, if nobody asked for it
            # Of token ids, as the one thread that reads texts is busy.
            asked = {"model": name, "prompt": [65, 66], "max_tokens": 1}
            assert server.post("/v1/completions", **asked).status_code == 200
        assert not rendered.done(), "the test needs a longer prompt"
        assert resident(server) == {"a", "c"}
    answer = rendered.result()
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == text


def test_a_name_that_exists_is_never_unknown(server):
    """More adapters than there is room for, by several clients each."""

    def ask(i: int) -> int:
        asked = {"model": NAMES[i % len(NAMES)], "prompt": PROMPT, "max_tokens": 2}
        return server.post("/v1/completions", **asked).status_code

    with ThreadPoolExecutor(6) as pool:
        statuses = set(pool.map(ask, range(60)))
    assert statuses <= {200, 503}  # the latter while all room is in use
    assert 200 in statuses
    assert all(server.in_flight(name) == 0 for name in NAMES)


def test_an_adapter_larger_than_all_the_room_is_refused(server):
    before = resident(server)
    answer = server.put("large", "large")
    assert answer.status_code == 400
    assert "expected at most" in answer.json()["error"]["message"]
    assert resident(server) == before
