"""Reading and writing an adapter folder.

    adapter_config.json         an AdapterSpec
    adapter_model.safetensors   per module, with R = sum of its experts' ranks:
                                base_model.model.<module>.lora_A.weight  [R, in]
                                base_model.model.<module>.lora_B.weight  [out, R]
                                base_model.model.<module>.router.weight  [E, in] float32, if E > 1
    README.md                   a model card

The rows of an expert are contiguous, in expert order. Names follow PEFT
(`peft/utils/save_and_load.py`); tensors are never unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from guilomo_serve.adapter.base import BaseModel
from guilomo_serve.adapter.spec import (
    CONFIG_FILE,
    PEFT_TYPE,
    TENSOR_PREFIX,
    WEIGHTS_FILE,
    AdapterError,
    AdapterSpec,
)

_WEIGHT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")


@dataclass(frozen=True)
class ModuleWeights:
    """The tensors of one adapted module: `lora_a [R, in]`, `lora_b [out, R]`, `router [E, in]`.

    `router` is float32, and None where the module has a single expert.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    router: torch.Tensor | None


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory: its spec and, for each module of `spec.experts`, its tensors."""

    spec: AdapterSpec
    weights: Mapping[str, ModuleWeights]


def is_guilomo_adapter(folder: str | Path) -> bool:
    """Whether the folder's config names itself a LoRA-MoE adapter (it may still be a bad one)."""
    try:
        value = json.loads((Path(folder) / CONFIG_FILE).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(value, dict) and value.get("peft_type") == PEFT_TYPE


def read_spec(folder: str | Path) -> AdapterSpec:
    """Reads and checks `adapter_config.json` alone.

    Raises:
        AdapterError: the folder or its config is missing or wrong.
    """
    path = _file_in(Path(folder), CONFIG_FILE)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise AdapterError(f"{path}: not a JSON file ({e})") from None
    return AdapterSpec.from_json(value, str(path))


def read_adapter(folder: str | Path, base: BaseModel | None = None) -> Adapter:
    """Reads an adapter folder; nothing is returned unless all of it is right.

    Args:
        folder: the adapter folder.
        base: the model it is to be applied to; None checks the adapter against itself alone.

    Raises:
        AdapterError: anything in the folder is missing, superfluous, malformed, of the wrong
            shape or dtype, not finite, or made for another base.
    """
    folder = Path(folder)
    spec = read_spec(folder)
    path = _file_in(folder, WEIGHTS_FILE)
    if base is not None:
        _check_base(spec, base, str(folder / CONFIG_FILE))
    try:
        with safe_open(path, framework="pt") as file:
            _check_tensors(spec, base, file, str(path))
            weights = {m: _module_weights(m, file) for m in spec.experts}
    except SafetensorError as e:
        raise AdapterError(
            f"{path}: not a complete safetensors file ({e}); copy the adapter again"
        ) from None
    for module, tensors in weights.items():
        for kind, tensor in _named_tensors(tensors):
            if not torch.isfinite(tensor).all():
                raise AdapterError(
                    f"{path}: {TENSOR_PREFIX}{module}.{kind}.weight has values that are not "
                    "finite (NaN or infinity)"
                )
    return Adapter(spec, weights)


def write_adapter(adapter: Adapter, folder: str | Path, card: str) -> None:
    """Writes an adapter folder; another one of that name is replaced when all is written.

    Args:
        adapter: the adapter; tensors may be on any device.
        folder: where to put it.
        card: the text of README.md.

    Raises:
        AdapterError: `folder` exists and is no adapter folder.
    """
    tensors = {
        f"{TENSOR_PREFIX}{module}.{kind}.weight": tensor.detach().cpu().contiguous()
        for module, weights in adapter.weights.items()
        for kind, tensor in _named_tensors(weights)
    }
    target = Path(folder)
    if target.exists() and any(target.iterdir()) and not (target / CONFIG_FILE).is_file():
        raise AdapterError(f"{target}: exists and is not an adapter folder; choose another name")
    with replace_folder(target) as partial:
        save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        (partial / CONFIG_FILE).write_text(json.dumps(adapter.spec.to_json(), indent=2) + "\n")
        (partial / "README.md").write_text(card)


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder that takes the name `target` when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes it private
        if target.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            os.replace(target, retired)
            os.replace(partial, target)
            shutil.rmtree(retired)
        else:
            os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _file_in(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder")
    path = folder / name
    if not path.is_file():
        pickles = [p for p in _PICKLE_FILES if (folder / p).exists()]
        if name == WEIGHTS_FILE and pickles:
            raise AdapterError(
                f"{folder / pickles[0]}: a pickle file can run code when it is read; "
                f"save the adapter as {WEIGHTS_FILE}"
            )
        raise AdapterError(f"{path}: the file is missing")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise AdapterError(f"{path}: leads out of the adapter folder; copy the file into it")
    return path


def _check_base(spec: AdapterSpec, base: BaseModel, where: str) -> None:
    if spec.base is not None and spec.base != base.fingerprint:
        raise AdapterError(
            f"{where}: made for another base model: base_fingerprint is {spec.base}, "
            f"the base in use is {base.fingerprint}"
        )
    for module in spec.experts:
        if module not in base.linears:
            raise AdapterError(f"{where}: experts has {module!r}, no linear layer of the base")


def _check_tensors(spec: AdapterSpec, base: BaseModel | None, file: safe_open, where: str) -> None:
    """Names, dtypes and shapes, from the header alone."""
    found = set(file.keys())
    expected: set[str] = set()
    for module, experts in spec.experts.items():
        prefix = f"{TENSOR_PREFIX}{module}"
        rank, count = sum(e.rank for e in experts), len(experts)
        names = {f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"}
        if count > 1:
            names.add(f"{prefix}.router.weight")
        expected |= names
        for name in sorted(names):
            if name not in found:
                raise AdapterError(f"{where}: the tensor {name} is missing")
        shape_a = tuple(file.get_slice(f"{prefix}.lora_A.weight").get_shape())
        shape_b = tuple(file.get_slice(f"{prefix}.lora_B.weight").get_shape())
        if base is not None:
            out_features, in_features = base.linears[module]
        else:
            out_features, in_features = shape_b[0], shape_a[-1]
        shapes = {"lora_A": (rank, in_features), "lora_B": (out_features, rank)}
        if count > 1:
            shapes["router"] = (count, in_features)
        for kind, shape in shapes.items():
            header = file.get_slice(f"{prefix}.{kind}.weight")
            if tuple(header.get_shape()) != shape:
                raise AdapterError(
                    f"{where}: {prefix}.{kind}.weight has shape {list(header.get_shape())}, "
                    f"expected {list(shape)} ({count} experts of total rank {rank})"
                )
            dtypes = ["F32"] if kind == "router" else list(_WEIGHT_DTYPES)
            if header.get_dtype() not in dtypes:
                raise AdapterError(
                    f"{where}: {prefix}.{kind}.weight is {header.get_dtype()}, "
                    f"expected {' or '.join(dtypes)}"
                )
    superfluous = sorted(found - expected)
    if superfluous:
        raise AdapterError(
            f"{where}: the tensor {superfluous[0]} belongs to no module of the config's experts"
        )


def _module_weights(module: str, file: safe_open) -> ModuleWeights:
    prefix = f"{TENSOR_PREFIX}{module}"
    router = f"{prefix}.router.weight"
    return ModuleWeights(
        lora_a=file.get_tensor(f"{prefix}.lora_A.weight"),
        lora_b=file.get_tensor(f"{prefix}.lora_B.weight"),
        router=file.get_tensor(router) if router in file.keys() else None,  # noqa: SIM118
    )


def _named_tensors(weights: ModuleWeights) -> Iterator[tuple[str, torch.Tensor]]:
    yield "lora_A", weights.lora_a
    yield "lora_B", weights.lora_b
    if weights.router is not None:
        yield "router", weights.router
