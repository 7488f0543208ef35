"""What a refusal is to who asked: an HTTP status, and an error in vLLM's form."""

from __future__ import annotations

import errno
import sqlite3
from http import HTTPStatus

from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import GracefulHTTPError

from guilomo_serve.adapter import AdapterError
from guilomo_serve.catalogue import CatalogueError, Forbidden, Missing, Unavailable
from guilomo_serve.catalogue.remote import Busy

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota, a process's limit
REFUSALS = (AdapterError, CatalogueError, OSError, sqlite3.Error)


class Unknown(CatalogueError):
    """The catalogue has no adapter of that name."""


class NoRoom(AdapterError):
    """All that is loaded is in use or pinned, and one adapter more would exceed the memory."""


class OutOfTouch(CatalogueError):
    """The catalogue that replicas share cannot be asked, or this one may have missed a change."""


class Declined(AdapterError):
    """A replica cannot serve a version, so none does.

    Attributes:
        status: HTTP's, as that replica would have said it.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def status_of(error: Exception) -> HTTPStatus:
    """The HTTP status that says what a refusal means to a client."""
    if isinstance(error, Declined):
        return HTTPStatus(error.status)
    if isinstance(error, (Missing, Unknown)):
        return HTTPStatus.NOT_FOUND
    if isinstance(error, Forbidden):
        return HTTPStatus.FORBIDDEN
    if isinstance(error, (Busy, NoRoom, OutOfTouch)):
        return HTTPStatus.SERVICE_UNAVAILABLE
    if isinstance(error, Unavailable):
        return HTTPStatus.BAD_GATEWAY
    if isinstance(error, CatalogueError):
        return HTTPStatus.CONFLICT
    if isinstance(error, AdapterError):
        return HTTPStatus.BAD_REQUEST
    if isinstance(error, OSError) and error.errno not in _DISK_FULL:
        return HTTPStatus.INTERNAL_SERVER_ERROR
    return HTTPStatus.INSUFFICIENT_STORAGE


def error_response(error: Exception, prefix: str = "") -> ErrorResponse:
    """A refusal in the form of vLLM's errors, for an administrator: paths are in it as they are."""
    status = status_of(error)
    kinds = {
        HTTPStatus.NOT_FOUND: "NotFoundError",
        HTTPStatus.FORBIDDEN: "PermissionDeniedError",
        HTTPStatus.BAD_GATEWAY: "BadGatewayError",
    }
    kind = kinds.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    response = create_error_response(f"{prefix}{error}", kind, status)
    response.error.message = f"{prefix}{error}"  # vLLM puts "<path>" for paths
    return response


def not_now(name: str, error: Unavailable | NoRoom | OutOfTouch) -> GracefulHTTPError:
    """What may go better later, for a client: an exception, as vLLM makes 404 of other errors."""
    return GracefulHTTPError(
        f"The adapter {name!a} cannot be loaded now: {error}", status_of(error)
    )


def not_allowed() -> ErrorResponse:
    return create_error_response(
        "only an administrator may change adapters", "PermissionDeniedError", HTTPStatus.FORBIDDEN
    )
