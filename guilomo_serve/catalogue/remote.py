"""Adapters in other places than folders: their addresses, and what a storage has to offer.

    hf://OWNER/REPO[@REVISION][/FOLDER]   on the Hugging Face Hub (hub.py)
    s3://BUCKET[/PREFIX][@REVISION]       in S3 or what speaks its protocol (s3.py)

A revision stands for bytes: a commit of the Hub; the two files' entity tags, joined by "+", in S3.
Branches and tags of the Hub may be asked for, but what is recorded is the commit.
"""

from __future__ import annotations

import re
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Protocol

from guilomo_serve.adapter import AdapterError

# A storage that says nothing for as long is taken to be down.
CONNECT_S = 5.0
ANSWER_S = 10.0

# Nothing that a client, a proxy or a storage could take for anything else than a plain name: no
# "..", empty or hidden parts, no escapes, queries or user names. A revision has no "/", so that
# it ends where the folder begins; that rules out the Hub's pull requests (refs/pr/...), which
# anybody may open on a repository.
_PART = r"[A-Za-z0-9_][A-Za-z0-9._:=+-]*"
_ID = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_TAG = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_HUB = re.compile(rf"({_ID})(?:/({_ID})(?:@(?!refs/)({_TAG}))?((?:/{_PART})*))?/?")
_S3 = re.compile(rf"([A-Za-z0-9][A-Za-z0-9.-]{{1,62}})((?:/{_PART})*)(?:@({_TAG}\+{_TAG}))?/?")
_MAX_LENGTH = 1024


class Unavailable(AdapterError):
    """A storage is down, silent or broken. The message names the address and no credentials."""

    def __init__(self, where: Address, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.reason = reason


class Busy(Unavailable):
    """A storage asks to be left alone for a while.

    Attributes:
        retry_after_s: how long it said, or by now still means; None if it did not say.
    """

    def __init__(self, where: Address, reason: str, retry_after_s: float | None) -> None:
        super().__init__(where, reason)
        self.retry_after_s = retry_after_s


def seconds_of(retry_after: str | None) -> float | None:
    """An HTTP header Retry-After, which is a number of seconds or a date (RFC 9110, 10.2.3)."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


class Denied(Unavailable):
    """A storage works, but does not let this server read an adapter."""


@dataclass(frozen=True)
class Address:
    """Where an adapter, or a root of adapters, is.

    Attributes:
        scheme: "hf" or "s3".
        parts: (owner, repository, folders ...) or (bucket, folders ...).
        revision: which state of it; None for what is there now.
    """

    scheme: str
    parts: tuple[str, ...]
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """Reads an address.

        Raises:
            AdapterError: it has none of the two forms. The message does not repeat it: it may
                have a password in it.
        """
        scheme, _, rest = text.partition("://")
        if len(text) <= _MAX_LENGTH:
            if scheme == "hf" and (found := _HUB.fullmatch(rest)):
                owner, repository, revision, folder = found.groups()
                head = (owner,) if repository is None else (owner, repository)
                return cls(scheme, head + _split(folder), revision)
            if scheme == "s3" and (found := _S3.fullmatch(rest)):
                bucket, folder, revision = found.groups()
                return cls(scheme, (bucket, *_split(folder)), revision)
        raise AdapterError(
            "no address of an adapter: expected hf://OWNER/REPO[@REVISION][/FOLDER] or "
            "s3://BUCKET/PREFIX of letters, digits and ._:=+- (credentials belong in the "
            "environment)"
        )

    def __str__(self) -> str:
        parts = list(self.parts)
        if self.revision is not None:
            parts[1 if self.scheme == "hf" else -1] += f"@{self.revision}"
        return f"{self.scheme}://{'/'.join(parts)}"

    def is_in(self, root: Address) -> bool:
        """Whether it is a root or lies below it, part by part."""
        return self.scheme == root.scheme and self.parts[: len(root.parts)] == root.parts

    def member(self, name: str) -> Address | None:
        """What lies below it under an adapter's name; None if nothing can."""
        try:
            return Address.parse(f"{self}/{name}")
        except AdapterError:
            return None


def is_address(source: str) -> bool:
    """Whether a source is meant as an address, and not as a folder."""
    return "://" in source


def _split(folder: str | None) -> tuple[str, ...]:
    return tuple((folder or "").split("/")[1:])


@dataclass(frozen=True)
class Found:
    """An adapter that a storage has: its revision, and file name -> size in bytes."""

    revision: str
    sizes: Mapping[str, int]


class Storage(Protocol):
    """What holds adapters. Methods block, and may be called by several threads at once."""

    def look(self, address: Address) -> Found:
        """What is at an address.

        Raises:
            Missing: there is no adapter, or it is no longer of the address's revision.
            AdapterError: it has no weights; Forbidden: it has moved.
            Busy: the storage says 429; Unavailable: it does not say.
        """

    def read(self, address: Address, name: str) -> Generator[bytes, None, None]:
        """A file's bytes as they arrive; the address has the revision of `look`.

        Raises:
            Missing: the file is no longer of that revision; Unavailable: the storage is down.
        """
