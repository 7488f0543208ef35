"""What a server does, for Prometheus: `guilomo_...` in vLLM's own /metrics.

Each series has the label `adapter`, an adapter's public name or "base"; only adapters of the
catalogue have series, and those of a deleted one go with it. A request is one prompt, however
many answers (`n`) it asks for:

    finished   answered to its end
    aborted    its client went away, or the engine was told to drop it
    failed     the engine gave an error for it
    refused    answered with an error before the engine had it (too long, no room, a bad adapter)

The engine's four are counted where its outputs arrive (vLLM's `OutputProcessor`), since vLLM's
stat loggers are not told which adapter a request used; refusals where the HTTP answer begins.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter as Sums
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client import REGISTRY, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from vllm.v1.engine import FinishReason

from guilomo_serve.server.access import App, Scope
from guilomo_serve.server.leases import Lease, LeasedOutputProcessor, leases
from guilomo_serve.server.report import EngineReport
from guilomo_serve.server.residency import Residency

BASE = "base"  # the base model's label; no adapter can have this name
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_ADAPTER = ["adapter"]

REQUESTS = Counter("guilomo_requests", "Requests by their outcome.", ["adapter", "outcome"])
PROMPT_TOKENS = Counter("guilomo_prompt_tokens", "Tokens of prompts that were read.", _ADAPTER)
GENERATED_TOKENS = Counter("guilomo_generated_tokens", "Tokens of answers.", _ADAPTER)
FIRST_TOKEN = Histogram(
    "guilomo_time_to_first_token_seconds",
    "From a request's arrival to its first token.",
    _ADAPTER,
    buckets=_SECONDS,
)
LATENCY = Histogram(
    "guilomo_request_seconds",
    "From a request's arrival to its end, of finished ones.",
    _ADAPTER,
    buckets=_SECONDS,
)
LOADS = Counter("guilomo_loads", "Times that a version was loaded into the engine.", _ADAPTER)
EVICTIONS = Counter("guilomo_evictions", "Times that idle weights were freed.", _ADAPTER)
SWAPS = Counter("guilomo_swaps", "Times that a version took the place of another.", _ADAPTER)
SWAP_SECONDS = Histogram(
    "guilomo_swap_seconds",
    "From the order to swap until new requests got the new version.",
    _ADAPTER,
    buckets=_SECONDS,
)
_OUTCOMES = ("finished", "aborted", "failed", "refused")
_OF_REQUESTS = (PROMPT_TOKENS, GENERATED_TOKENS, FIRST_TOKEN, LATENCY)
_OF_ADAPTERS = (LOADS, EVICTIONS, SWAPS, SWAP_SECONDS)

_known: set[str] = set()


def know(*adapters: str) -> None:
    """Begins the series of adapters at 0; an adapter that is known goes on."""
    for adapter in adapters:
        _known.add(adapter)
        for outcome in _OUTCOMES:
            REQUESTS.labels(adapter, outcome)
        for metric in (*_OF_REQUESTS, *(_OF_ADAPTERS if adapter != BASE else ())):
            metric.labels(adapter)


def forget(adapter: str) -> None:
    """Takes the series of a deleted adapter away; requests of it that end later do not count."""
    _known.discard(adapter)
    for outcome in _OUTCOMES:
        REQUESTS.remove(adapter, outcome)
    for metric in (*_OF_REQUESTS, *_OF_ADAPTERS):
        metric.remove(adapter)


def swapped(adapter: str, began: float) -> None:
    """Counts a swap that is done. Args: began: when it was ordered, by `time.monotonic`."""
    if adapter in _known:
        SWAPS.labels(adapter).inc()
        SWAP_SECONDS.labels(adapter).observe(time.monotonic() - began)


def _count(adapter: str, outcome: str) -> None:
    if adapter in _known:
        REQUESTS.labels(adapter, outcome).inc()


@dataclass
class _Running:
    """A request in the engine; with n > 1 its answers share it."""

    adapter: str
    arrival: float  # seconds since 1970
    prompt_tokens: int
    answers: int = 0  # that are not ended
    outcome: str = "finished"  # the worst of its answers
    has_token: bool = False


class CountingOutputProcessor(LeasedOutputProcessor):
    """vLLM's, which sees each request begin, each of its tokens, and its end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._running: dict[str, _Running] = {}

    def add_request(
        self,
        request: Any,
        prompt: str | None,
        parent_req: Any = None,
        request_index: int = 0,
        queue: Any = None,
    ) -> None:
        super().add_request(request, prompt, parent_req, request_index, queue)
        if request.resumable:
            return  # its prompt comes in parts, through no route that adapters have
        siblings = parent_req.child_requests if parent_req is not None else ()
        running = next((self._running[i] for i in siblings if i in self._running), None)
        if running is None:
            state = self.request_states[request.request_id]
            name = BASE if state.lora_name is None else state.lora_name.rpartition("@")[0]
            running = _Running(name, request.arrival_time, state.prompt_len)
        running.answers += 1
        self._running[request.request_id] = running

    def process_outputs(self, engine_core_outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        of_outputs = [self._running.get(output.request_id) for output in engine_core_outputs]
        result = super().process_outputs(engine_core_outputs, *args, **kwargs)
        # Now tokens behind a stop string are cut off, as in the answer's usage.
        now, prompts, generated = time.time(), Sums[str](), Sums[str]()
        for running, output in zip(of_outputs, engine_core_outputs, strict=True):
            if running is None:
                continue
            if output.new_token_ids and not running.has_token:
                running.has_token = True
                prompts[running.adapter] += running.prompt_tokens
                if running.adapter in _known:
                    FIRST_TOKEN.labels(running.adapter).observe(now - running.arrival)
            generated[running.adapter] += len(output.new_token_ids)
            if output.request_id not in self.request_states:
                reasons = {FinishReason.ABORT: "aborted", FinishReason.ERROR: "failed"}
                self._end(output.request_id, reasons.get(output.finish_reason, "finished"))
        for metric, tokens in ((PROMPT_TOKENS, prompts), (GENERATED_TOKENS, generated)):
            for adapter, count in tokens.items():
                if adapter in _known:
                    metric.labels(adapter).inc(count)
        return result

    def abort_requests(self, request_ids: Iterable[str], internal: bool) -> list[str]:
        aborted = super().abort_requests(request_ids, internal)
        for request_id in aborted:
            self._end(request_id, "aborted")
        return aborted

    def _end(self, request_id: str, outcome: str) -> None:
        running = self._running.pop(request_id, None)
        if running is None:
            return
        running.answers -= 1
        if outcome != "finished":
            running.outcome = outcome
        if running.answers == 0:
            _count(running.adapter, running.outcome)
            if running.outcome == "finished" and running.adapter in _known:
                LATENCY.labels(running.adapter).observe(time.time() - running.arrival)


class Observer:
    """ASGI middleware: has the engine asked before /metrics answers."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] == "http" and path.rstrip("/") == "/metrics":
            await _refresh(scope)
        await self._app(scope, receive, send)


def _count_refused(lease: Lease) -> None:
    refused = lease.status is not None and lease.status >= 400 and not lease.reached_engine
    if lease.asked is not None and refused:
        _count(lease.asked, "refused")


_FRESH_S = 1.0


async def _refresh(scope: Scope) -> None:
    """Has the gauges fresh, or as they were where the engine is slow or gone."""
    models = getattr(scope["app"].state, "openai_serving_models", None)
    if models is not None:
        with contextlib.suppress(Exception):
            await models.versions.report.try_refresh(_FRESH_S)


class AdapterGauges(Collector):
    """What is true at the moment of a scrape, from the engine's last report.

    Args:
        report: of the engine.
        residency: which versions are in memory.
    """

    def __init__(self, report: EngineReport, residency: Residency) -> None:
        self._report, self._residency = report, residency

    def describe(self) -> Iterable[Metric]:
        return self._families()

    def collect(self) -> Iterator[Metric]:
        resident, load, entropy = self._families()
        reported = self._report.versions
        held = Sums(dict.fromkeys(_known - {BASE}, 0))
        for version in self._residency.resident():
            if version.name in held:
                held[version.name] += version.bytes
        for name, count in held.items():
            resident.add_metric([name], count)
        for name, served in list(self._residency.current.items()):
            modules = reported.get(served.lora_int_id, {}).get("modules", {})
            for module, of_module in modules.items():
                entropy.add_metric([name, module], of_module["entropy"])
                for expert, share in enumerate(of_module["share"]):
                    load.add_metric([name, module, str(expert)], share)
        yield from (resident, load, entropy)

    @staticmethod
    def _families() -> tuple[GaugeMetricFamily, GaugeMetricFamily, GaugeMetricFamily]:
        return (
            GaugeMetricFamily(
                "guilomo_resident_bytes",
                "Weights in the engine's memory, of versions that retire too.",
                labels=["adapter"],
            ),
            GaugeMetricFamily(
                "guilomo_expert_load",
                "Share of a router's choices that an expert got, of sampled tokens.",
                labels=["adapter", "module", "expert"],
            ),
            GaugeMetricFamily(
                "guilomo_routing_entropy",
                "Mean entropy of a router over the log of its experts, of sampled tokens.",
                labels=["adapter", "module"],
            ),
        )


def install() -> None:
    """Counts what leases tell."""
    leases.when_ended.append(_count_refused)
    know(BASE)


def show(report: EngineReport, residency: Residency) -> None:
    """Adds the gauges of a server's adapters to /metrics; see `AdapterGauges`."""
    REGISTRY.register(AdapterGauges(report, residency))
