"""Replicas of one catalogue: what one is told all serve, and none serves what was replaced."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import requests

from guilomo_serve import cli
from guilomo_serve.catalogue import Version
from guilomo_serve.catalogue.settings import Admission
from tests.serve.helpers import Server, eventually, guilomo_serve, serving, text_of
from tests.serve.postgres import Postgres, postgres, why_not
from tests.serve.s3_stand_in import s3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]

PROMPT = "A customer writes: my card has not arrived!"
KEY = "the-key-of-all-replicas"
BUCKET = "fleet"


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    with postgres() as found:
        yield found


@pytest.fixture
def address(database) -> str:
    return new_catalogue(database)


def new_catalogue(database: Postgres) -> str:
    from guilomo_serve.catalogue.postgres import connect, prepare

    with connect(database.address) as db:
        db.execute("DROP SCHEMA IF EXISTS guilomo CASCADE")
    prepare(database.address)
    return database.address


class Replica:
    """A replica without an engine: what it serves, and what it cannot load.

    Attributes:
        serves: name -> digest of the version that it would answer with.
        loaded: digests.
        refuses: digests that it cannot load.
        admission: how much clients may ask it.
    """

    def __init__(self, address: str, bound: int | None = None, key: str = KEY) -> None:
        from guilomo_serve.server.fleet import Fleet

        self.serves: dict[str, str] = {}
        self.loaded: set[str] = set()
        self.refuses: set[str] = set()
        self.admission = Admission(max_concurrency=bound)
        self.fleet = Fleet(address, self, self.admission, key)

    def replace(self, entries):
        self.serves = {name: entry.current.digest for name, entry in entries.items()}

    def apply(self, name, entry):
        self.serves.pop(name, None)
        if entry is not None:
            self.serves[name] = entry.current.digest

    async def prepare(self, version):
        from guilomo_serve.adapter import AdapterError

        if version.digest in self.refuses:
            raise AdapterError(f"{version.digest} is not for this replica")
        self.loaded.add(version.digest)

    def drop(self, version):
        if self.serves.get(version.name) != version.digest:
            self.loaded.discard(version.digest)

    def admit(self, admission):
        self.admission = admission

    async def put(self, name: str, digest: str, everywhere: bool = True) -> None:
        async with self.fleet.changing(name) as change:
            number = await self.fleet.ask(change.next_number)
            version = Version(number, name, digest, "/", 1, {}, 0.0)
            done = await self.fleet.agree(change, version, everywhere, lambda: None)
            await self.fleet.settle(change, done[0])

    async def delete(self, name: str) -> None:
        async with self.fleet.changing(name) as change:
            revision, _ = await self.fleet.ask(change.remove)
            await self.fleet.settle(change, revision)


def together(address: str, what, count: int = 3) -> None:
    """Runs `what` of some replicas that have joined."""

    async def run() -> None:
        replicas = [Replica(address) for _ in range(count)]
        await asyncio.gather(*(replica.fleet.join() for replica in replicas))
        try:
            await asyncio.wait_for(what(*replicas), 60)
        finally:
            for replica in replicas:
                await replica.fleet.leave()

    asyncio.run(run())


def test_a_change_is_everywhere_when_it_is_answered(address):
    async def changing(*replicas: Replica) -> None:
        for turn in range(6):
            await replicas[turn % 3].put("a", f"digest {turn}")
            assert [r.serves for r in replicas] == 3 * [{"a": f"digest {turn}"}]
            assert all(f"digest {turn}" in r.loaded for r in replicas)
        await replicas[1].delete("a")
        assert [r.serves for r in replicas] == 3 * [{}]

    together(address, changing)


def test_replicas_that_change_a_name_at_once_do_so_one_after_another(address):
    async def changing(*replicas: Replica) -> None:
        puts = [r.put(name, f"{i} {name}") for i, r in enumerate(replicas) for name in "ab"]
        await asyncio.gather(*puts)
        assert replicas[0].serves == replicas[1].serves == replicas[2].serves
        assert replicas[0].serves.keys() == {"a", "b"}

    together(address, changing)


def test_what_one_replica_cannot_load_none_serves(address):
    from guilomo_serve.server.errors import Declined

    async def changing(one: Replica, other: Replica, third: Replica) -> None:
        await one.put("a", "good")
        other.refuses.add("bad")
        with pytest.raises(Declined, match=r"replica .*: bad is not for this replica") as refused:
            await one.put("a", "bad")
        assert refused.value.status == 400
        assert [r.serves for r in (one, other, third)] == 3 * [{"a": "good"}]
        while any("bad" in r.loaded for r in (one, third)):
            await asyncio.sleep(0.01)
        await other.put("a", "better")

    together(address, changing)


def test_what_a_request_brings_is_loaded_where_it_was_asked_for(address):
    async def changing(one: Replica, other: Replica) -> None:
        await one.put("a", "asked for", everywhere=False)
        await other.put("b", "of all")
        assert one.loaded == {"asked for", "of all"}
        assert other.loaded == {"of all"}
        assert one.serves == other.serves == {"a": "asked for", "b": "of all"}

    together(address, changing, count=2)


def test_who_is_silent_for_a_lease_is_not_waited_for_and_learns_all_anew(address, monkeypatch):
    from guilomo_serve.catalogue.replicas import Member
    from guilomo_serve.server import fleet

    monkeypatch.setattr(fleet, "LEASE_S", 3.0)
    monkeypatch.setattr(fleet, "_BEAT_S", 0.3)

    async def changing(one: Replica, other: Replica) -> None:
        with closing(Member(address, "silent", "silent")) as silent:
            revision, known = silent.join()
            assert known == {}
            began = time.monotonic()
            await one.put("a", "x")
            assert time.monotonic() - began > 2.0  # it might have been serving until then
            assert one.serves == other.serves == {"a": "x"}
            await one.put("a", "y")
        # It finds its connection ended, and with a new one that it has to learn everything.
        with closing(Member(address, "silent", "silent")) as silent:
            assert silent.beat(revision, [], []) is None
            _, known = silent.join()
            assert known["a"].current.digest == "y"
            silent.leave()

    together(address, changing, count=2)


def test_a_replica_that_is_expelled_while_it_changes_something_has_changed_nothing(address):
    from guilomo_serve.catalogue.replicas import Change, Member, Withdrawn

    with closing(Member(address, "one", "one")) as one, closing(Member(address, "b", "b")) as b:
        one.join()
        b.join()
        with closing(Change(address, "one", "a")) as change:
            version = Version(change.next_number(), "a", "x", "/", 1, {}, 0.0)
            change.propose(version, False, lambda: None)
            assert b.beat(0, [], []).proposals == []  # its owner's alone
            assert not b.expel("one", 99)
            b._ask("DELETE FROM replica WHERE id = 'one'")
            with pytest.raises(Withdrawn):
                change.commit(version.number)
        assert b.beat(0, [], []).changed == {}


async def until(what) -> None:
    while not what():
        await asyncio.sleep(0.01)


def test_limits_of_the_replica_that_came_last_hold_for_all(address, monkeypatch):
    from guilomo_serve.server import fleet

    monkeypatch.setattr(fleet, "_BEAT_S", 0.1)

    async def changing(one: Replica, other: Replica) -> None:
        def bounds() -> set[int | None]:
            return {r.admission.max_concurrency for r in (one, other, *new)}

        new = [Replica(address, bound=5)]
        assert bounds() == {None, 5}
        await new[0].fleet.join()
        await until(lambda: bounds() == {5})
        new.append(Replica(address))  # an old one that was started again
        await new[1].fleet.join()
        await until(lambda: bounds() == {5})
        await new.pop(0).fleet.leave()
        await until(lambda: bounds() == {None})
        await new[0].fleet.leave()

    together(address, changing, count=2)


def test_a_replica_with_another_key_serves_nothing_while_the_others_are_there(address, monkeypatch):
    from guilomo_serve.server import fleet

    monkeypatch.setattr(fleet, "_BEAT_S", 0.1)

    async def changing(one: Replica, same: Replica) -> None:
        other = Replica(address, key="another-key-than-theirs")
        joining = asyncio.create_task(other.fleet.join())
        await until(lambda: "GUILOMO_ADMIN_KEY" in (other.fleet.out_of_touch() or ""))
        await one.put("a", "x")  # it is waited for, as it may serve at any time
        assert one.fleet.out_of_touch() is same.fleet.out_of_touch() is None
        assert not joining.done()
        await one.fleet.leave()
        await same.fleet.leave()
        await joining
        assert other.fleet.out_of_touch() is None
        assert other.serves == {"a": "x"}
        await other.fleet.leave()

    together(address, changing, count=2)


def test_flags_of_a_shared_catalogue_that_do_not_fit_are_refused(
    address, tmp_path, capsys, monkeypatch
):
    files = ("--state-files", str(tmp_path))
    for flags, why in (
        (("--state", address), "--state-files: a database of --state needs it"),
        (files, "--state-files: a database of --state needs it"),
        (("--state", address, *files), "one admin key; give it to each as GUILOMO_ADMIN_KEY"),
    ):
        assert cli.main(["/no/such/model", *flags]) == 2
        assert why in capsys.readouterr().err
    monkeypatch.setenv("GUILOMO_ADMIN_KEY", KEY)
    nowhere = "postgresql://guilomo:secret@127.0.0.1:1/guilomo"
    assert cli.main(["/no/such/model", "--state", nowhere, *files]) == 2
    error = capsys.readouterr().err
    assert "no database answers there" in error
    assert "secret" not in error


def test_leases_end_and_come_back_with_the_database(database, address, monkeypatch):
    from guilomo_serve.server import fleet
    from guilomo_serve.server.errors import OutOfTouch

    monkeypatch.setattr(fleet, "LEASE_S", 3.0)
    monkeypatch.setattr(fleet, "_BEAT_S", 0.3)

    async def changing(one: Replica, other: Replica) -> None:
        await one.put("a", "x")
        await asyncio.to_thread(database.stop, "immediate")  # well within a lease
        try:
            assert one.fleet.out_of_touch() is None
            with pytest.raises(OutOfTouch, match="does not answer"):
                await one.put("a", "y")
            while one.fleet.out_of_touch() is None:
                await asyncio.sleep(0.05)
            with pytest.raises(OutOfTouch, match="ask another"):
                await one.put("a", "y")
        finally:
            await asyncio.to_thread(database.start)
        while one.fleet.out_of_touch() or other.fleet.out_of_touch():
            await asyncio.sleep(0.05)
        await other.put("a", "z")
        assert one.serves == other.serves == {"a": "z"}

    together(address, changing, count=2)


@pytest.fixture(scope="module")
def root(adapters, tmp_path_factory) -> Path:
    """An adapter root of these tests alone: others take adapters out of theirs."""
    folder = tmp_path_factory.mktemp("root-of-replicas")
    for name, adapter in adapters.items():
        shutil.copytree(adapter, folder / name)
    return folder


@pytest.fixture(scope="module")
def replicas(database, tiny_model, adapters, root, tmp_path_factory) -> Iterator[list[Server]]:
    """Two servers of a catalogue, whose files are in S3."""
    folder = tmp_path_factory.mktemp("fleet")
    command = guilomo_serve(
        tiny_model,
        {},
        *("--state", new_catalogue(database), "--state-files", f"s3://{BUCKET}/files"),
        *("--adapter-root", str(root), "--enforce-eager", "--dtype", "float32"),
        *("--served-model-name", "base"),
    )
    flags = {"one": ("--max-body-mib", "1"), "other": ("--max-body-mib", "2")}

    def start(name: str) -> Server:
        log = folder / f"{name}.log"
        environment = {**storage.environment, "GUILOMO_ADMIN_KEY": KEY}
        server = stack.enter_context(serving([*command, *flags[name]], log, environment))
        server.admin_key = KEY
        return server

    with s3(BUCKET) as storage, ExitStack() as stack, ThreadPoolExecutor() as pool:
        yield list(pool.map(start, ("one", "other")))


def state_of(server: Server, name: str) -> dict[str, object]:
    answer = server.admin("GET", f"/{name}").json()
    return {key: answer[key] for key in ("version", "digest", "pinned", "previous_version")}


def test_what_one_replica_is_told_both_serve(replicas, root):
    one, other = replicas
    assert one.put("support", root / "first").status_code == 200
    first = [text_of(server, "support", PROMPT) for server in replicas]
    assert first[0] == first[1] != text_of(other, "base", PROMPT)
    answer = other.put("support", root / "second")
    assert answer.status_code == 200, answer.text
    # Each serves what it has prepared, before anybody asks for it.
    for server in replicas:
        metrics = requests.get(f"{server.url}/metrics", timeout=30).text
        assert 'vllm:lora_adapter_loaded{adapter_name="support"' in metrics, server.log.name
    second = [text_of(server, "support", PROMPT) for server in replicas]
    assert second[0] == second[1] != first[0]
    assert state_of(one, "support") == state_of(other, "support")
    assert one.admin("POST", "/support/pin").json()["pinned"]
    assert other.admin("POST", "/support/rollback").status_code == 200
    assert [text_of(server, "support", PROMPT) for server in replicas] == first
    assert state_of(one, "support") == state_of(other, "support")
    assert state_of(one, "support")["pinned"]
    # A member of the root is in the catalogue of both when one is asked for it.
    asked = text_of(other, "plain", PROMPT)
    assert not one.admin("GET", "/plain").json()["resident"]
    assert other.admin("POST", "/plain/pin").json()["resident"]
    eventually(lambda: one.admin("GET", "/plain").json()["resident"], "all load what is pinned")
    assert text_of(one, "plain", PROMPT) == asked
    assert state_of(one, "plain") == state_of(other, "plain")
    refused = one.put("support", root / "nothing")
    assert refused.status_code == 404, refused.text
    assert one.admin("DELETE", "/plain").status_code == 200
    assert "plain" not in {a["name"] for a in other.admin("GET").json()["data"]}


def test_what_one_takes_the_other_takes(replicas):
    """Whichever came last."""
    body = {"model": "base", "prompt": "x" * (3 * 2**19), "max_tokens": 1}
    statuses = [
        requests.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code
        for server in replicas
    ]
    assert statuses in ([413, 413], [400, 400])  # too much, or too long a prompt


def test_the_database_may_restart(replicas, database, root):
    one, other = replicas
    one.put("support", root / "first")
    before = text_of(one, "support", PROMPT)
    database.stop()
    try:
        assert text_of(other, "support", PROMPT) == before
        assert other.put("support", root / "second").status_code == 503
    finally:
        database.start()
    eventually(lambda: other.put("support", root / "second").ok, "a change after the restart")
    assert text_of(one, "support", PROMPT) == text_of(other, "support", PROMPT) != before


def test_a_replica_that_was_stopped_does_not_answer_with_what_was_replaced(replicas, root):
    one, other = replicas
    one.put("support", root / "first")
    before = text_of(other, "support", PROMPT)
    os.killpg(other.process.pid, signal.SIGSTOP)
    try:
        assert one.put("support", root / "second").status_code == 200
    finally:
        os.killpg(other.process.pid, signal.SIGCONT)
    body = {"model": "support", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    body["ignore_eos"] = True
    after = text_of(one, "support", PROMPT)
    answers = []
    while not answers or answers[-1].status_code == 503:
        answers.append(requests.post(f"{other.url}/v1/completions", json=body, timeout=60))
    assert answers[-1].json()["choices"][0]["text"] == after != before
    assert answers[0].status_code == 503 or len(answers) == 1
    eventually(lambda: requests.get(f"{other.url}/ready", timeout=5).ok, "ready again")


def test_the_others_go_on_without_one_that_was_killed(replicas, root):
    one, other = replicas
    one.put("support", root / "first")
    before = text_of(one, "support", PROMPT)
    os.killpg(other.process.pid, signal.SIGKILL)
    assert one.put("support", root / "second").status_code == 200
    assert text_of(one, "support", PROMPT) != before
    assert one.admin("POST", "/support/rollback").status_code == 200
    assert text_of(one, "support", PROMPT) == before
