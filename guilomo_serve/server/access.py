"""Who may administer adapters, decided before a request reaches vLLM.

With an admin key, its holder may, from anywhere. Without one, programs on this machine may: the
client's address is a loopback one, no proxy stands between, and no page of another site is behind
it. vLLM's own key (`--api-key`) is for inference and gives no right here; where there is one and no
admin key, such programs need it as for all routes.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from guilomo_serve.catalogue.settings import ADMIN_KEY, Settings
from guilomo_serve.server.schemas import refusal

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]

# vLLM's routes and their doubles for one cloud's containers (POST and DELETE /adapters), and ours.
_PATHS = ("/v1/adapters", "/adapters", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip")

# What changes adapters asks this again: a path that this guard did not recognise gives no rights.
administrating: ContextVar[bool] = ContextVar("administrating", default=False)


class AdminGuard:
    """ASGI middleware around the whole server (vLLM's `--middleware`)."""

    def __init__(self, app: App) -> None:
        self._app = app
        settings = Settings.from_environment()
        self._key = settings.admin_key if settings else None

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] == "OPTIONS" or not is_administrative(scope):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refused = self._refusal_by_key(headers) if self._key else _refusal_of_place(scope, headers)
        if refused is not None:
            await refused(scope, receive, send)
            return
        if self._key:
            scope = _with_inference_key(scope)
        token = administrating.set(True)
        try:
            await self._app(scope, receive, send)
        finally:
            administrating.reset(token)

    def _refusal_by_key(self, headers: Headers) -> JSONResponse | None:
        assert self._key is not None
        given = headers.getlist("authorization")
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        # Bytes: compare_digest takes no other strings than ASCII.
        if hmac.compare_digest(key.encode(), self._key.encode()) and scheme.lower() == "bearer":
            return None
        return _refused(401, "administration needs 'Authorization: Bearer' with the admin key")


def is_administrative(scope: Scope) -> bool:
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return any(path == known or path.startswith(f"{known}/") for known in _PATHS)


def _refusal_of_place(scope: Scope, headers: Headers) -> JSONResponse | None:
    client = scope.get("client")
    if client is None or not _is_loopback(client[0]):
        return _refused(
            403, f"without an admin key ({ADMIN_KEY}) adapters are administered on the server alone"
        )
    proxied = [name for name in _PROXY_HEADERS if name in headers]
    if proxied:
        return _refused(403, f"administration through a proxy ({proxied[0]}) needs an admin key")
    host = headers.get("host", "")
    origin = headers.get("origin")
    # A page of another site in a browser on this machine, by its own name or by one that it lets
    # resolve to this machine.
    if not _is_loopback(urlsplit(f"//{host}").hostname or "") or (
        origin is not None and urlsplit(origin).netloc != host
    ):
        return _refused(403, "administration by a page of another site needs an admin key")
    return None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _with_inference_key(scope: Scope) -> Scope:
    """The request with a key that vLLM lets pass; it knows nothing of admin keys."""
    keys = scope["app"].state.args.api_key or [os.environ.get("VLLM_API_KEY")]
    headers = [(name, value) for name, value in scope["headers"] if name != b"authorization"]
    if keys[0]:
        headers.append((b"authorization", b"Bearer " + keys[0].encode()))
    return {**scope, "headers": headers}


def _refused(status: int, message: str) -> JSONResponse:
    return refusal(status, message, {"WWW-Authenticate": "Bearer"} if status == 401 else None)
