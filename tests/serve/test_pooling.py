"""Bases that pool: what vLLM alone serves there with a plain LoRA, and our adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from tests.serve import hf_reference
from tests.serve.helpers import Server, guilomo_serve, serving

pytestmark = pytest.mark.slow

PROMPTS = ["My card has not arrived.", "A dog.", "What is the weather like in spring?"]
FLAGS = ("--enforce-eager", "--dtype", "float32", "--served-model-name", "base")
LABELS = 3


@pytest.fixture(scope="module")
def classifier(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random classifier, and a plain LoRA for it with a head of its own."""
    folder = tmp_path_factory.mktemp("classifier")
    config = transformers.AutoConfig.from_pretrained(tiny_model, num_labels=LABELS)
    torch.manual_seed(4)
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder / "base")
    model = transformers.LlamaForSequenceClassification.from_pretrained(folder / "base")
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder / "base")
    targets = ["q_proj", "v_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=targets, task_type="SEQ_CLS"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder / "scored")
    return folder / "base", folder / "scored"


@pytest.fixture(scope="module")
def classifying(classifier, tmp_path_factory) -> Iterator[Server]:
    base, folder = classifier
    log = tmp_path_factory.mktemp("log") / "classifying.log"
    with serving(guilomo_serve(base, {"scored": folder}, *FLAGS), log) as server:
        yield server


def post(server: Server, path: str, model: str) -> list[dict]:
    answer = requests.post(
        f"{server.url}{path}", json={"model": model, "input": PROMPTS}, timeout=120
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return answer.json()["data"]


def test_a_classifier_answers_as_peft_does(classifying, classifier):
    """With the adapter's head and with the base's, in one batch too."""
    base, folder = classifier
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)

    def expected(adapter: Path | None) -> torch.Tensor:
        model = transformers.LlamaForSequenceClassification.from_pretrained(base).eval()
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter).eval()
        with torch.inference_mode():
            logits = [model(**tokenizer(p, return_tensors="pt")).logits[0] for p in PROMPTS]
        return torch.stack(logits).softmax(-1)

    wanted = {"base": expected(None), "scored": expected(folder)}
    assert (wanted["base"] - wanted["scored"]).abs().max() > 0.05
    for name, probabilities in wanted.items():
        found = torch.tensor([entry["probs"] for entry in post(classifying, "/classify", name)])
        assert (found - probabilities).abs().max() < 1e-5, name
    entry = classifying.admin("GET", "/scored").json()
    assert (entry["task"], entry["resident"], entry["warnings"]) == ("SEQ_CLS", True, [])


def test_names_and_health_are_as_on_a_server_that_generates(classifying, classifier):
    _, folder = classifier
    assert requests.get(f"{classifying.url}/ready", timeout=30).json() == {"status": "ready"}
    unknown = {"model": "scored2", "input": PROMPTS}
    answer = requests.post(f"{classifying.url}/classify", json=unknown, timeout=30)
    assert answer.status_code == 404
    assert "Did you mean `scored`?" in answer.json()["error"]["message"]
    assert classifying.put("again", folder).status_code == 200
    again = [entry["probs"] for entry in post(classifying, "/classify", "again")]
    assert again == [entry["probs"] for entry in post(classifying, "/classify", "scored")]
    assert classifying.admin("DELETE", "/again").status_code == 200


def test_embeddings_are_those_of_transformers(tiny_model, adapters, tmp_path):
    command = guilomo_serve(tiny_model, adapters, *FLAGS, "--runner", "pooling")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    with serving(command, tmp_path / "embedding.log") as server:
        for name, folder in {"base": None, **adapters}.items():
            model = hf_reference.model_with(tiny_model, folder)
            found = post(server, "/v1/embeddings", name)
            for prompt, entry in zip(PROMPTS, found, strict=True):
                with torch.inference_mode():
                    tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
                    hidden = model(tokens, output_hidden_states=True).hidden_states[-1][0, -1]
                wanted = torch.nn.functional.normalize(hidden, dim=0)
                assert (torch.tensor(entry["embedding"]) - wanted).abs().max() < 1e-4, name
