"""`/v1/adapters`: what is served, and changing it.

GET    /v1/adapters?limit=&after=    a page of adapters
GET    /v1/adapters/{name}           one, with its allocation and its versions
GET    /v1/adapters/{name}/load      how its routers share tokens out, of sampled ones
PUT    /v1/adapters/{name}           {"source": folder or address, "digest": ..., "dry_run": false}
DELETE /v1/adapters/{name}
POST   /v1/adapters/{name}/rollback  the version before, as a new version
POST   /v1/adapters/{name}/pin       keep its weights in memory; /unpin ends that
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from guilomo_serve.catalogue import Entry, Version
from guilomo_serve.server import lifecycle
from guilomo_serve.server.access import administrating
from guilomo_serve.server.errors import REFUSALS, error_response
from guilomo_serve.server.inspection import summary
from guilomo_serve.server.managed import ManagedServingModels
from guilomo_serve.server.schemas import (
    AdapterChecked,
    AdapterDeleted,
    AdapterDetails,
    AdapterList,
    AdapterLoad,
    AdapterPut,
    Name,
    describe,
    errors,
)
from guilomo_serve.server.versions import Versions
from guilomo_serve.timing import Parts


class PutBody(BaseModel):
    """The body of PUT: where the adapter is, and what it is expected to be."""

    model_config = ConfigDict(extra="forbid", strict=True)

    source: str = Field(min_length=1, max_length=4096)
    digest: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    dry_run: bool = False


class AdapterRoutes:
    """The routes in the form of vLLM's endpoint plugins."""

    name = "guilomo"
    required_tasks = None  # those that pool, too

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)
        app.include_router(lifecycle.router)
        describe(app)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Nothing to do: the routes use vLLM's list of models, which is ours."""


def _administrator() -> None:
    if not administrating.get():
        raise HTTPException(403, "only an administrator may see or change adapters")


async def _versions(request: Request) -> Versions:
    _administrator()
    models = request.app.state.openai_serving_models
    assert isinstance(models, ManagedServingModels)
    if reason := models.versions.out_of_touch():
        raise HTTPException(503, reason)
    return models.versions


Served = Annotated[Versions, Depends(_versions)]
router = APIRouter(prefix="/v1/adapters", tags=["adapters"])
# Adapters that a list reads before the next tokens of streams have their turn: a hundred with 210
# modules each take 17 ms, the time of half a step.
_AT_ONCE = 10


@router.get("", response_model=AdapterList, responses=errors(400))
async def list_adapters(
    versions: Served,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str, Query(max_length=128)] = "",
) -> Any:
    """Adapters in the order of their names: the first `limit` of those that come after a name."""
    found: list[dict[str, Any]] = []
    while len(found) <= limit:
        wanted = min(_AT_ONCE, limit + 1 - len(found))
        entries = versions.catalogue.page(after, wanted)
        resident = versions.resident()
        found += [_shown(versions, name, entry, resident) for name, entry in entries.items()]
        if len(entries) < wanted:
            break
        after = found[-1]["name"]
        await asyncio.sleep(0)
    return {"object": "list", "data": found[:limit], "has_more": len(found) > limit}


@router.get("/{name:path}/load", response_model=AdapterLoad, responses=errors(404))
async def get_load(name: Name, versions: Served) -> Any:
    """The share of each expert in the choices of each router, and the routers' entropy."""
    try:
        return await versions.load_of(name)
    except REFUSALS as e:
        return _failed(e)


@router.get("/{name:path}", response_model=AdapterDetails, responses=errors(404))
async def get_adapter(name: Name, versions: Served) -> Any:
    """One adapter, with the ranks of each module's experts and the versions one can serve."""
    try:
        return _detailed(versions, name)
    except REFUSALS as e:
        return _failed(e)


@router.put(
    "/{name:path}",
    response_model=AdapterPut | AdapterChecked,
    responses=errors(400, 404, 502, 507),
)
async def put_adapter(name: Name, body: PutBody, versions: Served, response: Response) -> Any:
    """Adds or replaces an adapter; answers once new requests get it.

    `Server-Timing` says what took the time.
    """
    try:
        source = versions.find(body.source)
        parts = Parts.begin()
        version = await versions.put(name, source, body.dry_run, body.digest)
        response.headers["Server-Timing"] = parts.header()
        if body.dry_run:
            return {**_described(version), "dry_run": True}
        return {**_detailed(versions, name), "dry_run": False}
    except REFUSALS as e:
        return _failed(e)


@router.delete("/{name:path}", response_model=AdapterDeleted, responses=errors(404, 507))
async def delete_adapter(name: Name, versions: Served) -> Any:
    """Takes an adapter away; its running requests finish."""
    try:
        await versions.delete(name)
    except REFUSALS as e:
        return _failed(e)
    return {"name": name, "deleted": True}


@router.post(
    "/{name:path}/rollback",
    response_model=AdapterDetails,
    responses=errors(400, 404, 409, 507),
)
async def roll_back(name: Name, versions: Served) -> Any:
    """Serves what the name stood for before, as a new version."""
    try:
        await versions.rollback(name)
        return _detailed(versions, name)
    except REFUSALS as e:
        return _failed(e)


@router.post("/{name:path}/pin", response_model=AdapterDetails, responses=errors(400, 404, 507))
async def pin(name: Name, versions: Served) -> Any:
    """Keeps an adapter's weights in memory while nobody asks for it; loads them if they are not."""
    return await _pin(versions, name, True)


@router.post("/{name:path}/unpin", response_model=AdapterDetails, responses=errors(404, 507))
async def unpin(name: Name, versions: Served) -> Any:
    """Lets an adapter that nobody asks for be evicted again."""
    return await _pin(versions, name, False)


async def _pin(versions: Versions, name: str, pinned: bool) -> Any:
    try:
        await versions.pin(name, pinned)
        return _detailed(versions, name)
    except REFUSALS as e:
        return _failed(e)


def _detailed(versions: Versions, name: str) -> dict[str, Any]:
    resident = versions.resident()
    entry = versions.entry(name)
    known = [v for v in (entry.current, entry.previous) if v is not None]
    return {
        **_shown(versions, name, entry, resident),
        "allocation": entry.current.about["allocation"],
        "versions": [_described(version) for version in known],
    }


def _shown(versions: Versions, name: str, entry: Entry, resident: set[int]) -> dict[str, Any]:
    return {
        **_described(entry.current),
        "previous_version": entry.previous.number if entry.previous else None,
        "pinned": entry.pinned,
        "resident": versions.request_of(entry.current).lora_int_id in resident,
        "in_flight": versions.in_flight(name),
        "last_used": _time(versions.last_used(name)),
        "error": versions.failed.get(name),
    }


def _described(version: Version) -> dict[str, Any]:
    return {
        "name": version.name,
        "version": version.number or None,
        "digest": version.digest,
        "kind": version.about["kind"],
        "base": version.about["base"],
        "task": version.about["task"],
        **summary(version.about),
        "bytes": version.size,
        "source": version.source,
        "created": _time(version.created),
        "warnings": version.about.get("warnings", []),
    }


def _time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _failed(error: Exception) -> JSONResponse:
    response = error_response(error)
    return JSONResponse(response.model_dump(), status_code=response.error.code)
