"""Who may administer, decided before a request reaches vLLM.

One rule: what a route does for inference, or to show health or metrics, is for everyone (or for who
has vLLM's `--api-key`); every other route needs the admin key. So a route that a new vLLM brings is
closed until it is known. Where a request comes from gives no right: behind a proxy all clients come
from the same place.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.routing import Match
from starlette.websockets import WebSocketClose
from vllm.logger import init_logger

from guilomo_serve.catalogue import keys
from guilomo_serve.catalogue.settings import ADMIN_KEY, Settings
from guilomo_serve.server.schemas import refusal

logger = init_logger("vllm.guilomo")

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]

# Method -> the paths, as their routes have them, that need no admin key.
_OPEN: dict[str, frozenset[str]] = {
    "POST": frozenset(
        {
            "/v1/chat/completions",
            "/v1/chat/completions/batch",
            "/v1/chat/completions/derender",
            "/v1/chat/completions/render",
            "/v1/completions",
            "/v1/completions/derender",
            "/v1/completions/render",
            "/v1/messages",
            "/v1/messages/count_tokens",
            "/v1/messages/render",
            "/v1/responses",
            "/v1/responses/render",
            "/v1/responses/{response_id}/cancel",
            "/v1/systemone",
            "/generative_scoring",
            "/inference/v1/generate",
            "/invocations",
            "/tokenize",
            "/detokenize",
            "/v1/audio/transcriptions",
            "/v1/audio/translations",
            "/classify",
            "/pooling",
            "/v1/embeddings",
            "/v2/embed",
            "/score",
            "/v1/score",
            "/rerank",
            "/v1/rerank",
            "/v2/rerank",
            "/cohere/v2/chat",
            "/ping",
        }
    ),
    "GET": frozenset(
        {
            "/v1/models",
            "/v1/responses/{response_id}",
            "/tokenizer_info",
            "/health",
            "/ready",
            "/ping",
            "/load",
            "/version",
            "/kv_event_sources",
            "/metrics",
            "/openapi.json",
            "/docs",
            "/docs/oauth2-redirect",
            "/redoc",
            "/console",
            "/console/{name}",
        }
    ),
    "WEBSOCKET": frozenset({"/v1/realtime"}),
}

_ROUTE = "guilomo.route"  # in a request's scope, once it is known

# What changes adapters asks this again: a path that this guard did not recognise gives no rights.
administrating: ContextVar[bool] = ContextVar("administrating", default=False)


class AdminGuard:
    """ASGI middleware around the whole server (vLLM's `--middleware`)."""

    def __init__(self, app: App) -> None:
        self._app = app
        settings = Settings.from_environment()
        assert settings is not None
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            self._say_where_the_key_is(scope["app"].state.args)
        # OPTIONS is asked by browsers, without keys, and answered before any route.
        if scope["type"] == "lifespan" or scope.get("method") == "OPTIONS":
            await self._app(scope, receive, send)
            return
        path = _route_of(scope)
        if path in _open_paths(scope):
            await self._app(scope, receive, send)
            return
        if not self._has_key(Headers(scope=scope)):
            # What no route takes is answered with 404, and with 405 what its route does not take.
            answer = self._app if path is None else _refused(scope)
            await answer(scope, receive, send)
            return
        token = administrating.set(True)
        try:
            await self._app(_with_inference_key(scope), receive, send)
        finally:
            administrating.reset(token)

    def _has_key(self, headers: Headers) -> bool:
        given = headers.getlist("authorization")
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        # Bytes: compare_digest takes no other strings than ASCII.
        is_it = hmac.compare_digest(key.encode(), self._settings.admin_key.encode())
        return is_it and scheme.lower() == "bearer"

    def _say_where_the_key_is(self, args: Any) -> None:
        if self._settings.made_key and args.uds is None:
            try:
                path = keys.leave(self._settings.admin_key, args.port)
            except keys.KeyFileError as e:
                logger.warning("`guilomo-serve adapters` will not find the admin key: %s", e)
            else:
                logger.info("The admin key of this server is in %s", path)


def is_administrative(scope: Scope) -> bool:
    """Whether a request is for a route that needs the admin key."""
    path = _route_of(scope)
    return path is not None and path not in _open_paths(scope)


def _route_of(scope: Scope) -> str | None:
    """The path, as it was declared, of the route that Starlette takes for a request.

    Matching takes a look at each route, so what was found stays in the scope.
    """
    if _ROUTE not in scope:
        routes = scope["app"].routes
        route = next((r for r in routes if r.matches(scope)[0] is Match.FULL), None)
        scope[_ROUTE] = None if route is None else getattr(route, "path", "")
    path: str | None = scope[_ROUTE]
    return path


def _open_paths(scope: Scope) -> frozenset[str]:
    method = scope.get("method", "WEBSOCKET")
    return _OPEN.get("GET" if method == "HEAD" else method, frozenset())


def _with_inference_key(scope: Scope) -> Scope:
    """The request with a key that vLLM lets pass; it knows nothing of admin keys."""
    given = scope["app"].state.args.api_key or [os.environ.get("VLLM_API_KEY")]
    headers = [(name, value) for name, value in scope["headers"] if name != b"authorization"]
    if given[0]:
        headers.append((b"authorization", b"Bearer " + given[0].encode()))
    return {**scope, "headers": headers}


def _refused(scope: Scope) -> JSONResponse | WebSocketClose:
    if scope["type"] == "websocket":
        return WebSocketClose()
    return refusal(
        401,
        "administration needs 'Authorization: Bearer' with the admin key: what the server has in "
        f"{ADMIN_KEY}, or else in the file that it names when it starts",
        {"WWW-Authenticate": "Bearer"},
    )
