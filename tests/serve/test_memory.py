"""A server that may hold two adapters at once serves many, and says when there is no room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from guilomo_serve.adapter import WEIGHTS_FILE
from tests.serve.helpers import Server, guilomo_serve, random_adapter, serving, text_of

pytestmark = pytest.mark.slow

PROMPT = "My card has not arrived."
SEED = 5
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
    size = (root / "a" / WEIGHTS_FILE).stat().st_size
    assert (root / "large" / WEIGHTS_FILE).stat().st_size > 2.5 * size
    command = guilomo_serve(
        tiny_model,
        {},
        *("--adapter-root", str(root), "--adapter-memory", str(2.5 * size / 2**30)),
        *("--enforce-eager", "--dtype", "float32", "--served-model-name", "base"),
    )
    with serving(command, tmp_path_factory.mktemp("log") / "memory.log") as running:
        yield running


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
    assert server.admin("POST", "/b/unpin").status_code == 200
    text_of(server, "c", PROMPT)  # and is not remembered as refused


def test_an_adapter_larger_than_all_the_room_is_refused(server):
    before = resident(server)
    answer = server.put("large", "large")
    assert answer.status_code == 400
    assert "expected at most" in answer.json()["error"]["message"]
    assert resident(server) == before
