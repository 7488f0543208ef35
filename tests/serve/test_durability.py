"""No power cut loses a version that was acknowledged: every moment of the writes is replayed.

The writes are those of the real store and catalogue. At each moment the disk may have what was
synced and nothing else, or all that was written by then; both are built anew and opened.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from guilomo_serve.adapter import WEIGHTS_FILE
from guilomo_serve.catalogue import Catalogue, Store, Version
from guilomo_serve.catalogue.database import CATALOGUE_FILE

Folder = dict[str, int]  # name -> inode


class Disk:
    """What of a folder would be there after a power cut at each moment so far.

    Attributes:
        cuts: folders to start from after a cut, each with the names that were acknowledged.
    """

    def __init__(self, root: Path, scratch: Path) -> None:
        self._root, self._scratch = root, scratch
        self._files: dict[int, bytes] = {}  # what of them was synced
        self._folders: dict[int, Folder] = {}
        self._acknowledged: set[str] = set()
        self.cuts: list[tuple[Path, set[str]]] = []

    def synced(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        inode = path.stat().st_ino
        if path.is_dir():
            self._folders[inode] = {child.name: child.stat().st_ino for child in path.iterdir()}
        else:
            self._files[inode] = path.read_bytes()
        self.cut()

    def acknowledge(self, name: str) -> None:
        self._acknowledged.add(name)
        self.cut()

    def cut(self) -> None:
        for build in (self._what_was_synced, self._all):
            place = self._scratch / str(len(self.cuts))
            build(place)
            self.cuts.append((place, set(self._acknowledged)))

    def _all(self, place: Path) -> None:
        shutil.copytree(self._root, place)

    def _what_was_synced(self, place: Path) -> None:
        self._build(self._root.stat().st_ino, place)
        # SQLite syncs by itself, its file and the folder, before a change is done.
        for path in self._root.glob(f"{CATALOGUE_FILE}*"):
            shutil.copy(path, place / path.name)

    def _build(self, inode: int, place: Path) -> None:
        place.mkdir()
        for name, child in self._folders.get(inode, {}).items():
            if child in self._files:
                (place / name).write_bytes(self._files[child])
            elif child in self._folders:
                self._build(child, place / name)
            # else a folder or file of which the name alone is there


@pytest.fixture
def disk(tmp_path, monkeypatch):
    root = tmp_path / "state"
    root.mkdir()
    (tmp_path / "cuts").mkdir()
    disk = Disk(root, tmp_path / "cuts")
    sync, rename, delete = os.fsync, os.rename, shutil.rmtree

    def and_then_cut(act: Callable[..., None]) -> Callable[..., None]:
        def acting(path: Path, *args: object, **kwargs: object) -> None:
            act(path, *args, **kwargs)
            if root in Path(path).parents:
                disk.cut()

        return acting

    def syncing(descriptor: int) -> None:
        sync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path == root or root in path.parents:
            disk.synced(descriptor)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "rename", and_then_cut(rename))
    monkeypatch.setattr(shutil, "rmtree", and_then_cut(delete))
    yield disk
    monkeypatch.undo()


def put(disk: Disk, store: Store, catalogue: Catalogue, name: str, folder: Path) -> None:
    """As a server does it."""
    stored, _ = store.add(folder, lambda copy: None)
    version = Version(catalogue.next_number(), name, stored.digest, str(folder), stored.size, {}, 0)
    forgotten = catalogue.put(version)
    disk.acknowledge(name)
    for digest in forgotten:
        if not catalogue.has_digest(digest):
            store.discard(digest)


def test_no_power_cut_loses_an_acknowledged_version(disk, adapters, tmp_path, monkeypatch):
    root = tmp_path / "state"
    catalogue = Catalogue(root / CATALOGUE_FILE)
    store = Store(root / "adapters")
    put(disk, store, catalogue, "one", adapters["first"])
    put(disk, store, catalogue, "one", adapters["second"])
    put(disk, store, catalogue, "one", adapters["plain"])  # the first goes
    put(disk, store, catalogue, "two", adapters["plain"])  # a copy that is there
    catalogue.close()
    monkeypatch.undo()

    assert len(disk.cuts) > 20
    for place, acknowledged in disk.cuts:
        after = Catalogue(place / CATALOGUE_FILE)
        entries = after.page("", 10)
        assert entries.keys() >= acknowledged
        store = Store(place / "adapters")
        for entry in entries.values():
            store.verify(entry.current.digest)
            if entry.previous is not None:
                store.verify(entry.previous.digest)
        after.close()


def test_the_disk_of_these_tests_forgets_what_was_not_synced(disk, adapters, tmp_path):
    folder = tmp_path / "state" / "adapters"
    folder.mkdir()
    (folder / WEIGHTS_FILE).write_bytes(b"weights")
    disk.cut()
    (synced, _), (everything, _) = disk.cuts
    assert not (synced / "adapters").exists()
    assert (everything / "adapters" / WEIGHTS_FILE).exists()
