"""Which layers of a model get a LoRA-MoE adapter, and with which experts (a PEFT tuner).

Every check comes before the first layer is replaced: a model that is refused stays as it was.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from guilomo_serve.adapter import BaseFingerprint, is_linear, linear_sizes
from guilomo_train.endings import configured_ends
from guilomo_train.lora_moe.config import LoraMoeConfig
from guilomo_train.lora_moe.layer import LoraMoeLayer, LoraMoeLinear


class LoraMoeModel(BaseTuner):
    """Wraps the linear layers that the config names; the base stays frozen.

    Raises:
        ValueError: a name in `experts` or `target_modules` is none of the model's, or a target is
            no linear layer, the output layer, or an expert or router of a base that is a mixture
            of experts itself.
    """

    prefix = "lora_"  # of all that belongs to an adapter, by which PEFT finds it
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
        peft_config.base_fingerprint = _fingerprint(model)
        modules = _modules(model)
        moe = _moe_parts(modules)
        if peft_config.experts is not None:
            for name in peft_config.experts:
                if name not in modules:
                    raise ValueError(f"experts names {name!r}, which the model does not have")
        else:
            if peft_config.target_modules == "all-linear":
                if moe:
                    raise ValueError(
                        f"target_modules is 'all-linear', but {moe[0]} belongs to a mixture of "
                        "experts in the base, which cannot be adapted; name the layers to adapt, "
                        f"of {_kinds(model, modules, moe)}"
                    )
                peft_config.target_modules = sorted(_linear_layers(model, modules))
                if not peft_config.target_modules:
                    raise ValueError(
                        f"target_modules is 'all-linear', but {type(model).__name__} has no linear "
                        "layers (torch.nn.Linear)"
                    )
                if peft_config.layers_to_transform is not None:
                    peft_config.target_modules = _in_layers(peft_config)
            for unknown in _unmatched(peft_config.target_modules, modules):
                pattern = " as a pattern for whole names" * isinstance(
                    peft_config.target_modules, str
                )
                raise ValueError(
                    f"target_modules has {unknown!r}, which{pattern} names no layer of the model; "
                    f"expected a list of some of {_kinds(model, modules, moe)}"
                )
        output = getattr(model, "get_output_embeddings", lambda: None)()
        for name, module in modules.items():
            if self._check_target_module_exists(peft_config, name):
                _check_target(name, module, module is output, moe, peft_config)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "add_weighted_adapter: routers of two LoRA-MoE adapters have no weighted sum; set both "
            "active, whose outputs then add up, or serve them as two adapters"
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the base generates, and it stops at the active adapters' stop tokens too."""
        active = [self.peft_config[name] for name in self.active_adapters]
        stops = {token for config in active for token in config.stop_token_ids or ()}
        if stops and kwargs.get("eos_token_id") is None:
            config = kwargs.get("generation_config") or self.model.generation_config
            kwargs["eos_token_id"] = sorted(stops | configured_ends(config))
        return self.model.generate(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names: rows of one batch cannot use different LoRA-MoE adapters here; "
                "choose one with set_adapter, or serve them together with guilomo-serve"
            )
        yield

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """What is saved. A router is float32 in the adapter format, whatever a trainer made it:
        TRL turns all of an adapter on a quantised base into bfloat16."""
        state = super()._get_adapter_state_dict(*args, **kwargs)
        return {key: t.float() if ".lora_router." in key else t for key, t in state.items()}

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
        layer = LoraMoeLinear(target, adapter_name, experts, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Adds an adapter and makes its allocation explicit, so that the saved config needs no
        rule to be read. The caller's own config stays as it is, for other models."""
        config = self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        if heads := _HEADS.get(config.task_type):
            config.modules_to_save = sorted({*(config.modules_to_save or ()), *heads})
        super().inject_adapter(model, adapter_name, *args, **kwargs)
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


def _fingerprint(model: nn.Module) -> dict[str, Any] | None:
    """What tells a base from others; None where its config is no language model's."""
    try:
        return BaseFingerprint.from_config(model.config).to_json()
    except AttributeError:
        return None


# The heads that PEFT's models of these tasks train whole. They tell the caller's config of them
# when the adapter is there, and look for them in the model's own.
_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
# What transformers calls the router of a mixture of experts, beside a module named `experts`.
_ROUTER_NAMES = ("gate", "router")


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by name, without the insides of layers that are adapted already."""
    modules: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name and not name.startswith(inside):
            modules[name] = module
            if isinstance(module, LoraMoeLayer):
                inside += (f"{name}.",)
    return modules


def _moe_parts(modules: dict[str, nn.Module]) -> list[str]:
    """Names of the experts and routers of a base that is a mixture of experts itself.

    transformers holds experts as one module of stacked weights, or (older code) as a list of
    linear layers; both are called `experts`, or by their class.
    """
    experts = [
        name
        for name, module in modules.items()
        if name.split(".")[-1] == "experts" or "Experts" in type(module).__name__
    ]
    blocks = {name.rpartition(".")[0] for name in experts}
    routers = [f"{block}.{name}" for block in blocks for name in _ROUTER_NAMES]
    return experts + [name for name in routers if name in modules]


def _in_moe(name: str, moe: list[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in moe)


def _linear_layers(model: nn.Module, modules: dict[str, nn.Module]) -> set[str]:
    """The linear layers of the model's body: no output layer, no head, and of a language model that
    takes images no tower of theirs. Encoders and decoders of one model belong together."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    body = getattr(model, "base_model", model)
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if output is not None and not encodes:
        body = model.get_decoder()  # type: ignore[operator]
    prefix = next((f"{name}." for name, module in modules.items() if module is body), "")
    return {
        name
        for name, module in modules.items()
        if (is_linear(module) or isinstance(module, LoraMoeLayer))
        and module is not output
        and name.startswith(prefix)
    }


def _in_layers(config: LoraMoeConfig) -> list[str]:
    """Those of the target modules, given by their full names, that are in `layers_to_transform`.

    PEFT does not ask for the layer of a module that is named in full.
    """
    probe = copy.copy(config)
    found = []
    for name in config.target_modules or ():
        probe.target_modules = [name.rpartition(".")[2]]
        if BaseTuner._check_target_module_exists(probe, name):
            found.append(name)
    if not found:
        raise ValueError(
            f"layers_to_transform is {config.layers_to_transform}, which has no linear layer "
            "of the model"
        )
    return found


def _unmatched(targets: Any, modules: dict[str, nn.Module]) -> list[str]:
    """The entries of `target_modules` that name no module; a pattern (a string) is one entry."""
    if isinstance(targets, str):
        return [] if any(re.fullmatch(targets, name) for name in modules) else [targets]
    ends = {name[i:] for name in modules for i in _starts_of_parts(name)}
    return sorted(set(targets or ()) - ends)


def _starts_of_parts(name: str) -> list[int]:
    return [0, *(i + 1 for i, character in enumerate(name) if character == ".")]


def _kinds(model: nn.Module, modules: dict[str, nn.Module], moe: list[str]) -> str:
    """The last parts of the names of what can be adapted: `q_proj, k_proj, ...`."""
    linear = sorted(_linear_layers(model, modules), key=list(modules).index)
    return ", ".join(dict.fromkeys(n.split(".")[-1] for n in linear if not _in_moe(n, moe)))


def _check_target(
    name: str, module: nn.Module, is_output: bool, moe: list[str], config: LoraMoeConfig
) -> None:
    field = "target_modules" if config.experts is None else "experts"
    if _in_moe(name, moe):
        raise ValueError(
            f"{field}: {name} is an expert or router of a mixture of experts in the base and "
            "cannot be adapted; name the attention's layers alone in target_modules"
        )
    if linear_sizes(module) is None:
        raise ValueError(
            f"{field}: {name} is a {type(module).__name__}; "
            "a LoRA-MoE adapter can be put on linear layers alone"
        )
    if is_output:
        raise ValueError(
            f"{field}: {name} is the output layer; neither TRL nor vLLM would apply an adapter"
        )
