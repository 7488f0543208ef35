"""Adapters' names and versions in vLLM's OpenAI server.

vLLM reloads an adapter in place: under one id, one name and one path. A stream that runs goes on
with the new weights, and prefix-cache blocks (vLLM hashes them with name and path) are reused
across versions. Here each load is a version with an id and an inner name that follow from its
digest (guilomo_serve/runtime/identity.py), and the public name points to the latest: who has begun
finishes with what he began with.

    models.py      vLLM's list of models, for any server that has the plugin
    managed.py     the same over a catalogue, for servers that `guilomo-serve` starts
    versions.py    what names stand for: put, rollback, delete, and what a request brings in
    shared.py      the same for replicas that share a catalogue
    fleet.py       what replicas say to one another, and how long one may answer
    leases.py      what is in use: one lease a request
    residency.py   whose weights are in memory
    report.py      what the engine says of them
    inspection.py  what an adapter folder is, without the engine
    routes.py      /v1/adapters
    schemas.py     what it answers, and errors
    access.py      who may administer
    limits.py      how much clients may ask at once
    lifecycle.py   /ready, and an end that finishes what runs
    prometheus.py  what a server does, in vLLM's /metrics
    model_names.py what a request's `model` does where vLLM does otherwise
    errors.py      what a refusal is to who asked
    console/       the operator's page

The seam, for vLLM 0.32: the class `OpenAIServingModels` is replaced, of which the overridden
methods and `lora_requests`, `lora_resolver_lock` have to stay; `vllm.plugins.load_endpoint_plugins`
returns our routes too (vLLM loads endpoint plugins only where VLLM_PLUGINS names them, and who
starts `guilomo-serve` has named it); `GracefulHTTPError` gives a status of ours to a client whose
`model` cannot be fetched;
`vllm.v1.engine.async_llm.OutputProcessor` is replaced by one that tells leases, and in
`guilomo-serve` counts (leases.py, prometheus.py).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any


def install() -> None:
    """Puts our class in the place of vLLM's list of models (see guilomo_serve.runtime).

    Called again, it is as if it had been called then alone: the plugin is loaded when vLLM's parser
    is made, and `guilomo-serve` has its settings after that.
    """
    from vllm.entrypoints.openai.models import serving
    from vllm.v1.engine import async_llm

    from guilomo_serve.catalogue.settings import Settings
    from guilomo_serve.server.leases import LeasedOutputProcessor, LeasePlugin
    from guilomo_serve.server.models import VersionedServingModels

    models: type[VersionedServingModels] = VersionedServingModels
    processor: type[LeasedOutputProcessor] = LeasedOutputProcessor
    plugins: list[Any] = [LeasePlugin()]
    if Settings.from_environment() is not None:
        from guilomo_serve.server import prometheus
        from guilomo_serve.server.console import ConsoleRoutes
        from guilomo_serve.server.managed import ManagedServingModels
        from guilomo_serve.server.routes import AdapterRoutes

        models = ManagedServingModels
        processor = prometheus.CountingOutputProcessor
        plugins += [AdapterRoutes(), ConsoleRoutes()]
        prometheus.install()
    _add_plugins(plugins)
    setattr(async_llm, "OutputProcessor", processor)  # noqa: B010
    setattr(serving, "OpenAIServingModels", models)  # noqa: B010
    app_state = sys.modules.get("vllm.entrypoints.launchers.api_server.app_state")
    if app_state is not None:  # imported by now: it has a name of its own for the class
        setattr(app_state, "OpenAIServingModels", models)  # noqa: B010


def _add_plugins(ours: Sequence[Any]) -> None:
    from vllm import plugins

    theirs = plugins.load_endpoint_plugins
    theirs = getattr(theirs, "without_ours", theirs)

    def with_ours(*args: Any, **kwargs: Any) -> list[Any]:
        return [*theirs(*args, **kwargs), *ours]

    with_ours.without_ours = theirs  # type: ignore[attr-defined]
    plugins.load_endpoint_plugins = with_ours
