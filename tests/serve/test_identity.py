"""What versions are called inside vLLM, and what leaves it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.platforms import current_platform
from vllm.v1.core import kv_cache_utils

from guilomo_serve.runtime import identity
from guilomo_serve.server.errors import NoRoom
from guilomo_serve.server.leases import Leases
from guilomo_serve.server.residency import Residency

ONE, OTHER = 64 * "1", 64 * "2"


@pytest.fixture(autouse=True)
def installed():
    identity.install()
    identity.install()


def test_an_id_follows_from_name_and_digest():
    version = identity.request_of("team/support", ONE, "/here")
    again = identity.request_of("team/support", ONE, "/there")
    assert version == again
    # As it was in the first release, or replicas of two releases share nothing.
    assert version.lora_int_id == again.lora_int_id == 353672659
    assert version != identity.request_of("team/support", OTHER, "/here")
    assert version.lora_name == f"team/support@{ONE}"
    assert version.name == "team/support"  # what KV events show
    assert identity.public_name("a@b") == "a@b"
    assert identity.public_name(f"a@b@{ONE}") == "a@b"


def test_blocks_are_hashed_with_the_digest_alone():
    def keys(name: str, digest: str, path: str) -> Any:
        request = SimpleNamespace(lora_request=identity.request_of(name, digest, path))
        return kv_cache_utils._gen_lora_extra_hash_keys(request)

    assert keys("a", ONE, "/here") == keys("b", ONE, "/there")
    assert keys("a", ONE, "/here") != keys("a", OTHER, "/here")
    # A program's own requests are vLLM's affair.
    request = SimpleNamespace(lora_request=identity.LoRARequest("a", 1, "/here"))
    assert kv_cache_utils._gen_lora_extra_hash_keys(request) == [("lora", "a", "/here")]
    assert kv_cache_utils._gen_lora_extra_hash_keys(SimpleNamespace(lora_request=None)) == []


class Engine:
    """What residency asks of vLLM's; nothing but the calls counts here."""

    def __init__(self, **answer: Any) -> None:
        self.asked: list[str] = []
        self._answer = {"bytes": 1, "rank": 1, "seconds": 0.0} | answer

    async def collective_rpc(self, method: str, args: Any) -> list[Any]:
        self.asked.append(method)
        return [self._answer]

    async def remove_lora(self, number: int) -> None:
        pass


def test_two_versions_of_one_id_are_not_in_memory_together(monkeypatch):
    monkeypatch.setattr(identity, "id_of", lambda inner: 7)

    async def load_all() -> None:
        residency = Residency(Engine(), Leases())
        await residency.load("a", identity.request_of("a", ONE, "/a"))
        await residency.load("a", identity.request_of("a", ONE, "/a"))  # it is there
        with pytest.raises(NoRoom, match=f"b@{OTHER} is that of a@{ONE}"):
            await residency.load("b", identity.request_of("b", OTHER, "/b"))

    asyncio.run(load_all())


@pytest.mark.parametrize(("on_cpu", "between_steps"), [(True, True), (False, False)])
def test_beside_a_gpu_no_adapter_is_read_between_steps(monkeypatch, on_cpu, between_steps):
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda platform: on_cpu)
    engine = Engine()
    residency = Residency(engine, Leases())
    asyncio.run(residency.load("a", identity.request_of("a", ONE, "/a"), size=1000))
    beside = [] if between_steps else ["guilomo_read", "guilomo_has_read"]
    assert engine.asked == [*beside, "guilomo_add"]


def test_workers_whose_memory_is_full_are_no_fault_of_the_adapter():
    """There may be room later: 503, and not 400."""

    async def load() -> None:
        engine = Engine(refused="it takes more than there is", is_full=True)
        residency = Residency(engine, Leases())
        with pytest.raises(NoRoom, match="it takes more than there is"):
            await residency.load("a", identity.request_of("a", ONE, "/a"))
        assert residency.resident() == []

    asyncio.run(load())


def test_what_has_a_size_only_once_it_is_there_counts_then():
    """As what plain `vllm serve` takes from the Hub, under its default bound."""

    async def load_all() -> None:
        residency = Residency(Engine(bytes=40, rank=1), Leases(), bound=100, keeps_names=True)
        for name in ("a", "b", "c", "d"):
            version = identity.request_of(name, ONE, f"/{name}")
            await residency.load(name, version)
            residency.switch(name, version)
        assert {resident.name for resident in residency.resident()} == {"b", "c", "d"}
        assert set(residency.current) == {"a", "b", "c", "d"}

    asyncio.run(load_all())


@pytest.mark.parametrize("keeps_names", [False, True])
def test_no_more_versions_are_kept_than_may_be(keeps_names):
    """What is in use or pinned stays above them, until it is not."""

    async def use_all() -> None:
        leases = Leases()
        pinned = ["pinned"]
        residency = Residency(
            Engine(), leases, most=2, pinned=lambda: pinned, keeps_names=keeps_names
        )
        versions = {n: identity.request_of(n, ONE, f"/{n}") for n in ("pinned", "a", "b", "c")}

        async def bring_in(name: str) -> None:
            await residency.load(name, versions[name])
            residency.switch(name, versions[name])

        def resident() -> set[str]:
            return {resident.name for resident in residency.resident()}

        await bring_in("pinned")
        await bring_in("a")
        lease = leases.open(reads=False)
        lease.take("a")
        lease.bind(versions["a"])
        await bring_in("b")
        assert resident() == {"pinned", "a", "b"}  # nothing could go
        await bring_in("c")
        assert resident() == {"pinned", "a", "c"}
        lease.let_go()
        assert resident() == {"pinned", "a"}, "a was used last"
        assert set(residency.current) == (set(versions) if keeps_names else resident())
        pinned.clear()
        await bring_in("b")
        assert resident() == {"a", "b"}
        residency.withdraw("b")
        assert resident() == {"a"}

    asyncio.run(use_all())
