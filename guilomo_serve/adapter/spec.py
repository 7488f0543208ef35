"""The contents of `adapter_config.json` (format version 1) as checked dataclasses.

`AdapterSpec.from_json` refuses everything this version would not apply: an unknown key may
change what the adapter computes, so it is an error and not ignored.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from guilomo_serve.adapter.base import BaseFingerprint

PEFT_TYPE = "GUILOMO"
FORMAT_VERSION = 2
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
TENSOR_PREFIX = "base_model.model."

_REQUIRED_KEYS = (
    "format_version",
    "base_model_name_or_path",
    "target_modules",
    "top_k",
    "lora_alpha",
    "experts",
)
# PEFT's housekeeping: these say how the adapter came about, not what it computes.
_IGNORED_KEYS = frozenset({"auto_mapping", "inference_mode", "peft_version"})
# Training settings that must have their neutral value, or the adapter would compute more than
# its experts do.
_NEUTRAL_KEYS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "bias": (("none",), ""),
    "modules_to_save": ((None, []), ", or the modules put into the base (docs/new_tokens.md)"),
}
_TRAINING_KEYS = frozenset({"lora_dropout", "num_experts", "expert_rank", "exclude_modules"})
_MODULE_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
_KNOWN_KEYS = (
    frozenset(_REQUIRED_KEYS)
    | {"peft_type", "task_type", "r", "base_fingerprint", "search", "stop_token_ids", "revision"}
    | _IGNORED_KEYS
    | _NEUTRAL_KEYS.keys()
    | _TRAINING_KEYS
)


class AdapterError(ValueError):
    """An adapter folder that cannot be used; the message names the file, the key and the remedy."""


@dataclass(frozen=True)
class Expert:
    """One LoRA expert of a module: `scaling * B_e A_e`; `A_e` is [rank, in], `B_e` [out, rank]."""

    rank: int
    scaling: float


@dataclass(frozen=True)
class AdapterSpec:
    """What an adapter is, without its tensors.

    Attributes:
        base_model_name_or_path: the model the adapter was trained on, as the trainer named it.
        target_modules: the last parts of the adapted modules' names, as in PEFT.
        top_k: experts that a token uses in each module (all of them where a module has fewer).
        lora_alpha: numerator of the default scaling; the scaling that counts is each expert's.
        experts: full module name -> its experts, in the order of their rows.
        base: fingerprint of the base model, None where the writer did not know it.
        task_type: PEFT's task type.
        search: record of the search (method, seed, data, versions), None for a hand-made one.
        stop_token_ids: tokens that end an answer, beside the end tokens of the base.
        revision: the base's commit on the hub, None where it was a folder.
        format_version: of the folder that it was read from.
    """

    base_model_name_or_path: str
    target_modules: tuple[str, ...]
    top_k: int
    lora_alpha: float
    experts: Mapping[str, tuple[Expert, ...]]
    base: BaseFingerprint | None = None
    task_type: str | None = "CAUSAL_LM"
    search: Mapping[str, Any] | None = field(default=None, compare=False)
    stop_token_ids: tuple[int, ...] = ()
    revision: str | None = None
    format_version: int = field(default=FORMAT_VERSION, compare=False)

    @property
    def max_total_rank(self) -> int:
        """The largest number of rows (sum of expert ranks) of any module: `r` on disk."""
        return max(sum(e.rank for e in experts) for experts in self.experts.values())

    @property
    def total_experts(self) -> int:
        return sum(len(experts) for experts in self.experts.values())

    @property
    def total_rank(self) -> int:
        return sum(e.rank for experts in self.experts.values() for e in experts)

    def to_json(self) -> dict[str, Any]:
        """The value of `adapter_config.json`."""
        return {
            "peft_type": PEFT_TYPE,
            "format_version": FORMAT_VERSION,
            "base_model_name_or_path": self.base_model_name_or_path,
            "revision": self.revision,
            "base_fingerprint": self.base.to_json() if self.base else None,
            "task_type": self.task_type,
            "target_modules": list(self.target_modules),
            "top_k": self.top_k,
            "lora_alpha": self.lora_alpha,
            "r": self.max_total_rank,
            "experts": {
                module: [{"rank": e.rank, "scaling": e.scaling} for e in experts]
                for module, experts in self.experts.items()
            },
            "search": dict(self.search) if self.search is not None else None,
            "stop_token_ids": list(self.stop_token_ids),
        }

    @classmethod
    def from_json(cls, value: Any, where: str) -> AdapterSpec:
        """Checks a parsed `adapter_config.json`.

        Args:
            value: the parsed JSON.
            where: the file's path, for messages.

        Raises:
            AdapterError: the value is no config of a version up to this one; the message names the
                key.
        """
        _check(isinstance(value, dict), where, "the file", type(value).__name__, "a JSON object")
        peft_type = value.get("peft_type")
        _check(peft_type == PEFT_TYPE, where, "peft_type", peft_type, repr(PEFT_TYPE))
        for key in _REQUIRED_KEYS:
            if key not in value:
                raise AdapterError(f"{where}: the key {key!r} is missing")
        version = value["format_version"]
        _check(is_int(version), where, "format_version", version, "an integer")
        if version > FORMAT_VERSION:
            raise AdapterError(
                f"{where}: format_version is {version}, this guilomo reads up to "
                f"{FORMAT_VERSION}: install a newer guilomo"
            )
        _check(version >= 1, where, "format_version", version, f"1 to {FORMAT_VERSION}")
        unknown = sorted(value.keys() - _KNOWN_KEYS)
        if unknown:
            raise AdapterError(
                f"{where}: unknown key {unknown[0]!r}: this guilomo would not apply it, "
                "so the adapter is refused"
            )
        for key, (neutral, otherwise) in _NEUTRAL_KEYS.items():
            if key in value and value[key] not in neutral:
                raise AdapterError(
                    f"{where}: {key} is {value[key]!r}, which a LoRA-MoE adapter cannot apply; "
                    f"expected {neutral[0]!r}{otherwise}"
                )

        name = value["base_model_name_or_path"]
        _check(isinstance(name, str), where, "base_model_name_or_path", name, "a string")
        targets = value["target_modules"]
        _check(
            isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets),
            where,
            "target_modules",
            targets,
            "a list of module names",
        )
        revision = value.get("revision")
        is_name = revision is None or isinstance(revision, str)
        _check(is_name, where, "revision", revision, "a string")
        top_k = value["top_k"]
        _check(is_int(top_k) and top_k >= 1, where, "top_k", top_k, "an integer >= 1")
        alpha = value["lora_alpha"]
        _check(is_finite(alpha) and alpha > 0, where, "lora_alpha", alpha, "a number > 0")
        modules = value["experts"]
        _check(
            isinstance(modules, dict) and bool(modules),
            where,
            "experts",
            modules,
            "an object with a list of experts for each module",
        )
        fingerprint = value.get("base_fingerprint")
        task_type = value.get("task_type")
        is_name = task_type is None or isinstance(task_type, str)
        _check(is_name, where, "task_type", task_type, "a string")
        search = value.get("search")
        _check(search is None or isinstance(search, dict), where, "search", search, "an object")
        stops = value.get("stop_token_ids")
        stops = [] if stops is None else stops
        _check(
            isinstance(stops, list) and all(is_int(token) and token >= 0 for token in stops),
            where,
            "stop_token_ids",
            stops,
            "a list of token ids",
        )
        spec = cls(
            base_model_name_or_path=name,
            target_modules=tuple(targets),
            top_k=top_k,
            lora_alpha=float(alpha),
            experts={m: _experts_of(m, listed, where) for m, listed in modules.items()},
            base=_fingerprint_of(fingerprint, where) if fingerprint is not None else None,
            task_type=task_type,
            search=search,
            stop_token_ids=tuple(stops),
            revision=revision,
            format_version=version,
        )
        for module in spec.experts:
            if not _MODULE_NAME.fullmatch(module):
                raise AdapterError(f"{where}: experts has {module!r}, which is no module's name")
            if not any(module == t or module.endswith("." + t) for t in targets):
                raise AdapterError(
                    f"{where}: experts has {module!r}, which no entry of target_modules "
                    f"{list(targets)} names"
                )
        if "r" in value:
            _check(
                value["r"] == spec.max_total_rank,
                where,
                "r",
                value["r"],
                f"{spec.max_total_rank}, the largest total rank of a module",
            )
        return spec


def _experts_of(module: str, listed: Any, where: str) -> tuple[Expert, ...]:
    key = f"experts[{module!r}]"
    _check(isinstance(listed, list) and bool(listed), where, key, listed, "a non-empty list")
    experts = []
    for i, entry in enumerate(listed):
        _check(
            isinstance(entry, dict) and entry.keys() == {"rank", "scaling"},
            where,
            f"{key}[{i}]",
            entry,
            'an object {"rank": ..., "scaling": ...}',
        )
        rank, scaling = entry["rank"], entry["scaling"]
        _check(is_int(rank) and rank >= 1, where, f"{key}[{i}].rank", rank, "an integer >= 1")
        _check(is_finite(scaling), where, f"{key}[{i}].scaling", scaling, "a finite number")
        experts.append(Expert(rank, float(scaling)))
    return tuple(experts)


def _fingerprint_of(value: Any, where: str) -> BaseFingerprint:
    try:
        return BaseFingerprint.from_json(value)
    except (TypeError, ValueError) as e:
        raise AdapterError(f"{where}: base_fingerprint: {e}") from None


def _check(ok: Any, where: str, key: str, found: Any, expected: str) -> None:
    if not ok:
        shown = repr(found)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise AdapterError(f"{where}: {key} is {shown}, expected {expected}")


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max
