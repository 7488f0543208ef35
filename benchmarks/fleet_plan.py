"""How many replicas many adapters need, and what the router between them is worth: a simulation.

    .venv/bin/python benchmarks/fleet_plan.py --out benchmarks/results/fleet_plan.json

Requests for 10,000 adapters arrive at random, popular ones more often (Zipf), and now and then one
adapter has a burst. Each is sent to a replica at its arrival; a replica does one piece of work
after another, as an engine's throughput is one for all requests in its batch: it loads the adapter
if that is not in its memory (the one that was not used for longest goes), reads the prompt, and
writes the answer. A request is in flight until its answer ends at the speed of a full batch. Three
ways to choose the replica, side by side:

    round_robin   one after another, whatever the adapter
    hashing       the adapter's own replica by consistent hashing, or the next one on the ring that
                  has at most 1.25 times the mean number of requests (bounded load)
    lora_aware    one that has the adapter in memory (`vllm:lora_adapter_loaded`), unless the wait
                  there is longer by more than a load takes; the least busy one otherwise

Costs are those measured on a CPU with SmolLM2-135M: a load is `p50_ms` of results/swap.json (PUT to
first token, so rather more than a load), throughput is that of results/serve_throughput_32.json
with eight adapters, and an adapter's bytes follow from its mean total rank. A router's news are
taken to be fresh, and nothing fails.

    cold            share of requests that waited for a load
    p50_s, p99_s    to the first token
    gib_per_min     of adapters that all replicas read
    replicas_needed for `rate` requests a second, so that p99_s is at most `target_s`
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import math
from bisect import bisect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from common import report

from guilomo_train.pictures import save, subplots

RESULTS = Path(__file__).parent / "results"
LAYERS, ROW = 30, 10_176  # SmolLM2-135M: in + out of a layer's seven modules
BATCH = 32  # requests at once, of serve_throughput_32.json
SIZES = (3, 10, 30, 100, 300, 1000)
UTILISATION = 0.4  # without loads, where fleets of several sizes are compared
BOUND = 1.25  # of the mean load, for hashing
POINTS = 64  # of a replica on the ring


@dataclass(frozen=True)
class Costs:
    """Of one replica: seconds of its work for a load, a prompt and a token of an answer, and of a
    step, which gives each request in a batch a token; bytes."""

    load_s: float
    prompt_s: float
    token_s: float
    step_s: float
    adapter_bytes: float

    @classmethod
    def measured(cls, prompt_tokens: int) -> Costs:
        swap, serving = (
            json.loads((RESULTS / f"{name}.json").read_text())["result"]
            for name in ("swap", "serve_throughput_32")
        )
        prefill, decode = (
            serving[phase]["base_tokens_per_s"] * serving[phase]["adapter_8"]
            for phase in ("prefill", "decode")
        )
        size = LAYERS * ROW * serving["mean_total_rank"] * 2  # bfloat16
        return cls(swap["p50_ms"] / 1000, prompt_tokens / prefill, 1 / decode, BATCH / decode, size)


@dataclass(frozen=True)
class Traffic:
    """What is asked for: `rate` requests a second, and `burst` of that once more for one adapter,
    for ten seconds of each minute."""

    adapters: int
    zipf: float
    rate: float
    requests: int
    answer_tokens: float
    burst: float

    def popularity(self) -> np.ndarray:
        """[adapters], the share of each."""
        weights = np.arange(1, self.adapters + 1) ** -self.zipf
        return weights / weights.sum()

    def draw(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Arrivals in their order, [n] each: when, for which adapter, tokens of the answer."""
        random = np.random.default_rng(seed)
        times = random.exponential(1 / self.rate, self.requests).cumsum()
        adapters = random.choice(self.adapters, self.requests, p=self.popularity())
        for begin in np.arange(30.0, times[-1] - 10, 60.0):
            more = begin + 10 * random.random(random.poisson(10 * self.rate * self.burst))
            times = np.concatenate([times, more])
            adapters = np.concatenate(
                [adapters, np.full(len(more), random.integers(self.adapters))]
            )
        order = times.argsort()
        answers = random.geometric(1 / self.answer_tokens, len(times))
        return times[order], adapters[order], answers


class Fleet:
    """Replicas while requests come and go.

    Attributes:
        in_flight: [replicas], requests that each has.
        resident: of each replica its adapters, those first that were not used for longest.
        holders: adapter -> the replicas that have it.
    """

    def __init__(self, replicas: int, capacity: int, ring: int = 0) -> None:
        self.size, self._capacity = replicas, capacity
        self.in_flight = np.zeros(replicas, dtype=np.int64)
        self.resident: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(replicas)]
        self.holders: dict[int, set[int]] = {}
        self._free_at = np.zeros(replicas)
        self._ends: list[tuple[float, int]] = []
        self._ring = sorted(
            (_place(f"{ring * replicas + r}/{i}"), r)
            for r in range(replicas)
            for i in range(POINTS)
        )

    def pass_time(self, now: float) -> None:
        """Takes away what has ended by now."""
        while self._ends and self._ends[0][0] <= now:
            self.in_flight[heapq.heappop(self._ends)[1]] -= 1

    def serve(
        self, replica: int, now: float, adapter: int, answer: int, costs: Costs
    ) -> tuple[float, bool]:
        """Seconds to the first token, and whether the adapter had to be loaded."""
        cold = self._use(replica, adapter)
        begin = max(now, self._free_at[replica])
        first = begin + costs.load_s * cold + costs.prompt_s
        self._free_at[replica] = first + answer * costs.token_s
        self.in_flight[replica] += 1
        heapq.heappush(self._ends, (first + answer * costs.step_s, replica))
        return first - now, cold

    def around(self, adapter: int) -> list[int]:
        """The replicas as they follow an adapter's place on the ring, some several times."""
        at = bisect(self._ring, (_place(str(adapter)), 0))
        return [r for _, r in self._ring[at:] + self._ring[:at]]

    def _use(self, replica: int, adapter: int) -> bool:
        resident = self.resident[replica]
        cold = adapter not in resident
        if cold and len(resident) == self._capacity:
            gone, _ = resident.popitem(last=False)
            self.holders[gone].discard(replica)
        resident[adapter] = None
        resident.move_to_end(adapter)
        self.holders.setdefault(adapter, set()).add(replica)
        return cold


def _place(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])


Policy = Callable[[int], int]  # adapter -> replica


def round_robin(fleet: Fleet, costs: Costs, mean_s: float) -> Policy:
    turn = iter(range(10**12))
    return lambda adapter: next(turn) % fleet.size


def hashing(fleet: Fleet, costs: Costs, mean_s: float) -> Policy:
    rings: dict[int, list[int]] = {}

    def choose(adapter: int) -> int:
        if adapter not in rings:
            rings[adapter] = list(dict.fromkeys(fleet.around(adapter)[: 8 * POINTS]))
        bound = math.ceil(BOUND * (fleet.in_flight.sum() + 1) / fleet.size)
        free = (r for r in rings[adapter] if fleet.in_flight[r] < bound)
        return next(free, int(fleet.in_flight.argmin()))

    return choose


def lora_aware(fleet: Fleet, costs: Costs, mean_s: float) -> Policy:
    def choose(adapter: int) -> int:
        least = int(fleet.in_flight.argmin())
        holder = min(fleet.holders.get(adapter, ()), key=fleet.in_flight.__getitem__, default=None)
        if holder is None:
            return least
        # Of what is in flight half is done, on average.
        longer_s = (fleet.in_flight[holder] - fleet.in_flight[least]) * mean_s / 2
        return holder if longer_s <= costs.load_s else least

    return choose


POLICIES = (round_robin, hashing, lora_aware)


@dataclass(frozen=True)
class Outcome:
    """See this file's docstring."""

    cold: float
    p50_s: float
    p99_s: float
    gib_per_min: float


@dataclass(frozen=True)
class Run:
    """Of each request [n]: seconds to its first token, whether it was cold; all of them in `s`."""

    first_token_s: np.ndarray
    cold: np.ndarray
    s: float

    def outcome(self, costs: Costs) -> Outcome:
        p50, p99 = np.quantile(self.first_token_s, (0.5, 0.99))
        bytes_per_s = self.cold.sum() * costs.adapter_bytes / self.s
        figures = (self.cold.mean(), p50, p99, bytes_per_s * 60 / 2**30)
        return Outcome(*(round(float(figure), 4) for figure in figures))


def simulate(
    costs: Costs,
    traffic: Traffic,
    replicas: int,
    capacity: int,
    policy: Callable[[Fleet, Costs, float], Policy],
    seed: int = 0,
    ring: int = 0,
) -> Run:
    """Runs a fleet on drawn traffic; the first half fills its memory and does not count.

    Args:
        ring: on which of all rings, by chance, the replicas have their places.
    """
    times, adapters, answers = traffic.draw(seed)
    fleet = Fleet(replicas, capacity, ring)
    choose = policy(fleet, costs, costs.prompt_s + traffic.answer_tokens * costs.token_s)
    seconds, cold = np.zeros(len(times)), np.zeros(len(times), dtype=bool)
    each = zip(times.tolist(), adapters.tolist(), answers.tolist(), strict=True)
    for i, (now, adapter, answer) in enumerate(each):
        fleet.pass_time(now)
        seconds[i], cold[i] = fleet.serve(choose(adapter), now, adapter, answer, costs)
    half = len(times) // 2
    return Run(seconds[half:], cold[half:], float(times[-1] - times[half]))


def replicas_needed(
    costs: Costs, traffic: Traffic, capacity: int, policy: Callable[..., Policy], target_s: float
) -> int:
    """The fewest with which `p99_s` keeps to the target, to about a fiftieth."""
    few = math.ceil(traffic.rate * (costs.prompt_s + traffic.answer_tokens * costs.token_s))
    many = 4 * few  # enough for a load with each request, and its wait
    while many - few > max(1, few // 50):
        middle = (few + many) // 2
        run = simulate(costs, traffic, middle, capacity, policy)
        kept = run.outcome(costs).p99_s <= target_s
        few, many = (few, middle) if kept else (middle, many)
    return many


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of their popularity")
    parser.add_argument("--memory-gib", type=float, default=2.0, help="of adapters, a replica's")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--answer-tokens", type=float, default=64, help="mean; geometric")
    parser.add_argument("--burst", type=float, default=0.2, help="share of the traffic")
    parser.add_argument("--rate", type=float, default=100, help="for replicas_needed")
    parser.add_argument("--target-s", type=float, default=3.0, help="for replicas_needed")
    parser.add_argument("--out", type=Path, help="write the result with the machine here")
    args = parser.parse_args()

    costs = Costs.measured(args.prompt_tokens)
    capacity = int(args.memory_gib * 2**30 / costs.adapter_bytes)
    traffic = Traffic(args.adapters, args.zipf, args.rate, 200_000, args.answer_tokens, args.burst)
    mean_s = costs.prompt_s + traffic.answer_tokens * costs.token_s
    outcomes: dict[str, dict[int, Outcome]] = {policy.__name__: {} for policy in POLICIES}
    for size in SIZES:
        sized = replace(
            traffic, rate=UTILISATION * size / mean_s, requests=max(100_000, 1_000 * size)
        )
        for policy in POLICIES:
            run = simulate(costs, sized, size, capacity, policy)
            outcomes[policy.__name__][size] = run.outcome(costs)
            print(size, policy.__name__, outcomes[policy.__name__][size], flush=True)
    needed = {
        policy.__name__: replicas_needed(costs, traffic, capacity, policy, args.target_s)
        for policy in POLICIES
    }
    if args.out is not None:
        draw(outcomes, args.out.with_suffix(".png"))
    result = {
        "costs": asdict(costs),
        "resident_adapters": capacity,
        "replicas_needed": needed,
        "outcomes": {
            name: {str(size): asdict(outcome) for size, outcome in of_size.items()}
            for name, of_size in outcomes.items()
        },
    }
    report(result, args, args.out)


def draw(outcomes: dict[str, dict[int, Outcome]], path: Path) -> None:
    """A picture of each figure over the number of replicas."""
    figure, axes = subplots(1, 3, 12, 3.6)
    titles = {
        "cold": "requests that wait for a load",
        "p99_s": "first token, 99th percentile, s",
        "gib_per_min": "adapters read, GiB a minute",
    }
    for axis, (name, title) in zip(axes[0], titles.items(), strict=True):
        for policy, of_size in outcomes.items():
            axis.plot(
                list(of_size),
                [getattr(outcome, name) for outcome in of_size.values()],
                marker="o",
                label=policy.replace("_", " "),
            )
        axis.set_title(title, fontsize=10)
        axis.set_xscale("log")
        axis.set_xlabel("replicas")
        axis.set_yscale("linear" if name == "cold" else "log")
    axes[0][0].legend(fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    main()
