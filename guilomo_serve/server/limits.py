"""Bounds on what clients may send and ask: bytes of a body, and requests of one adapter.

A body that is too large is refused before it is read, or, if its length is not said, as soon as it
is. How many requests an adapter may have is known only once vLLM has found the adapter, since a
request's `model` may come in a body, a form or a header: its lease is refused then (leases.py).
"""

from __future__ import annotations

from typing import Any

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from guilomo_serve.server.access import App, Scope, is_administrative
from guilomo_serve.server.leases import current_lease, leases
from guilomo_serve.server.schemas import refusal

_MAX_ADMIN_BODY = 64 * 2**10  # bytes; a path of 4,096 characters has 24 KiB at most in JSON


class Limits:
    """ASGI middleware around the whole server (vLLM's `--middleware`)."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        bound = _MAX_ADMIN_BODY if is_administrative(scope) else leases.admission.max_body
        length = Headers(scope=scope).get("content-length", "0")
        if int(length) > bound:  # what is no number has been refused by the HTTP server
            await _too_large(bound)(scope, receive, send)
            return
        lease, received = current_lease(), 0
        assert lease is not None

        async def bounded() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > bound:
                lease.refusal = _too_large(bound)
                raise HTTPException(413)
            return message

        async def answer(message: Any) -> None:
            # vLLM's routes make an answer of a refusal each in its own way; this is ours.
            if lease.refusal is None:
                await send(message)
            elif message["type"] == "http.response.start":
                await lease.refusal(scope, receive, send)

        await self._app(scope, bounded, answer)


def _too_large(bound: int) -> JSONResponse:
    return refusal(413, f"the body is too large: expected at most {bound} bytes")
