"""When a lease ends, by the application that has it: what servers cannot be brought to at will."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from httpx import ASGITransport, AsyncClient
from vllm.lora.request import LoRARequest

from guilomo_serve.server.leases import LeasedTasks, Leasing, current_lease, leases

VERSION = LoRARequest("support@7", 7, "/copies/of/it")


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()
    app.add_middleware(Leasing)
    return app


def ask(app: FastAPI, method: str = "POST") -> None:
    async def asking() -> None:
        async with AsyncClient(transport=ASGITransport(app), base_url="http://server") as client:
            assert (await client.request(method, "/")).status_code == 200

    asyncio.run(asking())


def test_a_stream_has_its_version_until_its_last_byte(app):
    seen = []

    async def stream() -> AsyncIterator[str]:
        seen.append((leases.of("support"), leases.of_version(7), leases.working()))
        yield "a"
        await asyncio.sleep(0)
        seen.append((leases.of("support"), leases.of_version(7), leases.working()))
        yield "b"

    @app.post("/")
    async def route() -> StreamingResponse:
        lease = current_lease()
        lease.take("support")
        lease.take("support")  # as often as vLLM asks
        lease.bind(VERSION)
        return StreamingResponse(stream())

    ask(app)
    assert seen == [(1, 1, 1), (1, 1, 1)]
    assert (leases.of("support"), leases.of_version(7), leases.working()) == (0, 0, 0)
    assert leases.last_used["support"] > 0


def test_what_goes_on_after_its_response_has_its_version(app):
    tasks, seen = LeasedTasks(), []

    @app.post("/")
    async def route() -> dict[str, str]:
        lease = current_lease()
        lease.take("support")
        lease.bind(VERSION)
        tasks["answer"] = asyncio.create_task(asyncio.Event().wait())
        return {}

    @app.get("/")
    async def look() -> dict[str, str]:
        seen.append(leases.of_version(7))
        return {}

    async def asking() -> None:
        async with AsyncClient(transport=ASGITransport(app), base_url="http://server") as client:
            await client.post("/")
            await client.get("/")
            tasks["answer"].cancel()
            await asyncio.wait([tasks["answer"]])
            await asyncio.sleep(0)

    asyncio.run(asking())
    assert seen == [1]
    assert leases.of_version(7) == 0


def test_a_lease_that_has_ended_takes_nothing_more(app):
    """As a task does that outlives its client."""
    late = []

    @app.post("/")
    async def route() -> dict[str, str]:
        late.append(current_lease())
        return {}

    ask(app)
    (lease,) = late
    lease.take("support")
    lease.bind(VERSION)
    assert (leases.of("support"), leases.of_version(7)) == (0, 0)


def test_a_request_has_one_adapter(app):
    @app.post("/")
    async def route() -> dict[str, str]:
        current_lease().take("support")
        with pytest.raises(HTTPException) as refused:
            current_lease().take("another")
        assert refused.value.status_code == 400
        assert (leases.of("support"), leases.of("another")) == (1, 0)
        return {}

    ask(app)


def test_who_only_reads_is_not_waited_for(app):
    @app.get("/")
    async def route() -> dict[str, str]:
        assert leases.working() == 0
        return {}

    ask(app, "GET")
