"""Adapters in S3 and in what speaks its protocol, over s3fs: read, and written for replicas.

Endpoint, region and credentials come from where AWS's own tools have them (AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, profiles, roles) or from fsspec's settings (FSSPEC_S3_ANON=true for public
buckets). The objects themselves are asked for by s3fs's client: one request reads a file, under the
condition that it still has the entity tag that was seen.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
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
_WRITE_S = 500.0  # for all of a file; S3 that says nothing is given up sooner (read_timeout)

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

    def metadata(self, address: Address, name: str) -> Mapping[str, str]:
        """What was said of a file when it was written.

        Raises:
            Missing: there is none; Unavailable: the storage is down.
        """
        found: Mapping[str, str] = self._ask(address, self._asked_of, address, name)["Metadata"]
        return found

    def write(self, address: Address, folder: Path, metadata: Mapping[str, str]) -> None:
        """Writes an adapter's files, each of them whole or not at all.

        Args:
            address: without a revision.
            folder: has the files.
            metadata: is said of each of them.

        Raises:
            Unavailable: the storage is down, or does not take them.
        """
        for name in FILES:
            self._ask(address, self._put, address, folder / name, metadata, timeout=_WRITE_S)

    def delete(self, address: Address) -> None:
        """Deletes an adapter's files; it does not matter whether they are there.

        Raises:
            Unavailable: the storage is down, or does not do it.
        """
        for name in FILES:
            self._ask(address, self._delete, address, name)

    async def _head(self, address: Address, name: str) -> tuple[str, int]:
        """A file's entity tag and size."""
        head = await self._asked_of(address, name)
        return head["ETag"].strip('"'), head["ContentLength"]

    async def _asked_of(self, address: Address, name: str) -> dict[str, Any]:
        client = await self._files.set_session()
        head: dict[str, Any] = await client.head_object(
            Bucket=address.parts[0], Key=_key(address, name)
        )
        return head

    async def _put(self, address: Address, path: Path, metadata: Mapping[str, str]) -> None:
        place = f"{address.parts[0]}/{_key(address, path.name)}"
        # In parts, if it is large.
        await self._files._put_file(str(path), place, Metadata=dict(metadata))

    async def _delete(self, address: Address, name: str) -> None:
        client = await self._files.set_session()
        await client.delete_object(Bucket=address.parts[0], Key=_key(address, name))

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

    def _ask(
        self,
        address: Address,
        ask: Callable[..., Awaitable[T]],
        *args: Any,
        timeout: float = ANSWER_S,  # for as long as a storage may be silent
    ) -> T:
        """Runs a coroutine in fsspec's own thread."""
        with _errors(address):
            answer: T = sync(self._files.loop, ask, *args, timeout=timeout)
            return answer


def _key(address: Address, name: str) -> str:
    return "/".join((*address.parts[1:], name))


async def _next(pieces: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(pieces, b"")


@contextmanager
def _errors(address: Address) -> Iterator[None]:
    """Says in our words what went wrong; messages of the library may have the endpoint's URL."""
    try:
        try:
            yield
        except OSError as e:  # s3fs's own words for what S3 has said
            raise (e.__cause__ if isinstance(e.__cause__, ClientError) else e) from None
    except ClientError as e:
        status = e.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = str(e.response.get("Error", {}).get("Code", ""))[:80]
        if status == 404 and code != "NoSuchBucket":
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
