"""Does a fleet do what benchmarks/fleet_plan.py says of it?

Three replicas of a tiny model have some hundred adapters in a folder and memory for a part of them.
Requests come at random, popular adapters more often (Zipf), through HAProxy: one replica after
another, and by consistent hashing of the name with bounded load. The simulation gets the
same requests, and costs that were measured on one of the replicas before. Both count the second
half, as the first fills memories. Beside each other, for each way:

    cold           share of requests for which a replica loaded an adapter
    p50_s, p99_s   to the first token

    for_a_core_s   measured alone: what the replicas' threads waited for one of this machine's
                   cores, for each request. The simulation's replicas have cores of their own

The simulation's hashing has other places on the ring than HAProxy's. So it is done with many, and
has the median, and the least and the most (`cold_range`).

    costs          of one replica, see fleet_plan.py; and `steps`: seconds of a step by its requests
    resident       adapters that fit into a replica's memory
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import numpy as np
import requests
import transformers
from common import report
from fleet import KEY, Replica, haproxy, three_replicas
from fleet_plan import Costs, Traffic, hashing, round_robin, simulate

sys.path.append(str(Path(__file__).parents[1]))  # tests are no installed package

from guilomo_serve.adapter import BaseModel
from guilomo_serve.server.inspection import memory_of
from tests.serve.helpers import random_adapter, tiny_llama

RANKS = 8 * (16,)  # of each module: all adapters are of one size, some 2 MiB
SAMPLES = 60  # of each cost
PAUSE_S = 0.1  # before each, as a process that has slept takes longer
BATCH = 8
ROUNDS, STEPS = 10, 63  # of each batch, to time a step
PLACES = 50  # on the ring, for hashing
HASHING = (
    "hash req.body,json_query('$.model')\n    hash-type consistent\n    hash-balance-factor 125"
)
WAYS = {"round_robin": "roundrobin", "hashing": HASHING}


@dataclass(frozen=True)
class Answer:
    """Seconds to the first token and to the last one."""

    first_s: float
    last_s: float


def name_of(adapter: int) -> str:
    return f"a{adapter}"


async def ask(
    session: aiohttp.ClientSession, url: str, adapter: int, tokens: int, pause_s: float = 0
) -> Answer:
    """A stream of an adapter; each prompt is another one, so that no block of it is there."""
    await asyncio.sleep(pause_s)
    body = {
        "model": name_of(adapter),
        "prompt": f"{time.monotonic_ns()} is when a customer wrote: my card has not arrived!",
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
    }
    sent, first = time.monotonic(), None
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        if answer.status != 200:
            raise SystemExit(f"{answer.status}: {await answer.text()}")
        async for line in answer.content:
            if first is None and line.startswith(b"data: {"):
                first = time.monotonic()
    if first is None:
        raise SystemExit("an answer without tokens")
    return Answer(first - sent, time.monotonic() - sent)


async def know(url: str, adapters: int) -> None:
    """Has a replica copy all adapters; in memory are the last ones then."""
    async with aiohttp.ClientSession() as session:
        for adapter in range(adapters):
            await ask(session, url, adapter, 1)


async def measure(url: str) -> tuple[Costs, dict[int, float]]:
    """Costs of a replica that is asked now and then, and seconds of a step by its requests."""
    async with aiohttp.ClientSession() as session:
        cold = [await ask(session, url, a, 8, PAUSE_S) for a in range(SAMPLES)]
        warm = [await ask(session, url, SAMPLES - 1, 8, PAUSE_S) for _ in range(SAMPLES)]
        steps = {}
        for batch in (1, 2, 4, BATCH):
            answers = []
            for _ in range(ROUNDS):
                each = [ask(session, url, SAMPLES - 1 - i, STEPS + 1) for i in range(batch)]
                answers += await asyncio.gather(*each)
            steps[batch] = median((a.last_s - a.first_s) / STEPS for a in answers)
    prompt_s = median(a.first_s for a in warm)
    load_s = median(a.first_s for a in cold) - prompt_s
    return Costs(load_s, prompt_s, steps[BATCH] / BATCH, steps[1], 0.0), steps


async def campaign(url: str, drawn: list[np.ndarray]) -> np.ndarray:
    """Seconds to the first token [n] of requests that come at their time, the first one now."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        began, asked = time.monotonic() - drawn[0][0], []
        for at, adapter, tokens in zip(*(of.tolist() for of in drawn), strict=True):
            await asyncio.sleep(began + at - time.monotonic())
            asked.append(asyncio.create_task(ask(session, url, adapter, tokens)))
        return np.array([answer.first_s for answer in await asyncio.gather(*asked)])


def loads(replicas: Sequence[Replica]) -> int:
    """How often they have loaded an adapter."""
    metrics = [requests.get(f"{replica.url}/metrics", timeout=30).text for replica in replicas]
    found = re.findall(r"^guilomo_loads_total\S* (\S+)$", "\n".join(metrics), re.MULTILINE)
    return int(sum(map(float, found)))


def for_a_core_s(replicas: Sequence[Replica]) -> float:
    """Seconds that their threads have waited for a core of this machine (Linux's schedstat)."""
    groups = {replica.group for replica in replicas}
    waited = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if os.getpgid(int(process.name)) in groups:
                for thread in process.glob("task/*/schedstat"):
                    waited += int(thread.read_text().split()[1])
    return waited / 1e9


def resident(replica: Replica) -> int:
    answer = requests.get(
        f"{replica.url}/v1/adapters?limit=1000",
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=30,
    )
    return sum(adapter["resident"] for adapter in answer.json()["data"])


def figures(seconds: np.ndarray, cold: float) -> dict[str, float]:
    p50, p99 = np.quantile(seconds, (0.5, 0.99))
    found = {"cold": cold, "p50_s": p50, "p99_s": p99}
    return {name: round(float(figure), 4) for name, figure in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=300)
    parser.add_argument("--resident", type=int, default=60, help="for how many there is memory")
    parser.add_argument("--zipf", type=float, default=1.0)
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=10.0, help="requests a second, of all")
    parser.add_argument("--answer-tokens", type=float, default=16, help="mean; geometric")
    parser.add_argument("--out", type=Path, help="write the result with machine and versions here")
    args = parser.parse_args()
    if args.adapters < SAMPLES:
        parser.error(f"--adapters {args.adapters}: expected {SAMPLES} or more, to time loads")
    # All replicas are on this machine: threads of several would wait for one another on its cores.
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    traffic = Traffic(args.adapters, args.zipf, args.rate, args.requests, args.answer_tokens, 0.0)
    drawn = traffic.draw(0)
    half = len(drawn[0]) // 2
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        scratch = Path(folder)
        model = tiny_llama(scratch / "model")
        described = BaseModel.from_config(transformers.AutoConfig.from_pretrained(model))
        ranks = dict.fromkeys(described.linears, RANKS)
        for adapter in range(args.adapters):
            random_adapter(model, scratch / "root" / name_of(adapter), seed=adapter, ranks=ranks)
        memory = memory_of(scratch / "root" / name_of(0), 4) * (args.resident + 0.5) / 2**30
        flags = ("--adapter-root", str(scratch / "root"), "--adapter-memory", str(memory))
        flags += ("--expert-load", "off")
        replicas = stack.enter_context(three_replicas(model, flags, scratch))
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda r: asyncio.run(know(r.url, args.adapters)), replicas))
        costs, steps = asyncio.run(measure(replicas[0].url))
        capacity = resident(replicas[0])
        print(costs, steps, capacity, flush=True)
        result: dict[str, Any] = {"costs": asdict(costs), "steps": steps, "resident": capacity}
        for way, balance in WAYS.items():
            with haproxy(replicas, scratch, balance, name_of(0)) as url:
                asyncio.run(campaign(url, [of[:half] for of in drawn]))
                before, waited = loads(replicas), for_a_core_s(replicas)
                seconds = asyncio.run(campaign(url, [of[half:] for of in drawn]))
                cold = (loads(replicas) - before) / len(seconds)
            waited = (for_a_core_s(replicas) - waited) / len(seconds)
            result[way] = {"measured": {**figures(seconds, cold), "for_a_core_s": round(waited, 4)}}
            result[way]["simulated"] = simulated(way, costs, traffic, capacity)
            print(way, json.dumps(result[way]), flush=True)
    report(result, args, args.out)


def simulated(way: str, costs: Costs, traffic: Traffic, capacity: int) -> dict[str, Any]:
    policy = {"round_robin": round_robin, "hashing": hashing}[way]
    runs = []
    for place in range(PLACES if way == "hashing" else 1):
        run = simulate(costs, traffic, 3, capacity, policy, ring=place)
        runs.append(figures(run.first_token_s, float(run.cold.mean())))
    found: dict[str, Any] = {key: round(median(run[key] for run in runs), 4) for key in runs[0]}
    if len(runs) > 1:
        found["cold_range"] = [min(run["cold"] for run in runs), max(run["cold"] for run in runs)]
    return found


if __name__ == "__main__":
    main()
