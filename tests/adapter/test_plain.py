"""A plain LoRA's config is checked field by field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from peft import LoraConfig

from guilomo_serve.adapter import AdapterError
from guilomo_serve.adapter.plain import GENERATING, POOLING, check_plain_config

WHERE = "folder/adapter_config.json"


def config(**changes: Any) -> dict[str, Any]:
    """What PEFT writes, but for some fields."""
    wrote = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return json.loads(json.dumps({**wrote.to_dict(), "target_modules": ["q_proj"], **changes}))


def test_what_peft_writes_is_accepted():
    assert check_plain_config(config(), WHERE, GENERATING) == []
    for changes in (
        {"use_rslora": True, "lora_alpha": 0.5, "rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 2.5}, "init_lora_weights": "gaussian"},
        {"target_modules": ".*q_proj", "modules_to_save": [], "task_type": None},
        {"layers_to_transform": [0, 1], "eva_config": {"rho": 2.0}, "lora_dropout": 0.1},
    ):
        assert check_plain_config(config(**changes), WHERE, GENERATING) == []
    scored = config(task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
    assert check_plain_config(scored, WHERE, POOLING) == []


@pytest.mark.parametrize("wrong", [["x", {}], {"x": []}, 1e999, "\u202e"], ids=str)
def test_no_field_may_be_of_any_type(wrong):
    """A list, an object, an infinity and a strange text in each field in turn, and at its depth."""
    reasons = {}
    for key in config():
        try:
            check_plain_config({**config(), key: wrong}, WHERE, GENERATING)
        except AdapterError as e:
            reasons[key] = str(e)
    for key, reason in reasons.items():
        assert reason.startswith(f"{WHERE}: {key} is ")
    texts = {"base_model_name_or_path", "revision", "peft_version", "megatron_core"}
    names = {"target_modules", "exclude_modules", "layers_pattern"}
    settings = {"auto_mapping", "megatron_config", "loftq_config"}
    settings |= {f"{name}_config" for name in ("eva", "corda", "lora_ga", "velora")}
    allowed = {str: texts | names, dict: settings}.get(type(wrong), set())
    assert config().keys() - reasons.keys() == allowed


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("r", "8", "r is '8', expected an integer >= 1"),
        ("r", True, "expected an integer >= 1"),
        ("r", 0, "expected an integer >= 1"),
        ("r", 8.0, "expected an integer >= 1"),
        ("lora_alpha", "16", "expected a number > 0"),
        ("lora_alpha", None, "expected a number > 0"),
        ("rank_pattern", {"q_proj": "4"}, "integers >= 1"),
        ("alpha_pattern", {"q_proj": float("nan")}, "numbers > 0"),
        ("bias", "lora_only", "'none'"),
        ("modules_to_save", ["lm_head"], "vLLM applies no others"),
        ("init_lora_weights", "pissa_niter_4", "change the base"),
        ("use_dora", True, "left out"),
        ("layer_replication", [[0, 1]], "left out"),
        ("trainable_token_indices", [1], "left out"),
        ("task_type", "SEQ_CLS", "'CAUSAL_LM' on this base"),
        ("task_type", "MADE_UP", "'CAUSAL_LM' on this base"),
        ("peft_type", "IA3", "'GUILOMO' or 'LORA'"),
        ("peft_type", ["LORA"], "'GUILOMO' or 'LORA'"),
        ("from_the_future", "on", "unknown key 'from_the_future'"),
    ],
)
def test_what_would_change_the_answer_is_refused(key, value, reason):
    with pytest.raises(AdapterError) as refused:
        check_plain_config({**config(), key: value}, WHERE, GENERATING)
    assert str(refused.value).startswith(f"{WHERE}: ")
    assert reason in str(refused.value)


def test_what_is_off_and_unknown_is_a_warning():
    for value in (None, False, [], {}):
        (warning,) = check_plain_config({**config(), "later": value}, WHERE, GENERATING)
        assert "'later'" in warning


def test_a_field_that_is_needed_is_named():
    for key in ("r", "lora_alpha", "target_modules"):
        short = {k: v for k, v in config().items() if k != key}
        with pytest.raises(AdapterError, match=f"the key '{key}' is missing"):
            check_plain_config(short, WHERE, GENERATING)
    for value in ([], "LORA", None, 3):
        with pytest.raises(AdapterError, match="expected a JSON object"):
            check_plain_config(value, WHERE, GENERATING)
