"""Does a server of very many adapters start, list, remember and answer as one of few?

A state is prepared with `--adapters` names over `--distinct` adapters of one expert and rank 1 in
each module, and a server is started on it with `--bound-mib` for their weights. `--asked` of the
names are asked for in turn, each when it is cold and at once again, so that several times the bound
is loaded.

    ready_over_empty   seconds from the start to /ready, over those with an empty state
    resident_over_bound  what the server's processes have grown by while adapters came and went,
                       over the bound
    list_s             the slowest page of GET /v1/adapters, of the default size
    metrics_ms         the median of /metrics, when as many adapters have series as may
    stream_p99_ratio   99th percentile of the time between tokens of a stream while /metrics and
                       /v1/adapters are asked for each second, over that without
    cold_p99_s         99th percentile of a cold adapter's first token; and warm_p99_s
    load_p99_s         that of loading a cold adapter without a request, by pinning it
    cold_over_goal     cold_p99_s over twice warm_p99_s plus load_p99_s
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any
from unittest.mock import patch

import openai
import psutil
import torch
from common import report
from serving import admin_headers, serving
from transformers import AutoConfig

from guilomo_serve.adapter import (
    Adapter,
    AdapterSpec,
    BaseModel,
    Expert,
    ModuleWeights,
    write_adapter,
)
from guilomo_serve.catalogue import Catalogue, Store, Version
from guilomo_serve.catalogue.database import CATALOGUE_FILE

REPOSITORY = Path(__file__).parent.parent
PROMPT = "A customer writes: my card has not arrived."
FLAGS = ("--enforce-eager", "--max-model-len", "1024")
STREAMS, STREAMED = 4, 400  # of each kind, in turn, and tokens of each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = REPOSITORY / ".cache" / "smollm2-135m-instruct"
    parser.add_argument("model", nargs="?", type=Path, default=default, help="the base model")
    parser.add_argument("--adapters", type=int, default=10_000, help="names in the catalogue")
    parser.add_argument("--distinct", type=int, default=200, help="adapters that they stand for")
    parser.add_argument("--asked", type=int, default=1000, help="names that are asked for")
    parser.add_argument("--bound-mib", type=int, default=256, help="memory for their weights")
    parser.add_argument("--starts", type=int, default=3, help="of each kind, the median counts")
    parser.add_argument("--out", type=Path, help="write the result with machine and versions here")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        empty, full = Path(scratch) / "empty", Path(scratch) / "full"
        log = Path(scratch) / "log"
        print(f"preparing a state of {args.adapters} adapters", flush=True)
        with patch("os.fsync"):  # what is made here need not outlive a power cut
            prepare(args.model, full, args.adapters, args.distinct)
        flags = ("--adapter-memory", str(args.bound_mib / 1024), *FLAGS)
        start(args.model, log, empty, flags)  # which reads all files from the disk
        starts: dict[Path, list[float]] = {empty: [], full: []}
        for state in args.starts * (empty, full):
            starts[state].append(start(args.model, log, state, flags))
        print(f"seconds to be ready: {list(starts.values())}", flush=True)
        with serving(str(args.model), {}, log, "--state", str(full), *flags) as url:
            result = measure(url, args.adapters, args.asked, args.bound_mib * 2**20)
    ready = [statistics.median(seconds) for seconds in starts.values()]
    report({"ready_over_empty": ready[1] / ready[0], **result}, args, args.out)


def prepare(model: Path, state: Path, count: int, distinct: int) -> None:
    """Writes a state as a server leaves it that was given `count` adapters."""
    base = BaseModel.from_config(AutoConfig.from_pretrained(model))
    modules = {module: shape for module, shape in base.linears.items() if module != "lm_head"}
    experts = {module: (Expert(1, 0.1),) for module in modules}
    targets = tuple(sorted({module.rsplit(".", 1)[-1] for module in modules}))
    spec = AdapterSpec(str(model), targets, 1, 16.0, experts, base.fingerprint)
    about = {"kind": "guilomo", "base": str(model), "task": None}
    about |= {"allocation": {module: [1] for module in modules}}
    state.mkdir()
    store, catalogue = Store(state / "adapters"), Catalogue(state / CATALOGUE_FILE)
    catalogue._db.execute("PRAGMA synchronous = OFF")
    generator = torch.Generator().manual_seed(0)
    stored = []
    for _ in range(min(distinct, count)):
        weights = {
            module: ModuleWeights(
                torch.randn(1, in_features, generator=generator).bfloat16() / 32,
                torch.randn(out_features, 1, generator=generator).bfloat16() / 32,
                None,
            )
            for module, (out_features, in_features) in modules.items()
        }
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(Adapter(spec, weights), Path(folder) / "adapter", card="Random.")
            stored.append(store.add(Path(folder) / "adapter", lambda copy: None)[0])
    for i in range(count):
        of = stored[i % len(stored)]
        number = catalogue.next_number()
        catalogue.put(Version(number, name_of(i), of.digest, "/", of.size, about, time.time()))
    catalogue.close()


def name_of(i: int) -> str:
    return f"adapter-{i:06d}"


def start(model: Path, log: Path, state: Path, flags: tuple[str, ...]) -> float:
    """Seconds until a server on a state is ready."""
    began = time.monotonic()
    with serving(str(model), {}, log, "--state", str(state), *flags):
        return time.monotonic() - began


def measure(url: str, count: int, asked: int, bound: int) -> dict[str, Any]:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)
    server = url.removesuffix("/v1")
    step = max(count // asked, 1)
    names = [name_of(i) for i in range(0, count, step)][:asked]
    first_token(client, "base")
    for name in names[:8]:
        first_token(client, name)
    before = memory()
    cold, warm, most = [], [], 0
    for i, name in enumerate(names[8:]):
        cold.append(first_token(client, name))
        warm.append(first_token(client, name))
        most = max(most, memory())
        if i % 100 == 0:
            print(f"{i} asked, {(most - before) / 2**20:.0f} MiB more", flush=True)
    pages = [page for _ in range(3) for page in list_all(server)]
    metrics = [seconds_of(f"{server}/metrics") for _ in range(20)]
    loads = [seconds_to_load(server, name_of(i + 1)) for i in range(0, count - 1, step)][:asked]
    quiet, watched = [], []
    for _ in range(STREAMS):
        quiet += between_tokens(client, names[-1])
        stop = threading.Event()
        watcher = threading.Thread(target=watch, args=(server, stop))
        watcher.start()
        watched += between_tokens(client, names[-1])
        stop.set()
        watcher.join()
    cold_p99_s, warm_p99_s, load_p99_s = (percentile(times, 99) for times in (cold, warm, loads))
    return {
        "resident_over_bound": (most - before) / bound,
        "list_s": max(pages),
        "metrics_ms": 1e3 * statistics.median(metrics),
        "stream_p99_ratio": percentile(watched, 99) / percentile(quiet, 99),
        "cold_p99_s": cold_p99_s,
        "warm_p99_s": warm_p99_s,
        "load_p99_s": load_p99_s,
        "cold_over_goal": cold_p99_s / (2 * warm_p99_s + load_p99_s),
    }


def first_token(client: openai.OpenAI, model: str) -> float:
    began = time.monotonic()
    client.completions.create(model=model, prompt=PROMPT, max_tokens=1)
    return time.monotonic() - began


def memory() -> int:
    """Bytes of all servers' processes below this one."""
    return sum(process.memory_info().rss for process in psutil.Process().children(recursive=True))


def seconds_of(url: str, headers: dict[str, str] | None = None) -> float:
    began = time.monotonic()
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {})) as answer:
        answer.read()
    return time.monotonic() - began


def seconds_to_load(server: str, name: str) -> float:
    """Has a server load an adapter that nobody has asked for."""
    url, headers = f"{server}/v1/adapters/{name}", admin_headers(server)
    began = time.monotonic()
    urllib.request.urlopen(urllib.request.Request(f"{url}/pin", b"", headers)).close()
    seconds = time.monotonic() - began
    urllib.request.urlopen(urllib.request.Request(f"{url}/unpin", b"", headers)).close()
    return seconds


def list_all(server: str) -> list[float]:
    """Seconds of each page of the first thousand adapters."""
    headers, seconds, after = admin_headers(server), [], ""
    for _ in range(10):
        url = f"{server}/v1/adapters?after={after}"
        seconds.append(seconds_of(url, headers))
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            page = json.load(answer)
        if not page["has_more"]:
            break
        after = page["data"][-1]["name"]
    return seconds


def watch(server: str, stop: threading.Event) -> None:
    """Asks as a monitor and an operator do."""
    headers = admin_headers(server)
    while not stop.wait(1.0):
        seconds_of(f"{server}/metrics")
        seconds_of(f"{server}/v1/adapters", headers)


def between_tokens(client: openai.OpenAI, model: str) -> list[float]:
    """Seconds between the tokens of a stream."""
    stream = client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=STREAMED,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    times = [time.monotonic() for _ in stream]
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def percentile(values: list[float], rank: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[rank - 1]


if __name__ == "__main__":
    main()
