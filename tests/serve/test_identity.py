"""What versions are called inside vLLM, and what leaves it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
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


def test_two_versions_of_one_id_are_not_in_memory_together(monkeypatch):
    class Engine:
        async def collective_rpc(self, method: str, args: Any) -> list[Any]:
            return [{"bytes": 1, "rank": 1, "seconds": 0.0}]

    monkeypatch.setattr(identity, "id_of", lambda inner: 7)

    async def load_all() -> None:
        residency = Residency(Engine(), Leases())
        await residency.load("a", identity.request_of("a", ONE, "/a"))
        await residency.load("a", identity.request_of("a", ONE, "/a"))  # it is there
        with pytest.raises(NoRoom, match=f"b@{OTHER} is that of a@{ONE}"):
            await residency.load("b", identity.request_of("b", OTHER, "/b"))

    asyncio.run(load_all())
