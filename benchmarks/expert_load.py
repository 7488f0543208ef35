"""What sampling the load of experts costs: throughput with `--expert-load on` over `off`.

One engine with the plugin and searched adapters is measured in turn with sampling and without, in
each repeat; two engines would differ by more than what is looked for. A measurement takes some
seconds, so that several sampled steps lie in it. Each figure is the mean of the repeats' ratios,
with its standard error.

    prefill   tokens of the prompts per second, one token generated
    decode    tokens generated per second, after short prompts
"""

from __future__ import annotations

import argparse
import math
import os
import secrets
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import report
from engines import generate, start
from serve_throughput import write_searched

from guilomo_serve.catalogue import Settings

REPOSITORY = Path(__file__).parent.parent
PROMPT_TOKENS, PROMPTS = 128, 5  # of each concurrent request, in prefill
DECODE_PROMPT_TOKENS, DECODE_TOKENS = 16, 160
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
        seconds, sampled = measure(args, adapters)

    if not sampled:
        sys.exit("no token was sampled")
    result: dict[str, Any] = {"sampled_tokens": sampled}
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


def measure(
    args: argparse.Namespace, adapters: list[Path]
) -> tuple[dict[str, dict[tuple[str, int], list[float]]], int]:
    """Seconds by phase, sampling and number of adapters, and how many tokens were sampled.

    The first round warms up, uncounted.
    """
    os.environ["VLLM_PLUGINS"] = "guilomo"
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # a function for the worker, below
    # As `guilomo-serve` tells its processes; nobody administers these.
    Settings(admin_key=secrets.token_hex()).export(os.environ)
    llm = start(
        *(str(args.model), args.requests, PROMPT_TOKENS),
        enable_lora=True,
        max_loras=len(adapters),
        max_lora_rank=64,
    )
    from vllm.lora.request import LoRARequest  # after `start` has told vLLM how to log

    loras = [LoRARequest(f"a{i}", i, str(path)) for i, path in enumerate(adapters, start=1)]
    jobs = {
        "prefill": (PROMPTS * args.requests, PROMPT_TOKENS, 1),
        "decode": (args.requests, DECODE_PROMPT_TOKENS, DECODE_TOKENS),
    }
    seconds: dict[str, dict[tuple[str, int], list[float]]] = {}
    off_s = 0.0
    for phase, job in jobs.items():
        runs = [(sampling, count) for count in ADAPTERS for sampling in ("off", "on")]
        seconds[phase] = {run: [] for run in runs}
        for repeat in range(args.repeats + 1):
            # Every other round the other way round, for what the one leaves to the next.
            for sampling, count in runs if repeat % 2 else reversed(runs):
                began = time.monotonic()
                llm.collective_rpc(set_sampling, args=(off_s if sampling == "on" else None,))
                took = generate(llm, loras[:count], *job)
                if sampling == "off":
                    off_s += time.monotonic() - began
                if repeat:
                    seconds[phase][sampling, count].append(took)
            done = " ".join(f"{n} {c}: {t[-1]:.2f}" for (n, c), t in seconds[phase].items() if t)
            print(f"{phase} {repeat}/{args.repeats}: {done or 'warm-up'} (s)", flush=True)
    numbers = list(range(1, len(adapters) + 1))
    (report,) = llm.collective_rpc("guilomo_report", args=(numbers,))
    return seconds, sum(version["tokens"] for version in report["versions"])


def set_sampling(worker: Any, off_s: float | None) -> None:
    """In the worker: samples as if `off_s` seconds had not been, or (None) not at all."""
    worker.guilomo_report([1])  # counts what the last step kept, or the next measurement would
    load = worker.model_runner.lora_manager._adapter_manager.expert_load
    load.clock = (lambda: -math.inf) if off_s is None else (lambda: time.monotonic() - off_s)


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
