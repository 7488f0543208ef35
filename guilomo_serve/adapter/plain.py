"""The `adapter_config.json` of a plain LoRA, as PEFT 0.21 writes it, checked field by field.

As strictly as our own format: a field has the type that PEFT gives it, and what would change the
answer and is not applied is refused. Later versions of PEFT add fields; one that nobody here knows
is accepted where it is off (null, false, or empty), with a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from guilomo_serve.adapter.spec import AdapterError, is_finite, is_int

PLAIN_TYPE = "LORA"
# Tasks of PEFT, by what a server does with its base.
GENERATING = ("CAUSAL_LM",)
POOLING = ("CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_CLS", "TOKEN_CLS")
# They say how the weights began; others are applied to the base again when PEFT loads the adapter.
_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_HEADS = ("classifier", "score")

Check = Callable[[Any], bool]


@dataclass(frozen=True)
class _Field:
    """What a field may be, and how that is said."""

    check: Check
    expected: str


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _map_to(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _or_null(*checks: Check) -> Check:
    return lambda value: value is None or any(check(value) for check in checks)


def _off(value: Any) -> bool:
    return value is None or value is False or value in ([], {})


_RANK = _Field(lambda v: is_int(v) and v >= 1, "an integer >= 1")
_ALPHA = _Field(lambda v: is_finite(v) and v > 0, "a number > 0")
_TEXT_OR_NULL = _Field(_or_null(_is_text), "a string or null")
_NAMES = _Field(_or_null(_is_text, _list_of(_is_text)), "a string, a list of strings, or null")
_SETTINGS = _Field(_or_null(lambda v: isinstance(v, dict)), "an object or null")
_NOT_APPLIED = _Field(_off, "that it is left out: vLLM does not apply it")

_FIELDS: Mapping[str, _Field] = {
    "peft_type": _Field(lambda v: v == PLAIN_TYPE, "'GUILOMO' or 'LORA'"),
    "r": _RANK,
    "lora_alpha": _ALPHA,
    "target_modules": _Field(
        lambda v: (_is_text(v) or _list_of(_is_text)(v)) and bool(v),
        "a string or a list of strings",
    ),
    "rank_pattern": _Field(_or_null(_map_to(_RANK.check)), "an object of integers >= 1, or null"),
    "alpha_pattern": _Field(_or_null(_map_to(_ALPHA.check)), "an object of numbers > 0, or null"),
    "use_rslora": _Field(_is_bool, "true or false"),
    "bias": _Field(lambda v: v == "none", "'none': vLLM applies no biases"),
    "modules_to_save": _Field(
        _or_null(_list_of(lambda v: v in _HEADS)),
        f"null, or some of {list(_HEADS)} of a classifier: vLLM applies no others",
    ),
    "init_lora_weights": _Field(
        lambda v: _is_bool(v) or (_is_text(v) and v.lower() in _STARTS),
        f"true, false or one of {list(_STARTS)}: others change the base, which stays as it is here",
    ),
    "layers_to_transform": _Field(
        _or_null(is_int, _list_of(is_int)), "an integer, a list of integers, or null"
    ),
    "layers_pattern": _NAMES,
    "exclude_modules": _NAMES,
    "base_model_name_or_path": _TEXT_OR_NULL,
    "revision": _TEXT_OR_NULL,
    "peft_version": _TEXT_OR_NULL,
    "auto_mapping": _SETTINGS,
    "inference_mode": _Field(_is_bool, "true or false"),
    "fan_in_fan_out": _Field(_is_bool, "true or false"),
    "ensure_weight_tying": _Field(_is_bool, "true or false"),
    "lora_dropout": _Field(lambda v: is_finite(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "megatron_config": _SETTINGS,
    "megatron_core": _TEXT_OR_NULL,
    "loftq_config": _SETTINGS,
    "eva_config": _SETTINGS,
    "corda_config": _SETTINGS,
    "lora_ga_config": _SETTINGS,
    "velora_config": _SETTINGS,
    "qalora_group_size": _Field(is_int, "an integer"),
    "use_dora": _NOT_APPLIED,
    "use_qalora": _NOT_APPLIED,
    "use_bdlora": _NOT_APPLIED,
    "lora_bias": _NOT_APPLIED,
    "layer_replication": _NOT_APPLIED,
    "alora_invocation_tokens": _NOT_APPLIED,
    "trainable_token_indices": _NOT_APPLIED,
    "target_parameters": _NOT_APPLIED,
    "arrow_config": _NOT_APPLIED,
    "kasa_config": _NOT_APPLIED,
    "monteclora_config": _NOT_APPLIED,
}
_REQUIRED = ("r", "lora_alpha", "target_modules")


def check_plain_config(value: Any, where: str, tasks: Collection[str]) -> list[str]:
    """Checks a parsed config.

    Args:
        value: the parsed JSON.
        where: the file's path, for messages.
        tasks: the values of `task_type` that fit the server.

    Returns:
        Warnings: what cannot be known.

    Raises:
        AdapterError: names the key, what it is and what it should be.
    """
    if not isinstance(value, dict):
        raise AdapterError(f"{where}: is {_shown(value)}, expected a JSON object")
    if value.get("peft_type") != PLAIN_TYPE:
        _refuse(where, "peft_type", value.get("peft_type"), _FIELDS["peft_type"].expected)
    for key in _REQUIRED:
        if key not in value:
            raise AdapterError(f"{where}: the key {key!r} is missing")
    warnings = []
    for key, given in value.items():
        field = _FIELDS.get(key)
        if key == "task_type":
            if given is not None and given not in tasks:
                _refuse(where, key, given, " or ".join(map(repr, tasks)) + " on this base")
        elif field is not None:
            if not field.check(given):
                _refuse(where, key, given, field.expected)
        elif _off(given):
            warnings.append(f"its config has {key!r}, which this guilomo does not know; it is off")
        else:
            raise AdapterError(
                f"{where}: unknown key {key!r}: this guilomo would not apply it, so the adapter "
                "is refused"
            )
    return warnings


def _refuse(where: str, key: str, found: Any, expected: str) -> None:
    raise AdapterError(f"{where}: {key} is {_shown(found)}, expected {expected}")


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
