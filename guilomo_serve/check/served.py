"""vLLM with the plugin in a process of its own: what it is asked, and what its layers did.

`record` runs this file as a program, so that vLLM, its threads and its memory are gone afterwards.
The engine is in that process itself. Each layer's op is wrapped there: it is run once more on
zeros, which gives what the adapter adds without the rounding of the base's own product.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from guilomo_serve import flags

_LOG_LINES = 30  # of vLLM's output, shown where it fails


class ServedError(RuntimeError):
    """vLLM did not start or did not answer; the message is the end of what it printed."""


@dataclass(frozen=True)
class Product:
    """What a served layer did for one module, over the T tokens of a prompt.

    Attributes:
        x: [T, in], the layer's input.
        added: [T, out], what its op adds for the adapter.
        unsummed: how far the layer's output is from the sum of the base's product and `added`, in
            units of the dtype's rounding (eps times the norms of both); the largest of a token.
    """

    x: torch.Tensor
    added: torch.Tensor
    unsummed: float


@dataclass(frozen=True)
class Served:
    """What vLLM computes for a prompt of T tokens.

    Attributes:
        logprobs: [T - 1] float32, of each token but the first, given those before it.
        products: module -> what was added, in the model's order; all modules of the layers that the
            adapter has something in.
    """

    logprobs: torch.Tensor
    products: Mapping[str, Product]


@dataclass(frozen=True)
class Record:
    """What vLLM did.

    Attributes:
        dtype: of the model's activations, and of A and B.
        quantization: of the base, by vLLM's name for it; None if it has none.
        base: of each prompt, without an adapter.
        adapters: of each adapter and prompt.
    """

    dtype: torch.dtype
    quantization: str | None
    base: list[Served]
    adapters: list[list[Served]]


def engine_flags(command: Sequence[str], adapters: Sequence[Path]) -> argparse.Namespace:
    """What vLLM makes of flags, once they and the adapters have been checked.

    Args:
        command: as for `vllm serve`, the model first.
        adapters: their folders.

    Raises:
        UsageError: several processes are asked for; or as `guilomo_serve.flags` does.
        AdapterError: as there.
    """
    args = flags.parse("guilomo-serve check", command, lambda parser: None)
    for over in ("tensor", "pipeline", "data"):
        if getattr(args, f"{over}_parallel_size") > 1:
            raise flags.UsageError(
                f"--{over}-parallel-size: layers are compared whole, in one process; leave it out"
            )
    flags.complete(args, [f"adapter{i}={folder}" for i, folder in enumerate(adapters)])
    return args


def record(
    command: Sequence[str], adapters: Sequence[Path], prompts: Sequence[Sequence[int]]
) -> Record:
    """Asks vLLM for each prompt without and with each adapter.

    Args:
        command: vLLM's flags, the model first.
        adapters: their folders.
        prompts: tokens.

    Raises:
        ServedError: vLLM did not do it.
    """
    request = {
        "command": list(command),
        "adapters": [str(folder.resolve()) for folder in adapters],
        "prompts": [list(tokens) for tokens in prompts],
    }
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    with tempfile.TemporaryDirectory() as scratch:
        asked, answer, log = (Path(scratch) / name for name in ("asked", "answer", "log"))
        asked.write_text(json.dumps(request), encoding="utf-8")
        with log.open("w") as output:
            ran = subprocess.run(
                [sys.executable, "-m", "guilomo_serve.check.served", str(asked), str(answer)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if ran.returncode:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            raise ServedError("\n".join(lines[-_LOG_LINES:]))
        read = torch.load(answer)
    runs = [
        [
            Served(one["logprobs"], {m: Product(**p) for m, p in one["products"].items()})
            for one in run
        ]
        for run in read["runs"]
    ]
    return Record(read["dtype"], read["quantization"], runs[0], runs[1:])


def _main(asked: str, answer: str) -> None:
    """The process of `record`."""
    from vllm import LLM, EngineArgs, SamplingParams
    from vllm.lora.request import LoRARequest

    request = json.loads(Path(asked).read_text(encoding="utf-8"))
    args = engine_flags(request["command"], [Path(folder) for folder in request["adapters"]])
    arguments = EngineArgs.from_cli_args(args)
    llm = LLM.from_engine_args(arguments)
    (layers,) = llm.apply_model(_Layers)
    parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    runs = []
    for i, folder in enumerate([None, *request["adapters"]]):
        adapter = None if folder is None else LoRARequest(f"adapter{i}", i, folder)
        run = []
        for tokens in request["prompts"]:
            layers.kept.clear()
            (output,) = llm.generate(
                {"prompt_token_ids": tokens}, parameters, use_tqdm=False, lora_request=adapter
            )
            scores = [
                entry[token].logprob
                for entry, token in zip(output.prompt_logprobs[1:], tokens[1:], strict=True)
            ]
            run.append({"logprobs": torch.tensor(scores), "products": layers.products()})
        runs.append(run)
    config = llm.model_config
    torch.save({"dtype": config.dtype, "quantization": config.quantization, "runs": runs}, answer)


class _Layers:
    """The adapted layers of a model in vLLM, which keep what they do."""

    def __init__(self, model: Any) -> None:
        from guilomo_serve.adapter import BaseModel

        self._manager = model.lora_manager
        self.kept: dict[str, list[Product]] = {}
        plan = self._manager.plan
        trained = BaseModel.from_config(model.config).linears
        self._trained = {plan.rename(module): module for module in trained}
        for name, layer in self._manager.modules.items():
            layer.slots.apply_ = self._keeping(name, layer.slots.apply_)

    def _keeping(self, name: str, apply_: Callable[..., None]) -> Callable[..., None]:
        def keeping(y: torch.Tensor, x: torch.Tensor, batch: Any) -> None:
            added, before = torch.zeros_like(y), y.clone()
            apply_(added, x, batch)
            apply_(y, x, batch)
            off = (y.double() - before.double() - added.double()).norm(dim=1)
            size = before.double().norm(dim=1) + added.double().norm(dim=1)
            unsummed = torch.where(off == 0, 0.0, off / size).max().item()
            unsummed /= torch.finfo(y.dtype).eps
            of_batch = slice(0, batch.size)
            self.kept.setdefault(name, []).append(
                Product(x[of_batch].cpu().clone(), added[of_batch].cpu(), unsummed)
            )

        return keeping

    def products(self) -> dict[str, dict[str, Any]]:
        """`Served.products` since `kept` was cleared: a long prompt takes several steps."""
        products = {}
        plan = self._manager.plan
        for module, (name, index) in plan.module_at.items():
            if name not in self.kept:
                continue
            steps = self.kept[name]
            widths = [part.width for part in plan.layers[name].slices]
            added = torch.cat([step.added for step in steps]).split(widths, dim=1)[index]
            products[self._trained.get(module, module)] = asdict(
                Product(
                    torch.cat([step.x for step in steps]),
                    added,
                    max(step.unsummed for step in steps),
                )
            )
        return products


if __name__ == "__main__":
    _main(*sys.argv[1:])
