"""What a training step costs: fused layer, loop over experts, plain LoRA, and the searches.

    .venv/bin/python benchmarks/train_step.py

All variants run in one process, in turn, through the trainers that users run: the same base, the
same batches of random tokens, 8 experts of rank 8 on every linear layer against a plain PEFT LoRA
of the same total rank (64). Memory is the peak of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import BASE, report
from datasets import Dataset
from peft import LoraConfig, PeftConfig, get_peft_model
from torch.nn import functional as F
from transformers import TrainerCallback

from guilomo_serve.adapter import BaseModel
from guilomo_train.arguments import training_arguments
from guilomo_train.base import load_base
from guilomo_train.config import CommonConfig
from guilomo_train.lora_moe import LoraMoeConfig, LoraMoeLinear
from guilomo_train.search.selection import SelectionVectors
from guilomo_train.search.space import SearchSpace
from guilomo_train.search.trainer import SearchTrainer
from guilomo_train.trainer import LoraMoeTrainer

EXPERTS, RANK, TOP_K = 8, 8, 2
VARIANTS = ("lora", "fused", "loop", "search_online", "search_first", "search_second")


class StepTimes(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=3, help="steps of a variant in a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.memory_of is not None:
        print(json.dumps(peak_memory(args)))
        return

    rounds: list[dict[str, float]] = []  # seconds of a step
    steps = {name: build(name, args) for name in VARIANTS}
    for number in range(args.rounds):
        # The first step warms up.
        rounds.append({n: statistics.median(steps[n](args.steps)[1:]) for n in VARIANTS})
        line = "  ".join(f"{name} {seconds:.2f} s" for name, seconds in rounds[-1].items())
        print(f"round {number + 1}  {line}", flush=True)

    def ratio(name: str, to: str) -> float:
        """Within a round, where a machine that others use as well is about as fast for both."""
        return statistics.median(seconds[name] / seconds[to] for seconds in rounds)

    memory = {name: memory_in_own_process(name) for name in ("fused", "search_second")}
    adapter_bytes = memory["fused"]["adapter_bytes"]
    result = {
        "fused_over_lora": ratio("fused", "lora"),
        "loop_over_lora": ratio("loop", "lora"),
        "search_online_over_step": ratio("search_online", "fused"),
        "search_first_over_step": ratio("search_first", "fused"),
        "search_second_over_step": ratio("search_second", "fused"),
        "search_extra_memory_over_adapter": (
            memory["search_second"]["peak"] - memory["fused"]["peak"]
        )
        / adapter_bytes,
        "lora_step_s": statistics.median(seconds["lora"] for seconds in rounds),
    }
    result = {key: round(value, 3) for key, value in result.items()}
    for key, value in result.items():
        print(f"{key:>34} {value:.3f}")
    report(result, args, args.out)


def build(name: str, args: argparse.Namespace) -> Callable[[int], list[float]]:
    """A function that takes that many steps and returns the seconds of each."""
    base = load_base(str(args.base))
    torch.manual_seed(0)
    ids = torch.randint(0, 1000, (64 * args.batch, args.length)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    config: PeftConfig = LoraMoeConfig(num_experts=EXPERTS, expert_rank=RANK, top_k=TOP_K)
    if name == "lora":
        config = LoraConfig(r=EXPERTS * RANK, target_modules="all-linear")
    model = get_peft_model(base.model, config)
    if name == "loop":
        for layer in model.modules():
            if isinstance(layer, LoraMoeLinear):
                layer._delta = loop_over_experts.__get__(layer)  # type: ignore[method-assign]
    times = StepTimes()
    common = CommonConfig(base="", train="", output="")
    shared: dict[str, Any] = {
        "model": model,
        "args": training_arguments(
            common, Path(tempfile.gettempdir()), epochs=1, batch_size=args.batch, learning_rate=1e-3
        ),
        "train_dataset": rows,
        "processing_class": base.tokenizer,
        "balance_coefficient": 0.0 if name in ("lora", "loop") else 0.01,
        "callbacks": [times],
    }
    if name.startswith("search"):
        linears = BaseModel.from_config(base.model.config).linears
        space = SearchSpace(
            {m: linears[m] for m in model.peft_config["default"].experts}, EXPERTS, RANK, TOP_K
        )
        trainer: LoraMoeTrainer = SearchTrainer(
            **shared,
            selection=SelectionVectors(space, budget=space.cost(EXPERTS, RANK) // 3),
            estimator="marginal",
            selection_learning_rate=0.1,
            validation_dataset=None if name == "search_online" else rows,
            second_order=name == "search_second",
        )
    else:
        trainer = LoraMoeTrainer(**shared)

    def take(steps: int) -> list[float]:
        times.seconds = []
        trainer.args.max_steps = steps
        trainer.train()
        return times.seconds

    return take


def loop_over_experts(layer: LoraMoeLinear, adapter: str, x: torch.Tensor) -> torch.Tensor:
    """The layer's product one expert after another, as the authors' release computes it."""
    weights = layer._expert_weights(adapter, x)
    experts = layer.experts[adapter]
    ranks = [e.rank for e in experts]
    a = layer.lora_A[adapter].weight.to(x.dtype).split(ranks, dim=0)
    b = layer.lora_B[adapter].weight.to(x.dtype).split(ranks, dim=1)
    total = x.new_zeros(*x.shape[:-1], layer.out_features)
    for e, expert in enumerate(experts):
        product = F.linear(F.linear(x, a[e]), b[e]) * expert.scaling
        total = total + product * weights[..., e : e + 1].to(x.dtype)
    return total


def peak_memory(args: argparse.Namespace) -> dict[str, float]:
    """Bytes: this process's peak after some steps, and the adapter's parameters."""
    take = build(args.memory_of, args)
    take(3)
    # Not getrusage: its maximum is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    config = LoraMoeConfig(num_experts=EXPERTS, expert_rank=RANK, top_k=TOP_K)
    model = get_peft_model(load_base(str(args.base)).model, config)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return {"peak": peak, "adapter_bytes": parameters}


def memory_in_own_process(name: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, *sys.argv, "--memory-of", name],
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
