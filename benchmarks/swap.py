"""What swapping an adapter does to a server under load.

Two clients ask for the adapter that is swapped, two for another one, all the while. Each swap puts
the other of two versions under the same name; then the next request's first token is waited for.

    failed   requests and swaps that did not succeed
    mixed    answers that are no version's: each is greedy, and must be that of one of the two as
             given alone; after a swap has been answered, that of the new one. In bfloat16 answers
             depend on what is beside them, and this is null
    p50_ms, p99_ms         from sending PUT to the first token of the new version
    parts_ms               the medians of what that is made of: what the server says in
                           `Server-Timing` (guilomo_serve/timing.py), the rest of PUT, and the
                           first token after it, which waits for the step at hand and then for
                           one that computes its prompt beside the other clients' tokens
    others_p99_over_idle   99th percentile of the other adapter's latency while swapping, over that
                           under the same load without swaps
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import openai
from common import report
from serve_throughput import LOUD, write_searched
from serving import admin_headers, serving

REPOSITORY = Path(__file__).parent.parent
PROMPT = 3 * "A customer writes: my card has not arrived, and it has been two weeks now. "
TOKENS = 16
CLIENTS = 2  # of the swapped adapter, and of the other one
# With blocks of 128 tokens, the default on a CPU, no prompt here would be in the prefix cache.
FLAGS = ("--enable-prefix-caching", "--block-size", "32", "--enforce-eager")


@dataclass
class Load:
    """What the clients saw while they ran."""

    answers: dict[str, list[str]] = field(default_factory=lambda: {"swapped": [], "other": []})
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"swapped": [], "other": []})
    failed: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = REPOSITORY / ".cache" / "smollm2-135m-instruct"
    parser.add_argument("model", nargs="?", type=Path, default=default, help="the base model")
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--idle-s", type=float, default=60.0, help="length of the load alone")
    parser.add_argument("--out", type=Path, help="write the result with machine and versions here")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        print(f"writing adapters for {args.model}", flush=True)
        folders, _ = write_searched(args.model, Path(scratch), LOUD)
        adapters = {"swapped": folders[0], "second": folders[1], "other": folders[2]}
        print("starting the server", flush=True)
        flags = ("--dtype", args.dtype, *FLAGS)
        with serving(str(args.model), adapters, Path(scratch) / "log", *flags) as url:
            result = measure(url, folders[:2], args.swaps, args.idle_s)
    if args.dtype != "float32":
        result["mixed"] = None
    report(result, args, args.out)


def measure(url: str, versions: list[Path], swaps: int, idle_s: float) -> dict[str, object]:
    """Runs the load alone, then with swaps; `versions` are the two folders."""
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)
    alone = [complete(client, name) for name in ("swapped", "second")]
    if alone[0] == alone[1]:
        raise SystemExit("the two versions give the same answer: nothing could tell them apart")

    idle, swapping = Load(), Load()
    under_load(client, idle, lambda: time.sleep(idle_s))
    print(f"{len(idle.seconds['other'])} requests to the other adapter without swaps", flush=True)
    first_token_ms: list[float] = []
    parts_ms: dict[str, list[float]] = {}
    stale = 0

    def swap() -> None:
        nonlocal stale
        for n in range(1, swaps + 1):
            start = time.perf_counter()
            try:
                parts = put(url, "swapped", versions[n % 2])
                answered = time.perf_counter()
                answer, first = first_token(client, "swapped")
            except (openai.OpenAIError, OSError) as e:
                swapping.failed.append(str(e))
                continue
            first_token_ms.append(1000 * (first - start))
            parts["rest"] = 1000 * (answered - start) - sum(parts.values())
            parts["first_token"] = 1000 * (first - answered)
            for name, ms in parts.items():  # nothing was read where a request still had it
                parts_ms.setdefault(name, []).append(ms)
            stale += answer != alone[n % 2]
            if n % max(swaps // 10, 1) == 0:
                print(f"swap {n}/{swaps}: {first_token_ms[-1]:.0f} ms", flush=True)

    under_load(client, swapping, swap)
    mixed = stale + sum(answer not in alone for answer in swapping.answers["swapped"])
    for error in [*idle.failed, *swapping.failed][:5]:
        print(f"failed: {error}", flush=True)
    if not first_token_ms:
        raise SystemExit("no swap succeeded")
    print("milliseconds        median      p99")
    for name, ms in parts_ms.items():
        print(f"{name:<16} {statistics.median(ms):9.1f} {percentile(ms, 0.99):8.1f}")
    return {
        "failed": len(idle.failed) + len(swapping.failed),
        "mixed": mixed,
        "p50_ms": round(statistics.median(first_token_ms), 1),
        "p99_ms": round(percentile(first_token_ms, 0.99), 1),
        "others_p99_over_idle": round(
            percentile(swapping.seconds["other"], 0.99) / percentile(idle.seconds["other"], 0.99), 3
        ),
        "parts_ms": {n: round(statistics.median(ms), 1) for n, ms in parts_ms.items()},
        "requests": sum(map(len, swapping.answers.values())),
    }


def under_load(client: openai.OpenAI, load: Load, during) -> None:
    """Runs `during` while the clients ask, and waits for their last answers."""

    def ask(name: str) -> None:
        while not load.stop.is_set():
            start = time.perf_counter()
            try:
                load.answers[name].append(complete(client, name))
            except openai.OpenAIError as e:
                load.failed.append(str(e))
            load.seconds[name].append(time.perf_counter() - start)

    with ThreadPoolExecutor(2 * CLIENTS) as pool:
        clients = [pool.submit(ask, name) for name in CLIENTS * ("swapped", "other")]
        try:
            during()
        finally:
            load.stop.set()
        for running in clients:
            running.result()


def complete(client: openai.OpenAI, name: str) -> str:
    return client.completions.create(**_asked(name)).choices[0].text


def first_token(client: openai.OpenAI, name: str) -> tuple[str, float]:
    """A whole answer, and when its first token came (`time.perf_counter`)."""
    stream = client.completions.create(**_asked(name), stream=True)
    pieces, first = [], None
    for chunk in stream:
        first = first or time.perf_counter()
        pieces += [choice.text for choice in chunk.choices]
    assert first is not None
    return "".join(pieces), first


def _asked(name: str) -> dict:
    settings = {"max_tokens": TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}
    return {"model": name, "prompt": PROMPT, **settings}


def put(url: str, name: str, folder: Path) -> dict[str, float]:
    """PUT /v1/adapters/{name}.

    Returns:
        What the server spent its time on, in milliseconds.

    Raises:
        OSError: it is refused.
    """
    request = urllib.request.Request(
        f"{url}/adapters/{name}",
        data=json.dumps({"source": str(folder)}).encode(),
        headers={"Content-Type": "application/json", **admin_headers(url)},
        method="PUT",
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        answer.read()
        timings = [entry.split(";dur=") for entry in answer.headers["Server-Timing"].split(", ")]
    return {name: float(ms) for name, ms in timings}


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


if __name__ == "__main__":
    main()
