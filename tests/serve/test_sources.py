"""Adapters from the Hugging Face Hub and from S3: pinned, bounded, confined, and when both fail.

S3 is moto's server, the Hub a stand-in, both in this process; one server of ours asks them. The
last test takes S3 away.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from moto.server import ThreadedMotoServer

from guilomo_serve import cli
from guilomo_serve.adapter import CONFIG_FILE, WEIGHTS_FILE, AdapterError
from guilomo_serve.catalogue import Missing, Sources, Store, command, digest_of
from guilomo_serve.catalogue import sources as catalogue_sources
from guilomo_serve.catalogue.remote import Address, Found, Unavailable, seconds_of
from tests.serve.helpers import Server, eventually, guilomo_serve, random_adapter, serving, text_of
from tests.serve.hub_stand_in import HubStandIn
from tests.serve.s3_stand_in import s3

pytestmark = pytest.mark.slow

PROMPT = "My card has not arrived."
BUCKET, BELOW = "models", "team/adapters"
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIDOFTHETESTS123456",
    "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests-for-s3",
    "HF_TOKEN": "hf_tokenOfTheTests",
}


@dataclass
class World:
    """A server, and the storages that it takes adapters from."""

    server: Server
    hub: HubStandIn
    s3: Any
    moto: ThreadedMotoServer

    def upload(self, folder: Path, name: str, bucket: str = BUCKET) -> str:
        """Puts a folder's files into S3; returns its address."""
        for path in folder.iterdir():
            self.s3.upload_file(str(path), bucket, f"{BELOW}/{name}/{path.name}")
        return f"s3://{bucket}/{BELOW}/{name}"

    def refusal(self, source: str, name: str = "refused") -> tuple[int, str]:
        """Status and message of a PUT that has to fail."""
        answer = self.server.put(name, source)
        assert not answer.ok, answer.text
        assert not any(secret in answer.text for secret in SECRETS.values())
        return answer.status_code, answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def world(tiny_model, adapters, tmp_path_factory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(adapters["plain"], root / "in-both")
    command = guilomo_serve(
        tiny_model,
        {},
        *("--adapter-root", f"s3://{BUCKET}/{BELOW}", "--adapter-root", "hf://acme"),
        *("--adapter-root", str(root), "--evict-idle", "2", "--drain-timeout", "3"),
        *("--max-concurrency", "limited=1"),
        *("--enforce-eager", "--dtype", "float32", "--served-model-name", "base"),
    )
    log = tmp_path_factory.mktemp("log") / "sources.log"
    with HubStandIn() as hub, s3(BUCKET, f"{BUCKET}-2") as storage:
        environment = {
            **storage.environment,
            **SECRETS,
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": hub.url,
        }
        with serving(command, log, environment, anew=True) as server:
            yield World(server, hub, storage.client, storage.moto)


def served(world: World, name: str) -> dict[str, Any]:
    return world.server.admin("GET", f"/{name}").json()


@pytest.fixture(scope="module")
def texts(world, adapters) -> dict[str, str]:
    """What the server says with each adapter, from where the tests of folders have it."""
    found = {}
    for name in ("first", "second"):
        world.hub.commit(f"acme/{name}", adapters[name])
        assert world.server.put(f"the-{name}", f"hf://acme/{name}").ok
        assert served(world, f"the-{name}")["digest"] == digest_of(adapters[name])
        found[name] = text_of(world.server, f"the-{name}", PROMPT)
    assert found["first"] != found["second"]
    return found


@pytest.mark.parametrize(
    "address",
    [
        "hf://acme/adapters",
        "hf://acme/adapters@v1.0/support/first",
        "hf://acme/adapters@0123456789abcdef0123456789abcdef01234567",
        "s3://models/team/first",
        "s3://models/team/v=1/first@9a0364b9e99bb480dd25e1f0284c8555+d41d8cd98f00b204e980-2",
    ],
)
def test_an_address_is_read_and_written_alike(address):
    assert str(Address.parse(address)) == address
    assert Address.parse(f"{address}/") == Address.parse(address)


@pytest.mark.parametrize(
    "address",
    [
        *("s3://models/../secret", "s3://models//first", "s3://models/.hidden/first", "s3://"),
        *("s3://models/a%2e%2e/first", "s3://models/first?versionId=1", "s3://models/a\\..\\b"),
        *("s3://models/f\u0131rst", "s3://models/first\n", "s3://models/a b", "S3://models/first"),
        *("s3://key:secret@models/first", "s3://models/fi@rst", "s3://models/" + 1024 * "a"),
        *("hf://acme/adapters@refs/pr/1", "hf://acme/adapters@", "hf://acme/adapters@v1@v2"),
        *("hf://acme@v1/adapters", "hf://acme/../umbrella/adapters", "hf:///adapters"),
        *("http://127.0.0.1/adapters", "file:///etc", "gs://models/first"),
    ],
)
def test_other_addresses_are_refused_and_not_repeated(address):
    with pytest.raises(AdapterError, match="hf://OWNER/REPO") as refused:
        Address.parse(address)
    assert "secret" not in str(refused.value)


def test_a_root_is_a_part_of_the_way_and_not_of_a_name():
    root = Address.parse("s3://models/team")
    for inside in ("s3://models/team", "s3://models/team/a", "s3://models/team/a@b+c"):
        assert Address.parse(inside).is_in(root)
    for outside in (
        "s3://models/teams/a",
        "s3://models",
        "s3://models2/team/a",
        "hf://models/team",
    ):
        assert not Address.parse(outside).is_in(root)


def test_roots_that_cannot_be_are_refused_before_vllm_starts(tiny_model, capsys, monkeypatch):
    for root, why in (
        ("s3://key:secret@models", "expected hf://OWNER/REPO"),
        ("http://127.0.0.1/adapters", "expected hf://OWNER/REPO"),
        ("hf://acme/adapters@v1", "a root has no revision"),
    ):
        assert cli.main([str(tiny_model), "--adapter-root", root]) == 2
        message = capsys.readouterr().err
        assert why in message
        assert "secret" not in message
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, "guilomo_serve.catalogue.s3", raising=False)
    assert cli.main([str(tiny_model), "--adapter-root", "s3://models"]) == 2
    assert "pip install 'guilomo[s3]'" in capsys.readouterr().err


class _Slow:
    """A storage that says 8 bytes a file, and sends what it is told."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = pieces

    def look(self, address):
        return Found("a+b", {CONFIG_FILE: 8, WEIGHTS_FILE: 8})

    def read(self, address, name):
        yield from self._pieces


def test_a_fetch_ends_in_time_and_whole(tmp_path, monkeypatch):
    address = Address.parse("s3://models/first")
    for i, (pieces, error, why) in enumerate(
        (
            ((b"1234", b"567"), Unavailable, "ended 1 bytes early"),
            ((b"1234", b"56789"), AdapterError, "larger than the storage said"),
        )
    ):
        (tmp_path / str(i)).mkdir()
        with pytest.raises(error, match=why):
            catalogue_sources.fetch(_Slow(*pieces), address, tmp_path / str(i))
    monkeypatch.setattr(catalogue_sources, "_FETCH_S", -1.0)
    with pytest.raises(Unavailable, match="not fetched within"):
        catalogue_sources.fetch(_Slow(b"12345678"), address, tmp_path)


def test_made_up_names_wait_in_no_endless_queue(tmp_path):
    class Blocked(_Slow):
        def look(self, address):
            released.wait()
            raise Missing(str(address))

    async def ask() -> None:
        sources = Sources(Store(tmp_path), (Address.parse("s3://models"),))
        sources._storages["s3"] = Blocked()
        many = catalogue_sources._MAX_LOOKS
        asked = [asyncio.create_task(sources.member(f"a{i}")) for i in range(many)]
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="too many"):
            await sources.member("one-more")
        released.set()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert {type(answer) for answer in answers} == {Missing}
        with pytest.raises(Missing):
            await sources.member("one-more")

    released = threading.Event()
    asyncio.run(ask())


def test_an_adapter_is_put_from_s3_and_swapped_when_it_changed(world, adapters, texts, capsys):
    server = world.server
    address = world.upload(adapters["first"], "support")
    answer = server.put("support", address).json()
    assert answer["digest"] == digest_of(adapters["first"])
    assert text_of(server, "support", PROMPT) == texts["first"]
    first = answer["source"]
    assert first.startswith(f"{address}@")
    assert server.put("support", first).json()["source"] == first

    world.upload(adapters["second"], "support")
    assert text_of(server, "support", PROMPT) == texts["first"]
    assert command.main(["put", "support", address, "--url", server.url]) == 0
    assert "is version" in capsys.readouterr().out
    assert text_of(server, "support", PROMPT) == texts["second"]
    second = served(world, "support")["source"]
    assert second != first
    # What it was pinned to is no longer there, but the store has it.
    assert world.refusal(first, "support") == (
        404,
        f"{first}: the files have changed, they are of {second.partition('@')[2]} now",
    )
    assert server.put("support", address, digest=digest_of(adapters["first"])).status_code == 400
    assert server.admin("POST", "/support/rollback").json()["source"] == first
    assert text_of(server, "support", PROMPT) == texts["first"]


def test_an_adapter_is_put_from_a_revision_on_the_hub(world, adapters, texts):
    old = world.hub.commit("acme/support", adapters["first"], "adapters/v1/")
    new = world.hub.commit("acme/support", adapters["second"], "adapters/v1/")
    for revision, commit, text in (
        (f"@{old}", old, texts["first"]),
        ("", new, texts["second"]),
        ("@main", new, texts["second"]),
    ):
        answer = world.server.put("from-hub", f"hf://acme/support{revision}/adapters/v1")
        assert answer.status_code == 200, answer.text
        assert answer.json()["source"] == f"hf://acme/support@{commit}/adapters/v1"
        assert text_of(world.server, "from-hub", PROMPT) == text
    assert {key for _, _, key in world.hub.requests} == {f"Bearer {SECRETS['HF_TOKEN']}"}


def test_a_member_of_a_remote_root_is_served_when_asked_for(world, adapters, texts):
    """Once for all who ask for it; folders come first, and names that are none are not asked."""
    server, hub = world.server, world.hub
    world.upload(adapters["first"], "in-s3")
    hub.commit("acme/on-hub", adapters["second"])
    world.upload(adapters["first"], "in-both")
    with ThreadPoolExecutor(3) as pool:
        found = set(pool.map(lambda _: text_of(server, "in-s3", PROMPT), range(3)))
    assert found == {texts["first"]}
    assert served(world, "in-s3")["previous_version"] is None
    assert text_of(server, "on-hub", PROMPT) == texts["second"]
    assert text_of(server, "in-both", PROMPT) != texts["first"]
    assert served(world, "in-both")["kind"] == "lora"

    hub.requests.clear()
    for name in ("../acme/first", "a/../b", "first@main", "hf://acme/first", "x%2f", "a" * 129):
        with pytest.raises(openai.BadRequestError):
            text_of(server, name, PROMPT)
    assert hub.requests == []
    for name in ("nobody", "no--body", "no:body"):
        with pytest.raises(openai.NotFoundError):
            text_of(server, name, PROMPT)
    assert [path for _, path, _ in hub.requests] == ["/api/models/acme/nobody"]


@pytest.mark.parametrize(
    "source",
    [
        *(f"s3://{BUCKET}/{BELOW}s/first", f"s3://{BUCKET}/team", f"s3://{BUCKET}-2/{BELOW}/first"),
        *("hf://umbrella/first", "hf://ACME/first", "hf://acme-2/first", "hf://acme/moved"),
    ],
)
def test_what_lies_outside_of_the_roots_is_forbidden(world, adapters, source):
    world.upload(adapters["first"], "first", f"{BUCKET}-2")
    world.hub.commit("umbrella/first", adapters["first"])
    world.hub.moved["acme/moved"] = "umbrella/first"  # as a repository that was given away
    world.hub.requests.clear()
    assert world.refusal(source)[0] == 403
    asked = {path for _, path, _ in world.hub.requests}
    assert asked <= {"/api/models/acme/moved"}


def test_what_cannot_be_served_leaves_the_old_version(world, adapters, texts, tmp_path):
    """Too large by what the storage says or by what it sends, damaged, denied, or not there."""
    server, hub = world.server, world.hub
    source = world.upload(adapters["first"], "target")
    assert server.put("target", source).ok
    before = served(world, "target")

    bad = tmp_path / "bad"
    shutil.copytree(adapters["second"], bad)
    (bad / WEIGHTS_FILE).write_bytes((bad / WEIGHTS_FILE).read_bytes()[:-1])
    status, message = world.refusal(world.upload(bad, "target"), "target")
    assert (status, "not a complete safetensors file" in message) == (400, True)
    assert message.startswith(source), message

    (bad / CONFIG_FILE).write_bytes(b" " * (16 * 2**20 + 1))
    status, message = world.refusal(world.upload(bad, "target"), "target")
    assert (status, "expected at most" in message) == (400, True)

    for name, size, why in (
        ("huge", 2**34, "expected at most"),
        ("liar", 1000, "larger than the storage said"),
    ):
        hub.commit(f"acme/{name}", adapters["second"], f"{name}/")
        hub.claimed[f"{name}/{WEIGHTS_FILE}"] = size
        hub.requests.clear()
        status, message = world.refusal(f"hf://acme/{name}/{name}", "target")
        assert (status, why in message) == (400, True), message
        read = [path for method, path, _ in hub.requests if method == "GET" and "resolve" in path]
        assert (read == []) == (name == "huge")

    (bad / WEIGHTS_FILE).unlink()
    hub.commit("acme/no-weights", bad)
    assert world.refusal("hf://acme/no-weights", "target")[0] == 400
    hub.commit("acme/closed", adapters["second"])
    hub.denied.add("acme/closed")
    status, message = world.refusal("hf://acme/closed", "target")
    assert (status, "denies access" in message) == (502, True)
    for missing in (
        *(f"s3://{BUCKET}/{BELOW}/nothing", "hf://acme/nothing", "hf://acme/first/nothing"),
        "hf://acme/first@v9",
    ):
        status, message = world.refusal(missing, "target")
        assert (status, missing in message) == (404, True), message

    assert served(world, "target") | {"last_used": None} == before | {"last_used": None}
    assert text_of(server, "target", PROMPT) == texts["first"]


def test_a_name_is_loaded_though_its_client_has_gone(world, adapters):
    world.hub.commit("acme/slow", adapters["first"])
    world.hub.silent.set()
    try:
        with pytest.raises(requests.ReadTimeout):
            requests.post(
                f"{world.server.url}/v1/completions",
                json={"model": "slow", "prompt": PROMPT},
                timeout=1,
            )
    finally:
        world.hub.silent.clear()
    eventually(
        lambda: world.server.admin("GET", "/slow").status_code == 200, "the name is loaded", 40
    )


def test_a_silent_storage_holds_up_nobody_else(world, adapters, texts):
    """One that accepts connections and says nothing, for a PUT and for names on demand."""
    server = world.server
    for name in ("late", "later"):
        world.hub.commit(f"acme/{name}", adapters["first"])
    source = world.upload(adapters["second"], "prompt")
    world.hub.silent.set()
    try:
        with ThreadPoolExecutor(12) as pool:
            puts = [pool.submit(server.put, n, f"hf://acme/{n}") for n in ("late", "later")]
            asks = [pool.submit(text_of, server, f"late-{i}", PROMPT) for i in range(10)]
            time.sleep(1)
            assert text_of(server, "base", PROMPT)
            assert text_of(server, "the-first", PROMPT) == texts["first"]
            assert server.put("prompt", source).ok
            assert text_of(server, "prompt", PROMPT) == texts["second"]
            assert not any(waiting.done() for waiting in (*puts, *asks))
            for put in puts:
                assert put.result().status_code == 502, put.result().text
                assert "hf://acme/late" in put.result().text
            for ask in asks:
                assert _status(ask.exception()) == 502
    finally:
        world.hub.silent.clear()
    assert server.put("late", "hf://acme/late").ok


def until_asked(world, name: str) -> None:
    """Waits until roots that were down are asked again, for a name that is not there."""
    asked = {"model": name, "prompt": PROMPT}
    eventually(
        lambda: world.server.post("/v1/completions", **asked).status_code == 404,
        "the roots are asked",
    )


def test_a_name_that_is_not_there_is_asked_for_once(world):
    until_asked(world, "not-there")
    hub, asked = world.hub, {"model": "made-up", "prompt": PROMPT}
    hub.requests.clear()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: world.server.post("/v1/completions", **asked), range(16)))
    assert {answer.status_code for answer in answers} == {404}
    assert [path for _, path, _ in hub.requests] == ["/api/models/acme/made-up"]


def test_a_storage_that_is_busy_is_left_alone_as_long_as_it_says(world, adapters):
    """Other names wait with it; what the server has is served."""
    hub, server = world.hub, world.server
    for name in ("at-once", "in-peace"):
        hub.commit(f"acme/{name}", adapters["first"])
    assert server.put("at-once", "hf://acme/at-once").ok
    until_asked(world, "nor-there")
    hub.busy["acme/too-many"] = "4"
    hub.requests.clear()
    for name in ("too-many", "in-peace", "too-many", "made-up-too"):
        refused = server.post("/v1/completions", model=name, prompt=PROMPT)
        assert refused.status_code == 503, refused.text
        assert 1 <= int(refused.headers["Retry-After"]) <= 4
        assert "HTTP 429" in refused.json()["error"]["message"]
    assert [path for _, path, _ in hub.requests] == ["/api/models/acme/too-many"]
    assert text_of(server, "at-once", PROMPT)
    in_peace = {"model": "in-peace", "prompt": PROMPT, "max_tokens": 1}
    eventually(lambda: server.post("/v1/completions", **in_peace).ok, "it is asked again")


def test_both_forms_of_retry_after_are_read():
    assert seconds_of("7") == 7
    in_five_minutes = format_datetime(datetime.now(UTC) + timedelta(minutes=5), usegmt=True)
    assert 200 <= seconds_of(in_five_minutes) <= 300
    assert seconds_of("Fri, 31 Dec 1999 23:59:59 GMT") == 0


def test_a_retry_after_that_is_none_says_nothing():
    assert [seconds_of(header) for header in (None, "", "soon", "-1")] == 4 * [None]


def test_a_client_that_leaves_while_a_root_is_asked_holds_no_place(world, adapters, texts):
    """Its adapter may have one request at once."""
    hub = world.hub
    hub.commit("acme/limited", adapters["first"])
    until_asked(world, "nobody-here")
    hub.requests.clear()
    hub.silent.set()
    body = json.dumps({"model": "limited", "prompt": PROMPT, "max_tokens": 1}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    try:
        with socket.create_connection(("127.0.0.1", world.server.port)) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            eventually(lambda: hub.requests, "the root is asked")
    finally:
        hub.silent.clear()
    eventually(lambda: served(world, "limited").get("resident"), "the root has answered")
    assert text_of(world.server, "limited", PROMPT) == texts["first"]


def _status(error: BaseException | None) -> int | None:
    return error.status_code if isinstance(error, openai.APIStatusError) else None


def test_while_s3_is_down(world, adapters, texts, tiny_model, tmp_path):
    """The last test: S3 goes, and comes again."""
    server = world.server
    source = world.upload(adapters["first"], "kept")
    assert server.put("kept", source).ok
    later = world.upload(random_adapter(tiny_model, tmp_path / "other", 7), "other")
    world.moto.stop()
    world.moto._server.server_close()

    status, message = world.refusal(later)
    assert (status, message.startswith(f"{later}: the storage does not answer")) == (502, True)
    for name in ("other", "nowhere", "other"):
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/messages"):
            body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
            if path in ("/v1/completions", "/tokenize"):
                body = {"prompt": "a"}
            answer = server.post(path, model=name, **body)
            assert answer.status_code == 502, (path, answer.text)
            assert f"s3://{BUCKET}/{BELOW}/{name}: " in answer.text
    # What was loaded is in the store: it is evicted and comes back without S3.
    eventually(lambda: not served(world, "kept")["resident"], "an idle one is evicted", 40)
    assert text_of(server, "kept", PROMPT) == texts["first"]

    world.moto.start()
    asked = {"model": "other", "prompt": "a"}
    eventually(
        lambda: server.post("/v1/completions", **asked).status_code == 200, "it is looked for again"
    )
    with pytest.raises(openai.NotFoundError):
        text_of(server, "nowhere", PROMPT)
    log = server.log.read_text()
    assert f"below s3://{BUCKET}/{BELOW} cannot be fetched" in log
    assert not any(secret in log for secret in SECRETS.values())


def test_a_server_ends_while_it_fetches(world, adapters):
    """The last test: a file that comes for ever holds up neither the end nor the process."""
    world.hub.commit("acme/endless", adapters["first"])
    world.hub.slow.set()
    server, asked = world.server, {"model": "endless", "prompt": PROMPT}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(requests.post, f"{server.url}/v1/completions", json=asked, timeout=120)
        fetching = "/acme/endless/resolve/"
        eventually(lambda: any(fetching in path for _, path, _ in world.hub.requests), "it fetches")
        server.process.terminate()
        assert server.process.wait(timeout=60) == 0, server.log.read_text()[-3000:]
        with contextlib.suppress(requests.ConnectionError):
            assert answer.result().status_code >= 500
