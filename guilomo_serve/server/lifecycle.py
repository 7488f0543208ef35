"""A server that is ready or not, and an end that cuts nobody off.

`/health` is vLLM's: whether the engine lives, so that a supervisor restarts what is dead. `/ready`
is whether new requests should come here. (While the server starts nothing listens.)

On SIGTERM or SIGINT the server is no longer ready and refuses new work with 503. What runs has
`--drain-timeout` seconds to end, and is aborted then, or at a second signal. Only then does vLLM
stop the engine and the process ends with status 0. vLLM alone would stop the engine first, while
responses are still on their way, and take new requests until then. A server that ends though
nobody asked it to, because its engine died, has status 1. Until the server is there, and where
something keeps it from ending, see guilomo_serve/ending.py.

The seam, for vLLM 0.32: `serve_http` sets its signal handlers before the app's lifespan begins,
where ours take their place; `app.state.server` is uvicorn's and ends by `should_exit`, after which
vLLM stops the engine; `output_processor.request_states` has what runs, `abort` ends it.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import JSONResponse
from vllm.logger import init_logger

from guilomo_serve.ending import end_within
from guilomo_serve.server.access import App, Scope
from guilomo_serve.server.leases import READING, leases
from guilomo_serve.server.schemas import Error, Ready, refusal

logger = init_logger("vllm.guilomo")

_POLL_S = 0.1
_RETRY_AFTER_S = 5  # by when a load balancer has found another server
# For the last bytes to a client that does not read, when all requests have ended.
_CLOSING_S = 5
# For vLLM to stop its engine, which does nothing by then.
_STOPPING_S = 10


async def _nothing() -> None:
    """What a server does that has no replicas."""


class _Life:
    """This process's server; there is one."""

    def __init__(self) -> None:
        self._app: FastAPI | None = None
        self._ending: asyncio.Task[None] | None = None
        self._hurried = False
        self.out_of_touch: Callable[[], str | None] = lambda: None
        self.leave: Callable[[], Awaitable[None]] = _nothing

    def begin(self, app: FastAPI) -> None:
        self._app = app
        app.state.server.config.timeout_graceful_shutdown = _CLOSING_S
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._end)

    @property
    def refusing(self) -> str | None:
        """Why new requests should not come here; None if they should."""
        if self._ending is not None:
            return "the server is shutting down; it finishes what runs and takes nothing new"
        if self._app is None or self._app.state.engine_client.errored:
            return "the engine has died; the server ends, to be restarted"
        return None

    @property
    def was_ended(self) -> bool:
        return self._ending is not None

    def _end(self) -> None:
        if self._ending is None:
            self._ending = asyncio.create_task(self._drain())
        else:
            self._hurried = True

    async def _drain(self) -> None:
        assert self._app is not None
        server, engine = self._app.state.server, self._app.state.engine_client
        timeout = engine.vllm_config.shutdown_timeout
        logger.info("Shutting down: %d requests have %d s to finish", leases.working(), timeout)
        for connection in list(server.server_state.connections):
            connection.shutdown()  # it closes when its response has ended
        deadline = time.monotonic() + timeout
        while leases.working() and time.monotonic() < deadline and not self._hurried:
            await asyncio.sleep(_POLL_S)
        if leases.working():
            logger.warning("Shutting down: %d requests are aborted", leases.working())
            await engine.abort(list(engine.output_processor.request_states), internal=True)
        await self.leave()
        server.should_exit = True
        end_within(_CLOSING_S + _STOPPING_S, 0)


_life = _Life()


class Lifecycle:
    """ASGI middleware around the whole server (vLLM's `--middleware`)."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            _life.begin(scope["app"])
        if scope["type"] != "http" or scope["method"] in READING:
            await self._app(scope, receive, send)
            return
        if _life.refusing:
            await _refused(_life.refusing)(scope, receive, send)
            return
        await self._app(scope, receive, send)


router = APIRouter(tags=["lifecycle"])


@router.get(
    "/ready",
    response_model=Ready,
    responses={
        503: {
            "model": Error,
            "description": "the server ends, or its engine has, or it has lost its replicas",
        }
    },
)
async def ready() -> Any:
    """Whether new requests should come here: the adapters are restored and the engine lives.

    A replica that may have missed a change of the shared catalogue is not ready either.
    """
    reason = _life.refusing or _life.out_of_touch()
    return _refused(reason) if reason else {"status": "ready"}


def is_replica(
    out_of_touch: Callable[[], str | None], leave: Callable[[], Awaitable[None]]
) -> None:
    """Makes this process's server one of several.

    Args:
        out_of_touch: says why it may serve no adapters; None while it may.
        leave: is awaited when what ran has ended, before the server does.
    """
    _life.out_of_touch, _life.leave = out_of_touch, leave


def exit_status() -> int:
    """Of a process whose server has ended: 0 if it was asked to end."""
    return 0 if _life.was_ended else 1


def _refused(reason: str) -> JSONResponse:
    # Closed, or a client would ask this server again over the connection it has.
    return refusal(503, reason, {"Retry-After": str(_RETRY_AFTER_S), "Connection": "close"})
