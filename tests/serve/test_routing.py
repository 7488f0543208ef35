"""vLLM chooses the experts that transformers chooses, on the real model in bfloat16.

vLLM's choices are read off its layers as `guilomo-serve check` does it; transformers' are those of
the training layer.
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

from guilomo_serve import check
from guilomo_serve.adapter import read_adapter
from guilomo_train.lora_moe import LoraMoeLayer
from tests.serve.helpers import random_adapter

PROMPTS = [
    "My card has not arrived and it has been two weeks. What can I do?",
    "Write one sentence about the sea.",
    "2 + 2 =",
]


def test_chosen_experts_are_those_of_transformers_except_at_near_ties(
    small_model: Path, tmp_path: Path
) -> None:
    folder = random_adapter(small_model, tmp_path / "adapter", seed=5)
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),  # for tests.serve
        "VLLM_PLUGINS": "guilomo",
        "HF_HUB_OFFLINE": "1",
    }
    program = "import sys; from tests.serve.test_routing import see; see(*sys.argv[1:])"
    subprocess.run(
        [sys.executable, "-c", program, str(small_model), str(folder), str(tmp_path / "logits.pt")],
        env=environment,
        check=True,
        timeout=280,
    )
    seen: list[dict[str, torch.Tensor]] = torch.load(tmp_path / "logits.pt")
    top_k = read_adapter(folder).spec.top_k
    model = transformers.AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(small_model)

    choices = agreed = 0
    for prompt, ours in zip(PROMPTS, seen, strict=True):
        theirs = transformers_logits(model, tokenizer(prompt, return_tensors="pt"))
        assert theirs.keys() == ours.keys()
        for module, wanted in theirs.items():
            got = ours[module]
            assert got.shape == wanted.shape, module
            if wanted.shape[-1] <= top_k:
                choices += len(wanted)
                agreed += len(wanted)
                continue
            same, margin = check.compare_choices(got, wanted, top_k)
            clear = margin[~same] >= check.NEAR_TIE * wanted.std()
            assert not clear.any(), (module, margin[~same], wanted.std())
            choices += same.numel()
            agreed += int(same.sum())
    assert choices > 5000
    assert agreed / choices > 0.97


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


def see(base: str, folder: str, target: str) -> None:
    """Saves the router logits of vLLM's layers for each prompt."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokens = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    (seen,) = check.see_vllm(base, [Path(folder)], tokens, torch.bfloat16)
    torch.save([of_prompt.router_logits for of_prompt in seen], target)
