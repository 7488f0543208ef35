"""Adapters in S3 and in what speaks its protocol, over s3fs.

Endpoint, region and credentials come from where AWS's own tools have them (AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, profiles, roles) or from fsspec's settings (FSSPEC_S3_ANON=true for public
buckets). The objects themselves are asked for by s3fs's client: one request reads a file, under the
condition that it still has the entity tag that was seen.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import s3fs
from botocore.exceptions import (
    ClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)
from fsspec.asyn import sync

from guilomo_serve.adapter import AdapterError
from guilomo_serve.catalogue.remote import (
    ANSWER_S,
    CONNECT_S,
    Address,
    Busy,
    Denied,
    Found,
    Unavailable,
    seconds_of,
)
from guilomo_serve.catalogue.store import FILES, Missing

_PIECE = 2**20

T = TypeVar("T")


class S3:
    """S3 as a `Storage`."""

    def __init__(self) -> None:
        self._files = s3fs.S3FileSystem(
            skip_instance_cache=True,
            config_kwargs={
                "connect_timeout": CONNECT_S,
                "read_timeout": ANSWER_S,
                "retries": {"mode": "standard", "total_max_attempts": 2},
            },
        )

    def look(self, address: Address) -> Found:
        tags: dict[str, str] = {}
        sizes: dict[str, int] = {}
        for name in FILES:
            try:
                tags[name], sizes[name] = self._ask(address, self._head, address, name)
            except Missing:
                if not sizes:
                    raise
                raise AdapterError(f"{address}: the file {name} is missing") from None
        revision = "+".join(tags[name] for name in FILES)
        if address.revision not in (None, revision):
            raise Missing(f"{address}: the files have changed, they are of {revision} now")
        return Found(revision, sizes)

    def read(self, address: Address, name: str) -> Generator[bytes, None, None]:
        pieces = self._pieces(address, name)
        try:
            while piece := self._ask(address, _next, pieces):
                yield piece
        finally:
            self._ask(address, pieces.aclose)

    async def _head(self, address: Address, name: str) -> tuple[str, int]:
        """A file's entity tag and size."""
        client = await self._files.set_session()
        head = await client.head_object(Bucket=address.parts[0], Key=_key(address, name))
        return head["ETag"].strip('"'), head["ContentLength"]

    async def _pieces(self, address: Address, name: str) -> AsyncGenerator[bytes, None]:
        assert address.revision is not None
        tag = dict(zip(FILES, address.revision.split("+"), strict=True))[name]
        client = await self._files.set_session()
        answer = await client.get_object(
            Bucket=address.parts[0], Key=_key(address, name), IfMatch=f'"{tag}"'
        )
        async with answer["Body"] as body:
            while piece := await body.read(_PIECE):
                yield piece

    def _ask(self, address: Address, ask: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Runs a coroutine in fsspec's own thread, for as long as a storage may be silent."""
        with _errors(address):
            answer: T = sync(self._files.loop, ask, *args, timeout=ANSWER_S)
            return answer


def _key(address: Address, name: str) -> str:
    return "/".join((*address.parts[1:], name))


async def _next(pieces: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(pieces, b"")


@contextmanager
def _errors(address: Address) -> Iterator[None]:
    """Says in our words what went wrong; messages of the library may have the endpoint's URL."""
    try:
        yield
    except ClientError as e:
        status = e.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = str(e.response.get("Error", {}).get("Code", ""))[:80]
        if status == 404:
            raise Missing(f"{address}: no such adapter") from None
        if status == 412:
            raise Missing(f"{address}: the files changed while they were read") from None
        if status in (401, 403):
            raise Denied(address, f"the storage denies access ({code})") from None
        reason = f"the storage answers with HTTP {status} ({code})"
        if status == 429 or code == "SlowDown":
            headers = e.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
            raise Busy(address, reason, seconds_of(headers.get("retry-after"))) from None
        raise Unavailable(address, reason) from None
    except ParamValidationError:
        raise Missing(f"{address}: no bucket can have that name") from None
    except (NoCredentialsError, PartialCredentialsError):
        raise Denied(address, "this server has no credentials for S3") from None
    except Exception as e:  # of botocore, aiohttp, asyncio and fsspec
        raise Unavailable(address, f"the storage does not answer ({type(e).__name__})") from None
