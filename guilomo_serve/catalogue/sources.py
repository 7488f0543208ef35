"""Where adapters may be taken from, and how those that are no folder get here.

A folder is copied by the store as it is. What is on the Hub or in S3 is first fetched into a
folder of the store, with bounds on its size and on the time it takes, and is then a folder as any
other. Remote places are only those below a root; with roots of whichever kind, folders too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from guilomo_serve.adapter import AdapterError
from guilomo_serve.catalogue.remote import (
    Address,
    Busy,
    Denied,
    Storage,
    Unavailable,
    is_address,
)
from guilomo_serve.catalogue.store import LIMITS, Forbidden, Missing, Store, Stored

logger = logging.getLogger("vllm.guilomo")

# How long a storage that was down, or wants to be left alone and does not say for how long, is not
# asked on behalf of requests: at first, and at most after it was so again and again.
_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 60.0
_LONGEST_ASKED_PAUSE_S = 3600.0
# How long a storage's no to a name stands, and of how many names: clients may ask for any.
_NO_FOR_S = 30.0
_MOST_NOES = 10_000
# Less than the 600 s that `guilomo-serve adapters` waits for an answer.
_FETCH_S = 500.0
# Of each storage, so that one that is slow leaves the other's and the server's own threads alone;
# for looking and for fetching, so that names that are made up hold up no fetch.
_THREADS = 8
# Names are clients' words: there may be more of them than a storage can be asked for.
_MAX_LOOKS = 256

Source = Path | Address
T = TypeVar("T")


class Sources:
    """The places that adapters are taken from.

    Args:
        store: keeps the adapters; its roots are the folders among the roots.
        roots: addresses that adapters may lie below.
    """

    def __init__(self, store: Store, roots: Sequence[Address] = ()) -> None:
        self._store = store
        self._roots = tuple(roots)
        schemes = {root.scheme for root in roots}
        self._storages = {scheme: storage_class(scheme)() for scheme in schemes}
        self._lookers = {scheme: ThreadPoolExecutor(_THREADS, "look") for scheme in schemes}
        self._fetchers = {scheme: ThreadPoolExecutor(_THREADS, "fetch") for scheme in schemes}
        self._looks: dict[Address, asyncio.Future[AdapterError | None]] = {}
        self._pauses = {root: _Pause() for root in roots}
        # Address -> until when it stands that there is nothing, or nothing that may be read.
        self._noes: OrderedDict[Address, tuple[float, AdapterError]] = OrderedDict()

    def find(self, source: str) -> Source:
        """The folder or address that an administrator names; asks no storage.

        Raises:
            Forbidden: it lies in no root.
            Missing: there is no such folder.
            AdapterError: it is meant as an address, and is none.
        """
        if is_address(source):
            address = Address.parse(source)
            if not any(address.is_in(root) for root in self._roots):
                raise Forbidden(f"{address}: lies below no root of the server (--adapter-root)")
            return address
        if self._roots and not self._store.roots:
            raise Forbidden(f"{source}: adapters are taken from {self._roots[0]} (--adapter-root)")
        return self._store.find(source)

    async def member(self, name: str) -> Source:
        """The adapter of a name in the roots: folders first, then addresses, in their order.

        A root that cannot be asked ends the search: the same name below a later root may be
        another adapter.

        Raises:
            Missing: no root has it. Forbidden: its folder leads out of the root.
            Busy, Unavailable: a root cannot be asked, or could not a moment ago.
        """
        if self._store.roots:
            try:
                return self._store.find(name)
            except Missing:
                if not self._roots:
                    raise
        for root in self._roots:
            address = root.member(name)
            if address is not None and await self._has(root, address):
                return address
        raise Missing(f"there is no adapter {name!a}")

    def members(self, limit: int) -> list[str]:
        """Names of adapters in the folders among the roots; see `Store.members`."""
        return self._store.members(limit)

    async def add(self, source: Source, check: Callable[[Path], T]) -> tuple[Stored, T, str]:
        """Stores an adapter, as `Store.add` does.

        Returns:
            What `Store.add` returns, and the source with its revision.

        Raises:
            Missing, Forbidden, Unavailable: it cannot be fetched; and what `Store.add` raises.
        """
        if isinstance(source, Path):
            return (*await asyncio.to_thread(self._store.add, source, check), str(source))
        fetchers = self._fetchers[source.scheme]
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(fetchers, self._fetch_and_add, source, check)

    def _fetch_and_add(self, address: Address, check: Callable[[Path], T]) -> tuple[Stored, T, str]:
        with self._store.temporary() as folder:
            fetched = fetch(self._storages[address.scheme], address, folder)
            try:
                stored, checked = self._store.add(folder, check)
            except AdapterError as e:
                raise AdapterError(str(e).replace(str(folder), str(fetched))) from None
        return stored, checked, str(fetched)

    async def _has(self, root: Address, address: Address) -> bool:
        """Whether there is an adapter below a root; asked once for all who wait for it."""
        until, no = self._noes.get(address, (0.0, None))
        if no is not None and time.monotonic() < until:
            return self._refuse(no)
        look = self._looks.get(address)
        if look is None:
            self._pauses[root].check(address)
            if len(self._looks) >= _MAX_LOOKS:
                raise Unavailable(address, "too many other names are being looked for")
            loop = asyncio.get_running_loop()
            look = loop.run_in_executor(self._lookers[root.scheme], self._look, root, address)
            self._looks[address] = look
            look.add_done_callback(lambda _: self._looks.pop(address))
        no = await asyncio.shield(look)
        if no is None:
            return True
        self._noes[address] = (time.monotonic() + _NO_FOR_S, no)
        self._noes.move_to_end(address)
        if len(self._noes) > _MOST_NOES:
            self._noes.popitem(last=False)
        return self._refuse(no)

    @staticmethod
    def _refuse(no: AdapterError) -> bool:
        """Nothing is there; what is denied or has moved ends the search."""
        if isinstance(no, Missing):
            return False
        raise no

    def _look(self, root: Address, address: Address) -> AdapterError | None:
        """Asks a storage. Returns: what it says of this address alone, if that is no."""
        pause, no = self._pauses[root], None
        pause.check(address)  # it may have begun while this was waiting for a thread
        try:
            self._storages[root.scheme].look(address)
        except (Missing, Denied, Forbidden) as e:
            no = e
        except Unavailable as e:
            pause.begin(e)
            logger.warning("Adapters below %s cannot be fetched: %s", root, e.reason)
            raise
        except AdapterError:
            pass  # there is one, and `add` will say what is wrong with it
        pause.failures = 0
        return no


class _Pause:
    """When a root may be asked again on behalf of requests.

    Attributes:
        failures: how often in a row it could not be asked.
    """

    def __init__(self) -> None:
        self.failures = 0
        self._until = 0.0
        self._why: Unavailable | None = None

    def begin(self, why: Unavailable) -> None:
        if time.monotonic() < self._until:
            return  # one of several that were asked at once
        seconds = min(_PAUSE_S * 2**self.failures, _LONGEST_PAUSE_S)
        if isinstance(why, Busy) and why.retry_after_s is not None:
            seconds = min(why.retry_after_s, _LONGEST_ASKED_PAUSE_S)
        self.failures += 1
        self._until, self._why = time.monotonic() + seconds, why

    def check(self, address: Address) -> None:
        """Raises what began the pause, of another address, while it lasts."""
        left = self._until - time.monotonic()
        if self._why is None or left <= 0:
            return
        if isinstance(self._why, Busy):
            raise Busy(address, self._why.reason, left)
        raise Unavailable(address, self._why.reason)


def storage_class(scheme: str) -> type[Storage]:
    """The storage that addresses of a scheme are in.

    Raises:
        AdapterError: the packages that it needs are not installed.
    """
    try:
        if scheme == "hf":
            from guilomo_serve.catalogue.hub import Hub

            return Hub
        from guilomo_serve.catalogue.s3 import S3

        return S3
    except ImportError as e:
        extra = {"hf": "serve", "s3": "s3"}[scheme]
        raise AdapterError(
            f"{scheme}:// needs a package that is not installed ({e.name}): "
            f"pip install 'guilomo[{extra}]'"
        ) from None


def fetch(storage: Storage, address: Address, folder: Path) -> Address:
    """Copies an adapter's files into a folder; returns the address with its revision.

    Raises:
        Missing, AdapterError, Unavailable: see `Storage`; they are too large, or take too long.
    """
    until = time.monotonic() + _FETCH_S
    found = storage.look(address)
    fetched = replace(address, revision=found.revision)
    for name, limit in LIMITS.items():
        if found.sizes[name] > limit:
            raise AdapterError(
                f"{fetched}: {name} has {found.sizes[name]} bytes, expected at most {limit}"
            )
    for name in LIMITS:
        left = found.sizes[name]
        with closing(storage.read(fetched, name)) as pieces, (folder / name).open("xb") as file:
            for piece in pieces:
                left -= len(piece)
                if left < 0:
                    raise AdapterError(f"{fetched}: {name} is larger than the storage said")
                if time.monotonic() > until:
                    raise Unavailable(fetched, f"not fetched within {_FETCH_S:.0f} s")
                file.write(piece)
        if left:
            raise Unavailable(fetched, f"{name} ended {left} bytes early")
    return fetched
