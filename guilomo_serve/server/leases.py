"""One lease a request: what runs, for which adapter, and with which of its versions.

A lease opens when a request arrives. It takes the adapter's name as soon as it is known that there
is such an adapter, and one version of it once that is loaded; the request keeps this version,
whatever the name stands for later. The lease ends with the last byte of the response, or when the
client leaves, and not before the engine has ended the last of the request's prompts.

Whoever wants to know what is in use asks here: limits, eviction, retirement of old versions, what
is in flight, draining and metrics.

The seam, for vLLM 0.32: `OutputProcessor` (v1/engine/output_processor.py) has each engine request
from `add_request`, which is called in the context of the HTTP request, until it is gone from
`request_states` after `process_outputs` or `abort_requests`. Were these renamed, a version could be
freed while the engine ends what its client has left. `OpenAIServingResponses.background_tasks`
gets each answer that goes on after its HTTP response.
"""

from __future__ import annotations

import asyncio
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException
from starlette.responses import JSONResponse
from vllm.lora.request import LoRARequest
from vllm.v1.engine.output_processor import OutputProcessor

from guilomo_serve.catalogue.settings import Admission
from guilomo_serve.runtime.identity import public_name
from guilomo_serve.server.access import App, Scope
from guilomo_serve.server.schemas import refusal

READING = ("GET", "HEAD", "OPTIONS")
_RETRY_AFTER_S = 1  # most requests end within seconds

T = TypeVar("T")


class Lease:
    """What one request holds.

    Attributes:
        reads: whether it is a request that only reads, and asks no model.
        asked: the model that it names, if vLLM has asked for it.
        name: the adapter that it takes.
        version: the version of it that the request uses.
        began: seconds since 1970.
        status: of its HTTP response, once that has begun.
        left: whether its client went away before the last byte.
        reached_engine: whether the engine got a prompt of it.
        has_token: whether an answer to it has begun.
        engine_said: "aborted" or "failed", if the engine ended a prompt of it so.
        refusal: what it is answered in place of vLLM's own error.
    """

    def __init__(self, leases: Leases, reads: bool) -> None:
        self._leases = leases
        self._holds = 1  # its response, each of its requests in the engine, a background task
        self.reads = reads
        self.asked: str | None = None
        self.name: str | None = None
        self.version: LoRARequest | None = None
        self.began = time.time()
        self.status: int | None = None
        self.left = False
        self.reached_engine = False
        self.has_token = False
        self.engine_said: str | None = None
        self.refusal: JSONResponse | None = None

    def take(self, name: str) -> None:
        """Counts the request as one of an adapter's; from now on the name is in use.

        Raises:
            HTTPException: the adapter has as many as it may have, or the request has another one.
        """
        if name == self.name or not self._holds:
            return
        if self.name is not None:
            raise HTTPException(400, f"a request asks one adapter, this one has {self.name!a}")
        limit = self._leases.limit_of(name)
        if limit is not None and self._leases.of(name) >= limit:
            self.refusal = refusal(
                429,
                f"the adapter {name!a} has as many requests as it may have at once ({limit}); "
                "try again when one has finished",
                {"Retry-After": str(_RETRY_AFTER_S)},
            )
            raise HTTPException(429)
        self.name = name
        self._leases.took(self)

    def bind(self, version: LoRARequest) -> None:
        """Gives the request its version, of the name that it took. The first one stays."""
        if self.version is None and self._holds:
            self.version = version
            self._leases.bound(self)

    def hold(self) -> None:
        """Keeps the lease open until one more `let_go`."""
        self._holds += 1

    def let_go(self) -> None:
        """Ends the lease if nothing holds it any more."""
        self._holds -= 1
        if not self._holds:
            self._leases.ended(self)


class Leases:
    """The leases of this process's server.

    Attributes:
        admission: how many each adapter may have at once.
        last_used: name -> when a request last took it or gave it back, in seconds since 1970.
        when_ended: are called with each lease that has ended.
    """

    def __init__(self) -> None:
        self._open: set[Lease] = set()
        self._of_name: Counter[str] = Counter()
        self._of_version: Counter[int] = Counter()
        self.admission = Admission()
        self.last_used: dict[str, float] = {}
        self.when_ended: list[Callable[[Lease], None]] = []

    def limit_of(self, name: str) -> int | None:
        return self.admission.max_concurrency_of.get(name, self.admission.max_concurrency)

    def open(self, reads: bool) -> Lease:
        lease = Lease(self, reads)
        self._open.add(lease)
        return lease

    def working(self) -> int:
        """How many requests there are that do not only read."""
        return sum(not lease.reads for lease in self._open)

    def of(self, name: str) -> int:
        """How many requests have an adapter's name."""
        return self._of_name[name]

    def of_version(self, version: int) -> int:
        """How many requests use a version."""
        return self._of_version[version]

    def took(self, lease: Lease) -> None:
        assert lease.name is not None
        self._of_name[lease.name] += 1
        self.last_used[lease.name] = lease.began

    def bound(self, lease: Lease) -> None:
        assert lease.version is not None
        self._of_version[lease.version.lora_int_id] += 1

    def ended(self, lease: Lease) -> None:
        self._open.remove(lease)
        if lease.name is not None:
            _one_less(self._of_name, lease.name)
            self.last_used[lease.name] = time.time()
        if lease.version is not None:
            _one_less(self._of_version, lease.version.lora_int_id)
        for tell in self.when_ended:
            tell(lease)


def _one_less(counts: Counter[T], key: T) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]  # or each that ever was would stay


leases = Leases()
_current: ContextVar[Lease | None] = ContextVar("lease", default=None)


def current_lease() -> Lease | None:
    """The lease of the request at hand; None where there is none, as in tests of parts."""
    return _current.get()


class Leasing:
    """ASGI middleware: opens a lease for each request, and lets it go when its response ends."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket") or _current.get() is not None:
            await self._app(scope, receive, send)
            return
        lease, complete = leases.open(scope.get("method") in READING), False

        async def receive_watched() -> Any:
            message = await receive()
            if message["type"] == "http.disconnect" and not complete:
                lease.left = True
            return message

        async def send_watched(message: Any) -> None:
            nonlocal complete
            if message["type"] == "http.response.start":
                lease.status = message["status"]
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                complete = True
            await send(message)

        token = _current.set(lease)
        try:
            await self._app(scope, receive_watched, send_watched)
        finally:
            _current.reset(token)
            lease.let_go()


class LeasedOutputProcessor(OutputProcessor):
    """vLLM's, which holds the lease of a request as long as the engine has a prompt of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lease_of: dict[str, Lease] = {}

    def add_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        super().add_request(request, *args, **kwargs)
        state = self.request_states[request.request_id]
        if state.lora_name is not None:  # the label of vllm:lora_requests_info
            state.lora_name = public_name(state.lora_name)
        lease = current_lease()
        if lease is not None and request.request_id not in self._lease_of:
            lease.hold()
            lease.reached_engine = True
            self._lease_of[request.request_id] = lease

    def process_outputs(self, engine_core_outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        result = super().process_outputs(engine_core_outputs, *args, **kwargs)
        self._let_go(output.request_id for output in engine_core_outputs)
        return result

    def abort_requests(self, request_ids: Iterable[str], internal: bool) -> list[str]:
        aborted = super().abort_requests(request_ids, internal)
        self._let_go(aborted)
        return aborted

    def _let_go(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            if request_id not in self.request_states:
                lease = self._lease_of.pop(request_id, None)
                if lease is not None:
                    lease.let_go()


class LeasePlugin:
    """What any server with the plugin needs for leases, in the form of vLLM's endpoint plugins."""

    name = "guilomo_leases"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        app.add_middleware(Leasing)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        responses = getattr(state, "openai_serving_responses", None)
        if responses is not None:
            responses.background_tasks = LeasedTasks()


class LeasedTasks(dict[str, asyncio.Task[Any]]):
    """Tasks that go on after their HTTP response, each of which holds its request's lease."""

    def __setitem__(self, name: str, task: asyncio.Task[Any]) -> None:
        super().__setitem__(name, task)
        lease = current_lease()
        if lease is not None:
            lease.hold()
            task.add_done_callback(lambda _: lease.let_go())
