"""Who may administer: nobody without the key, wherever he is, and whatever the route."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from starlette.applications import Starlette
from starlette.routing import Route

from guilomo_serve.catalogue import keys
from guilomo_serve.server.access import is_administrative
from tests.serve.helpers import Server, eventually, free_port

slow = pytest.mark.slow

# All that `opened` has, vLLM's routes for developers too, and that needs the key.
CLOSED = {
    *("GET /v1/adapters", "GET /v1/adapters/{name}", "GET /v1/adapters/{name}/load"),
    *("PUT /v1/adapters/{name}", "DELETE /v1/adapters/{name}"),
    *(f"POST /v1/adapters/{{name}}/{what}" for what in ("rollback", "pin", "unpin")),
    *("POST /v1/load_lora_adapter", "POST /v1/unload_lora_adapter"),
    *("POST /adapters", "DELETE /adapters/{adapter_name}"),
    *("POST /scale_elastic_ep", "POST /is_scaling_elastic_ep"),
    *("POST /inference/v1/abort_requests", "POST /abort_requests"),
    *("POST /reset_prefix_cache", "POST /reset_mm_cache", "POST /reset_encoder_cache"),
    *("POST /collective_rpc", "GET /server_info"),
    *("POST /sleep", "POST /wake_up", "GET /is_sleeping", "POST /release_kv_cache_memory"),
    *("POST /pause", "POST /resume", "GET /is_paused"),
    *("POST /init_weight_transfer_engine", "POST /shutdown_weight_transfer_engine"),
    *("POST /start_weight_update", "POST /start_draft_weight_update", "POST /update_weights"),
    *("POST /finish_weight_update", "POST /update_weight_version", "GET /weight_info"),
    *("POST /weight_checker", "GET /get_world_size"),
}


def routes(server: Server) -> set[tuple[str, str]]:
    """Method and path of all routes that a server has, as vLLM prints them when it starts."""
    found = re.findall(
        r"Route: (\S+), Methods: (.+)", server.log.read_text().replace(":path}", "}")
    )
    return {(method, path) for path, methods in found for method in methods.split(", ")}


@slow
def test_a_route_needs_the_key_unless_it_is_known_not_to(opened):
    asked = routes(opened)
    assert ("POST", "/v1/chat/completions") in asked
    closed = set()
    for method, path in asked:
        url = opened.url + re.sub(r"\{\w+\}", "nobody", path)
        answer = requests.request(method, url, json={}, timeout=30)
        if answer.status_code == 401:
            closed.add(f"{method} {path}")
            if method != "HEAD":
                assert "the admin key" in answer.json()["error"]["message"]
    assert closed == CLOSED
    key = opened.admin_headers
    assert requests.get(f"{opened.url}/is_sleeping", headers=key, timeout=30).ok
    assert requests.post(f"{opened.url}/reset_prefix_cache", headers=key, timeout=30).ok


@slow
def test_no_place_and_no_header_takes_the_keys_place(opened):
    url = f"{opened.url}/v1/adapters"
    for headers in (
        {},
        {"Host": "localhost"},
        {"Host": "localhost", "Via": "1.1 proxy"},
        {"X-Forwarded-For": "127.0.0.1"},
        {"Forwarded": "for=127.0.0.1"},
        {"Origin": opened.url},
        {"Authorization": "Bearer "},
        {"Authorization": f"Bearer {opened.admin_key}x"},
    ):
        assert requests.get(url, headers=headers, timeout=10).status_code == 401, headers
    assert requests.get(url, headers=opened.admin_headers, timeout=10).status_code == 200


@pytest.fixture
def proxy(opened, tmp_path) -> Iterator[str]:
    """URL of an nginx in front of the server, set up as its manual begins."""
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    port = free_port()
    config = tmp_path / "nginx.conf"
    places = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{place}_temp_path {tmp_path / place};" for place in places)
    config.write_text(
        f"daemon off; pid {tmp_path / 'pid'}; error_log stderr; events {{}}\n"
        f"http {{ access_log off; {temporary} server {{ listen 127.0.0.1:{port};\n"
        f"location / {{ proxy_pass {opened.url}; }} }} }}\n"
    )
    process = subprocess.Popen(["nginx", "-e", "stderr", "-p", tmp_path, "-c", config])
    try:
        url = f"http://127.0.0.1:{port}"
        eventually(lambda: _answers(f"{url}/health"), "nginx answers", 20)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=20)


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.ConnectionError:
        return False


@slow
def test_a_proxys_clients_need_the_key(proxy, opened, root):
    """To the server all of them are on its own machine, and ask for the address it has there."""
    put = {"source": str(root / "first")}
    url = f"{proxy}/v1/adapters/through-a-proxy"
    assert requests.put(url, json=put, timeout=60).status_code == 401
    assert requests.get(f"{proxy}/v1/adapters", timeout=60).status_code == 401
    loading = {"lora_name": "through-a-proxy", "lora_path": str(root / "first")}
    url = f"{proxy}/v1/load_lora_adapter"
    assert requests.post(url, json=loading, timeout=60).status_code == 401
    assert opened.admin("GET", "/through-a-proxy").status_code == 404
    url = f"{proxy}/v1/adapters"
    assert requests.get(url, headers=opened.admin_headers, timeout=60).status_code == 200


@slow
def test_the_key_is_in_files_that_its_user_alone_can_read(opened, state):
    named = re.search(r"The admin key of this server is in (\S+)", opened.log.read_text())
    assert named is not None
    for path in (Path(named[1]), state / "admin.key"):
        assert path.read_text().strip() == opened.admin_key
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(Path(named[1]).parent.stat().st_mode) == 0o700
    assert opened.admin_key not in opened.log.read_text()


@slow
def test_routes_that_nobody_has_are_not_found(opened):
    for method, path, status in (
        ("POST", "/v1/images/generations", 404),
        ("PUT", "/v1/adapter/a", 404),
        ("GET", "/v1/chat/completions", 405),
        ("PATCH", "/v1/adapters", 405),
    ):
        answer = requests.request(method, opened.url + path, timeout=30)
        assert answer.status_code == status, (method, path, answer.text)


def test_a_state_keeps_its_key(tmp_path):
    key = keys.key_of(tmp_path)
    assert keys.key_of(tmp_path) == key
    assert keys.key_of(None) != keys.key_of(None)
    (tmp_path / "admin.key").chmod(0o644)
    with pytest.raises(keys.KeyFileError, match="nobody else can use"):
        keys.key_of(tmp_path)
    (tmp_path / "admin.key").chmod(0o600)
    (tmp_path / "admin.key").write_text("short\n")
    with pytest.raises(keys.KeyFileError, match="too short"):
        keys.key_of(tmp_path)


def test_a_key_is_found_while_its_server_lives(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    path = keys.leave("the key of a server", 8123)
    for url in ("http://localhost:8123", "http://127.0.0.1:8123/", "http://[::1]:8123/v1"):
        assert keys.find(url) == "the key of a server"
    for url in ("http://localhost:8124", "http://elsewhere:8123", "http://localhost", "x"):
        assert keys.find(url) is None
    with pytest.raises(keys.KeyFileError, match="cannot be left"):
        keys.leave("the key of another one", 8123)
    path.with_name("8125.key").write_text("the key of one that has ended")
    path.with_name("8125.key").chmod(0o600)
    assert keys.find("http://localhost:8125") is None
    path.parent.chmod(0o755)
    with pytest.raises(keys.KeyFileError, match="others could read"):
        keys.leave("the key of another one", 8126)


def test_a_request_is_matched_with_the_routes_once():
    asked = []

    class Counted(Route):
        def matches(self, scope):
            asked.append(scope["path"])
            return super().matches(scope)

    app = Starlette(routes=[Counted("/v1/adapters", lambda request: None)])
    scope = {"type": "http", "method": "GET", "path": "/v1/adapters", "app": app}
    assert is_administrative(scope)
    assert is_administrative(scope)
    assert len(asked) == 1
