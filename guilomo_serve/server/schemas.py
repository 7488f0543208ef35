"""What /v1/adapters answers, for /openapi.json and for the answers themselves, which FastAPI checks
against it; and errors in the form of OpenAI's API, which its clients know how to read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Path, Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from guilomo_serve.catalogue.settings import NAME, NAME_LENGTH

OURS = ("/v1/adapters", "/ready")
_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
}


class _Answer(BaseModel):
    # An answer with more than is described would be an error, not a secret.
    model_config = ConfigDict(extra="forbid")


class Spread(_Answer):
    """A count over an adapter's modules."""

    min: float
    mean: float
    max: float


class PerModule(_Answer):
    experts: Spread
    rank: Spread = Field(description="the sum of the ranks of a module's experts")


class AdapterVersion(_Answer):
    """A version of an adapter: what a name stands or stood for."""

    name: str
    version: int | None = Field(description="unique on this server; null for a dry run")
    digest: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of the adapter's two files")
    kind: Literal["guilomo", "lora"]
    base: str | None = Field(description="the base model that its config names")
    task: str | None
    modules: int
    experts: int
    rank: int = Field(description="the sum of all experts' ranks")
    per_module: PerModule
    bytes: int = Field(description="size of the weights file")
    source: str = Field(description="where it was taken from")
    created: str = Field(description="ISO 8601, when it was put")
    warnings: list[str] = Field(description="what cannot be known of it, such as its base")


class Adapter(AdapterVersion):
    """A name's current version, and how it is used."""

    previous_version: int | None = Field(description="what a rollback goes back to")
    pinned: bool
    resident: bool = Field(description="whether its weights are in memory")
    in_flight: int = Field(description="requests that run or wait")
    last_used: str | None = Field(description="ISO 8601")
    error: str | None = Field(description="why it could not be loaded when that was last tried")


class AdapterDetails(Adapter):
    """An adapter with its allocation, and the versions that can be served."""

    allocation: dict[str, list[int]] = Field(description="module -> ranks of its experts")
    versions: list[AdapterVersion]


class AdapterPut(AdapterDetails):
    """An adapter that was put."""

    dry_run: Literal[False]


class AdapterChecked(AdapterVersion):
    """An adapter that was checked, and not put."""

    dry_run: Literal[True]


class AdapterList(_Answer):
    object: Literal["list"]
    data: list[Adapter]
    has_more: bool = Field(description="whether others come `after` the last of these")


class ModuleLoad(_Answer):
    """How a module's router shares tokens out."""

    tokens: int = Field(description="sampled since the version was loaded")
    share: list[float] = Field(description="of each expert in the router's choices; they sum to 1")
    entropy: float = Field(description="mean entropy of the routing over that of an even one")


class AdapterLoad(_Answer):
    """How an adapter's routers share tokens out, of sampled ones."""

    name: str
    version: int
    tokens: int
    modules: dict[str, ModuleLoad] = Field(description="those that have a router")


class AdapterDeleted(_Answer):
    name: str
    deleted: Literal[True]


class Ready(_Answer):
    status: Literal["ready"]


class ErrorDetails(_Answer):
    message: str
    type: str
    param: str | None = Field(description="the field that is wrong, if it is one")
    code: int = Field(description="the HTTP status")


class Error(_Answer):
    """An error, as OpenAI's API has it."""

    error: ErrorDetails


# Described, not checked: what is wrong with a name is said better by check_name and the catalogue.
Name = Annotated[
    str,
    Path(json_schema_extra={"pattern": f"^{NAME}$", "maxLength": NAME_LENGTH}),
]


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`: those statuses that it has of its own, and those of all."""
    meanings = {
        400: "the request, or the adapter, is refused",
        401: "the admin key is missing or wrong",
        403: "not from here, or not from there: rights of the client, or the place of the adapter",
        404: "there is no such adapter, or no such folder",
        409: "the catalogue does not have what is asked for",
        413: "the body is too large",
        500: "the server, or its disk, has failed",
        502: "the storage that the adapter lies in cannot be asked",
        503: "the server ends, its engine has, no memory is left, or replicas are out of touch",
        507: "the disk is full, or cannot be written",
    }
    found = sorted({401, 403, 413, 500, 503, *statuses})
    return {status: {"model": Error, "description": meanings[status]} for status in found}


def refusal(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error as an answer."""
    details = {"message": message, "type": _TYPES.get(status, "Error"), "param": None}
    return JSONResponse({"error": {**details, "code": status}}, status, headers)


def describe(app: FastAPI) -> None:
    """Makes what FastAPI adds to our routes true: its errors, and what it says of them."""
    theirs = app.openapi

    def openapi() -> dict[str, Any]:
        schema = theirs()
        for path, operations in schema["paths"].items():
            if path.startswith(OURS):
                for operation in operations.values():
                    operation["responses"].pop("422", None)  # vLLM makes a 400 of it
        return schema

    async def answer(request: Request, error: Exception) -> Response:
        """Unknown paths and methods; Starlette's errors are not FastAPI's, which vLLM handles."""
        assert isinstance(error, HTTPException)
        if request.url.path.startswith(OURS):
            return refusal(error.status_code, error.detail, error.headers)
        return await http_exception_handler(request, error)

    app.openapi = openapi  # type: ignore[method-assign]
    app.add_exception_handler(HTTPException, answer)
