"""What a server does, for Prometheus: `guilomo_...` in vLLM's own /metrics.

Each series but one has the label `adapter`, an adapter's public name or "base". The `MOST` adapters
that were used last have series; an adapter that comes back after others begins from zero, as all do
when a server starts, and those of a deleted one go. What was counted of adapters whose series went
is in those of "(others)", so that sums over all stay true. A client's request is counted by how it
ended:

    finished   answered to its end
    aborted    its client went away, or the server dropped it as it ended
    failed     the engine gave an error for it
    refused    answered with an error before the engine had it (too long, no room, a bad adapter)

It is one request however many prompts it has, answers (`n`) it asks for, or beams it searches; what
the engine gets for it are its engine requests, of which answers to one prompt share one. Clients'
requests are counted by their leases, the engine's and tokens where its outputs arrive, since vLLM's
stat loggers are not told which adapter a request used.

`vllm:lora_adapter_loaded` is what vLLM is to have for routers that look for a replica with the
adapter in memory, as vllm-project/vllm#54830 proposes it and llm-d/llm-d-router#2792 reads it. vLLM
0.32 has none; one that does refuses ours when a server starts (two metrics of one name).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import REGISTRY, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from vllm.v1.engine import FinishReason
from vllm.v1.metrics.prometheus import get_prometheus_registry

from guilomo_serve.server.access import App, Scope
from guilomo_serve.server.leases import Lease, LeasedOutputProcessor, current_lease, leases
from guilomo_serve.server.report import EngineReport
from guilomo_serve.server.residency import Residency

BASE = "base"  # the base model's label; no adapter can have this name
OTHERS = "(others)"  # the label of those without series; no adapter can have this name either
MOST = 64  # adapters with series: 37 lines each, at 10 microseconds a line
_SECONDS = (0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)

SWAP_SECONDS = Histogram(
    "guilomo_swap_seconds",
    "From the order to swap until new requests got the new version.",
    buckets=_SECONDS,
)


@dataclass
class _Seconds:
    """A histogram: how many lie in each bucket and beyond the last, and their sum."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(_SECONDS) + 1))
    sum: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(_SECONDS, seconds)] += 1
        self.sum += seconds

    def add(self, other: _Seconds) -> None:
        self.counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum

    def buckets(self) -> list[tuple[str, float]]:
        total, found = 0, []
        for bound, count in zip((*_SECONDS, float("inf")), self.counts, strict=True):
            total += count
            found.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
        return found


@dataclass
class Totals:
    """What there was of one adapter."""

    requests: Counter[str] = field(
        default_factory=lambda: Counter(finished=0, aborted=0, failed=0, refused=0)
    )
    engine_requests: Counter[str] = field(
        default_factory=lambda: Counter(finished=0, aborted=0, failed=0)
    )
    prompt_tokens: int = 0
    generated_tokens: int = 0
    first_token: _Seconds = field(default_factory=_Seconds)
    latency: _Seconds = field(default_factory=_Seconds)
    loads: int = 0
    evictions: int = 0
    swaps: int = 0

    def add(self, other: Totals) -> None:
        self.requests.update(other.requests)
        self.engine_requests.update(other.engine_requests)
        self.first_token.add(other.first_token)
        self.latency.add(other.latency)
        for name in ("prompt_tokens", "generated_tokens", "loads", "evictions", "swaps"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Series:
    """The totals of those adapters that were used last.

    Attributes:
        others: of those that had series before, so that sums over all never fall.
        exists: whether a name is an adapter's that is in memory; others get no series.
        pinned: the names that were pinned at the last scrape.
    """

    def __init__(self) -> None:
        self._of: OrderedDict[str, Totals] = OrderedDict()
        self.others = Totals()
        self.exists: Callable[[str], bool] = lambda name: False
        self.pinned: Collection[str] = ()

    def of(self, adapter: str) -> Totals:
        """Those of an adapter, to be added to; of what is none they are thrown away."""
        totals = self._of.get(adapter)
        if totals is None:
            totals = Totals()
            if adapter != BASE and not self.exists(adapter):
                return totals
            self._of[adapter] = totals
        self._of.move_to_end(adapter)
        if len(self._of) > MOST:
            gone = next(name for name in self._of if name != BASE)
            self.others.add(self._of.pop(gone))
        return totals

    def forget(self, adapter: str) -> None:
        """Takes those of a deleted adapter away; requests of it that end later do not count."""
        self.others.add(self._of.pop(adapter, Totals()))

    def all(self) -> list[tuple[str, Totals]]:
        return list(self._of.items())


series = Series()


def swapped(adapter: str, began: float) -> None:
    """Counts a swap that is done. Args: began: when it was ordered, by `time.monotonic`."""
    series.of(adapter).swaps += 1
    SWAP_SECONDS.observe(time.monotonic() - began)


@dataclass
class _Running:
    """A request in the engine; with n > 1 its answers share it."""

    adapter: str
    lease: Lease | None
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
            name = BASE if state.lora_name is None else state.lora_name
            running = _Running(name, current_lease(), state.prompt_len)
        running.answers += 1
        self._running[request.request_id] = running

    def process_outputs(self, engine_core_outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        of_outputs = [self._running.get(output.request_id) for output in engine_core_outputs]
        result = super().process_outputs(engine_core_outputs, *args, **kwargs)
        # Now tokens behind a stop string are cut off, as in the answer's usage.
        now = time.time()
        for running, output in zip(of_outputs, engine_core_outputs, strict=True):
            if running is None:
                continue
            totals = series.of(running.adapter)
            if output.new_token_ids and not running.has_token:
                running.has_token = True
                totals.prompt_tokens += running.prompt_tokens
                if running.lease is not None and not running.lease.has_token:
                    running.lease.has_token = True
                    totals.first_token.observe(now - running.lease.began)
            totals.generated_tokens += len(output.new_token_ids)
            if output.request_id not in self.request_states:
                reasons = {FinishReason.ABORT: "aborted", FinishReason.ERROR: "failed"}
                self._end(output.request_id, reasons.get(output.finish_reason, "finished"))
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
            if running.lease is not None:
                running.lease.engine_said = outcome
        if running.answers == 0:
            series.of(running.adapter).engine_requests[running.outcome] += 1


def _count(lease: Lease) -> None:
    """Counts a client's request that asked a model, once it has ended."""
    refused = lease.status is not None and lease.status >= 400
    if lease.asked is None or not (refused or lease.left or lease.reached_engine):
        return  # one that only wanted its tokens counted, for instance
    totals = series.of(lease.asked)
    if lease.left:
        outcome = "aborted"
    elif lease.engine_said is not None:
        outcome = lease.engine_said
    elif refused:
        outcome = "failed" if lease.reached_engine else "refused"
    else:
        outcome = "finished"
        totals.latency.observe(time.time() - lease.began)
    totals.requests[outcome] += 1


class Metrics:
    """ASGI middleware in the place of vLLM's route /metrics, of the same answer.

    It renders in a thread, for the streams that go on, and asks the engine for its report first.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        asked = scope["type"] == "http" and path.rstrip("/") == "/metrics"
        if not asked or scope["method"] not in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        await _refresh(scope)
        registry = get_prometheus_registry()
        names = Request(scope).query_params.getlist("name[]")
        encode, kind = choose_encoder(Headers(scope=scope).get("accept", ""))
        chosen = registry.restricted_registry(names) if names else registry
        text = await asyncio.to_thread(encode, chosen)
        await Response(text, media_type=kind)(scope, receive, send)


_FRESH_S = 1.0
_WAIT_S = 0.02  # for the engine; what it says later is in the next scrape


async def _refresh(scope: Scope) -> None:
    """Has the gauges fresh, or as they were where the engine is slow or gone."""
    models = getattr(scope["app"].state, "openai_serving_models", None)
    if models is not None:
        with contextlib.suppress(Exception):
            series.pinned = models.versions.catalogue.pinned()
            await models.versions.report.try_refresh(_FRESH_S, _WAIT_S)


class AdapterMetrics(Collector):
    """The series of the adapters that were used last.

    Args:
        report: of the engine.
        residency: which versions are in memory.
    """

    def __init__(self, report: EngineReport, residency: Residency) -> None:
        self._report, self._residency = report, residency

    def describe(self) -> Iterable[Metric]:
        return [*self._totals([]), *self._gauges([])]

    def collect(self) -> Iterator[Metric]:
        of = series.all()
        yield from self._totals([*of, (OTHERS, series.others)])
        yield from self._gauges([name for name, _ in of if name != BASE])

    @staticmethod
    def _totals(of: list[tuple[str, Totals]]) -> Iterator[Metric]:
        for name, text, counts in (
            (
                "guilomo_requests",
                "Clients' requests by their outcome.",
                lambda totals: totals.requests,
            ),
            (
                "guilomo_engine_requests",
                "The engine's requests, of which a client's may need many, by their outcome.",
                lambda totals: totals.engine_requests,
            ),
        ):
            counter = CounterMetricFamily(name, text, labels=["adapter", "outcome"])
            for adapter, totals in of:
                for outcome, count in list(counts(totals).items()):
                    counter.add_metric([adapter, outcome], count)
            yield counter
        for name, text, attribute in (
            ("guilomo_prompt_tokens", "Tokens of prompts that were read.", "prompt_tokens"),
            ("guilomo_generated_tokens", "Tokens of answers.", "generated_tokens"),
            ("guilomo_loads", "Times that a version was loaded into the engine.", "loads"),
            ("guilomo_evictions", "Times that idle weights were freed.", "evictions"),
            ("guilomo_swaps", "Times that a version took the place of another.", "swaps"),
        ):
            counter = CounterMetricFamily(name, text, labels=["adapter"])
            for adapter, totals in of:
                counter.add_metric([adapter], getattr(totals, attribute))
            yield counter
        for name, text, attribute in (
            (
                "guilomo_time_to_first_token_seconds",
                "From a client's request's arrival to its first token.",
                "first_token",
            ),
            (
                "guilomo_request_seconds",
                "From a client's request's arrival to its end, of finished ones.",
                "latency",
            ),
        ):
            histogram = HistogramMetricFamily(name, text, labels=["adapter"])
            for adapter, totals in of:
                seconds: _Seconds = getattr(totals, attribute)
                histogram.add_metric([adapter], seconds.buckets(), seconds.sum)
            yield histogram

    def _gauges(self, names: list[str]) -> Iterator[Metric]:
        held = Counter(dict.fromkeys(names, 0))
        for resident in self._residency.resident():
            if resident.name in held:
                held[resident.name] += resident.bytes
        memory = GaugeMetricFamily(
            "guilomo_resident_bytes",
            "Weights in the engine's memory, of versions that retire too.",
            labels=["adapter"],
        )
        entropy = GaugeMetricFamily(
            "guilomo_routing_entropy",
            "Entropy of an adapter's routers over the log of their experts; mean of all routers, "
            "of sampled tokens.",
            labels=["adapter"],
        )
        imbalance = GaugeMetricFamily(
            "guilomo_routing_imbalance",
            "Share of a router's most chosen expert times the router's experts, 1 where all are "
            "chosen alike; mean of all routers, of sampled tokens.",
            labels=["adapter"],
        )
        load = GaugeMetricFamily(
            "guilomo_expert_load",
            "Share of a router's choices that an expert got, of sampled tokens "
            "(--expert-load modules).",
            labels=["adapter", "module", "expert"],
        )
        loaded = GaugeMetricFamily(
            "vllm:lora_adapter_loaded",
            'Adapters in memory; level: "gpu" in a slot of the engine (a CPU\'s has slots too), '
            '"cpu" beside them; pinned: is not evicted; rank: of its largest module.',
            labels=["adapter_name", "level", "pinned", "rank"],
        )
        for name, count in held.items():
            memory.add_metric([name], count)
            self._add_loaded(loaded, name)
            found = self._report.of(self._residency.current.get(name))
            if found is None or not found["tokens"]:
                continue
            entropy.add_metric([name], found["entropy"])
            imbalance.add_metric([name], found["imbalance"])
            for module, of_module in found.get("modules", {}).items():
                for expert, share in enumerate(of_module["share"]):
                    load.add_metric([name, module, str(expert)], share)
        yield from (memory, entropy, imbalance, load, loaded)

    def _add_loaded(self, loaded: GaugeMetricFamily, name: str) -> None:
        resident = self._residency.of(name)
        if resident is not None:
            level = "gpu" if resident.version.lora_int_id in self._report.in_slots else "cpu"
            pinned = str(name in series.pinned).lower()
            loaded.add_metric([name, level, pinned, str(resident.rank)], 1)


def install() -> None:
    """Counts what leases tell."""
    leases.when_ended.append(_count)
    series.of(BASE)


def show(report: EngineReport, residency: Residency) -> None:
    """Adds the series of a server's adapters to /metrics; see `AdapterMetrics`."""
    series.exists = lambda name: residency.current.get(name) is not None
    REGISTRY.register(AdapterMetrics(report, residency))
