"""The adapters' files, copied and named by their digest.

A version's files must not change while it is served, and must still be there to go back to. So
they are copied once, checked as they are copied, and read from the copy ever after:

    STATE/adapters/<sha256>/adapter_config.json
    STATE/adapters/<sha256>/adapter_model.safetensors

The digest is that of `sha256sum adapter_config.json adapter_model.safetensors | sha256sum`. When
`add` returns it, the files, their folder and its name are on the disk, so that what is written down
with it afterwards is true whenever the power goes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open

from guilomo_serve.adapter import CONFIG_FILE, WEIGHTS_FILE, AdapterError, check_start
from guilomo_serve.adapter.files import MAX_CONFIG_BYTES, home_of, open_plain
from guilomo_serve.timing import part

FILES = (CONFIG_FILE, WEIGHTS_FILE)
# Hundreds of times what a searched adapter weighs, and less than what would fill a disk.
MAX_WEIGHTS_BYTES = 8 * 2**30
LIMITS = {CONFIG_FILE: MAX_CONFIG_BYTES, WEIGHTS_FILE: MAX_WEIGHTS_BYTES}
_CHUNK = 2**20
_LOOKED_AT = 10  # entries of a root for each name that is wanted
_PARTIAL = ".partial-"

T = TypeVar("T")


class Missing(AdapterError):
    """There is no adapter folder at the given path."""


class Forbidden(AdapterError):
    """The path leads to where adapters may not be taken from."""


@dataclass(frozen=True)
class Stored:
    """A copied adapter: its digest, and the size of its weights file in bytes."""

    digest: str
    size: int


class Store:
    """The folder of copies.

    Args:
        folder: where to keep them; made if it is missing.
        roots: where adapters may be taken from; none: from everywhere.
    """

    def __init__(self, folder: Path, roots: Sequence[Path] = ()) -> None:
        self.roots = tuple(root.resolve() for root in roots)
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for place in folder.parents:
            with suppress(PermissionError):  # one that this server cannot have made
                _sync(place)

    def folder_of(self, digest: str) -> Path:
        return self._folder / digest

    def find(self, source: str) -> Path:
        """The adapter folder that a client names; a relative path is one in a root.

        Raises:
            Forbidden: it lies, by symbolic links or `..` too, in no root.
            Missing: there is no folder.
        """
        if "\0" in source:
            raise Forbidden(f"{source!a}: no path")
        places = [root / source for root in self.roots] or [Path(source)]
        inside = [path for path in map(_resolved, places) if self._is_inside(path)]
        if not inside:
            raise Forbidden(
                f"{source}: lies in no folder that adapters may be taken from (--adapter-root)"
            )
        for path in inside:
            if path.is_dir():
                return path
        raise Missing(f"{source}: no such adapter folder")

    def members(self, limit: int) -> list[str]:
        """Names of adapter folders in the roots, at most `limit`, in no order.

        What has an adapter's files counts; whether it can be served is seen when it is asked for.
        A folder with many other entries is not read to its end.
        """
        names: set[str] = set()
        for root in self.roots:
            with os.scandir(root) as entries:
                for entry in islice(entries, _LOOKED_AT * limit):
                    folder = _resolved(root / entry.name)
                    if self._is_inside(folder) and all((folder / f).is_file() for f in FILES):
                        names.add(entry.name)
                    if len(names) == limit:
                        return list(names)
        return list(names)

    def add(
        self, source: Path, check: Callable[[Path], T], digest: str | None = None
    ) -> tuple[Stored, T]:
        """Copies an adapter's files and keeps them once `check` has accepted the copy.

        Args:
            source: the adapter folder.
            check: raises AdapterError for a folder that cannot be served.
            digest: what the adapter's has to be; None: anything.

        Returns:
            The copy, and what `check` returned.

        Raises:
            AdapterError: a file is missing, no plain file, too large, no safetensors file,
                refused by `check`, or of another digest. Nothing is kept.
            OSError: the disk is full, or cannot be read.
        """
        with self.temporary() as partial:
            sums = {}
            for name in FILES:
                with _opened(source, name) as file:
                    _check_beginning(file, source / name)
                    sums[name] = _copy(file, partial / name, source / name)
            with ThreadPoolExecutor(1) as disk:  # which writes while the copy is checked
                written = [disk.submit(_sync, partial / name) for name in FILES]
                try:
                    with part("check"):
                        checked = check(partial)
                except AdapterError as e:
                    raise AdapterError(str(e).replace(str(partial), str(source))) from None
            with part("copy"):
                for writing in written:
                    writing.result()
            stored = Stored(_combined(sums), (partial / WEIGHTS_FILE).stat().st_size)
            if digest not in (None, stored.digest):
                raise AdapterError(
                    f"{source}: its digest is {stored.digest}, expected {digest}: its files have "
                    "changed"
                )
            with part("copy"):
                self._keep(partial, stored.digest)
        return stored, checked

    @contextmanager
    def temporary(self) -> Iterator[Path]:
        """A folder for an adapter that is not known to be good; gone afterwards."""
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self._folder))
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def verify(self, digest: str) -> Path:
        """The folder of a copy, once it is known to be what was stored.

        Raises:
            AdapterError: the copy is gone, or its files have changed.
        """
        folder = self.folder_of(digest)
        if not folder.is_dir():
            raise AdapterError(f"{folder}: the stored adapter is gone; put it again")
        found = digest_of(folder)
        if found != digest:
            raise AdapterError(
                f"{folder}: the stored adapter has changed (its digest is {found}, expected "
                f"{digest}); put it again"
            )
        return folder

    def discard(self, digest: str) -> None:
        """Deletes a copy, if it is there."""
        shutil.rmtree(self.folder_of(digest), ignore_errors=True)

    def prune(self, wanted: Collection[str]) -> None:
        """Deletes all copies but those with the given digests, while nobody adds any.

        What a server left that was killed goes, too.
        """
        for folder in self._folder.iterdir():
            if folder.name not in wanted:
                shutil.rmtree(folder, ignore_errors=True)

    def _is_inside(self, path: Path) -> bool:
        return not self.roots or any(path.is_relative_to(root) for root in self.roots)

    def _keep(self, partial: Path, digest: str) -> None:
        target = self.folder_of(digest)
        try:
            self.verify(digest)
        except (AdapterError, OSError):
            if target.is_dir():
                shutil.rmtree(target)  # damaged; this is what it should be
            partial.chmod(0o755)
            _sync(partial)
            os.rename(partial, target)
        _sync(self._folder)  # also of a server that was killed before it could


def digest_of(folder: Path) -> str:
    """The digest of an adapter folder's two files, 64 hexadecimal digits.

    Raises:
        AdapterError: a file is missing, no plain file, or too large.
    """
    sums = {}
    for name in FILES:
        with _opened(folder, name) as file:
            sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return _combined(sums)


def _sync(path: Path) -> None:
    """Has a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _combined(sums: dict[str, str]) -> str:
    listed = "".join(f"{sums[name]}  {name}\n" for name in FILES)
    return hashlib.sha256(listed.encode()).hexdigest()


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a name that is too long, a loop of links
        return Path("/nonexistent")


@contextmanager
def _opened(folder: Path, name: str) -> Iterator[BufferedReader]:
    """Opens one of an adapter's files; a link must stay where the files have to lie.

    What was opened is checked, not what the path names: that can change between the two.
    """
    path, home = folder / name, home_of(folder)
    if not _resolved(path).is_relative_to(home):
        raise Forbidden(f"{path}: leads out of the adapter folder; copy the file into it")
    try:
        file = open_plain(path, LIMITS[name])
    except FileNotFoundError:
        pickles = sorted(p.name for p in folder.glob("adapter_model.*") if p.name != WEIGHTS_FILE)
        found = f" (only {pickles[0]}, and no other format is read)" if pickles else ""
        raise AdapterError(f"{path}: the file is missing{found}") from None
    with file:
        real = Path(f"/proc/self/fd/{file.fileno()}").resolve()
        if not real.is_relative_to(home):
            raise Forbidden(f"{path}: leads out of the adapter folder; copy the file into it")
        yield file


def _check_beginning(file: BufferedReader, where: Path) -> None:
    """Checks a weights file's header against its size, before it is copied."""
    if where.name != WEIGHTS_FILE:
        return
    check_start(file.read(8), os.fstat(file.fileno()).st_size, str(where))
    file.seek(0)
    try:
        with safe_open(f"/proc/self/fd/{file.fileno()}", framework="pt"):
            pass  # it compares shapes, offsets and the file's size
    except (SafetensorError, OSError) as e:
        raise AdapterError(
            f"{where}: not a complete safetensors file ({e}); copy the adapter again"
        ) from None


def _copy(file: BufferedReader, target: Path, where: Path) -> str:
    """Copies a file, which is not on the disk then; returns the SHA-256 of what was copied."""
    digest, left = hashlib.sha256(), LIMITS[where.name]
    with target.open("xb") as copy:
        while chunk := file.read(_CHUNK):
            left -= len(chunk)
            if left < 0:
                raise AdapterError(f"{where}: grew while it was read; put it when it is complete")
            with part("digest"):
                digest.update(chunk)
            with part("copy"):
                copy.write(chunk)
    return digest.hexdigest()
