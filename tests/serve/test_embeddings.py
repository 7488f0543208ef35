"""Adapters of heads and embeddings are refused: vLLM's own LoRA of them is wrong on a CPU."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.lora.layers import LoRAMapping, VocabParallelEmbeddingWithLoRA
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from tests.serve.helpers import random_adapter, random_lora

SLOTS, RANK, VOCABULARY, WIDTH = 2, 2, 5, 3
ADAPTER, BASE = 1, 0  # ids; the adapter is in the first slot


@pytest.fixture
def place(root: Path) -> Iterator[Path]:
    """A folder of these tests in `opened`'s root."""
    folder = root / "of-embeddings"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
def test_adapters_of_heads_and_embeddings_are_refused_by_name(opened, tiny_model, place):
    def lora(module: str) -> Path:
        return random_lora(tiny_model, place / module, seed=5, target_modules=[module, "v_proj"])

    routed = random_adapter(tiny_model, place / "routed", seed=6, targets=("lm_head", "v_proj"))
    refused = (
        (lora("lm_head"), "lm_head"),
        (routed, "lm_head"),
        (lora("embed_tokens"), "embed_tokens"),
    )
    for folder, module in refused:
        answer = opened.put("head", folder)
        assert answer.status_code == 400
        assert module in answer.json()["error"]["message"]


def wrapper() -> PunicaWrapperCPU:
    """vLLM's own, for a batch of a token with an adapter and one without."""
    found = PunicaWrapperCPU(max_num_batched_tokens=8, max_batches=2, device="cpu")
    batch = LoRAMapping((ADAPTER, BASE), (ADAPTER, BASE), is_prefill=True)
    found.update_metadata(batch, [ADAPTER], SLOTS, VOCABULARY)
    return found


def test_vllms_own_lora_of_a_head_reaches_requests_of_the_base_on_a_cpu():
    """They get what is in the last slot. Should vLLM mend this, heads may be served."""
    a, b = torch.ones(SLOTS, 1, RANK, WIDTH), torch.ones(SLOTS, 1, VOCABULARY, RANK)
    logits = torch.zeros(2, VOCABULARY)
    wrapper().add_lora_logits(logits, torch.ones(2, WIDTH), a, b, 1.0)
    assert torch.equal(logits, torch.full((2, VOCABULARY), float(RANK * WIDTH)))


def test_vllms_own_lora_of_embeddings_reaches_requests_of_the_base_on_a_cpu():
    """They get A of the first slot and B of the last. Should vLLM mend this, they may be served."""
    base = torch.nn.Embedding.from_pretrained(torch.zeros(VOCABULARY, WIDTH))
    base.org_vocab_size = VOCABULARY
    layer = VocabParallelEmbeddingWithLoRA(base)
    layer.create_lora_weights(SLOTS, SimpleNamespace(max_lora_rank=RANK, lora_dtype=torch.float32))
    layer.set_lora(0, torch.ones(RANK, VOCABULARY), torch.ones(WIDTH, RANK))
    layer.set_lora(1, torch.ones(RANK, VOCABULARY), torch.full((WIDTH, RANK), 10.0))
    layer.punica_wrapper = wrapper()
    output = layer(torch.tensor([3, 3]))
    assert torch.equal(output, torch.tensor([[2.0], [20.0]]).expand(2, WIDTH))
