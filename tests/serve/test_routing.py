"""vLLM chooses the experts that transformers chooses, on the real model in bfloat16.

The inputs of every adapted layer are recorded in vLLM's worker while it answers prompts; the
routers applied to them give its choices. transformers' choices are those of the training layer.
Activations differ by bfloat16 rounding, so choices may differ where two logits nearly tie.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from guilomo_serve.adapter import Adapter, read_adapter
from guilomo_train.lora_moe import LoraMoeLayer
from tests.serve.helpers import random_adapter

PROMPTS = [
    "My card has not arrived and it has been two weeks. What can I do?",
    "Write one sentence about the sea.",
    "2 + 2 =",
]
PACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
# A difference of two logits that bfloat16 activations can turn round, as a share of the spread of
# the router's logits at that layer.
NEAR_TIE = 0.15


def test_chosen_experts_are_those_of_transformers_except_at_near_ties(
    small_model: Path, tmp_path: Path
) -> None:
    folder = random_adapter(small_model, tmp_path / "adapter", seed=5)
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),  # for tests.serve
        "VLLM_PLUGINS": "guilomo",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "HF_HUB_OFFLINE": "1",
    }
    # Imported by name, so that the worker can find the functions that are sent to it.
    program = "import sys; from tests.serve.test_routing import record; record(*sys.argv[1:])"
    subprocess.run(
        [sys.executable, "-c", program, str(small_model), str(folder), str(tmp_path / "inputs.pt")],
        env=environment,
        check=True,
        timeout=280,
    )
    recorded: list[dict[str, torch.Tensor]] = torch.load(tmp_path / "inputs.pt")
    adapter = read_adapter(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(small_model)

    choices = agreed = 0
    for prompt, inputs in zip(PROMPTS, recorded, strict=True):
        theirs = transformers_logits(model, tokenizer(prompt, return_tensors="pt"))
        ours = vllm_logits(adapter, inputs)
        assert theirs.keys() == ours.keys()
        for module, wanted in theirs.items():
            got = ours[module]
            assert got.shape == wanted.shape, module
            same, margin = compare(got, wanted, adapter.spec.top_k)
            spread = wanted.std()
            assert (margin[~same] < NEAR_TIE * spread).all(), (module, margin[~same], spread)
            choices += same.numel()
            agreed += int(same.sum())
    assert choices > 5000
    assert agreed / choices > 0.97


def compare(
    got: torch.Tensor, wanted: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each token's chosen set is the same, and how clear transformers' choice was."""
    if wanted.shape[-1] <= top_k:
        everything = torch.ones(len(wanted), dtype=torch.bool)
        return everything, torch.full((len(wanted),), torch.inf)
    ranked = wanted.sort(dim=-1, descending=True).values
    margin = ranked[:, top_k - 1] - ranked[:, top_k]
    sets = [logits.topk(top_k, dim=-1).indices.sort(dim=-1).values for logits in (got, wanted)]
    return (sets[0] == sets[1]).all(-1), margin


def transformers_logits(model: Any, inputs: Any) -> dict[str, torch.Tensor]:
    """Router logits [T, E] of each module with a router."""
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraMoeLayer)
    }
    for layer in layers.values():
        layer.keep_routing = True
    with torch.no_grad():
        model(**inputs)
    return {
        name: layer.routing.logits[0] for name, layer in layers.items() if layer.routing is not None
    }


def vllm_logits(adapter: Adapter, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same from what vLLM's layers were given: served layer -> [T, in]."""
    logits = {}
    for name, x in inputs.items():
        parent, _, last = name.rpartition(".")
        for module in PACKED.get(last, (last,)):
            router = adapter.weights[f"{parent}.{module}"].router
            if router is not None:
                logits[f"{parent}.{module}"] = x.float() @ router.T
    return logits


def watch(model: torch.nn.Module) -> None:
    """Runs in vLLM's worker: keeps what each adapted layer is given."""
    from guilomo_serve.runtime.layers import RoutedLayer

    model.recorded = {}
    for name, layer in model.named_modules():
        if isinstance(layer, RoutedLayer):

            def keep(_: Any, args: tuple[torch.Tensor, ...], name: str = name) -> None:
                model.recorded[name] = args[0].clone()

            layer.register_forward_pre_hook(keep)


def fetch(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Runs in vLLM's worker: the inputs of the last step."""
    return dict(model.recorded)  # type: ignore[arg-type]


def record(base: str, folder: str, target: str) -> None:
    """Answers each prompt with the adapter in vLLM and saves the layers' inputs."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        base, enable_lora=True, enforce_eager=True, max_model_len=256, max_num_seqs=4,
        max_lora_rank=512, enable_prefix_caching=False,
    )  # fmt: skip
    llm.apply_model(watch)
    request = LoRARequest("adapter", 1, folder)
    inputs = []
    for prompt in PROMPTS:
        # One token: the only step is the one over the prompt.
        llm.generate(prompt, SamplingParams(max_tokens=1), lora_request=request)
        inputs.append(llm.apply_model(fetch)[0])
    torch.save(inputs, target)
