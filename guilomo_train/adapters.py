"""The adapter of a PEFT model: put on a base, filled with weights, and taken out of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from guilomo_serve.adapter import (
    CONFIG_FILE,
    Adapter,
    AdapterSpec,
    BaseFingerprint,
    BaseModel,
    Expert,
    ModuleWeights,
    is_guilomo_adapter,
    read_adapter,
    read_config,
    read_spec,
    replace_folder,
)
from guilomo_train.errors import ConfigError
from guilomo_train.limits import writing
from guilomo_train.lora_moe import LoraMoeConfig
from guilomo_train.shards import is_whole


def with_adapter(model: PreTrainedModel, config: LoraMoeConfig) -> PeftModel:
    """The model wrapped with a new adapter.

    Raises:
        ConfigError: the model lacks modules that the config names, or they cannot be adapted.
    """
    try:
        return get_peft_model(model, config)
    except ValueError as e:
        raise ConfigError(f"--allocation: {e}" if config.experts else f"--{e}") from None


def adapter_of(model: PeftModel) -> Adapter:
    """The active adapter of a PEFT model as the adapter format has it.

    A and B are in the base's precision, in which their products run anyway.
    """
    name = model.active_adapter
    config = model.peft_config[name]
    experts = {module: config.experts_of(module) for module in config.experts}
    spec = AdapterSpec(
        base_model_name_or_path=config.base_model_name_or_path,
        target_modules=tuple(config.to_dict()["target_modules"]),
        top_k=config.top_k,
        lora_alpha=config.lora_alpha,
        experts=experts,
        base=BaseFingerprint.from_json(config.base_fingerprint),
        task_type=config.task_type,
        search=config.search,
        stop_token_ids=tuple(config.stop_token_ids or ()),
        revision=config.revision,
    )
    state = get_peft_model_state_dict(
        model, unsharded_state(model), adapter_name=name, save_embedding_layers=False
    )
    dtype = model.dtype

    def tensor(module: str, kind: str) -> torch.Tensor:
        return state[f"base_model.model.{module}.{kind}.weight"].detach().cpu()

    weights = {
        module: ModuleWeights(
            lora_a=tensor(module, "lora_A").to(dtype),
            lora_b=tensor(module, "lora_B").to(dtype),
            router=tensor(module, "lora_router").float() if len(listed) > 1 else None,
        )
        for module, listed in experts.items()
    }
    return Adapter(spec, weights)


def start_from(model: PeftModel, start: Adapter) -> None:
    """Puts an adapter's weights into the model's new one, which has to have the same experts."""
    name = model.active_adapter
    config, theirs = model.peft_config[name], start.spec.experts
    if config.top_k != start.spec.top_k:
        raise ConfigError(f"--start: its top_k is {start.spec.top_k}, expected {config.top_k}")
    if config.experts.keys() != theirs.keys():
        module = sorted(config.experts.keys() ^ theirs.keys())[0]
        where = "only the adapter" if module in theirs else "only the allocation"
        raise ConfigError(f"--start: {where} has {module}, expected the modules of the allocation")
    for module, experts in theirs.items():
        expected = config.experts_of(module)
        if experts != expected:
            raise ConfigError(
                f"--start: the experts of {module} are {_short(experts)}, expected those of the "
                f"allocation and --lora_alpha, {_short(expected)}"
            )
    # Modules that are trained whole keep what they have, which is the base's.
    state = get_peft_model_state_dict(
        model, unsharded_state(model), adapter_name=name, save_embedding_layers=False
    )
    set_peft_model_state_dict(model, state | start.tensors(), adapter_name=name)


def _short(experts: Sequence[Expert]) -> str:
    scaling = ", ".join(f"{s:g}" for s in sorted({e.scaling for e in experts}))
    return f"of rank {', '.join(str(e.rank) for e in experts)} (scaling {scaling})"


def check_whole_modules(
    model: PreTrainedModel, names: Iterable[str], adapted: Iterable[str]
) -> None:
    """Checks that modules of a base can be trained whole, beside an adapter.

    Args:
        model: the base.
        names: what their names end in, as PEFT's `modules_to_save` has it.
        adapted: full names of the linear layers that get experts.

    Raises:
        ConfigError: there is no such module, it gets experts, or it is quantised, in shards or in
            a precision in which small steps are lost.
    """
    for name in names:
        found = {n: m for n, m in model.named_modules() if n and name and n.endswith(name)}
        if not found:
            raise ConfigError(f"--modules_to_save: the base has no module {name!r}")
        for module, wanted in found.items():
            for layer in adapted:
                if f"{layer}.".startswith(f"{module}."):
                    raise ConfigError(
                        f"--modules_to_save: {module} would be trained whole, but {layer} gets "
                        "experts: leave one of them out (--target_modules)"
                    )
            for weight in wanted.parameters():
                if not is_whole(weight):
                    raise ConfigError(
                        f"--modules_to_save: each process has a part of {module} alone: train it "
                        "without FSDP or DeepSpeed"
                    )
                if not weight.is_floating_point():
                    raise ConfigError(f"--modules_to_save: {module} is quantised, so it is frozen")
                if weight.dtype != torch.float32:
                    dtype = str(weight.dtype).removeprefix("torch.")
                    raise ConfigError(
                        f"--modules_to_save: {module} is {dtype}, in which small steps are lost: "
                        "give --dtype float32"
                    )


def write_with_whole_modules(model: PeftModel, folder: Path, card: str) -> None:
    """Writes an adapter with the modules that were trained whole, in PEFT's layout; a folder of
    that name is replaced when all is written.

    Raises:
        OutputError: a file cannot be written.
    """
    with writing(folder), replace_folder(folder) as partial:
        model.save_pretrained(partial, save_embedding_layers=False)
        (partial / "README.md").write_text(card, encoding="utf-8")


def read_trained_spec(folder: Path) -> tuple[AdapterSpec, list[str]]:
    """What an adapter folder has: experts, and modules of the base that were trained whole.

    Raises:
        AdapterError: it is no adapter folder, or would not be applied as its config says.
    """
    if not is_guilomo_adapter(folder):
        return read_spec(folder), []  # says why it is none
    value = read_config(folder / CONFIG_FILE)
    whole = value.pop("modules_to_save", None) or []
    return AdapterSpec.from_json(value, str(folder / CONFIG_FILE)), whole


def put_on(model: PreTrainedModel, folder: Path) -> tuple[PeftModel, Adapter]:
    """The base with an adapter folder on it, and its experts.

    Raises:
        AdapterError: the folder is not sound, or of another base.
    """
    if read_trained_spec(folder)[1]:  # PEFT says what is missing of them
        loaded = PeftModel.from_pretrained(model, folder)
        return loaded, adapter_of(loaded)
    adapter = read_adapter(folder, BaseModel.from_module(model))  # refuses what PEFT would not
    return PeftModel.from_pretrained(model, folder), adapter


def unsharded_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that are whole in each process, an adapter's among them, by name.

    Given a sharded base PEFT would gather all of it only to leave it out of what is saved.
    """
    return {name: p for name, p in model.named_parameters() if is_whole(p)}
