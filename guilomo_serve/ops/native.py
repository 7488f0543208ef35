"""The routed product of a layer on the CPU, in C++ (`native.cpp`), built where it runs.

The source is compiled for the machine at hand on first use (a few seconds) and kept under
`$XDG_CACHE_HOME/guilomo`. Without a C++ compiler the op in torch is used, which gives the same at
a lower speed; `python -m guilomo_serve.ops.native` builds ahead and says what is wrong.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from guilomo_serve.ops.layer import Batch, LayerWeights, Slots

_SOURCE = Path(__file__).with_name("native.cpp")
_COMPILE = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-c")
# Linked without -fopenmp: OpenMP's symbols are found in the runtime that torch has loaded, whose
# threads and their bindings the op is to share. A second runtime would fight it for the cores.
_LINK = ("-shared",)
_OPENMP = re.compile(r"/\S*lib(?:gomp|iomp5|omp)\S*\.so\S*")
_SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "f32"}
DTYPES = tuple(_SUFFIXES)
_log = logging.getLogger(__name__)


class NativeUnavailableError(RuntimeError):
    """The C++ op cannot be built or loaded here; the message says why."""


@functools.cache
def load(architecture: str = "native") -> ctypes.CDLL:
    """Builds the library if it is not built yet, and loads it.

    Args:
        architecture: the compiler's `-march`; "native" is all that this machine can do.

    Raises:
        NativeUnavailableError: there is no compiler, or it fails.
    """
    path = _build(f"-march={architecture}")
    try:
        for runtime in set(_OPENMP.findall(Path("/proc/self/maps").read_text(encoding="utf-8"))):
            ctypes.CDLL(runtime, mode=os.RTLD_GLOBAL)  # loaded already: makes its symbols visible
        library = ctypes.CDLL(str(path), mode=os.RTLD_NOW)
    except OSError as e:
        raise NativeUnavailableError(f"{path} cannot be loaded: {e}") from None
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    for suffix in _SUFFIXES.values():
        function = getattr(library, f"guilomo_routed_linear_{suffix}")
        function.restype = None
        function.argtypes = [
            *(pointer, integer, pointer, integer),  # y, its row stride, x, its row stride
            *(pointer, pointer, integer, pointer),  # slots, segments, their count, order
        ]
    return library


def make_slots(count: int, device: torch.device, dtype: torch.dtype) -> Slots:
    """The fastest implementation for a layer on this device and of this dtype."""
    if device.type == "cpu" and dtype in DTYPES and is_available():
        return NativeSlots(count)
    return Slots(count)


@functools.cache
def is_available() -> bool:
    """Whether the C++ op can be used; says so once in the log where it cannot."""
    try:
        load()
    except NativeUnavailableError as e:
        _log.warning("Adapters run in torch, which is slower than the C++ op: %s", e)
        return False
    return True


class NativeSlots(Slots):
    """The slots of one layer as the C++ op reads them: addresses of tensors it keeps alive."""

    def __init__(self, count: int, architecture: str = "native") -> None:
        library = load(architecture)
        self._functions = {
            d: getattr(library, f"guilomo_routed_linear_{s}") for d, s in _SUFFIXES.items()
        }
        super().__init__(count)
        self._descriptors: list[np.ndarray | None] = [None] * count
        self._pointers = np.zeros(count, dtype=np.int64)
        self._address = self._pointers.ctypes.data

    def set(self, slot: int, weights: LayerWeights | None) -> None:
        """As `Slots.set`; the weights are on the CPU."""
        descriptor = None if weights is None else _descriptor(weights)
        super().set(slot, weights)
        self._descriptors[slot] = descriptor
        self._pointers[slot] = 0 if descriptor is None else descriptor.ctypes.data

    def apply_(self, y: torch.Tensor, x: torch.Tensor, batch: Batch) -> None:
        """As `Slots.apply_`; y, x and the weights have one dtype of `DTYPES`.

        The rows of y and x are contiguous, and may be apart.
        """
        self._functions[x.dtype](
            y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0), self._address, *batch.addresses
        )


def _descriptor(weights: LayerWeights) -> np.ndarray:
    """The struct `Layer` of native.cpp: five counts, four addresses, seven numbers a slice."""
    values = [
        weights.lora_a.shape[1],
        len(weights.lora_a),
        len(weights.router),
        weights.top_k,
        len(weights.layout),
        weights.lora_a.data_ptr(),
        weights.router.data_ptr(),
        weights.row_scale.data_ptr(),
        weights.expert_of_row.data_ptr(),
    ]
    for layout, lora_b in zip(weights.layout, weights.lora_b, strict=True):
        values += [*layout.rows, *layout.experts, *layout.columns, lora_b.data_ptr()]
    return np.array(values, dtype=np.int64)


def _build(march: str) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise NativeUnavailableError("no C++ compiler was found (g++, or the one CXX names)")
    # The processor's own name is part of the key: a home folder may be shared by several machines.
    machine = subprocess.run(
        [compiler, march, "-E", "-v", "-x", "c++", os.devnull],
        capture_output=True,
        text=True,
        check=False,
    )
    key = hashlib.sha256()
    for part in (
        _SOURCE.read_text(encoding="utf-8"),
        " ".join((march, *_COMPILE, *_LINK)),
        machine.stderr,
    ):
        key.update(part.encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "guilomo"
    target = cache / f"native-{key.hexdigest()[:16]}.so"
    if target.exists():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built, unlinked = Path(folder) / target.name, Path(folder) / "native.o"
            _run(compiler, march, *_COMPILE, str(_SOURCE), "-o", str(unlinked))
            _run(compiler, *_LINK, str(unlinked), "-o", str(built))
            built.replace(target)  # atomic: several processes may build at once
    except OSError as e:
        raise NativeUnavailableError(f"{cache} cannot be written: {e}") from None
    return target


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise NativeUnavailableError(f"{' '.join(command)} failed:\n{result.stderr}")


if __name__ == "__main__":
    load()
