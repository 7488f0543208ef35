"""Where replicas that share a catalogue keep adapters' files: a folder that all see, or S3.

    FOLDER/<sha256>/...             as a server's own store (store.py)
    s3://BUCKET[/PREFIX]/<sha256>/  the same two files; each says in its metadata whose it is

The digest is the name, so that nothing there ever changes: what is there is left alone, unless it
is not what its name says. Each replica has copies of its own of what it serves, and checks their
digest.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from guilomo_serve.adapter import AdapterError
from guilomo_serve.catalogue.remote import Address, Unavailable
from guilomo_serve.catalogue.sources import fetch
from guilomo_serve.catalogue.store import FILES, Missing, Store

logger = logging.getLogger("vllm.guilomo")

_DIGEST = "guilomo-digest"  # of the adapter, in each object's metadata


class SharedFiles(Protocol):
    """Adapters by digest. Methods block, and may be called by several threads at once."""

    def publish(self, digest: str, folder: Path) -> None:
        """Has an adapter's files there, from a folder that is known to have them.

        Raises:
            Unavailable, OSError: they cannot be written.
        """

    def fetch_into(self, store: Store, digest: str) -> None:
        """Copies an adapter into a server's own store.

        Raises:
            AdapterError: it is not there, or is not what it was; Unavailable: it cannot be asked.
        """

    def discard(self, digest: str) -> None:
        """Deletes an adapter that nobody has any more; what cannot be deleted stays."""


def shared_files(place: Path | Address) -> SharedFiles:
    """Of --state-files."""
    return SharedFolder(place) if isinstance(place, Path) else SharedBucket(place)


class SharedFolder:
    """A folder that all replicas see."""

    def __init__(self, folder: Path) -> None:
        self._files = Store(folder)

    def publish(self, digest: str, folder: Path) -> None:
        try:
            self._files.verify(digest)
        except (AdapterError, OSError):
            self._files.add(folder, lambda copy: None)

    def fetch_into(self, store: Store, digest: str) -> None:
        folder = self._files.folder_of(digest)
        _take(store, folder, digest, str(folder))

    def discard(self, digest: str) -> None:
        self._files.discard(digest)


class SharedBucket:
    """A place in S3."""

    def __init__(self, root: Address) -> None:
        from guilomo_serve.catalogue.s3 import S3  # an extra

        self._root, self._s3 = root, S3()

    def publish(self, digest: str, folder: Path) -> None:
        address = self._address_of(digest)
        if not self._has(address, digest):
            self._s3.write(address, folder, {_DIGEST: digest})

    def fetch_into(self, store: Store, digest: str) -> None:
        address = self._address_of(digest)
        with store.temporary() as folder:
            try:
                fetch(self._s3, address, folder)
            except Missing as e:
                raise AdapterError(f"{e}; put the adapter again") from None
            _take(store, folder, digest, str(address))

    def discard(self, digest: str) -> None:
        try:
            self._s3.delete(self._address_of(digest))
        except Unavailable as e:
            logger.warning("An adapter that nobody has any more stays in S3: %s", e)

    def _address_of(self, digest: str) -> Address:
        return replace(self._root, parts=(*self._root.parts, digest))

    def _has(self, address: Address, digest: str) -> bool:
        """Whether both files are as they were written; who writes another one says nothing."""
        try:
            return all(self._s3.metadata(address, name).get(_DIGEST) == digest for name in FILES)
        except Missing:
            return False


def _take(store: Store, folder: Path, digest: str, where: str) -> None:
    try:
        store.add(folder, lambda copy: None, digest)
    except AdapterError as e:
        raise AdapterError(f"{str(e).replace(str(folder), where)}; put the adapter again") from None
