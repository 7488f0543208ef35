"""Do replicas answer as one while everything happens to them?

Three replicas of a tiny model share a catalogue in a PostgreSQL of their own. Clients ask for one
adapter through a load balancer while it is swapped again and again, each time through the next
replica. Meanwhile one replica is stopped past its lease (SIGSTOP) and goes on, the database is
restarted, one replica is killed (-9), and another one joins. The clients are behind HAProxy, and
with `--vllm-router` half of them behind that one.

    failed    requests that did not get an answer, but those in flight when a replica was killed
    lost      those
    mixed     answers that are no version's
    stale     answers of a version whose replacement was acknowledged before the request was sent
    put_p50_s, put_p99_s   of a swap, until it is acknowledged; while a replica is silent that is up
              to a lease, and while the database is down PUT is tried again (`put_retries`)
    replicas  how many there are in the end
    requests, swaps        how many there were, requests by load balancer

It ends with status 1 if a request failed, or an answer was mixed or stale.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from common import report

sys.path.append(str(Path(__file__).parents[1]))  # tests are no installed package

from tests.serve.helpers import random_adapter, tiny_llama
from tests.serve.postgres import Postgres, postgres

NAME = "swapped"
PROMPT = "A customer writes: my card has not arrived!"
TOKENS = 8
CLIENTS = 4
VERSIONS = 3  # different adapters, one after another, so that one too old is told from the next
STOPPED_S = 13.0  # more than a lease
KEY = "the-key-of-all-replicas"
START_S = 600
# When, as a share of all swaps.
STOP, RESTART, KILL, JOIN = 0.2, 0.4, 0.55, 0.6

# A request whose body comes after its headers is only asked again elsewhere if it was waited for.
HAPROXY = """
defaults
    mode http
    timeout connect 2s
    timeout client 120s
    timeout server 120s
    timeout check 1s
    retries 3
    option redispatch
    option http-no-delay
    retry-on conn-failure empty-response 503
frontend front
    bind 127.0.0.1:{port}
    option http-buffer-request
    default_backend replicas
backend replicas
    balance {balance}
    option httpchk GET /ready
    default-server check inter 500ms fall 2 rise 1
"""


@dataclass
class Asked:
    """A request: when it was sent and answered, and with what; `text` is None if it failed."""

    url: str
    sent: float
    answered: float
    text: str | None
    error: str = ""


@dataclass
class Swap:
    """A version: which adapter, when its PUT was sent first, and when it was acknowledged."""

    adapter: int
    sent: float
    acknowledged: float = math.inf


@dataclass
class Seen:
    """What a campaign saw."""

    asked: list[Asked] = field(default_factory=list)
    swaps: list[Swap] = field(default_factory=list)
    killed: float = math.inf  # and when the process was gone, with its sockets
    gone: float = -math.inf
    retries: int = 0


class Replica:
    """A server on a port, which can be started again."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.port = free_port()
        self._command, self._log = [*command, "--port", str(self.port)], log
        self.usable = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def group(self) -> int:
        """Of its processes."""
        return self._process.pid

    def start(self) -> None:
        environment = {**os.environ, "GUILOMO_ADMIN_KEY": KEY, "VLLM_CPU_KVCACHE_SPACE": "1"}
        with self._log.open("a") as output:
            self._process = subprocess.Popen(
                self._command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**environment, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
                start_new_session=True,
            )
        self.wait()

    def wait(self) -> None:
        """Until it is ready."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if requests.get(f"{self.url}/ready", timeout=2).ok:
                    self.usable = True
                    return
            except requests.RequestException:
                pass
            time.sleep(0.2)
        sys.exit(f"{self._log.read_text()[-3000:]}\na replica did not start")

    def signal(self, number: signal.Signals) -> None:
        self.usable = False
        os.killpg(self._process.pid, number)

    def end(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def put(self, source: Path) -> bool:
        """Whether a swap was acknowledged; else it is to be tried again, elsewhere."""
        try:
            answer = requests.put(
                f"{self.url}/v1/adapters/{NAME}",
                json={"source": str(source)},
                headers={"Authorization": f"Bearer {KEY}"},
                timeout=300,
            )
        except requests.ConnectionError:
            return False
        if answer.status_code not in (200, 503):
            raise SystemExit(f"a swap was refused: {answer.text}")
        return answer.ok


@contextmanager
def three_replicas(model: Path, flags: Sequence[str], scratch: Path) -> Iterator[list[Replica]]:
    """Three servers of a model, with further flags, that run for the length of the block."""
    command = [
        *(sys.executable, "-m", "guilomo_serve.cli", str(model), "--served-model-name", "base"),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "512"),
        *(*flags, "--host", "127.0.0.1"),
    ]
    replicas = [Replica(command, scratch / f"{n}.log") for n in range(3)]
    print("starting three replicas", flush=True)
    with ExitStack() as stack:
        for replica in replicas:
            stack.callback(replica.end)
        with ThreadPoolExecutor() as pool:
            list(pool.map(Replica.start, replicas))
        yield replicas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--vllm-router", type=Path, help="the program, of PyPI's vllm-router")
    parser.add_argument("--out", type=Path, help="write the result with machine and versions here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        scratch = Path(folder)
        model = tiny_llama(scratch / "model")
        adapters = [random_adapter(model, scratch / str(n), seed=n) for n in range(VERSIONS)]
        database = stack.enter_context(postgres())
        shared = ("--state", database.address, "--state-files", str(scratch / "files"))
        replicas = stack.enter_context(three_replicas(model, shared, scratch))
        texts = [alone(replicas, adapter) for adapter in adapters]
        if len(set(texts)) < VERSIONS:
            raise SystemExit("two adapters give the same answer: nothing could tell them apart")
        fronts = {stack.enter_context(haproxy(replicas, scratch)): "haproxy"}
        if args.vllm_router:
            router = stack.enter_context(vllm_router(args.vllm_router, replicas, scratch))
            fronts[router] = "vllm-router"
        for url, name in fronts.items():
            print(f"{name} is {url}", flush=True)
        seen = campaign(list(fronts), replicas, database, adapters, args.swaps)
        result = judged(seen, texts, sum(replica.usable for replica in replicas))
        for url, name in fronts.items():
            result["requests"][name] = sum(asked.url == url for asked in seen.asked)
    report(result, args, args.out)
    if result["failed"] or result["mixed"] or result["stale"]:
        sys.exit(1)


def alone(replicas: list[Replica], adapter: Path) -> str:
    """What an adapter answers, on all replicas alike."""
    assert replicas[0].put(adapter)
    found = {ask(replica.url).text for replica in replicas}
    if len(found) != 1 or None in found:
        raise SystemExit(f"replicas differ before anything has happened: {found}")
    return str(found.pop())


def ask(url: str, session: Any = requests, model: str = NAME) -> Asked:
    body = {"model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    sent = time.monotonic()
    try:
        answer = session.post(
            f"{url}/v1/completions", json={**body, "ignore_eos": True}, timeout=120
        )
        text = answer.json()["choices"][0]["text"] if answer.ok else None
        error = "" if answer.ok else f"{answer.status_code} {answer.text[:200]}"
    except (requests.RequestException, ValueError, KeyError) as e:
        text, error = None, repr(e)[:200]
    return Asked(url, sent, time.monotonic(), text, error)


def campaign(
    urls: list[str], replicas: list[Replica], database: Postgres, adapters: list[Path], swaps: int
) -> Seen:
    """Swaps under load of clients of these URLs, with all that happens meanwhile."""
    seen, stop = Seen(), threading.Event()

    def asking(url: str) -> None:
        session = requests.Session()
        while not stop.is_set():
            seen.asked.append(ask(url, session))

    def stopped() -> None:
        replicas[1].signal(signal.SIGSTOP)
        time.sleep(STOPPED_S)
        replicas[1].signal(signal.SIGCONT)
        replicas[1].wait()

    def restarted() -> None:
        database.stop()
        time.sleep(1)
        database.start()

    def killed() -> None:
        seen.killed = time.monotonic()
        replicas[2].signal(signal.SIGKILL)
        replicas[2].end()
        seen.gone = time.monotonic()

    happenings: dict[int, Callable[[], None]] = {
        int(swaps * STOP): stopped,
        int(swaps * RESTART): restarted,
        int(swaps * KILL): killed,
        int(swaps * JOIN): replicas[2].start,
    }
    turns = itertools.cycle(range(len(replicas)))

    def swap(n: int) -> None:
        seen.swaps.append(version := Swap(n % len(adapters), time.monotonic()))
        while True:
            replica = next(replicas[turn] for turn in turns if replicas[turn].usable)
            if replica.put(adapters[version.adapter]):
                break
            seen.retries += 1
            time.sleep(0.1)
        version.acknowledged = time.monotonic()

    swap(0)
    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        clients = [pool.submit(asking, urls[c % len(urls)]) for c in range(CLIENTS)]
        last = pool.submit(int)
        for n in range(1, swaps):
            if n in happenings:
                last.result()
                print(f"swap {n}: {happenings[n].__name__}", flush=True)
                last = pool.submit(happenings[n])
            swap(n)
        last.result()  # who joins takes part in the last ones
        for n in range(swaps, swaps + len(replicas)):
            swap(n)
        stop.set()
        for client in clients:
            client.result()
    return seen


def judged(seen: Seen, texts: list[str], replicas: int) -> dict[str, Any]:
    """Args: texts: of each adapter alone; replicas: how many there are in the end."""
    failed = [asked for asked in seen.asked if asked.text is None]
    lost = [a for a in failed if a.sent <= seen.gone and a.answered >= seen.killed]
    for asked in failed[:20]:
        after = asked.sent - seen.killed
        print(f"failed: {asked.url}, {after:.3f} s after the kill: {asked.error}", flush=True)
    mixed = stale = 0
    for asked in seen.asked:
        if asked.text is None:
            continue
        if asked.text not in texts:
            mixed += 1
            continue
        may_be = set()
        for swap, later in itertools.zip_longest(seen.swaps, seen.swaps[1:]):
            replaced = later.acknowledged if later else math.inf
            if swap.sent <= asked.answered and replaced > asked.sent:
                may_be.add(texts[swap.adapter])
        stale += asked.text not in may_be
    seconds = sorted(swap.acknowledged - swap.sent for swap in seen.swaps)
    return {
        "failed": len(failed) - len(lost),
        "lost": len(lost),
        "mixed": mixed,
        "stale": stale,
        "put_p50_s": round(seconds[len(seconds) // 2], 3),
        "put_p99_s": round(seconds[min(int(0.99 * len(seconds)), len(seconds) - 1)], 3),
        "put_retries": seen.retries,
        "replicas": replicas,
        "requests": {},
        "swaps": len(seen.swaps),
    }


@contextmanager
def haproxy(
    replicas: list[Replica], scratch: Path, balance: str = "roundrobin", model: str = NAME
) -> Iterator[str]:
    """Args: model: that it is asked for to see whether it is there."""
    program = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        raise SystemExit("haproxy is not installed (Debian has it)")
    port = free_port()
    servers = [f"    server r{n} 127.0.0.1:{r.port}\n" for n, r in enumerate(replicas)]
    config = scratch / "haproxy.cfg"
    config.write_text(HAPROXY.format(port=port, balance=balance) + "".join(servers))
    command = [program, "-db", "-f", str(config)]
    with running(command, port, scratch / "haproxy.log", model) as url:
        yield url


@contextmanager
def vllm_router(program: Path, replicas: list[Replica], scratch: Path) -> Iterator[str]:
    port = free_port()
    command = [
        *(str(program), "--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin"),
        *("--health-check-endpoint", "/ready", "--health-check-interval-secs", "1"),
        *("--health-check-timeout-secs", "1"),
        *("--prometheus-port", str(free_port())),
        *("--worker-urls", *(replica.url for replica in replicas)),
    ]
    with running(command, port, scratch / "router.log") as url:
        yield url


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[str], port: int, log: Path, model: str = NAME) -> Iterator[str]:
    """A load balancer, once it passes on what clients ask."""
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while ask(url, model=model).text is None:
            if time.monotonic() > deadline or process.poll() is not None:
                raise SystemExit(f"{log.read_text()[-3000:]}\nthe load balancer does not answer")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
