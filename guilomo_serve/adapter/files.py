"""Reading and writing an adapter folder.

    adapter_config.json         an AdapterSpec
    adapter_model.safetensors   per module, with R = sum of its experts' ranks:
                                base_model.model.<module>.lora_A.weight  [R, in]
                                base_model.model.<module>.lora_B.weight  [out, R]
                                base_model.model.<module>.lora_router.weight  [E, in], if E > 1
    README.md                   a model card

The router is float32. Format 1 calls it `router`, which is read too; in format 2 all names have
"lora_" in them, by which PEFT finds an adapter's parameters.

The rows of an expert are contiguous, in expert order. Names follow PEFT
(`peft/utils/save_and_load.py`); tensors are never unpickled.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

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
    Expert,
)

_ROUTER_DTYPES = ("F32",)
_WEIGHT_DTYPES = ("F32", "F16", "BF16")
_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
# How files of torch.save begin (zip, and the older format). As a safetensors file's first bytes,
# the header's size, they would stand for more than 64 MB.
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02\x8a\x0a")
# An adapter's config and header are kilobytes; the largest we know of have some hundreds of them.
# More is refused before it is read into memory.
MAX_CONFIG_BYTES = 16 * 2**20
MAX_HEADER_BYTES = 16 * 2**20
_PICKLE_REFUSED = f"a pickle file can run code when it is read; save the adapter as {WEIGHTS_FILE}"

Header = tuple[str, tuple[int, ...]]  # a tensor's dtype, by safetensors' name, and its shape


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

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by their names on disk, which are PEFT's."""
        return {
            name: tensor
            for module, weights in self.weights.items()
            for name, tensor in _named_tensors(module, weights)
        }


def is_guilomo_adapter(folder: str | Path) -> bool:
    """Whether the folder's config names itself a LoRA-MoE adapter (it may still be a bad one)."""
    try:
        value = read_config(Path(folder) / CONFIG_FILE)
    except (OSError, AdapterError):
        return False
    return isinstance(value, dict) and value.get("peft_type") == PEFT_TYPE


def open_plain(path: Path, limit: int) -> BufferedReader:
    """Opens a file of at most `limit` bytes. What was opened is checked, not what the path names.

    Raises:
        AdapterError: it is no plain file, or larger.
        OSError: it cannot be opened.
    """
    # Non-blocking, or a pipe of that name would be waited for.
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_size <= limit:
        return file
    file.close()
    if not stat.S_ISREG(status.st_mode):
        raise AdapterError(f"{path}: is no plain file")
    raise AdapterError(f"{path}: has {status.st_size} bytes, expected at most {limit}")


def read_config(path: Path) -> Any:
    """The JSON value of an `adapter_config.json`, of whichever kind of adapter.

    Raises:
        AdapterError: it is no plain file, larger than `MAX_CONFIG_BYTES`, or no JSON.
    """
    with open_plain(path, MAX_CONFIG_BYTES) as file:
        text = file.read(MAX_CONFIG_BYTES)
    try:
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as e:  # the latter: nested thousands of levels deep
        raise AdapterError(f"{path}: not a JSON file ({e})") from None


def check_start(start: bytes, size: int, where: str) -> None:
    """Checks how a weights file begins, before more of it is read.

    A safetensors file is 8 bytes with the header's size (little-endian), the header, the tensors.

    Args:
        start: the file's first 8 bytes.
        size: of the whole file.
        where: the file's path, for messages.

    Raises:
        AdapterError: it is a pickle file, or its header would be too large or goes beyond its end.
    """
    if start[:4].startswith(_PICKLE_STARTS):
        raise AdapterError(f"{where}: {_PICKLE_REFUSED}")
    header = int.from_bytes(start, "little")
    if len(start) < 8 or header > size - 8:
        raise AdapterError(
            f"{where}: not a complete safetensors file (it has {size} bytes); "
            "copy the adapter again"
        )
    if header > MAX_HEADER_BYTES:
        raise AdapterError(
            f"{where}: has a header of {header} bytes, expected at most {MAX_HEADER_BYTES}"
        )


def read_spec(folder: str | Path) -> AdapterSpec:
    """Reads and checks `adapter_config.json` alone.

    Raises:
        AdapterError: the folder or its config is missing or wrong.
    """
    path = file_in(Path(folder), CONFIG_FILE)
    return AdapterSpec.from_json(read_config(path), str(path))


def read_adapter(folder: str | Path, base: BaseModel | None = None) -> Adapter:
    """Reads an adapter folder; nothing is returned unless all of it is right.

    Args:
        folder: the adapter folder.
        base: the model it is to be applied to; None checks the adapter against itself alone.

    Raises:
        AdapterError: anything in the folder is missing, superfluous, malformed, of the wrong
            shape or dtype, not finite, or made for another base.
    """
    return read_weights(folder, read_spec(folder), base)


def read_weights(folder: str | Path, spec: AdapterSpec, base: BaseModel | None) -> Adapter:
    """As `read_adapter`. Args: spec: what `read_spec` has read there."""
    folder = Path(folder)
    path = file_in(folder, WEIGHTS_FILE)
    if base is not None:
        _check_base(spec, base, str(folder / CONFIG_FILE))
    with path.open("rb") as file:
        check_start(file.read(8), path.stat().st_size, str(path))
    try:
        with safe_open(path, framework="pt") as tensors:
            _check_headers(spec, base, _headers_of_file(tensors), str(path))
            weights = {
                m: _module_weights(_tensor_names(m, experts, spec.format_version), tensors)
                for m, experts in spec.experts.items()
            }
    except (SafetensorError, OSError) as e:
        raise AdapterError(
            f"{path}: not a complete safetensors file ({e}); copy the adapter again"
        ) from None
    _check_finite(weights, str(path))
    return Adapter(spec, weights)


def write_adapter(adapter: Adapter, folder: str | Path, card: str) -> None:
    """Writes an adapter folder; another one of that name is replaced when all is written.

    Args:
        adapter: the adapter; tensors may be on any device.
        folder: where to put it.
        card: the text of README.md.

    Raises:
        AdapterError: the adapter would not be read back (tensors that do not fit the spec or are
            not finite), `folder` exists and is no adapter folder, or a file cannot be written, as
            on a full disk. What was there before stays as it is.
    """
    target = Path(folder)
    if target.exists() and not (target / CONFIG_FILE).is_file() and not _is_empty_folder(target):
        raise AdapterError(f"{target}: exists and is not an adapter folder; choose another name")
    config = adapter.spec.to_json()
    spec = AdapterSpec.from_json(config, str(target / CONFIG_FILE))
    tensors = {
        # A copy: save_file refuses tensors that share memory, as slices of one parameter do.
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in adapter.tensors().items()
    }
    headers = {
        name: (_DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
        for name, tensor in tensors.items()
    }
    _check_headers(spec, None, headers, str(target / WEIGHTS_FILE))
    _check_finite(adapter.weights, str(target / WEIGHTS_FILE))
    with _written(target), replace_folder(target) as partial:
        with _written(target / WEIGHTS_FILE):
            save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps(config, indent=2) + "\n"
        with _written(target / CONFIG_FILE):
            (partial / CONFIG_FILE).write_text(text, encoding="utf-8")
        with _written(target / "README.md"):
            (partial / "README.md").write_text(card, encoding="utf-8")


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder that takes the name `target` when the block ends without an error.

    What had that name stays untouched until then, and for good if the block fails. The folder's
    files may be read by whom the umask lets: safetensors writes its own for their owner alone,
    and who serves an adapter may be another user, in a container for instance.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    partial.mkdir()
    try:
        yield partial
        readable = partial.stat().st_mode & 0o666  # as the umask made it
        for path in partial.rglob("*"):
            if path.is_file():
                path.chmod(readable)
        if target.exists():
            retired = partial.with_suffix(".retired")
            os.replace(target, retired)
            try:
                os.replace(partial, target)
            except OSError:
                os.replace(retired, target)
                raise
            shutil.rmtree(retired)
        else:
            os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Says of which file an error of writing is."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        raise AdapterError(f"{path}: cannot be written ({e})") from None


def home_of(folder: Path) -> Path:
    """Where an adapter's files have to lie: in its folder, where links may lead within it.

    The files of a snapshot in the Hub's cache are links, and lie in the cache's folder of that
    repository:

        models--OWNER--NAME/snapshots/REVISION/adapter_config.json -> ../../blobs/SHA
    """
    folder = folder.resolve()
    for place in (folder, *folder.parents):
        snapshots = place.parent
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
            return snapshots.parent
    return folder


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def file_in(folder: Path, name: str) -> Path:
    """A file of an adapter folder.

    Raises:
        AdapterError: the folder or file is missing, or leads out of the folder.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder")
    path = folder / name
    if not path.is_file():
        pickles = [p for p in _PICKLE_FILES if (folder / p).exists()]
        if name == WEIGHTS_FILE and pickles:
            raise AdapterError(f"{folder / pickles[0]}: {_PICKLE_REFUSED}")
        raise AdapterError(f"{path}: the file is missing")
    if not path.resolve().is_relative_to(home_of(folder)):
        raise AdapterError(f"{path}: leads out of the adapter folder; copy the file into it")
    return path


def _check_base(spec: AdapterSpec, base: BaseModel, where: str) -> None:
    if spec.base is not None and spec.base != base.fingerprint:
        raise AdapterError(
            f"{where}: made for another base model: base_fingerprint is {spec.base}, "
            f"the base in use is {base.fingerprint}"
        )
    for token in spec.stop_token_ids:
        if token >= base.fingerprint.vocab_size:
            raise AdapterError(
                f"{where}: stop_token_ids has {token}, expected less than "
                f"{base.fingerprint.vocab_size}, the tokens of the base"
            )
    for module in spec.experts:
        if module not in base.linears:
            raise AdapterError(f"{where}: experts has {module!r}, no linear layer of the base")


def _check_headers(
    spec: AdapterSpec, base: BaseModel | None, headers: Mapping[str, Header], where: str
) -> None:
    """Names, shapes and dtypes of the tensors, before one of them is loaded."""
    expected: set[str] = set()
    for module, experts in spec.experts.items():
        names = _tensor_names(module, experts, spec.format_version)
        expected.update(names)
        for name in names:
            if name not in headers:
                raise AdapterError(f"{where}: the tensor {name} is missing")
            if len(headers[name][1]) != 2:
                raise AdapterError(
                    f"{where}: {name} has shape {list(headers[name][1])}, expected two dimensions"
                )
        # Without a base to ask, A and B themselves say the layer's size.
        in_features, out_features = headers[names[0]][1][1], headers[names[1]][1][0]
        if base is not None:
            out_features, in_features = base.linears[module]
        rank, count = sum(e.rank for e in experts), len(experts)
        shapes = ((rank, in_features), (out_features, rank), (count, in_features))
        dtypes = (_WEIGHT_DTYPES, _WEIGHT_DTYPES, _ROUTER_DTYPES)
        for name, shape, allowed in zip(names, shapes, dtypes, strict=False):
            found_dtype, found_shape = headers[name]
            if found_shape != shape:
                raise AdapterError(
                    f"{where}: {name} has shape {list(found_shape)}, expected {list(shape)} "
                    f"({count} experts of total rank {rank})"
                )
            if found_dtype not in allowed:
                raise AdapterError(
                    f"{where}: {name} is {found_dtype}, expected {' or '.join(allowed)}"
                )
    superfluous = sorted(headers.keys() - expected)
    if superfluous:
        raise AdapterError(
            f"{where}: the tensor {superfluous[0]} belongs to no module of the config's experts"
        )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite.

    By its extremes, which are NaN where a value is: that takes a sixth of the time of asking
    each value, and a worker looks through all of an adapter between two steps.
    """
    if not tensor.numel() or tensor.dtype not in _DTYPE_NAMES:
        return bool(torch.isfinite(tensor).all())
    return all(math.isfinite(extreme.item()) for extreme in torch.aminmax(tensor))


def _check_finite(weights: Mapping[str, ModuleWeights], where: str) -> None:
    for module, of_module in weights.items():
        for name, tensor in _named_tensors(module, of_module):
            if not is_finite(tensor):
                raise AdapterError(
                    f"{where}: {name} has values that are not finite (NaN or infinity)"
                )


def _headers_of_file(file: safe_open) -> dict[str, Header]:
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    return {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}


def _tensor_names(module: str, experts: Sequence[Expert], format_version: int) -> list[str]:
    """Names on disk of A, B and, if there is a choice to make, the router."""
    kinds = ["lora_A", "lora_B"]
    if len(experts) > 1:
        kinds.append("router" if format_version == 1 else "lora_router")
    return [f"{TENSOR_PREFIX}{module}.{kind}.weight" for kind in kinds]


def _module_weights(names: Sequence[str], file: safe_open) -> ModuleWeights:
    tensors = [file.get_tensor(name) for name in names]
    return ModuleWeights(tensors[0], tensors[1], tensors[2] if len(tensors) > 2 else None)


def _named_tensors(module: str, weights: ModuleWeights) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"{TENSOR_PREFIX}{module}.lora_A.weight", weights.lora_a
    yield f"{TENSOR_PREFIX}{module}.lora_B.weight", weights.lora_b
    if weights.router is not None:
        yield f"{TENSOR_PREFIX}{module}.lora_router.weight", weights.router
