"""Which layers of a model get a LoRA-MoE adapter, and with which experts (a PEFT tuner)."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from guilomo_serve.adapter import BaseFingerprint
from guilomo_train.lora_moe.config import LoraMoeConfig
from guilomo_train.lora_moe.layer import LoraMoeLayer, LoraMoeLinear


class LoraMoeModel(BaseTuner):
    """Wraps the linear layers that the config names; the base stays frozen.

    Raises:
        ValueError: `experts` names a module that the model lacks, or a target is no linear
            layer.
    """

    prefix = "guilomo_"
    tuner_layer_cls = LoraMoeLayer
    target_module_mapping: Any = MappingProxyType(
        {}
    )  # no defaults by architecture: all-linear is one

    @staticmethod
    def _check_target_module_exists(peft_config: LoraMoeConfig, key: str) -> Any:
        if peft_config.experts is not None:
            return key in peft_config.experts
        return BaseTuner._check_target_module_exists(peft_config, key)

    def _prepare_model(self, peft_config: LoraMoeConfig, model: nn.Module) -> None:
        if getattr(model, "config", None) is not None:
            peft_config.base_fingerprint = BaseFingerprint.from_config(model.config).to_json()
        if peft_config.experts is not None:
            names = {name for name, _ in model.named_modules()}
            for module in peft_config.experts:
                if module not in names:
                    raise ValueError(f"experts names {module!r}, which the model does not have")

    def _create_and_replace(
        self,
        peft_config: LoraMoeConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        experts = peft_config.experts_of(current_key)
        if isinstance(target, LoraMoeLayer):
            target.update_layer(adapter_name, experts, peft_config)
            return
        # Quantised linear layers are subclasses of nn.Linear or offer the same two sizes.
        if not (hasattr(target, "in_features") and hasattr(target, "out_features")):
            raise ValueError(
                f"{current_key} is a {type(target).__name__}; "
                "a LoRA-MoE adapter can be put on linear layers alone"
            )
        layer = LoraMoeLinear(target, adapter_name, experts, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _post_injection_hook(
        self, model: nn.Module, config: LoraMoeConfig, adapter_name: str
    ) -> None:
        """Makes the allocation explicit, so that the saved config needs no rule to be read."""
        experts = {
            name: layer.experts[adapter_name]
            for name, layer in model.named_modules()
            if isinstance(layer, LoraMoeLayer) and adapter_name in layer.experts
        }
        config.experts = {
            name: [{"rank": e.rank, "scaling": e.scaling} for e in listed]
            for name, listed in experts.items()
        }
        config.r = max(sum(e.rank for e in listed) for listed in experts.values())
