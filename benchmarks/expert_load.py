"""What sampling the load of experts costs: throughput with `--expert-load on` over `off`.

Two engines with the plugin and the same searched adapters live side by side, one that samples and
one that does not, and are measured in turn, in each repeat. A measurement takes some seconds, so
that several sampled steps lie in it. Each figure is the mean of the repeats' ratios, with its
standard error.

    prefill   tokens of the prompts per second, one token generated
    decode    tokens generated per second, after short prompts
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from common import report
from engines import generate, start
from serve_throughput import write_searched

from guilomo_serve.catalogue import Settings

REPOSITORY = Path(__file__).parent.parent
PROMPT_TOKENS, PROMPTS = 128, 8  # of each concurrent request, in prefill
DECODE_PROMPT_TOKENS, DECODE_TOKENS = 16, 192
ADAPTERS = (1, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = REPOSITORY / ".cache" / "smollm2-135m-instruct"
    parser.add_argument("model", nargs="?", type=Path, default=default, help="the base model")
    parser.add_argument("--requests", type=int, default=8, help="concurrent requests")
    parser.add_argument("--repeats", type=int, default=12, help="at least 2")
    parser.add_argument("--out", type=Path, help="write the result with machine and versions here")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        print(f"writing {max(ADAPTERS)} adapters for {args.model}", flush=True)
        adapters, _ = write_searched(args.model, Path(folder))
        engines = {on: Engine(args, adapters, on == "on") for on in ("off", "on")}
        seconds = measure(engines, args.repeats)
        sampled = {name: engine.ask(None) for name, engine in engines.items()}

    if sampled["off"] or not sampled["on"]:
        sys.exit(f"sampled tokens: {sampled}, expected none with off and some with on")
    result: dict[str, Any] = {"sampled_tokens": sampled["on"]}
    for phase, of_phase in seconds.items():
        result[phase] = {}
        for n in ADAPTERS:
            pairs = zip(of_phase["off", n], of_phase["on", n], strict=True)
            ratios = [off / on for off, on in pairs]
            result[phase][f"adapter_{n}"] = round(statistics.mean(ratios), 4)
            error = statistics.stdev(ratios) / len(ratios) ** 0.5
            result[phase][f"adapter_{n}_error"] = round(error, 4)
        tokens = PROMPTS * PROMPT_TOKENS if phase == "prefill" else DECODE_TOKENS
        median = statistics.median(of_phase["off", 1])
        result[phase]["off_tokens_per_s"] = round(args.requests * tokens / median, 1)
    print_table(result)
    report(result, args, args.out)


class Engine:
    """vLLM with the plugin in a process of its own, that samples or not."""

    def __init__(self, args: argparse.Namespace, adapters: list[Path], samples: bool) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        os.environ["VLLM_PLUGINS"] = "guilomo"
        Settings(expert_load=samples).export(os.environ)  # as `guilomo-serve` tells its processes
        self._process = multiprocessing.get_context("spawn").Process(
            target=serve, args=(theirs, str(args.model), args.requests, adapters)
        )
        self._process.start()
        print(f"starting with --expert-load {'on' if samples else 'off'}", flush=True)
        self._connection.recv()

    def ask(self, task: tuple[str, int] | None) -> float:
        """Seconds of a phase with so many different adapters; of None the sampled tokens."""
        self._connection.send(task)
        answer = self._connection.recv()
        if task is None:
            self._process.join()
        return answer


def serve(connection: Connection, model: str, requests: int, adapters: list[Path]) -> None:
    """The process of an engine."""
    llm = start(
        *(model, requests, PROMPT_TOKENS),
        enable_lora=True,
        max_loras=len(adapters),
        max_lora_rank=64,
    )
    from vllm.lora.request import LoRARequest  # after `start` has told vLLM how to log

    loras = [LoRARequest(f"a{i}", i, str(path)) for i, path in enumerate(adapters, start=1)]

    connection.send("ready")
    while (task := connection.recv()) is not None:
        phase, count = task
        if phase == "prefill":
            took = generate(llm, loras[:count], PROMPTS * requests, PROMPT_TOKENS, 1)
        else:
            took = generate(llm, loras[:count], requests, DECODE_PROMPT_TOKENS, DECODE_TOKENS)
        connection.send(took)
    (versions,) = llm.collective_rpc("guilomo_report")
    connection.send(sum(version["tokens"] for version in versions))
    # A process of multiprocessing ends without vLLM's exit handlers, and would wait for its engine.
    llm.llm_engine.engine_core.shutdown()


def measure(
    engines: dict[str, Engine], repeats: int
) -> dict[str, dict[tuple[str, int], list[float]]]:
    """Seconds by phase, engine and number of adapters; the first round warms up, uncounted."""
    seconds: dict[str, dict[tuple[str, int], list[float]]] = {}
    for phase in ("prefill", "decode"):
        runs = [(name, count) for count in ADAPTERS for name in engines]
        seconds[phase] = {run: [] for run in runs}
        for repeat in range(repeats + 1):
            # Every other round the other way round, for what the one leaves to the next.
            for name, count in runs if repeat % 2 else reversed(runs):
                took = engines[name].ask((phase, count))
                if repeat:
                    seconds[phase][name, count].append(took)
            done = " ".join(f"{n} {c}: {t[-1]:.2f}" for (n, c), t in seconds[phase].items() if t)
            print(f"{phase} {repeat}/{repeats}: {done or 'warm-up'} (s)", flush=True)
    return seconds


def print_table(result: dict[str, Any]) -> None:
    names = [f"adapter_{n}" for n in ADAPTERS]
    print(f"\nthroughput with sampling over without ({result['sampled_tokens']} tokens sampled)")
    print("".join(f"{c:>16}" for c in ["", *names]))
    for phase in ("prefill", "decode"):
        shown = [f"{result[phase][n]:.3f} ± {result[phase][n + '_error']:.3f}" for n in names]
        print(f"{phase:>16}" + "".join(f"{cell:>16}" for cell in shown))
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
