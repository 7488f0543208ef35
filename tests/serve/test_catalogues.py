"""Names and versions, asked of both catalogues: SQLite's and PostgreSQL's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from guilomo_serve.catalogue import Catalogue, CatalogueError, Entry, Version
from guilomo_serve.catalogue.database import CATALOGUE_FILE
from guilomo_serve.catalogue.sql import SqlCatalogue
from tests.serve.postgres import Postgres, postgres, why_not


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    if reason := why_not():
        pytest.skip(reason)
    with postgres() as found:
        yield found


@pytest.fixture
def empty(database):
    """The address of a database without a catalogue."""
    from guilomo_serve.catalogue.postgres import connect

    with connect(database.address) as db:
        db.execute("DROP SCHEMA IF EXISTS guilomo CASCADE")
    return database.address


@pytest.fixture(params=["sqlite", "postgresql"])
def catalogue(request, tmp_path) -> Iterator[SqlCatalogue]:
    found: SqlCatalogue
    if request.param == "sqlite":
        found = Catalogue(tmp_path / CATALOGUE_FILE)
    else:
        address = request.getfixturevalue("empty")
        from guilomo_serve.catalogue.postgres import SharedCatalogue, prepare

        prepare(address)
        found = SharedCatalogue(address)
    yield found
    found.close()


def version(catalogue: SqlCatalogue, name: str, digest: str) -> Version:
    about = {"kind": "lora-moe", "allocation": {"q%": [1, 2]}, "what?": None}
    return Version(catalogue.next_number(), name, digest, f"/{digest}", 2**40, about, 0.25)


def test_a_version_replaces_another_and_the_one_before_that_is_forgotten(catalogue):
    first, second, third = (version(catalogue, "a/b", digest) for digest in "xyz")
    assert first.number < second.number < third.number
    assert catalogue.put(first) == []
    assert catalogue.get("a/b") == Entry(first, None, False)
    assert catalogue.put(second) == []
    catalogue.pin("a/b", True)
    assert catalogue.put(third) == ["x"]
    assert catalogue.get("a/b") == Entry(third, second, True)
    assert catalogue.digests() == {"y", "z"}
    assert [catalogue.has_digest(digest) for digest in "xyz"] == [False, True, True]
    assert catalogue.get("b") is None


def test_pages_pins_and_lists_are_in_the_order_of_names(catalogue):
    for name in ("b", "a", "B", "a-b", "a/b"):
        catalogue.put(version(catalogue, name, f"of {name}"))
    names = ["B", "a", "a-b", "a/b", "b"]  # of their bytes, whatever the database's language
    assert list(catalogue.all()) == names
    assert list(catalogue.page("", 2)) == names[:2]
    assert list(catalogue.page("a", 9)) == names[2:]
    listed = catalogue.listed(3)
    assert list(listed) == names[:3]
    assert listed["a"].identity == {"digest": "of a", "version": catalogue.get("a").current.number}
    assert catalogue.pinned() == set()
    catalogue.pin("b", True)
    catalogue.pin("a", True)
    catalogue.pin("a", False)
    assert catalogue.pinned() == {"b"}


def test_a_deleted_name_is_forgotten_with_its_versions(catalogue):
    for digest in "xyy":
        catalogue.put(version(catalogue, "a", digest))
    other = version(catalogue, "b", "y")
    catalogue.put(other)
    assert sorted(catalogue.delete("a")) == ["y", "y"]
    assert catalogue.all() == {"b": Entry(other, None, False)}
    assert catalogue.digests() == {"y"}
    assert catalogue.delete("a") == []
    assert version(catalogue, "a", "z").number > other.number


def test_a_change_that_fails_leaves_all_as_it_was(catalogue):
    known = version(catalogue, "a", "x")
    catalogue.put(known)
    with pytest.raises(Exception, match=r"(?i)unique"):  # of the database's own kind
        catalogue.put(known)
    assert catalogue.all() == {"a": Entry(known, None, False)}


def test_a_catalogue_of_a_newer_guilomo_is_refused(empty):
    from guilomo_serve.catalogue.postgres import connect, prepare

    prepare(empty)
    prepare(empty)
    with connect(empty) as db:
        db.execute("UPDATE format SET version = 99")
    with pytest.raises(CatalogueError, match="of version 99"):
        prepare(empty)


def test_a_catalogue_of_an_older_guilomo_is_brought_up_to_date(empty):
    from guilomo_serve.catalogue import postgres
    from guilomo_serve.catalogue.replicas import Member

    with pytest.MonkeyPatch.context() as older:
        older.setattr(postgres, "_MIGRATIONS", postgres._MIGRATIONS[:1])
        postgres.prepare(empty)
    with postgres.connect(empty) as db:  # and one runs
        db.execute("INSERT INTO replica (id, host) VALUES ('old', 'old')")
    postgres.prepare(empty)
    with closing(Member(empty, "new", "new", "{}", "a key")) as new:
        new.join()
        news = new.beat(0, [], [])
        assert [(peer.replica, peer.admission, peer.key) for peer in news.peers] == [
            ("old", None, None),
            ("new", "{}", "a key"),
        ]


def test_servers_that_start_at_once_make_one_catalogue(empty):
    from guilomo_serve.catalogue.postgres import prepare

    failed: list[Exception] = []

    def preparing() -> None:
        try:
            prepare(empty)
        except CatalogueError as e:
            failed.append(e)

    threads = [threading.Thread(target=preparing) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_a_backup_of_a_database_is_a_catalogue_elsewhere(database, empty, tmp_path):
    """As docs/operations.md says."""
    from guilomo_serve.catalogue.postgres import SharedCatalogue, connect, prepare
    from guilomo_serve.catalogue.replicas import Change, Member

    prepare(empty)
    with closing(Member(empty, "one", "one")) as one, closing(Change(empty, "one", "a")) as change:
        one.join()
        for digest in "xyz":
            change.put(version(change, "a", digest))
        change.set_pinned(True)
        known = one.all()
    backup = str(tmp_path / "backup")
    database.client("pg_dump", "--format=custom", "--schema=guilomo", f"--file={backup}", empty)
    with connect(empty) as db:
        db.execute("CREATE DATABASE elsewhere")
    elsewhere = empty.replace("/postgres", "/elsewhere")
    database.client("pg_restore", "--exit-on-error", f"--dbname={elsewhere}", backup)
    prepare(elsewhere)
    with closing(SharedCatalogue(elsewhere)) as restored:
        assert restored.all() == known
        assert restored.revision() == 1
        assert restored.next_number() == known["a"].current.number + 1


def test_a_database_that_is_not_there_is_said_in_a_line(database):
    from guilomo_serve.catalogue.postgres import prepare

    with pytest.raises(CatalogueError, match="no database answers there") as error:
        prepare("postgresql://guilomo:secret@127.0.0.1:1/postgres")
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("limit", [1, 9, 10, 11, 24, 25, 100])
def test_a_list_leaves_others_their_turn(tmp_path, limit):
    """It is read part by part, and is the same list."""
    from guilomo_serve.server import routes

    catalogue = Catalogue(tmp_path / CATALOGUE_FILE)
    names = [f"adapter-{i:02d}" for i in range(25)]
    for name in names:
        about = {**version(catalogue, name, name).about, "base": "base", "task": None}
        catalogue.put(replace(version(catalogue, name, name), about=about))
    versions: Any = SimpleNamespace(
        catalogue=catalogue,
        failed={},
        resident=set,
        request_of=lambda version: SimpleNamespace(lora_int_id=version.number),
        in_flight=lambda name: 0,
        last_used=lambda name: None,
    )

    async def listed(after: str) -> tuple[dict[str, Any], int]:
        answer = asyncio.create_task(routes.list_adapters(versions, limit, after))
        turns = 0
        while not answer.done():
            await asyncio.sleep(0)
            turns += 1
        return answer.result(), turns

    found, after, more = [], "", True
    while more:
        page, turns = asyncio.run(listed(after))
        assert len(page["data"]) <= limit
        assert turns > len(page["data"]) // 10
        found += [entry["name"] for entry in page["data"]]
        after, more = found[-1], page["has_more"]
    assert found == names
    catalogue.close()
