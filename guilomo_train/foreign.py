"""Adapters that others' code trained, whose routing is per linear layer, as LoRA-MoE adapters.

All of these add to a frozen layer, with W_r its router and E its experts,

    y = W x + sum_e  w_e (alpha / r) B_e A_e x        w by softmax(W_r x)

    MoLA       arXiv 2402.08562: the top_k largest of w, divided by their sum, which is a softmax
               over the top_k largest logits; E, r and top_k by layer
    LoRAMoE    arXiv 2312.09979: w as it is, so that all E experts are used: top_k = E
    HydraLoRA  arXiv 2404.19245: as LoRAMoE, with one A for all experts, of which each gets a copy

What stands in the files was read off the code that writes them: `src/mola_lora_hacked.py` and
`src/mola_peft_model_hacked.py` of GCYZSL/MoLA, `peft/tuners/lora.py` of Ablustrund/LoRAMoE, and
`HydraLoRA/peft/tuners/lora.py` of Clin0212/HydraLoRA. Dropout and their balance losses are for
training alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load

from guilomo_serve.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    AdapterError,
    AdapterSpec,
    BaseModel,
    Expert,
    ModuleWeights,
    read_config,
    write_adapter,
)
from guilomo_serve.adapter.files import check_start, file_in, open_plain
from guilomo_serve.adapter.spec import TENSOR_PREFIX, is_finite, is_int
from guilomo_train.allocation_map import allocation_of, table
from guilomo_train.base import commit_of, without_weights
from guilomo_train.config import ImportConfig
from guilomo_train.errors import ConfigError
from guilomo_train.lora_moe import LoraMoeConfig
from guilomo_train.model_card import model_card

_PICKLE_FILE = "adapter_model.bin"
_MOST_BYTES = 2**40  # of a weights file: of any size that a disk has

# Keys of their configs that say how an adapter came about, not what it computes.
_WITHOUT_EFFECT = frozenset({
    "peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping",
    "inference_mode", "target_modules", "layers_to_transform", "layers_pattern",
    "init_lora_weights", "lora_dropout", "merge_weights", "blc_alpha", "blc_weight",
})  # fmt: skip
# Keys that change what it computes beyond experts and routers: the values that leave them off, and
# what else they do.
_OFF: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "bias": (("none",), "it trains biases of the base, which an adapter does not hold"),
    "modules_to_save": ((None, []), "it trains whole modules, which an adapter does not hold"),
    "fan_in_fan_out": ((False, None), "it transposes the base's weights"),
    "enable_lora": ((None,), "it adapts parts of a layer"),
}
_READ = frozenset({"r", "lora_alpha", "lora_nums"})


@dataclass(frozen=True)
class Layout:
    """How one of them names an adapter's tensors, behind a layer's name; {} is an expert's number.

    `by_layer` says whether ranks (`r`) are a list with one for each layer, and how many experts a
    token uses is in no file.
    """

    name: str
    a: str
    b: str
    router: str
    by_layer: bool = False


MOLA = Layout("MoLA", "lora_A_{}.weight", "lora_B_{}.weight", "router.router.weight", by_layer=True)
LORAMOE = Layout("LoRAMoE", "lora_A{}.weight", "lora_B{}.weight", "lora_route.weight")
HYDRALORA = Layout("HydraLoRA", "lora_A.weight", "lora_B{}.weight", "lora_route.weight")
LAYOUTS = (MOLA, LORAMOE, HYDRALORA)


@dataclass(frozen=True)
class Imported:
    """What came of it; `named_base` is the base by the name that the other code wrote down."""

    layout: str
    spec: AdapterSpec
    named_base: Any

    def __str__(self) -> str:
        return (
            f"an adapter of {self.layout}, the same function\n"
            f"{table(allocation_of(self.spec))}\n"
            f"its config says that it was trained on {self.named_base!r}; it is for "
            f"{self.spec.base_model_name_or_path!r} now"
        )


def import_adapter(config: ImportConfig) -> Imported:
    """Writes an adapter of another kind as one of ours, which computes the same.

    Raises:
        AdapterError: it has what would not be computed, does not fit the base, or is broken;
            nothing is written then.
        BaseError: there is no such base.
        ConfigError: `top_k` is missing, superfluous or of no single adapter.
    """
    folder = Path(config.adapter)
    path = file_in(folder, CONFIG_FILE)
    value = read_config(path)
    alpha = _alpha_of(value, str(path))
    tensors, weights_path = _tensors_of(folder)
    layout = _layout_of(tensors, str(weights_path))
    model = without_weights(config.base, config.revision, config.trust_remote_code)
    base = BaseModel.from_module(model)
    modules = _modules_of(layout, tensors, base, str(weights_path))
    experts, weights = {}, {}
    for module in modules:
        count = len(tensors[f"{TENSOR_PREFIX}{module}.{layout.router}"])
        rank = _rank_of(layout, value, module, count, str(path))
        experts[module] = (Expert(rank, alpha / rank),) * count
        weights[module] = _weights_of(layout, tensors, module, rank, base, str(weights_path))
    spec = AdapterSpec(
        base_model_name_or_path=config.base,
        target_modules=tuple(sorted({module.split(".")[-1] for module in modules})),
        top_k=_top_k(layout, config.top_k, value, {m: len(e) for m, e in experts.items()}),
        lora_alpha=alpha,
        experts=experts,
        base=base.fingerprint,
        revision=commit_of(config.base, config.revision),
    )
    try:  # what training and serving refuse to adapt
        with torch.device("meta"):
            get_peft_model(model, LoraMoeConfig(experts=spec.to_json()["experts"]))
    except ValueError as e:
        raise AdapterError(f"{weights_path}: {e}") from None
    adapter = Adapter(spec, weights)
    parameters = sum(tensor.numel() for tensor in adapter.tensors().values())
    data = f"not recorded; trained by the code of {layout.name}"
    write_adapter(adapter, config.output, model_card(spec, data, parameters, None))
    return Imported(layout.name, spec, value.get("base_model_name_or_path"))


def _alpha_of(value: Any, where: str) -> float:
    """Checks a config, but for its ranks, and gives its `lora_alpha`."""
    if not isinstance(value, dict) or value.get("peft_type") != "LORA":
        found = value.get("peft_type") if isinstance(value, dict) else type(value).__name__
        raise AdapterError(
            f"{where}: peft_type is {found!r}, expected 'LORA', which MoLA, LoRAMoE and HydraLoRA "
            "call themselves"
        )
    if value.get("task_type") not in (None, "CAUSAL_LM"):
        raise AdapterError(f"{where}: task_type is {value['task_type']!r}, expected 'CAUSAL_LM'")
    for key, (off, does) in _OFF.items():
        if key in value and value[key] not in off:
            raise AdapterError(
                f"{where}: {key} is {value[key]!r}, expected {json.dumps(off[0])}: {does}"
            )
    unknown = sorted(value.keys() - _WITHOUT_EFFECT - _OFF.keys() - _READ)
    if unknown:
        raise AdapterError(
            f"{where}: unknown key {unknown[0]!r}: it would not be applied, so the adapter is "
            "refused"
        )
    alpha = value.get("lora_alpha")
    if not isinstance(alpha, int | float) or not is_finite(alpha) or alpha <= 0:
        raise AdapterError(f"{where}: lora_alpha is {alpha!r}, expected a number > 0")
    return float(alpha)


def _tensors_of(folder: Path) -> tuple[dict[str, torch.Tensor], Path]:
    """All tensors of the folder by their names, and the file that they are in.

    Their code writes pickle files. PyTorch's reader for weights alone runs no code of theirs.
    """
    safe = (folder / WEIGHTS_FILE).exists()
    path = file_in(folder, WEIGHTS_FILE if safe else _PICKLE_FILE)
    with open_plain(path, _MOST_BYTES) as file:
        try:
            if safe:
                content = file.read()
                check_start(content[:8], len(content), str(path))
                return load(content), path
            value = torch.load(file, map_location="cpu", weights_only=True)
        except AdapterError:
            raise
        except SafetensorError as e:
            raise AdapterError(f"{path}: not a complete safetensors file ({e})") from None
        except Exception as e:  # a broken file has torch raise what it likes
            raise AdapterError(
                f"{path}: not a complete file of torch.save with tensors alone "
                f"({type(e).__name__}); save the adapter again"
            ) from None
    if not isinstance(value, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
    ):
        raise AdapterError(f"{path}: is no dictionary of tensors by their names")
    return value, path


def _layout_of(tensors: Mapping[str, torch.Tensor], where: str) -> Layout:
    for layout in LAYOUTS:
        ends = (f".{layout.router}", f".{layout.a.format(0)}")
        if all(any(name.endswith(end) for name in tensors) for end in ends):
            return layout
    if any(name.endswith(".lora_A.weight") for name in tensors):
        raise AdapterError(
            f"{where}: has no routers, so it is a plain LoRA, which PEFT and guilomo-serve take as "
            "it is"
        )
    first = next(iter(sorted(tensors)), None)
    raise AdapterError(
        f"{where}: {'has no tensors' if first is None else f'has {first}'}, expected a router and "
        f"experts in each layer, named as by {', '.join(layout.name for layout in LAYOUTS)}"
    )


def _modules_of(
    layout: Layout, tensors: Mapping[str, torch.Tensor], base: BaseModel, where: str
) -> list[str]:
    """The adapted layers, all of whose tensors are there, and no others."""
    end = f".{layout.router}"
    modules, expected = [], set()
    for router in tensors:
        if not (router.startswith(TENSOR_PREFIX) and router.endswith(end)):
            continue
        module = router.removeprefix(TENSOR_PREFIX).removesuffix(end)
        if module not in base.linears:
            raise AdapterError(f"{where}: {router}: the base has no linear layer {module!r}")
        if tensors[router].dim() != 2:
            raise AdapterError(
                f"{where}: {router} has shape {list(tensors[router].shape)}, expected two "
                "dimensions"
            )
        names = {
            f"{TENSOR_PREFIX}{module}.{part.format(e)}"
            for e in range(len(tensors[router]))
            for part in (layout.a, layout.b)
        }
        if missing := sorted(names - tensors.keys()):
            raise AdapterError(
                f"{where}: the tensor {missing[0]} is missing, of {len(tensors[router])} experts"
            )
        modules.append(module)
        expected |= {router, *names}
    if superfluous := sorted(tensors.keys() - expected):
        raise AdapterError(
            f"{where}: the tensor {superfluous[0]} belongs to no expert and no router (without "
            f"bias) of {layout.name}: it would not be applied, so the adapter is refused"
        )
    return modules


def _rank_of(layout: Layout, value: dict[str, Any], module: str, count: int, where: str) -> int:
    """The rank of a module's experts, as the config has it."""
    ranks = value.get("r")
    if layout.by_layer:
        if not isinstance(ranks, list) or not all(is_int(rank) and rank >= 1 for rank in ranks):
            raise AdapterError(
                f"{where}: r is {ranks!r}, expected a list of integers >= 1, one for each layer"
            )
        layer = _layer_of(module)
        if layer >= len(ranks):
            raise AdapterError(f"{where}: r has {len(ranks)} ranks, none for layer {layer}")
        return int(ranks[layer])
    if not isinstance(ranks, int) or not is_int(ranks) or ranks < 1:
        raise AdapterError(f"{where}: r is {ranks!r}, expected an integer >= 1")
    if value.get("lora_nums") != count:
        raise AdapterError(
            f"{where}: lora_nums is {value.get('lora_nums')!r}, but {module} has {count} experts"
        )
    return ranks


def _layer_of(module: str) -> int:
    """A module's layer as MoLA reads it off the name: `model.layers.3.mlp.up_proj` is in 3."""
    parts = module.split(".")
    if len(parts) < 3 or not parts[2].isdecimal():
        raise AdapterError(f"{module}: has no layer's number as third part of its name, as in MoLA")
    return int(parts[2])


def _weights_of(
    layout: Layout,
    tensors: Mapping[str, torch.Tensor],
    module: str,
    rank: int,
    base: BaseModel,
    where: str,
) -> ModuleWeights:
    """A module's tensors, with the rows of its experts one after another."""
    out_features, in_features = base.linears[module]

    def tensor_of(part: str, *shape: int) -> torch.Tensor:
        name = f"{TENSOR_PREFIX}{module}.{part}"
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise AdapterError(
                f"{where}: {name} has shape {list(tensor.shape)}, expected {list(shape)}"
            )
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise AdapterError(
                f"{where}: {name} is {tensor.dtype}, expected finite floating-point numbers alone"
            )
        return tensor

    count = len(tensors[f"{TENSOR_PREFIX}{module}.{layout.router}"])
    a = [tensor_of(layout.a.format(e), rank, in_features) for e in range(count)]
    b = [tensor_of(layout.b.format(e), out_features, rank) for e in range(count)]
    router = tensor_of(layout.router, count, in_features).float()
    return ModuleWeights(torch.cat(a), torch.cat(b, dim=1), router if count > 1 else None)


def _top_k(
    layout: Layout, given: str | None, value: dict[str, Any], counts: Mapping[str, int]
) -> int:
    """The one number of experts that a token uses at most, for an adapter of these counts."""
    if not layout.by_layer:
        if given is not None:
            raise ConfigError(f"--top_k {given}: {layout.name} uses all experts; leave it out")
        return max(counts.values())
    if given is None:
        raise ConfigError(
            "--top_k: MoLA's files do not say how many experts a token uses; give what it was "
            "trained with, a number or one for each layer (2,2,2,...)"
        )
    wanted = [int(part) for part in given.split(",")]
    layers = len(value["r"])
    wanted = wanted * layers if len(wanted) == 1 else wanted
    if len(wanted) != layers:
        raise ConfigError(f"--top_k has {len(wanted)} numbers, expected 1, or {layers} as r has")
    uses = {module: wanted[_layer_of(module)] for module in counts}
    for module, count in counts.items():
        if uses[module] > count:
            raise ConfigError(f"--top_k is {uses[module]} for {module}, which has {count} experts")
    top_k = max(uses.values())
    for module, count in counts.items():
        if min(top_k, count) != uses[module]:
            raise ConfigError(
                f"--top_k {given}: an adapter has one top_k, and none means {top_k} experts in one "
                f"layer and {uses[module]} of {count} in {module}"
            )
    return top_k
