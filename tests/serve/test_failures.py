"""What goes wrong around a server: clients, disks, its engine, and its end.

One server (`limited`) is abused by all tests but the last, and killed at the end of them.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import openai
import pytest
import requests

from guilomo_serve.adapter import WEIGHTS_FILE
from tests.serve.helpers import (
    Server,
    eventually,
    guilomo_serve,
    paused,
    random_adapter,
    serving,
    text_of,
)

pytestmark = pytest.mark.slow

PROMPT = "My card has not arrived."
LENGTH = 450  # tokens: with the prompt nearly all that the server takes
ANSWERS = 2  # to one request
LIMIT = 2  # requests of the adapter "limited" at once
CLIENTS = 1000
FLAGS = ("--enforce-eager", "--dtype", "float32", "--served-model-name", "base")


@pytest.fixture(scope="module")
def places(adapters, tmp_path_factory) -> dict[str, Path]:
    """A root of adapters and a state of this file's own."""
    folder = tmp_path_factory.mktemp("failures")
    shutil.copytree(adapters["first"], folder / "root" / "first")
    shutil.copytree(adapters["second"], folder / "root" / "second")
    return {"root": folder / "root", "state": folder / "state"}


@pytest.fixture(scope="module")
def limited(tiny_model, adapters, places, tmp_path_factory) -> Iterator[Server]:
    """A server on which "limited" may have two requests at once."""
    places["state"].mkdir()
    command = guilomo_serve(
        tiny_model,
        {"limited": adapters["first"], "free": adapters["second"]},
        *("--adapter-root", str(places["root"]), "--state", str(places["state"])),
        *("--max-concurrency", f"limited={LIMIT}", "--max-body-mib", "1"),
        *FLAGS,
    )
    with serving(command, tmp_path_factory.mktemp("log") / "limited.log") as server:
        yield server


def stream(server: Server, model: str) -> openai.Stream[openai.types.Completion]:
    """Long answers to one request."""
    return server.client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=LENGTH,
        temperature=1,
        n=ANSWERS,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )


def complete(server: Server, model: str, **settings: object) -> requests.Response:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 1, **settings}
    return requests.post(f"{server.url}/v1/completions", json=body, timeout=120)


def generated_tokens(server: Server) -> float:
    """All that this server has generated."""
    lines = requests.get(f"{server.url}/metrics", timeout=30).text.splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("vllm:generation_tokens_total")
    )


def until_running(server: Server, model: str, count: int) -> None:
    """Waits until so many of these requests run."""
    eventually(lambda: server.in_flight(model) == count, "they run")


def test_an_adapter_has_its_limit_and_others_have_theirs(limited):
    with ThreadPoolExecutor() as pool:
        with paused(limited):
            running = [stream(limited, "limited") for _ in range(LIMIT)]
            until_running(limited, "limited", LIMIT)
            for path, body in (
                ("/v1/completions", {"prompt": PROMPT}),
                ("/v1/completions", {"prompt": PROMPT, "stream": True}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}]}),
                ("/v1/messages", {"messages": [{"role": "user", "content": PROMPT}]}),
            ):
                refused = limited.post(path, model="limited", max_tokens=1, **body)
                assert refused.status_code == 429, (path, refused.text)
                assert "limited" in refused.json()["error"]["message"]
                assert int(refused.headers["Retry-After"]) > 0
            with pytest.raises(openai.RateLimitError):
                text_of(limited, "limited", PROMPT)
            others = [  # the last is loaded for it
                pool.submit(complete, limited, model) for model in ("free", "base", "first")
            ]
            eventually(lambda: limited.in_flight("free") == 1, "another adapter is asked")
        for answer in others:
            assert answer.result().status_code == 200
    for chunks in running:
        assert list(chunks)[-1].usage.completion_tokens == ANSWERS * LENGTH
    assert complete(limited, "limited").status_code == 200
    assert complete(limited, "nobody").status_code == 404


def test_a_client_that_leaves_gives_its_place_back(limited):
    """While it reads a stream, and while it waits for a whole answer."""
    all_of_it = LIMIT * ANSWERS * LENGTH
    before = generated_tokens(limited)
    with paused(limited):
        streams = [stream(limited, "limited") for _ in range(LIMIT)]
        until_running(limited, "limited", LIMIT)
        for chunks in streams:
            chunks.close()
        until_running(limited, "limited", 0)
    eventually(lambda: complete(limited, "limited").status_code == 200, "a place is given back")
    assert generated_tokens(limited) - before < all_of_it

    before = generated_tokens(limited)
    whole = {"model": "limited", "prompt": PROMPT, "max_tokens": LENGTH, "ignore_eos": True}
    whole |= {"n": ANSWERS, "temperature": 1}
    body = json.dumps(whole).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with paused(limited):
        with ExitStack() as connections:
            for _ in range(LIMIT):
                connection = socket.create_connection(("127.0.0.1", limited.port))
                connections.enter_context(connection).sendall(head.encode() + body)
            until_running(limited, "limited", LIMIT)
            assert complete(limited, "limited").status_code == 429
        until_running(limited, "limited", 0)
    eventually(lambda: complete(limited, "limited").status_code == 200, "a place is given back")
    assert generated_tokens(limited) - before < all_of_it


def test_a_connection_outlives_the_pause_between_requests_of_a_load_balancer(limited):
    """vLLM alone closes it after five seconds; a request that comes just then is lost."""
    connection = http.client.HTTPConnection("127.0.0.1", limited.port, timeout=30)
    with closing(connection):
        connection.connect()
        socket_of_ours = connection.sock
        for pause in (6, 0):
            connection.request("GET", "/ready")
            assert connection.getresponse().read()
            time.sleep(pause)
        assert connection.sock is socket_of_ours


def test_a_body_that_is_too_large_is_refused_before_it_is_read(limited):
    """Said by its length, of which nothing is sent, or sent in chunks without end."""
    for method, path, bound in (
        ("PUT", "/v1/adapters/limited", 2**16),
        ("POST", "/v1/load_lora_adapter", 2**16),
        ("POST", "/v1/completions", 2**20),
        ("POST", "/v1/chat/completions", 2**20),
    ):
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {limited.admin_key}\r\n"
        )
        with socket.create_connection(("127.0.0.1", limited.port), timeout=60) as connection:
            connection.sendall(f"{head}Content-Length: {bound + 1}\r\n\r\n".encode())
            refused_as_too_large(connection, bound)
        with socket.create_connection(("127.0.0.1", limited.port), timeout=60) as connection:
            connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            for _ in range(bound // 2**12 + 1):
                connection.sendall(b"1000\r\n" + 2**12 * b" " + b"\r\n")
            refused_as_too_large(connection, bound)
        allowed = requests.request(
            method,
            f"{limited.url}{path}",
            data=b"{" + (bound - 2) * b" " + b"}",
            headers={"Content-Type": "application/json", **limited.admin_headers},
            timeout=60,
        )
        assert allowed.status_code == 400, allowed.text  # read, and not what is expected


def refused_as_too_large(connection: socket.socket, bound: int) -> None:
    answer = connection.makefile("rb")
    assert answer.readline().split()[1] == b"413"
    length = 0
    while (line := answer.readline().strip()) != b"":
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    error = json.loads(answer.read(length))["error"]
    assert (error["code"], str(bound) in error["message"]) == (413, True)


@contextmanager
def no_room(server: Server, folder: Path, bytes_left: int) -> Iterator[None]:
    """The server's process may write no larger files (EFBIG), as in a container with a limit."""
    pid = server.process.pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (bytes_left, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def full_disk(server: Server, folder: Path, bytes_left: int) -> Iterator[None]:
    """A disk of its own, too small, where copies are kept (ENOSPC)."""
    size = f"size={bytes_left}"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "none", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no right to mount a small disk: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("trouble", [no_room, full_disk])
def test_a_full_disk_leaves_the_old_version(limited, places, trouble):
    """When an adapter is copied. What it left is cleared away, and the next try succeeds."""
    copies = places["state"] / "adapters"
    before, text = limited.admin("GET", "/free").json(), text_of(limited, "free", PROMPT)
    kept = sorted(copies.iterdir())
    weights = (places["root"] / "first" / WEIGHTS_FILE).stat().st_size
    with trouble(limited, copies, weights - 2**12):
        refused = limited.put("free", "first")
        assert refused.status_code == 507, refused.text
        assert refused.json()["error"]["code"] == 507
        assert text_of(limited, "free", PROMPT) == text
        if trouble is full_disk:
            assert not list(copies.iterdir())
    assert sorted(copies.iterdir()) == kept
    after = limited.admin("GET", "/free").json()
    assert after | {"last_used": 0} == before | {"last_used": 0}
    assert limited.put("free", "first").status_code == 200
    assert limited.admin("POST", "/free/rollback").json()["digest"] == before["digest"]
    assert text_of(limited, "free", PROMPT) == text


def test_a_catalogue_that_cannot_be_written_leaves_the_old_version(limited, places):
    """The copy is there already; the disk fills up when the name is to change."""
    assert limited.put("kept", "first").status_code == 200
    assert limited.put("kept", "second").status_code == 200
    before, text = limited.admin("GET", "/kept").json(), text_of(limited, "kept", PROMPT)
    with no_room(limited, places["state"], 1):
        refused = limited.admin("POST", "/kept/rollback")
        assert refused.status_code == 507, refused.text
        assert limited.admin("DELETE", "/kept").status_code == 507
        assert text_of(limited, "kept", PROMPT) == text
    after = limited.admin("GET", "/kept").json()
    assert after | {"last_used": 0} == before | {"last_used": 0}
    assert limited.admin("POST", "/kept/rollback").json()["version"] > before["version"]


def test_a_slow_copy_holds_up_nobody(limited, places, tiny_model):
    """Half a gigabyte, which the disk takes its time to write, and no adapter in the end."""
    folder, size = places["root"] / "large", 2**29
    shutil.copytree(places["root"] / "first", folder)
    header = json.dumps({"t": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    with (folder / WEIGHTS_FILE).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + size)
    random_adapter(tiny_model, places["root"] / "small", 5)
    meanwhile = 0
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(limited.put, "large", "large")
        while not slow.done():
            assert complete(limited, "free").status_code == 200
            assert limited.put("small", "small", dry_run=True).status_code == 200
            meanwhile += not slow.done()
    assert slow.result().status_code == 400, slow.result().text
    assert meanwhile > 0


def test_a_thousand_clients_at_once_all_get_an_answer(limited):
    async def ask_all() -> list[tuple[str, int]]:
        client = openai.AsyncOpenAI(
            base_url=f"{limited.url}/v1", api_key="none", max_retries=0, timeout=240
        )

        async def ask(model: str) -> tuple[str, int]:
            try:
                await client.completions.create(model=model, prompt=PROMPT, max_tokens=1)
            except openai.APIStatusError as refused:
                return model, refused.status_code
            return model, 200

        models = ("base", "free", "limited", "base")
        async with client:
            return await asyncio.gather(*(ask(models[i % 4]) for i in range(CLIENTS)))

    statuses = Counter(asyncio.run(ask_all()))
    assert statuses["base", 200] == CLIENTS // 2
    assert statuses["free", 200] == CLIENTS // 4
    assert statuses["limited", 200] >= LIMIT
    assert statuses["limited", 200] + statuses["limited", 429] == CLIENTS // 4
    assert complete(limited, "limited").status_code == 200
    assert limited.in_flight("limited") == 0


def test_an_engine_that_is_killed_ends_the_server_with_an_error(limited):
    assert requests.get(f"{limited.url}/ready", timeout=30).json() == {"status": "ready"}
    with paused(limited):
        running = stream(limited, "free")
        until_running(limited, "free", 1)
        limited.engine.kill()
    with pytest.raises(openai.APIError):
        list(running)
    # The server looks after its engine every few seconds, so it may have ended by now.
    with suppress(requests.ConnectionError):
        refused = complete(limited, "free")
        assert refused.status_code in (500, 503), refused.text
        assert refused.json()["error"]["message"]
    eventually(lambda: limited.process.poll() is not None, "the process ends")
    assert limited.process.returncode == 1


def test_a_server_that_is_stopped_finishes_what_runs(tiny_model, adapters, tmp_path):
    command = guilomo_serve(
        tiny_model, {"first": adapters["first"]}, *FLAGS, "--drain-timeout", "200"
    )
    with serving(command, tmp_path / "stopped.log") as server:
        assert requests.get(f"{server.url}/ready", timeout=30).status_code == 200
        with paused(server):
            streams = [stream(server, model) for model in ("first", "base", "first")]
            until_running(server, "first", 2)
            os.kill(server.process.pid, signal.SIGTERM)
            eventually(lambda: not requests.get(f"{server.url}/ready", timeout=30).ok, "not ready")
            ready = requests.get(f"{server.url}/ready", timeout=30)
            assert (ready.status_code, "shutting down" in ready.text) == (503, True)
            assert requests.get(f"{server.url}/health", timeout=30).status_code == 200  # it lives
            for refused in (complete(server, "base"), server.admin("DELETE", "/first")):
                assert refused.status_code == 503, refused.text
                assert int(refused.headers["Retry-After"]) > 0
                assert "shutting down" in refused.json()["error"]["message"]
        for answer in streams:
            *chunks, last = answer
            assert chunks[-1].choices[0].finish_reason == "length"
            assert last.usage.completion_tokens == ANSWERS * LENGTH
        assert server.process.wait(timeout=120) == 0, server.log.read_text()[-3000:]
