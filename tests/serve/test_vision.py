"""A base that sees images: its language model takes adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from vllm.model_executor.models.llama import LlamaForCausalLM

from guilomo_serve.adapter import BaseModel
from guilomo_serve.check import hf
from guilomo_serve.runtime.experts import left_alone
from tests.serve.helpers import ask, byte_tokenizer, guilomo_serve, random_adapter, serving

pytestmark = pytest.mark.slow

PROMPT = "My card has not arrived."
FLAGS = ("--enforce-eager", "--dtype", "float32", "--served-model-name", "base")
IMAGE_SIZE = 28  # four patches


@pytest.fixture(scope="module")
def seeing_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Idefics3 whose language model is as large as the tiny model."""
    folder = tmp_path_factory.mktemp("seeing")
    tokenizer = byte_tokenizer()
    marks = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    config = transformers.Idefics3Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": 14,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.eos_token_id,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.eos_token_id,
        scale_factor=2,
        dtype="float32",
    )
    torch.manual_seed(0)
    transformers.Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    size = {"longest_edge": IMAGE_SIZE}
    images = transformers.Idefics3ImageProcessor(
        size=size, max_image_size=size, do_image_splitting=False
    )
    transformers.Idefics3Processor(images, tokenizer, image_seq_len=1).save_pretrained(folder)
    return folder


def adapter_of(model: torch.nn.Module, base: Path, folder: Path, where: str) -> Path:
    """A random adapter of the projections of one part of the model."""
    described = BaseModel.from_module(model)
    ranks = {m: (2, 3) for m in described.linears if where in m and m.endswith("_proj")}
    return random_adapter(base, folder, seed=1, ranks=ranks, described=described)


def test_its_language_models_adapters_are_served(seeing_model, tmp_path):
    model = transformers.Idefics3ForConditionalGeneration.from_pretrained(seeing_model).eval()
    folder = adapter_of(model, seeing_model, tmp_path / "text", "text_model")
    tower = adapter_of(model, seeing_model, tmp_path / "tower", "vision_model")
    plain = get_peft_model(model, LoraConfig(target_modules=".*vision_model.*(q_proj|fc1)"))
    plain.save_pretrained(tmp_path / "plain")
    model = plain.unload()
    command = guilomo_serve(seeing_model, {"text": folder}, *FLAGS)
    with serving(command, tmp_path / "seeing.log") as server:
        for name in ("base", "text"):
            if name == "text":
                hf.with_adapter(model, folder)
            found = ask(server, name, PROMPT, 12, logprobs=0)
            tokens = torch.tensor([[*found.prompt_token_ids, *found.token_ids]])
            with torch.inference_mode():
                logprobs = model(tokens).logits[0, :-1].log_softmax(-1)
            wanted = logprobs.gather(1, tokens[0, 1:, None])[-len(found.token_ids) :, 0]
            served = torch.tensor(found.logprobs.token_logprobs)
            assert (served - wanted).abs().max() < 1e-3, name
        for folder in (tower, tmp_path / "plain"):
            answer = server.put("tower", folder)
            assert answer.status_code == 400
            message = answer.json()["error"]["message"]
            assert message.startswith(f"{folder}: adapts 'model.vision_model.")
            assert "train one of the language model alone, model.text_model" in message


def test_the_head_of_a_language_model_that_is_a_part_is_left_alone():
    """vLLM would wrap it, with room for each slot at the largest rank."""
    seeing, language = torch.nn.Module(), torch.nn.Module()
    language.embedding_modules = LlamaForCausalLM.embedding_modules
    seeing.language_model = language
    assert left_alone(seeing) == {"embed_tokens", "lm_head"}
