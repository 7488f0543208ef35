"""What /v1/adapters/{name}/load is compared with: routers applied to transformers' activations."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from guilomo_serve.adapter import read_adapter
from tests.serve import hf_reference
from tests.serve.helpers import Server, text_of

_ATTEMPTS = itertools.count()


def load_of(server: Server, name: str) -> dict[str, Any]:
    answer = server.admin("GET", f"/{name}/load")
    assert answer.status_code == 200, answer.text
    return answer.json()


def expected_load(
    base: Path, folder: Path, prompt: str, places: Sequence[int] | None = None
) -> dict[str, dict[str, Any]]:
    """`share` and `entropy` of each module with a router, over a prompt's tokens at some places."""
    model, adapter = hf_reference.model_with(base, folder), read_adapter(folder)
    inputs: dict[str, torch.Tensor] = {}
    for name in adapter.spec.experts:

        def keep(_: Any, args: tuple[torch.Tensor, ...], name: str = name) -> None:
            inputs[name] = args[0][0]

        model.get_submodule(name).register_forward_pre_hook(keep)
    tokens = transformers.AutoTokenizer.from_pretrained(base)(prompt, return_tensors="pt")
    with torch.inference_mode():
        model(tokens.input_ids)
    expected = {}
    for name, weights in adapter.weights.items():
        if weights.router is None:
            continue
        logits = inputs[name].float() @ weights.router.T
        logits = logits if places is None else logits[places]
        experts = logits.shape[1]
        chosen = [0] * experts
        for token in logits.tolist():
            for e in sorted(range(experts), key=lambda e: -token[e])[: adapter.spec.top_k]:
                chosen[e] += 1
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
        expected[name] = {
            "share": [count / sum(chosen) for count in chosen],
            "entropy": entropy / torch.tensor(float(experts)).log().item(),
        }
    return expected


def check_load(found: dict[str, Any], expected: dict[str, dict[str, Any]], tokens: int) -> None:
    assert found["tokens"] == tokens
    assert found["modules"].keys() == expected.keys()
    for module, of_module in found["modules"].items():
        assert of_module["tokens"] == tokens, module
        assert of_module["share"] == pytest.approx(expected[module]["share"], abs=1e-9), module
        assert sum(of_module["share"]) == pytest.approx(1, abs=1e-9)
        assert of_module["entropy"] == pytest.approx(expected[module]["entropy"], abs=1e-3), module


def first_sampled(server: Server, name: str, text: str) -> tuple[str, dict[str, Any]]:
    """Asks until a prompt of a fresh adapter was sampled; that prompt and the load.

    All prompts of a server differ at their beginning, so that none is in the prefix cache, where
    adapters of the same weights share blocks. The answers are one token, which comes of the
    prompt's only step.
    """
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        prompt = f"{next(_ATTEMPTS) % 1000:03d}{text}"
        text_of(server, name, prompt, 1)
        found = load_of(server, name)
        if found["tokens"]:
            return prompt, found
        time.sleep(0.2)
    pytest.fail("nothing was sampled")
