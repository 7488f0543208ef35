"""`guilomo-serve check BASE ADAPTER`: does vLLM compute what transformers computes?

Both read the same prompts with the same LoRA-MoE adapter. Compared are the log-probability of every
token and the experts that every token chooses in every module; both in the base's precision, so
what counts as the same is measured on the base without the adapter.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from guilomo_serve.adapter import (
    Adapter,
    AdapterError,
    BaseModel,
    is_guilomo_adapter,
    read_adapter,
    read_spec,
)
from guilomo_serve.ops import torch_ops

PROMPTS = (
    "My card has not arrived and it has been two weeks. What can I do?",
    "Write one sentence about the sea.",
    "def fibonacci(n):\n    return n if n < 2 else",
    "2 + 2 =",
)
# A difference of two logits that rounded activations can turn round, as a share of the spread of
# the router's logits in that module.
NEAR_TIE = 0.15
# The share of equal choices below which even near ties are too many.
LEAST_AGREED = 0.97
# Nats by which the mean error may exceed twice the base's own.
_SLACK = {torch.float32: 2e-3}
_SLACK_HALF = 0.02


class CheckError(ValueError):
    """The check cannot be run; the message names what is wrong."""


@dataclass(frozen=True)
class Seen:
    """What one implementation computes for one prompt of T tokens.

    Attributes:
        logprobs: [T - 1], of each token but the first, given those before it.
        router_logits: module -> [T, E], of the modules with a router.
    """

    logprobs: torch.Tensor
    router_logits: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One prompt compared; errors are differences of log-probabilities in nats.

    Attributes:
        tokens: of the prompt.
        error: mean with the adapter.
        worst: the largest with the adapter.
        base_error: mean without it.
        choices: tokens times modules that choose among experts.
        agreed: choices that are equal.
        clear: choices that differ though transformers' was no near tie.
    """

    tokens: int
    error: float
    worst: float
    base_error: float
    choices: int
    agreed: int
    clear: int


def main(argv: Sequence[str]) -> int:
    """Compares and prints a table and a verdict.

    Returns:
        0 if both compute the same, 1 if not, 2 if the input is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="guilomo-serve check",
        description="Compares vLLM with transformers on a base model and a LoRA-MoE adapter.",
        allow_abbrev=False,
    )
    parser.add_argument("base", help="base model: a folder or a name on the Hugging Face hub")
    parser.add_argument("adapter", type=Path, help="folder of the adapter")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a prompt a line (default: four built in)"
    )
    args = parser.parse_args(argv)
    try:
        prompts = PROMPTS if args.prompts is None else _read_prompts(args.prompts)
        adapter, dtype = _read(args.base, args.adapter)
        tokens = _tokenize(args.base, prompts)
    except (AdapterError, CheckError) as e:
        print(f"guilomo-serve check: {e}", file=sys.stderr)
        return 2
    base_served, served = see_vllm(args.base, [None, args.adapter], tokens, dtype)
    base_wanted, wanted = (see_transformers(args.base, a, tokens, dtype) for a in (None, adapter))
    rows = [
        compare(*of_prompt, top_k=adapter.spec.top_k)
        for of_prompt in zip(base_served, served, base_wanted, wanted, strict=True)
    ]
    same = is_same(rows, dtype)
    print(table(rows))
    print(
        "\nsame: vLLM computes what transformers computes"
        if same
        else "\nDIFFERENT: vLLM does not compute what transformers computes"
    )
    return 0 if same else 1


def compare(base: Seen, ours: Seen, base_wanted: Seen, wanted: Seen, top_k: int) -> Row:
    """Compares one prompt: vLLM without and with the adapter, transformers likewise."""
    if ours.router_logits.keys() != wanted.router_logits.keys():
        raise RuntimeError("vLLM and transformers have routers in different modules")
    errors = (ours.logprobs - wanted.logprobs).abs()
    choices = agreed = clear = 0
    for module, logits in wanted.router_logits.items():
        if logits.shape[-1] <= top_k:
            continue
        same, margin = compare_choices(ours.router_logits[module], logits, top_k)
        choices += same.numel()
        agreed += int(same.sum())
        clear += int((margin[~same] >= NEAR_TIE * logits.std()).sum())
    return Row(
        tokens=len(errors) + 1,
        error=errors.mean().item(),
        worst=errors.max().item(),
        base_error=(base.logprobs - base_wanted.logprobs).abs().mean().item(),
        choices=choices,
        agreed=agreed,
        clear=clear,
    )


def compare_choices(
    ours: torch.Tensor, wanted: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each token's chosen set is the same [T], and by how much `wanted` was clear [T].

    Args:
        ours, wanted: router logits [T, E], E > top_k.
    """
    ranked = wanted.sort(dim=-1, descending=True).values
    sets = [logits.topk(top_k, dim=-1).indices.sort(dim=-1).values for logits in (ours, wanted)]
    return (sets[0] == sets[1]).all(-1), ranked[:, top_k - 1] - ranked[:, top_k]


def is_same(rows: Sequence[Row], dtype: torch.dtype) -> bool:
    """The verdict over all prompts."""
    tokens = sum(row.tokens - 1 for row in rows)
    error = sum(row.error * (row.tokens - 1) for row in rows) / tokens
    base_error = sum(row.base_error * (row.tokens - 1) for row in rows) / tokens
    choices, agreed = sum(row.choices for row in rows), sum(row.agreed for row in rows)
    return (
        error <= 2 * base_error + _SLACK.get(dtype, _SLACK_HALF)
        and not any(row.clear for row in rows)
        and agreed >= LEAST_AGREED * choices
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as text, with what the columns mean."""
    lines = [
        "difference of log-probabilities (nats), and choices of experts",
        f"{'prompt':>6} {'tokens':>6} {'mean':>8} {'largest':>8} {'base':>8} "
        f"{'choices':>8} {'equal':>8} {'near ties':>9} {'clear':>6}",
    ]
    for i, row in enumerate(rows, 1):
        ties = row.choices - row.agreed - row.clear
        lines.append(
            f"{i:>6} {row.tokens:>6} {row.error:>8.4f} {row.worst:>8.4f} {row.base_error:>8.4f} "
            f"{row.choices:>8} {row.agreed:>8} {ties:>9} {row.clear:>6}"
        )
    return "\n".join(lines)


def see_transformers(
    base: str | Path, adapter: Adapter | None, prompts: Sequence[list[int]], dtype: torch.dtype
) -> list[Seen]:
    """What transformers computes, the adapter being applied by hooks."""
    model = model_with(base, adapter, dtype)
    logits: dict[str, torch.Tensor] = {}
    if adapter is not None:
        for name, weights in adapter.weights.items():
            if weights.router is not None:
                model.get_submodule(name).register_forward_hook(
                    _keep_logits(logits, name, weights.router)
                )
    seen = []
    for tokens in prompts:
        scores = logprobs(model, tokens)
        seen.append(Seen(scores, dict(logits)))
    return seen


def model_with(
    base: str | Path, adapter: Adapter | None, dtype: torch.dtype | str = "auto"
) -> torch.nn.Module:
    """The base in transformers, with an adapter applied by hooks."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    if adapter is not None:
        for name in adapter.spec.experts:
            model.get_submodule(name).register_forward_hook(_add_routed(adapter, name))
    return model


def logprobs(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """Log-probability of each token but the first, given those before it; float32."""
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def see_vllm(
    base: str | Path,
    adapters: Sequence[Path | None],
    prompts: Sequence[list[int]],
    dtype: torch.dtype,
) -> list[list[Seen]]:
    """What vLLM computes, for each adapter (None: the base alone) and prompt."""
    # vLLM's worker is a process of its own; functions are sent to it by their names.
    # They are sent as pickles, which vLLM allows on request only.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    longest = max(len(tokens) for tokens in prompts)
    llm = LLM(
        str(base),
        dtype=str(dtype).removeprefix("torch."),
        enable_lora=True,
        max_lora_rank=512,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=longest + 1,
        max_num_batched_tokens=max(longest + 1, 2048),  # a prompt is one step
        max_num_seqs=1,
    )
    llm.apply_model(_watch)
    routed = {
        folder: [
            module for module, experts in read_spec(folder).experts.items() if len(experts) > 1
        ]
        for folder in adapters
        if folder is not None
    }
    seen = []
    for i, adapter in enumerate(adapters, 1):
        request = None if adapter is None else LoRARequest(f"adapter{i}", i, str(adapter.resolve()))
        of_adapter = []
        for tokens in prompts:
            (output,) = llm.generate(
                {"prompt_token_ids": tokens},
                SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0),
                lora_request=request,
                use_tqdm=False,
            )
            scores = [
                entry[token].logprob
                for entry, token in zip(output.prompt_logprobs[1:], tokens[1:], strict=True)
            ]
            logits = (
                llm.apply_model(partial(_router_logits, modules=routed[adapter]))[0]
                if adapter is not None
                else {}
            )
            of_adapter.append(Seen(torch.tensor(scores), logits))
        seen.append(of_adapter)
    return seen


def _watch(model: Any) -> None:
    """In vLLM's worker: each adapted layer keeps its input from now on."""
    from guilomo_serve.runtime.layers import RoutedLayer

    for layer in model.modules():
        if isinstance(layer, RoutedLayer):
            layer.register_forward_pre_hook(_keep_input)  # type: ignore[attr-defined]


def _keep_input(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    layer.last_input = inputs[0].clone()


def _router_logits(model: Any, modules: Sequence[str]) -> dict[str, torch.Tensor]:
    """In vLLM's worker: the last step's router logits [T, E], from what its layers hold.

    Args:
        modules: names, in the trained model, of the modules with a router.
    """
    manager = model.lora_manager
    (mapping,) = manager.punica_wrapper_mapping.values()
    slot = mapping.batch.segments[0, 0]
    logits = {}
    for module in modules:
        name, index = manager.plan.module_at[manager.plan.rename(module)]
        layer, parts = manager.modules[name], manager.plan.layers[name].slices
        weights = layer.slots.weights[slot]
        column = sum(part.width for part in parts[:index])
        (experts,) = (s.experts for s in weights.layout if s.columns[0] == column)
        logits[module] = torch.nn.functional.linear(
            layer.last_input.flatten(0, -2).float(), weights.router[slice(*experts)]
        ).cpu()
    return logits


def _keep_logits(
    kept: dict[str, torch.Tensor], name: str, router: torch.Tensor
) -> Callable[..., None]:
    def hook(_module: Any, inputs: tuple[torch.Tensor, ...], _output: Any) -> None:
        kept[name] = torch.nn.functional.linear(inputs[0].flatten(0, -2).float(), router)

    return hook


def _add_routed(adapter: Adapter, name: str) -> Callable[..., torch.Tensor]:
    weights, experts = adapter.weights[name], adapter.spec.experts[name]
    scaling = torch.tensor([e.scaling for e in experts])
    expert_of_row = torch.repeat_interleave(torch.tensor([e.rank for e in experts]))

    def hook(_module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0].flatten(0, -2)
        added = torch_ops.routed_lora(
            x,
            weights.lora_a.to(x.dtype),
            weights.lora_b.to(x.dtype),
            weights.router,
            scaling[expert_of_row],
            expert_of_row,
            adapter.spec.top_k,
        )
        return output + added.view_as(output)

    return hook


def _read(base: str, folder: Path) -> tuple[Adapter, torch.dtype]:
    """The adapter, checked against the base, and the base's precision."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as e:
        raise CheckError(f"{base}: no model can be read there: {e}") from None
    if folder.is_dir() and not is_guilomo_adapter(folder):
        raise CheckError(f"{folder}: no LoRA-MoE adapter (its config has another peft_type)")
    adapter = read_adapter(folder, BaseModel.from_config(config))
    return adapter, config.dtype or torch.float32


def _tokenize(base: str, prompts: Sequence[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenized = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for prompt, tokens in zip(prompts, tokenized, strict=True):
        if len(tokens) < 2:
            raise CheckError(f"the prompt {prompt!r} has {len(tokens)} tokens, expected at least 2")
    return tokenized


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise CheckError(f"{path}: no prompts can be read there: {e}") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise CheckError(f"{path}: no prompts, expected one a line")
    return prompts
