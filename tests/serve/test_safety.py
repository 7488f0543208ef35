"""Attacks on a running server with keys: each is refused, and the old adapter keeps serving."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
import requests
import torch
from safetensors.torch import load_file, save_file

from guilomo_serve.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from tests.serve.helpers import Server, random_adapter, text_of

pytestmark = pytest.mark.slow

PROMPT = "My card has not arrived."
# Prepares a bad adapter (base, root, a folder outside of it): its source, and why it is refused.
Attack = Callable[[Path, Path, Path], tuple[str, str]]
INFERENCE, ADMIN = "the-key-for-inference", "the-key-for-administration"


@pytest.fixture
def target(restarted, root):
    """The server with an adapter under attack; afterwards it must serve what it did."""
    if restarted.admin("GET", "/target").status_code == 404:
        assert restarted.put("target", root / "first").status_code == 200
    text, before = text_of(restarted, "target", PROMPT), facts(restarted)
    yield restarted
    assert text_of(restarted, "target", PROMPT) == text
    assert facts(restarted) == before


def facts(server: Server) -> dict[str, tuple[int, str]]:
    """All adapters' versions and digests."""
    listed = server.admin("GET").json()["data"]
    return {entry["name"]: (entry["version"], entry["digest"]) for entry in listed}


def traversal(base: Path, root: Path, outside: Path) -> tuple[str, str]:
    return f"{root}/../{outside.name}/good", "no folder that adapters may be taken from"


def relative_traversal(base: Path, root: Path, outside: Path) -> tuple[str, str]:
    return f"first/../../{outside.name}/good", "no folder that adapters may be taken from"


def absolute(base: Path, root: Path, outside: Path) -> tuple[str, str]:
    return str(outside / "good"), "no folder that adapters may be taken from"


def linked_folder(base: Path, root: Path, outside: Path) -> tuple[str, str]:
    (root / "linked").symlink_to(outside / "good")
    return str(root / "linked"), "no folder that adapters may be taken from"


def linked_file(base: Path, root: Path, outside: Path) -> tuple[str, str]:
    shutil.copytree(root / "first", root / "linked-file")
    (root / "linked-file" / WEIGHTS_FILE).unlink()
    (root / "linked-file" / WEIGHTS_FILE).symlink_to(outside / "good" / WEIGHTS_FILE)
    return str(root / "linked-file"), "leads out of the adapter folder"


def pipe(base: Path, root: Path, outside: Path) -> tuple[str, str]:
    """A pipe would be waited for until someone writes."""
    shutil.copytree(root / "first", root / "pipe")
    (root / "pipe" / WEIGHTS_FILE).unlink()
    os.mkfifo(root / "pipe" / WEIGHTS_FILE)
    return str(root / "pipe"), "no plain file"


def huge_header(base: Path, root: Path, outside: Path) -> tuple[str, str]:
    """90 MB: below safetensors' own limit."""
    shutil.copytree(root / "first", root / "huge-header")
    size = 90 * 2**20
    with (root / "huge-header" / WEIGHTS_FILE).open("wb") as file:
        file.write(size.to_bytes(8, "little"))
        file.truncate(8 + size)
    return str(root / "huge-header"), f"a header of {size} bytes"


def huge_config(base: Path, root: Path, outside: Path) -> tuple[str, str]:
    shutil.copytree(root / "first", root / "huge-config")
    with (root / "huge-config" / CONFIG_FILE).open("wb") as file:
        file.truncate(2**40)  # sparse: the disk has it, memory would not
    return str(root / "huge-config"), f"has {2**40} bytes"


def deep_config(base: Path, root: Path, outside: Path) -> tuple[str, str]:
    shutil.copytree(root / "first", root / "deep-config")
    (root / "deep-config" / CONFIG_FILE).write_text(10**6 * "[")
    return str(root / "deep-config"), "not a JSON file"


def sparse_weights(base: Path, root: Path, outside: Path) -> tuple[str, str]:
    """Shapes and size agree, and are of a terabyte that the disk does not have."""
    return _with_first_shape(root, "sparse", [2**38], 2**40), "expected at most"


def shapes_beyond_the_file(base: Path, root: Path, outside: Path) -> tuple[str, str]:
    return _with_first_shape(root, "bomb", [2**20, 2**20], 2**42, 2**12), "safetensors"


def shapes_that_overflow(base: Path, root: Path, outside: Path) -> tuple[str, str]:
    return _with_first_shape(root, "overflow", [2**32, 2**32, 2**32], 4, 4), "safetensors"


def _with_first_shape(
    root: Path, name: str, shape: list[int], data: int, size: int | None = None
) -> str:
    """An adapter whose weights are one tensor of `data` bytes, in a file with `size` of them."""
    shutil.copytree(root / "first", root / name)
    header = {"t": {"dtype": "F32", "shape": shape, "data_offsets": [0, data]}}
    text = json.dumps(header).encode()
    size = data if size is None else size
    with (root / name / WEIGHTS_FILE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        # The whole file of the sparse one is of 2**40 bytes and what comes before them.
        file.truncate(8 + len(text) + size)
    return str(root / name)


def ranks_beyond_the_file(base: Path, root: Path, outside: Path) -> tuple[str, str]:
    """The config promises more experts than any memory holds; the tensors are small."""
    shutil.copytree(root / "first", root / "ranks")
    path = root / "ranks" / CONFIG_FILE
    config = json.loads(path.read_text())
    module = next(iter(config["experts"]))
    config["experts"][module] = [{"rank": 10**15, "scaling": 1.0}]
    del config["r"]
    path.write_text(json.dumps(config))
    return str(root / "ranks"), str(10**15)


def not_finite(kind: str, value: float) -> Attack:
    """An adapter of one kind with one value that is no number."""

    def attack(base: Path, root: Path, outside: Path) -> tuple[str, str]:
        folder = root / f"{kind}-with-{value}"
        shutil.copytree(root / kind, folder)
        tensors = load_file(folder / WEIGHTS_FILE)
        next(iter(tensors.values()))[0, 0] = value
        save_file(tensors, folder / WEIGHTS_FILE)
        return str(folder), "not finite"

    attack.__name__ = f"{kind}_with_{value}"
    return attack


def wrong_base(base: Path, root: Path, outside: Path) -> tuple[str, str]:
    def change(adapter: Adapter) -> Adapter:
        other = dataclasses.replace(adapter.spec.base, vocab_size=9)
        return Adapter(dataclasses.replace(adapter.spec, base=other), adapter.weights)

    return str(random_adapter(base, root / "wrong-base", 4, change=change)), "another base model"


def pickled(base: Path, root: Path, outside: Path) -> tuple[str, str]:
    """Named as what it is, by a plain LoRA: vLLM alone would read it."""
    folder = root / "pickled"
    shutil.copytree(root / "plain", folder)
    torch.save(load_file(folder / WEIGHTS_FILE), folder / "adapter_model.bin")
    (folder / WEIGHTS_FILE).unlink()
    return str(folder), "no other format is read"


def pickle_in_disguise(base: Path, root: Path, outside: Path) -> tuple[str, str]:
    """Reading it would leave a trace outside."""
    folder = root / "disguised"
    shutil.copytree(root / "plain", folder)

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(outside / "trace"),))

    (folder / WEIGHTS_FILE).write_bytes(pickle.dumps(Trap()))
    return str(folder), "safetensors"


@pytest.mark.parametrize(
    "attack",
    [
        *(traversal, relative_traversal, absolute, linked_folder, linked_file, pipe),
        *(huge_header, huge_config, deep_config, sparse_weights, shapes_beyond_the_file),
        *(shapes_that_overflow, ranks_beyond_the_file),
        *(not_finite("first", torch.nan), not_finite("plain", torch.inf)),
        *(wrong_base, pickled, pickle_in_disguise),
    ],
)
def test_a_bad_source_is_refused(target, tiny_model, root, attack):
    outside = root.parent / f"{root.name}-outside-{attack.__name__}"
    shutil.copytree(root / "first", outside / "good")
    source, reason = attack(tiny_model, root, outside)
    status = 403 if "taken from" in reason or "leads out" in reason else 400
    loading = {"lora_name": "target", "lora_path": source, "load_inplace": True}
    headers = {"Authorization": f"Bearer {ADMIN}"}
    for answer in (
        target.put("target", source),
        target.put("target", source, dry_run=True),
        requests.post(
            f"{target.url}/v1/load_lora_adapter", json=loading, headers=headers, timeout=60
        ),
    ):
        assert answer.status_code == status, answer.text
        assert reason in answer.json()["error"]["message"]
    assert not (outside / "trace").exists()


def test_a_member_that_leads_out_of_the_root_is_not_served(target, root):
    (root / "leading-out").symlink_to("/etc")
    for name in ("leading-out", "..", "../first", "first/../../x", "%2e%2e", str(root / "first")):
        with pytest.raises(openai.APIStatusError) as refused:
            text_of(target, name, PROMPT)
        assert refused.value.status_code in (400, 404), name


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "Bearer wrong",
        f"Bearer {INFERENCE}",
        f"Bearer {ADMIN} ",
        f"Bearer {ADMIN}x",
        f"Basic {ADMIN}",
        ADMIN,
        "Bearer ",
        "Bearer clé".encode(),
    ],
)
def test_who_has_no_admin_key_changes_nothing(target, root, authorization):
    headers = {} if authorization is None else {"Authorization": authorization}
    body = {"source": str(root / "plain")}
    ours, theirs = f"{target.url}/v1/adapters", f"{target.url}/v1"
    loading = {"lora_name": "target", "lora_path": str(root / "plain"), "load_inplace": True}
    for method, url, json_body in (
        ("GET", ours, None),
        ("GET", f"{ours}/target", None),
        ("PUT", f"{ours}/target", body),
        ("DELETE", f"{ours}/target", None),
        ("POST", f"{ours}/target/rollback", None),
        ("POST", f"{ours}/target/pin", None),
        ("POST", f"{theirs}/load_lora_adapter", loading),
        ("POST", f"{theirs}/unload_lora_adapter", {"lora_name": "target"}),
        ("POST", f"{target.url}/adapters", {"name": "target", "src": str(root / "plain")}),
        ("DELETE", f"{target.url}/adapters/target", None),
    ):
        answer = requests.request(method, url, json=json_body, headers=headers, timeout=30)
        assert answer.status_code == 401, (method, url, answer.text)
        assert ADMIN not in answer.text


def test_each_key_opens_its_own_doors_alone(target):
    headers = {"Authorization": f"Bearer {ADMIN}"}
    assert requests.get(f"{target.url}/v1/models", headers=headers, timeout=30).status_code == 401
    assert requests.get(f"{target.url}/v1/models", timeout=30).status_code == 401
    assert ADMIN not in target.log.read_text()


def test_spellings_of_the_routes_open_no_other_way(target, root):
    """Paths that a guard might not recognise and a router might."""
    for path in (
        *(
            "/v1/adapters/",
            "//v1/adapters",
            "/v1//adapters",
            "/V1/adapters",
            "/v1/adapters/target/",
        ),
        *("/v1/./adapters", "/x/../v1/adapters", "/v1/%61dapters", "/v1/adapters%2ftarget"),
        *("/v1/load_lora_adapter/", "/%761/load_lora_adapter", "/adapters/", "/adapters/target/"),
    ):
        for method in ("GET", "PUT", "POST", "DELETE"):
            head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            key = f"Authorization: Bearer {INFERENCE}\r\n"
            body = json.dumps({"source": str(root / "plain"), "lora_name": "target"})
            length = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            status = _raw(target, head + key + length + body)
            assert status in (307, 401, 404, 405), (method, path, status)


def test_headers_smuggle_no_key_and_no_name(target, root):
    get = "GET /v1/adapters HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    right, wrong = (f"Authorization: Bearer {key}\r\n" for key in (ADMIN, "wrong"))
    assert _raw(target, f"{get}{right}\r\n") == 200
    assert _raw(target, f"{get}{wrong}{right}\r\n") == 401
    assert _raw(target, f"{get}{right}{wrong}\r\n") == 401
    # The header by which one cloud's clients name an adapter, and what leads out of the root.
    for name in ("../first", "leading-out", "/etc", "target\x00"):
        answer = requests.post(
            f"{target.url}/invocations",
            json={"model": "base", "prompt": PROMPT, "max_tokens": 1},
            headers={
                "X-Amzn-SageMaker-Adapter-Identifier": name.encode("unicode_escape"),
                "Authorization": f"Bearer {INFERENCE}",
            },
            timeout=30,
        )
        assert answer.status_code in (400, 404, 422), (name, answer.text)


def _raw(server: Server, request: str) -> int:
    """Sends bytes as they are, as clients' libraries would not; returns the status."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(request.encode())
        return int(connection.makefile("rb").readline().split()[1])


@pytest.mark.parametrize(
    "name",
    [
        *(
            "%2e%2e",
            "a%2F.b",
            "a%2F%2Fb",
            "%2Fa",
            "a%2Fpin",
            "..%2f..%2fetc",
            "a%0d%0aSet-Cookie:x",
            "a%00b",
            ".hidden",
            "a@1",
        ),
        *("t%C3%A4rget", "t%D0%B0rget", "tar%E2%80%AEget", "%F0%9F%92%A5", "a" * 129, "base"),
    ],
)
def test_bad_names_are_refused(target, root, name):
    """Separators, control characters, and letters that look like others."""
    answer = target.put(name, root / "first")
    assert answer.status_code in (400, 404), answer.text
    assert "Set-Cookie" not in answer.headers


def test_bad_bodies_are_refused(target, root):
    for body in (
        {},
        {"source": 1},
        {"source": ""},
        {"source": "x" * 5000},
        {"source": "first", "dry_run": "yes"},
        {"source": "first", "digest": "abc"},
        {"source": "first", "unknown": 1},
        {"source": "first\0"},
    ):
        answer = target.admin("PUT", "/target", **body)
        assert 400 <= answer.status_code < 500, (body, answer.text)
