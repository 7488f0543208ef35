"""What a version of an adapter is called inside vLLM, and what leaves it.

A version's inner name is `name@digest`, and its id (vLLM's `lora_int_id`) follows from that. So
both are the same in every process, on every replica and after a restart, and a rollback finds what
the version left in the prefix cache. Blocks are hashed with the digest alone: those of the same
weights are shared, whatever they are called and wherever their folder lies, and those of others
never. What leaves the server has the public name.

The seam, for vLLM 0.32: `_gen_lora_extra_hash_keys` of vllm/v1/core/kv_cache_utils.py, what blocks
are hashed with; if it is renamed, replicas and a second name share no blocks. The property `name`
of `LoRARequest` (vllm/lora/request.py), which KV events show; `lora_name` is what vLLM compares
requests by, and has to tell versions apart. If `name` is no longer asked, events show inner names.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from vllm.lora.request import LoRARequest

_INNER = re.compile("(.*)@([0-9a-f]{64})", re.DOTALL)
_ID_BITS = 31  # vLLM's newer model runner has ids in int32 (vllm/v1/worker/gpu/lora_utils.py)


def request_of(name: str, digest: str, path: str) -> LoRARequest:
    """A version as vLLM is told of it.

    Args:
        name: public.
        digest: of the adapter's files, 64 hexadecimal digits.
        path: where they are.
    """
    inner = f"{name}@{digest}"
    return LoRARequest(lora_name=inner, lora_int_id=id_of(inner), lora_path=path)


def id_of(inner: str) -> int:
    """The id of an inner name: two of them may have one, which whoever loads them has to check."""
    drawn = int.from_bytes(hashlib.sha256(inner.encode()).digest())
    return drawn % (2**_ID_BITS - 1) + 1


def public_name(inner: str) -> str:
    """What a client calls it; a name that is not ours is left as it is."""
    found = _INNER.fullmatch(inner)
    return found[1] if found else inner


def digest_in(inner: str) -> str | None:
    """The digest of an inner name; None for a name that is not ours."""
    found = _INNER.fullmatch(inner)
    return found[2] if found else None


def install() -> None:
    """Has blocks hashed by digest, and events show public names; again, it changes nothing."""
    from vllm.v1.core import kv_cache_utils

    theirs = kv_cache_utils._gen_lora_extra_hash_keys
    theirs = getattr(theirs, "theirs", theirs)

    def by_digest(request: Any) -> list[tuple[str, str, str]]:
        adapter = request.lora_request
        digest = None if adapter is None else digest_in(adapter.lora_name)
        return theirs(request) if digest is None else [("lora", digest, "")]

    by_digest.theirs = theirs  # type: ignore[attr-defined]
    kv_cache_utils._gen_lora_extra_hash_keys = by_digest
    LoRARequest.name = property(lambda request: public_name(request.lora_name))
