"""Bases that are mixtures of experts: what every token uses takes adapters, experts and their
routers do not."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from guilomo_serve.adapter import BaseModel, read_adapter
from tests.serve import hf_reference
from tests.serve.helpers import byte_tokenizer, random_adapter

pytestmark = pytest.mark.slow

PROMPT = list(b"The quick brown fox jumps over the lazy dog.")
TOKENS = 8
TOLERANCE = 2e-3  # nats, in float32: the same sums in another order, through a softmax
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SHARED = ("gate_proj", "up_proj", "down_proj")
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "dtype": "float32",
}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 64, "intermediate_size": 96}
BASES: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, Any], tuple[str, ...]]] = {
    "qwen3": (transformers.Qwen3MoeConfig, {**EXPERTS, "head_dim": 32}, ATTENTION),
    "qwen2": (
        transformers.Qwen2MoeConfig,
        {**EXPERTS, "shared_expert_intermediate_size": 64},
        (*ATTENTION, *SHARED),
    ),
    "mixtral": (
        transformers.MixtralConfig,
        {"num_local_experts": 4, "intermediate_size": 96},
        ATTENTION,
    ),
    "gpt_oss": (
        transformers.GptOssConfig,
        {"num_local_experts": 4, "intermediate_size": 64, "head_dim": 32, "sliding_window": 32},
        ATTENTION,
    ),
    "deepseek": (
        transformers.DeepseekV2Config,
        {
            **{"num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1},
            **{"intermediate_size": 96, "moe_intermediate_size": 64, "first_k_dense_replace": 1},
            **{"topk_method": "greedy", "n_group": 1, "topk_group": 1, "q_lora_rank": 32},
            # The only sizes that vLLM's kernel takes.
            **{"kv_lora_rank": 512, "qk_rope_head_dim": 64},
            **{"qk_nope_head_dim": 16, "v_head_dim": 16},
        },
        (*LATENT, *SHARED),
    ),
}
# One process for all bases: most of the time goes into imports.
PROGRAM = """
import gc, json, sys
from pathlib import Path
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest
from guilomo_serve.runtime import worker_manager

prompt, tokens, jobs = json.loads(sys.argv[1])
parameters = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=0)
found = {}
memory = worker_manager.default_memory
for base, adapters in jobs.items():
    # Two adapters may be kept: of the first base by memory, of others by number.
    most = 2 if found else 5
    size = Path(adapters[0], "adapter_model.safetensors").stat().st_size if adapters else 0
    worker_manager.default_memory = memory if found else lambda: int(2.5 * size)
    llm = LLM(base, enable_lora=True, max_lora_rank=64, enforce_eager=True, dtype="float32",
              max_model_len=256, max_num_seqs=4, max_cpu_loras=most)
    for number, adapter in enumerate([base, *adapters]):
        lora = LoRARequest(adapter, number, adapter) if number else None
        asked = {"prompt_token_ids": prompt}
        try:
            if lora is not None:
                llm.llm_engine.add_lora(lora)
            (output,) = llm.generate(asked, parameters, use_tqdm=False, lora_request=lora)
        except Exception as e:
            found[adapter] = str(e)
            continue
        (answer,) = output.outputs
        ids = list(answer.token_ids)
        found[adapter] = [ids, [of[i].logprob for of, i in zip(answer.logprobs, ids)]]
    # What engines do that wait for one another: a batch that is none.
    llm.collective_rpc("execute_dummy_batch")
    found[f"{base} keeps"] = sorted(llm.llm_engine.list_loras())
    one = SamplingParams(max_tokens=1)
    for number in range(10, 14) if adapters else ():
        lora = LoRARequest(f"{number}", number, adapters[0])
        llm.generate(asked, one, use_tqdm=False, lora_request=lora)
    gc.collect()
    held = [o for o in gc.get_objects() if isinstance(o, worker_manager.ReadAdapter)]
    found[f"{base} holds"] = len(held)
    del held
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
print(json.dumps(found))
"""


def make_base(folder: Path, kind: str) -> Path:
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    of_kind, sizes, _ = BASES[kind]
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": end, "pad_token_id": end}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(of_kind(**{**SIZES, **tokens, **sizes}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapter_of(base: Path, folder: Path, module: str) -> Path:
    """An adapter that also has one more module, whatever the base makes of that."""
    described = BaseModel.from_config(transformers.AutoConfig.from_pretrained(base))
    linears = {**described.linears, module: described.linears.get(module, (64, 128))}
    ranks = {module: (2, 3), "model.layers.0.self_attn.o_proj": (2,)}
    targets = (module.rpartition(".")[2], "o_proj")
    with_it = dataclasses.replace(described, linears=linears)
    return random_adapter(base, folder, 3, targets, ranks=ranks, described=with_it)


def merged(base: Path, adapter: Path, folder: Path) -> Path:
    """The base with an adapter in its weights, all of whose modules have one expert."""
    make_base(folder, "deepseek")
    weights = load_file(base / "model.safetensors")
    read = read_adapter(adapter)
    for module, (expert,) in read.spec.experts.items():
        own = read.weights[module]
        weights[f"{module}.weight"] += expert.scaling * own.lora_b @ own.lora_a
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_mixtures_of_experts_take_adapters_on_what_every_token_uses(tmp_path: Path) -> None:
    jobs: dict[str, list[str]] = {}
    bases, adapters = {}, {}
    for kind, (_, _, targets) in BASES.items():
        bases[kind] = base = make_base(tmp_path / kind, kind)
        # One expert a module has no router: it can be added to the base's weights.
        described = BaseModel.from_config(transformers.AutoConfig.from_pretrained(base))
        ranks = dict.fromkeys(described.linears, (4,)) if kind == "deepseek" else None
        adapters[kind] = random_adapter(base, tmp_path / f"{kind}-a", 1, targets, ranks=ranks)
        jobs[str(base)] = [str(adapters[kind])]
    refused = {
        str(adapter_of(bases[kind], tmp_path / f"refused{i}", module)): (kind, module)
        for i, (kind, module) in enumerate(
            {
                "mixtral": "model.layers.0.mlp.gate",
                "qwen3": "model.layers.0.mlp.experts.1.gate_proj",
                "qwen2": "model.layers.0.mlp.shared_expert_gate",
                "deepseek": "model.layers.0.self_attn.kv_b_proj",
            }.items()
        )
    }
    for adapter, (kind, _) in refused.items():
        jobs[str(bases[kind])].append(adapter)
    with_adapter = merged(bases["deepseek"], adapters["deepseek"], tmp_path / "merged")
    jobs[str(with_adapter)] = []

    environment = {
        **{"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"},
        **{"VLLM_NO_USAGE_STATS": "1", **os.environ},
    }
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([PROMPT, TOKENS, jobs])],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=400,
    )
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-6000:]
    found = json.loads(ran.stdout.splitlines()[-1])

    for adapter, (_, module) in refused.items():
        assert module in found[adapter], found[adapter]
    for kind in BASES:
        assert found[f"{bases[kind]} keeps"] == [1]
        assert found[f"{bases[kind]} holds"] == 2, "of the five that were asked for"
    for kind in ("qwen3", "qwen2", "mixtral", "gpt_oss"):
        for adapter in (None, adapters[kind]):
            tokens, scores = found[str(adapter or bases[kind])]
            model = hf_reference.model_with(bases[kind], adapter)
            expected = hf_reference.logprobs(model, PROMPT + tokens)[-TOKENS:]
            assert (torch.tensor(scores) - expected).abs().max() < TOLERANCE, (kind, adapter)
        assert found[str(adapters[kind])][0] != found[str(bases[kind])][0]
    # vLLM's CPU build and transformers disagree on this base alone, so vLLM is its own reference.
    tokens, scores = found[str(adapters["deepseek"])]
    wanted_tokens, wanted_scores = found[str(with_adapter)]
    assert tokens == wanted_tokens != found[str(bases["deepseek"])][0]
    assert (torch.tensor(scores) - torch.tensor(wanted_scores)).abs().max() < TOLERANCE
