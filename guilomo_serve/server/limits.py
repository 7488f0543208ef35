"""Bounds on what clients may ask at once: requests of one adapter, and bytes of a body.

A body that is too large is refused before it is read, or, if its length is not said, as soon as it
is. How many requests an adapter may have is known only once vLLM has found the adapter: a
request's `model` may come in a body, a form or a header. So a request carries a ticket, on which
vLLM's question for the adapter (`Current` in residency.py) is noted, and which is given back when
the response has ended, however it did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from guilomo_serve.catalogue.settings import Settings
from guilomo_serve.server.access import App, Scope, is_administrative
from guilomo_serve.server.schemas import refusal

_MAX_ADMIN_BODY = 64 * 2**10  # bytes; a path of 4,096 characters has 24 KiB at most in JSON
_RETRY_AFTER_S = 1  # most requests end within seconds


class Admission:
    """How many requests each adapter has, and may have.

    Args:
        everyone: for each adapter without a limit of its own; None: no limit.
        named: adapter -> its own limit.
    """

    def __init__(self, everyone: int | None, named: Mapping[str, int]) -> None:
        self._everyone = everyone
        self._named = named
        self.running: Counter[str] = Counter()

    def limit_of(self, name: str) -> int | None:
        return self._named.get(name, self._everyone)


class _Ticket:
    """What one HTTP request holds, and what it is answered if it is refused."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._held: set[str] = set()
        self.refusal: JSONResponse | None = None

    def take(self, name: str) -> None:
        if name in self._held:
            return
        limit = self._admission.limit_of(name)
        if limit is not None and self._admission.running[name] >= limit:
            self.refusal = refusal(
                429,
                f"the adapter {name!a} has as many requests as it may have at once ({limit}); "
                "try again when one has finished",
                {"Retry-After": str(_RETRY_AFTER_S)},
            )
            raise HTTPException(429)
        self._admission.running[name] += 1
        self._held.add(name)

    def give_back(self) -> None:
        self._admission.running.subtract(self._held)
        for name in self._held:
            if not self._admission.running[name]:
                del self._admission.running[name]  # or any name ever asked for would stay


_ticket: ContextVar[_Ticket | None] = ContextVar("ticket", default=None)


def admit(name: str) -> None:
    """Counts the request at hand as one of an adapter's, once.

    Raises:
        HTTPException: the adapter has as many as it may have. The middleware answers.
    """
    ticket = _ticket.get()
    if ticket is not None:
        ticket.take(name)


class Limits:
    """ASGI middleware around the whole server (vLLM's `--middleware`)."""

    def __init__(self, app: App) -> None:
        self._app = app
        settings = Settings.from_environment()
        assert settings is not None
        self._max_body = settings.max_body
        self._admission = Admission(settings.max_concurrency, settings.max_concurrency_of)

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        administrative = is_administrative(scope)
        bound = _MAX_ADMIN_BODY if administrative else self._max_body
        length = Headers(scope=scope).get("content-length", "0")
        if int(length) > bound:  # what is no number has been refused by the HTTP server
            await _too_large(bound)(scope, receive, send)
            return
        ticket, received = _Ticket(self._admission), 0

        async def bounded() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > bound:
                ticket.refusal = _too_large(bound)
                raise HTTPException(413)
            return message

        async def answer(message: Any) -> None:
            # vLLM's routes make an answer of a refusal each in its own way; this is ours.
            if ticket.refusal is None:
                await send(message)
            elif message["type"] == "http.response.start":
                await ticket.refusal(scope, receive, send)

        token = _ticket.set(None if administrative else ticket)
        try:
            await self._app(scope, bounded, answer)
        finally:
            _ticket.reset(token)
            ticket.give_back()


def _too_large(bound: int) -> JSONResponse:
    return refusal(413, f"the body is too large: expected at most {bound} bytes")
