"""What an adapter needs to know of its base model: its fingerprint and its linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch


@dataclass(frozen=True)
class BaseFingerprint:
    """The facts that tell one base model from another where names and paths differ."""

    architecture: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int

    @classmethod
    def from_config(cls, config: Any) -> BaseFingerprint:
        """Reads the facts off a transformers `PretrainedConfig`."""
        architectures = getattr(config, "architectures", None) or [type(config).__name__]
        text = config.get_text_config()
        return cls(
            architecture=architectures[0],
            hidden_size=text.hidden_size,
            num_hidden_layers=text.num_hidden_layers,
            vocab_size=text.vocab_size,
        )

    @classmethod
    def from_json(cls, value: Any) -> BaseFingerprint:
        names = [f.name for f in fields(cls)]
        if not isinstance(value, dict) or sorted(value) != sorted(names):
            raise ValueError(f"found {value!r}, expected an object with the keys {names}")
        return cls(**value)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def is_linear(module: torch.nn.Module) -> bool:
    """Whether a module is a linear layer: `nn.Linear`, or the `Conv1D` of GPT-2, which is one whose
    weight is transposed."""
    return isinstance(module, torch.nn.Linear) or (
        type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    )


def linear_sizes(module: torch.nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer, or of what a quantiser put in its place; None for others."""
    if hasattr(module, "nf") and hasattr(module, "nx"):
        return module.nf, module.nx  # type: ignore[return-value]
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.out_features, module.in_features  # type: ignore[return-value]
    return None


@dataclass(frozen=True)
class BaseModel:
    """A base model as an adapter sees it.

    Attributes:
        fingerprint: what tells it from other bases.
        linears: full module name -> (out_features, in_features) of each linear layer.
    """

    fingerprint: BaseFingerprint
    linears: Mapping[str, tuple[int, int]]

    @classmethod
    def from_config(cls, config: Any) -> BaseModel:
        """Describes the causal LM of a transformers config, without allocating a weight."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return cls.from_module(model)

    @classmethod
    def from_module(cls, model: torch.nn.Module) -> BaseModel:
        """Describes a transformers model that is in memory (or on the meta device)."""
        linears = {
            name: sizes
            for name, module in model.named_modules()
            if is_linear(module) and (sizes := linear_sizes(module)) is not None
        }
        return cls(BaseFingerprint.from_config(model.config), linears)
