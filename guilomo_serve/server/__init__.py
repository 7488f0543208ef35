"""Adapters' names and versions in vLLM's OpenAI server.

vLLM reloads an adapter in place: under one id, one name and one path. A stream that runs goes on
with the new weights, and prefix-cache blocks (vLLM hashes them with name and path) are reused
across versions. Here each load is a version with an id and an inner name of its own, and the
public name points to the latest: who has begun finishes with what he began with.
"""

from __future__ import annotations

import sys


def install() -> None:
    """Puts `VersionedServingModels` in the place of vLLM's class (see guilomo_serve.runtime)."""
    from vllm.entrypoints.openai.models import serving

    from guilomo_serve.server.models import VersionedServingModels

    setattr(serving, "OpenAIServingModels", VersionedServingModels)  # noqa: B010
    app_state = sys.modules.get("vllm.entrypoints.launchers.api_server.app_state")
    if app_state is not None:  # imported by now: it has a name of its own for the class
        setattr(app_state, "OpenAIServingModels", VersionedServingModels)  # noqa: B010
