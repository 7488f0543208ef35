"""What an adapter costs in serving: throughput over that of the base model without plugin.

Three engines live side by side and are measured in turn, in each repeat: vLLM alone, vLLM with
guilomo (base requests, then some numbers of searched adapters), and vLLM's own LoRA with a
plain adapter of the same mean total rank. Each figure is a ratio of medians.

On a GPU each engine may take a share of the memory (`--gpu-memory-utilization`), and `--graphs` has
all three capture CUDA graphs. With `--load-format dummy` a folder with a config alone will do.

    prefill   tokens of the prompts per second, one token generated
    decode    tokens generated per second, without the prompts' share
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

import torch
from common import report
from engines import generate, start

from guilomo_serve.adapter import (
    Adapter,
    AdapterSpec,
    BaseModel,
    Expert,
    ModuleWeights,
    write_adapter,
)

REPOSITORY = Path(__file__).parent.parent
PROMPT_TOKENS = 128
DECODE_PROMPT_TOKENS = 16
DECODE_TOKENS = 64
EXPERTS, RANKS = (2, 8), (1, 8)  # as a search allots them: a mean total rank of about 23
LOUD = 20  # times as strong an adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = REPOSITORY / ".cache" / "smollm2-135m-instruct"
    parser.add_argument("model", nargs="?", type=Path, default=default, help="the base model")
    parser.add_argument("--requests", type=int, default=8, help="concurrent requests")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 8], metavar="N")
    parser.add_argument("--graphs", action="store_true", help="no eager mode: CUDA graphs on a GPU")
    parser.add_argument("--load-format", default="auto", help="vLLM's; dummy: no weights are read")
    parser.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=0.28,
        metavar="SHARE",
        help="of each of the three engines (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, help="write the result with machine and versions here")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        print(f"writing {max(args.adapters)} adapters for {args.model}", flush=True)
        searched, mean_rank = write_searched(args.model, Path(folder), count=max(args.adapters))
        plain = write_plain(args.model, Path(folder) / "plain", round(mean_rank))
        engines = {
            "base": Engine(args, []),
            "guilomo": Engine(args, searched, plugin=True),
            "vllm_lora": Engine(args, [plain]),
        }
        seconds = measure(engines, args.repeats, args.adapters)
        for engine in engines.values():
            engine.stop()

    result: dict[str, Any] = {}
    for phase, of_phase in seconds.items():
        medians = {name: statistics.median(times) for name, times in of_phase.items()}
        base = medians.pop("base")
        result[phase] = {name: round(base / median, 3) for name, median in medians.items()}
        tokens = args.requests * (PROMPT_TOKENS if phase == "prefill" else DECODE_TOKENS)
        result[phase]["base_tokens_per_s"] = round(tokens / base, 1)
    result["mean_total_rank"] = round(mean_rank, 2)
    print_table(result, args.adapters)
    report(result, args, args.out)


class Engine:
    """vLLM in a process of its own, so that the plugin can be there or not."""

    def __init__(
        self, args: argparse.Namespace, adapters: list[Path], plugin: bool = False
    ) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        os.environ["VLLM_PLUGINS"] = "guilomo" if plugin else ""
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=serve, args=(theirs, args, adapters, plugin))
        self._process.start()
        what = "guilomo" if plugin else "vLLM's LoRA" if adapters else "vLLM alone"
        print(f"starting {what}", flush=True)
        self._connection.recv()

    def seconds(self, phase: str, adapters: int) -> float:
        """Time of one phase with this many different adapters (0 for the base model)."""
        self._connection.send((phase, adapters))
        return self._connection.recv()

    def stop(self) -> None:
        self._connection.send(None)
        self._process.join()


def serve(
    connection: Connection, args: argparse.Namespace, adapters: list[Path], plugin: bool
) -> None:
    """The process of an engine: answers (phase, number of adapters) with seconds."""
    requests = args.requests
    settings = {
        "enforce_eager": not args.graphs,
        "gpu_memory_utilization": args.gpu_memory_utilization,
        "load_format": args.load_format,
        "skip_tokenizer_init": True,
    }
    lora = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": 32}
    if plugin:
        lora["max_lora_rank"] = 64
    settings |= lora if adapters else {}
    llm = start(str(args.model), requests, PROMPT_TOKENS, **settings)
    from vllm.lora.request import LoRARequest  # after `start` has told vLLM how to log

    loras = [LoRARequest(f"a{i}", i, str(path)) for i, path in enumerate(adapters, start=1)]

    connection.send("ready")
    while (task := connection.recv()) is not None:
        phase, count = task
        if phase == "prefill":
            connection.send(generate(llm, loras[:count], requests, PROMPT_TOKENS, 1))
        else:
            decode = (llm, loras[:count], requests, DECODE_PROMPT_TOKENS)
            prompts_alone = generate(*decode, 1)
            whole = generate(*decode, 1 + DECODE_TOKENS)
            connection.send(whole - prompts_alone)
    # A process of multiprocessing ends without vLLM's exit handlers, and would wait for its engine.
    llm.llm_engine.engine_core.shutdown()


def measure(
    engines: dict[str, Engine], repeats: int, adapters: list[int]
) -> dict[str, dict[str, list[float]]]:
    """Seconds by phase and configuration; the first round warms up and is not counted."""
    runs = [
        ("base", "base", 0),
        ("plugin_base", "guilomo", 0),
        *((f"adapter_{n}", "guilomo", n) for n in adapters),
        ("vllm_lora", "vllm_lora", 1),
    ]
    seconds: dict[str, dict[str, list[float]]] = {}
    for phase in ("prefill", "decode"):
        seconds[phase] = {name: [] for name, _, _ in runs}
        for repeat in range(repeats + 1):
            for name, engine, count in runs:
                took = engines[engine].seconds(phase, count)
                if repeat:
                    seconds[phase][name].append(took)
            done = " ".join(f"{n} {t[-1]:.2f}" for n, t in seconds[phase].items() if t)
            print(f"{phase} {repeat}/{repeats}: {done or 'warm-up'} (s)", flush=True)
    return seconds


def write_searched(
    model: Path, folder: Path, loudness: float = 1, count: int = 8
) -> tuple[list[Path], float]:
    """Random allocations as a search gives them; returns folders and the mean total rank.

    With `LOUD` an adapter's answers are its own; without, mostly the base's.
    """
    from transformers import AutoConfig

    base = BaseModel.from_config(AutoConfig.from_pretrained(model))
    modules = {m: s for m, s in base.linears.items() if m != "lm_head"}
    generator = torch.Generator().manual_seed(0)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    folders, total = [], 0
    for n in range(count):
        experts, weights = {}, {}
        for module, (out_features, in_features) in modules.items():
            experts[module] = tuple(Expert(integer(*RANKS), 0.1) for _ in range(integer(*EXPERTS)))
            rows = sum(e.rank for e in experts[module])
            total += rows
            weights[module] = ModuleWeights(
                torch.randn(rows, in_features, generator=generator).bfloat16() / 32,
                torch.randn(out_features, rows, generator=generator).bfloat16() * (loudness / 32),
                torch.randn(len(experts[module]), in_features, generator=generator) / 32,
            )
        targets = tuple(sorted({m.rsplit(".", 1)[-1] for m in modules}))
        spec = AdapterSpec(str(model), targets, 2, 16.0, experts, base.fingerprint)
        write_adapter(Adapter(spec, weights), folder / str(n), card="A random allocation.")
        folders.append(folder / str(n))
    return folders, total / len(modules) / len(folders)


def write_plain(model: Path, folder: Path, rank: int) -> Path:
    """A plain LoRA of one rank everywhere, in PEFT's files. It needs the base's config alone."""
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import AutoConfig

    base = BaseModel.from_config(AutoConfig.from_pretrained(model))
    modules = {m: s for m, s in base.linears.items() if m != "lm_head"}
    targets = sorted({m.rsplit(".", 1)[-1] for m in modules})
    LoraConfig(
        r=rank, target_modules=targets, task_type="CAUSAL_LM", base_model_name_or_path=str(model)
    ).save_pretrained(folder)
    tensors = {}
    for module, (out_features, in_features) in modules.items():
        name = f"base_model.model.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, in_features).bfloat16() / 32
        tensors[f"{name}.lora_B.weight"] = torch.randn(out_features, rank).bfloat16() / 32
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def print_table(result: dict[str, Any], adapters: list[int]) -> None:
    names = ["plugin_base", *(f"adapter_{n}" for n in adapters), "vllm_lora"]
    print("\nthroughput over the base without plugin")
    print("".join(f"{c:>13}" for c in ["", *names]))
    for phase in ("prefill", "decode"):
        print(f"{phase:>13}" + "".join(f"{result[phase][n]:>13.2f}" for n in names))
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
