"""The kernels as GPUs would run them: compiled ahead of time, which needs no GPU, and read.

Compiled is what a launch would compile: the launch itself is made, from tensors on the CPU.
"""

from __future__ import annotations

import bisect
import json
import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from guilomo_serve.ops import kernels, triton_slots
from guilomo_serve.ops.layer import Batch, TokenBlocks
from guilomo_serve.ops.triton_slots import TritonSlots
from guilomo_serve.ops.tuning import DEFAULTS, FILE, TOKEN_CLASSES, Tuning, stored

pytestmark = pytest.mark.skipif(
    kernels.INTERPRETED, reason="in the interpreter nothing is compiled"
)
IN, WIDTHS = 4096, (4096, 1024, 1024)
REGISTERS = 65536  # of a multiprocessor, of all three


@dataclass(frozen=True)
class Gpu:
    """Of its compute capability: shared memory in KiB, of a program and of a multiprocessor."""

    capability: int
    of_program: int
    of_multiprocessor: int


GPUS = (Gpu(80, 163, 164), Gpu(90, 227, 228), Gpu(100, 227, 228))
# An L40S has sm_80's instructions and less shared memory: KiB of a program.
OF_STORED = {"A100": GPUS[0], "H100": GPUS[1], "H200": GPUS[1], "B200": GPUS[2], "L40S": GPUS[0]}
OF_L40S = 99
DECODE = 256  # the most tokens of a batch that is taken for one


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a kernel."""

    ptx: str
    registers: int
    spilled: int
    shared: int
    threads: int

    @property
    def wide_loads(self) -> int:
        """Of 16 bytes."""
        wide = re.findall(r"ld\.global[.\w:]*\.v4\.b32|cp\.async\.cg\S* [^;]*0x10", self.ptx)
        return len(wide)

    @property
    def wide_stores(self) -> int:
        return len(re.findall(r"st\.global[.\w:]*\.v4\.b32", self.ptx))

    @property
    def tensor_core_products(self) -> set[str]:
        """Types of the factors."""
        found = re.findall(
            r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S*?(bf16|f16|tf32)\b", self.ptx
        )
        return set(found)

    def programs(self, gpu: Gpu) -> int:
        """How many a multiprocessor runs at once, for its registers and shared memory."""
        of_registers = REGISTERS // (self.registers * self.threads)
        return min(of_registers, gpu.of_multiprocessor * 1024 // (self.shared + 1024))


def compiled(launch: kernels.Launch, gpu: Gpu) -> Compiled:
    target = GPUTarget("cuda", gpu.capability, 32)
    backend, kernel = make_backend(target), launch.kernel
    if gpu.capability >= 90:
        launch = replace(launch, constants={**launch.constants, "OVERLAPS": True})
    given = {**launch.constants, **launch.options, "debug": False, "instrumentation_mode": ""}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.arguments, **given)
    options, signature, constants, attributes = kernel._pack_args(
        backend, given, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=target, options=options.__dict__)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    return Compiled(
        made.asm["ptx"],
        registers,
        stack + local,
        made.metadata.shared,
        32 * options.num_warps,
    )


def specialization(launch: kernels.Launch) -> str:
    """What Triton looks a compiled kernel up by."""
    kernel = launch.kernel
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, of_arguments, options = bind(*launch.arguments, **launch.constants, **launch.options)
    return f"{kernel.__name__} {of_arguments} {options}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_warming_up_compiles_what_batches_need(monkeypatch, dtype) -> None:
    """Whatever batches are like: sizes, strides and where their blocks begin."""
    seen: set[str] = set()
    monkeypatch.setattr(kernels, "INTERPRETED", True)  # on a CPU; nothing runs
    monkeypatch.setattr(triton_slots, "tuning_for", of_an_h100)
    monkeypatch.setattr(kernels.Launch, "run", lambda launch: seen.add(specialization(launch)))
    most = 2 * TOKEN_CLASSES[-1] + 1
    slots = TritonSlots(3, 64, (32, 16, 16), dtype, "cpu")
    slots.warm_up(most)
    warm = set(seen)
    assert {name.split()[0] for name in warm} == {"_shrink", "_expand"}
    blocks = TokenBlocks(most, 3, "cpu")
    for tokens in (1, 2, 3, 16, 17, 64, 100, 255, 256, 257, 1000, 1025, most):
        batch = Batch(np.arange(tokens) % 4 - 1)
        blocks.update(batch)
        y = torch.zeros(tokens, 64, dtype=dtype)
        for x in (
            torch.zeros(tokens, 64, dtype=dtype),
            torch.zeros(tokens, 192, dtype=dtype)[:, 64:128],
            torch.zeros(tokens, 67, dtype=dtype)[:, 3:],  # rows that begin anywhere
        ):
            slots.apply_(y, x, batch)
    assert seen == warm


def of_an_h100(device: torch.device, tokens: int) -> Tuning:
    return DEFAULTS[bisect.bisect_left(TOKEN_CLASSES, tokens)]


def launches(tuning, tokens: int, dtype: torch.dtype) -> tuple[kernels.Launch, kernels.Launch]:
    """Of both kernels, for a layer of a real size."""
    slots = TritonSlots(1, IN, WIDTHS, dtype, "cpu")
    x = torch.empty(tokens, IN, dtype=dtype)
    blocks = Batch(np.zeros(tokens, dtype=np.int64)).blocks(x.device)
    h, z = slots.results.of(tokens, len(WIDTHS), tuning.shrink.splits)
    cut = blocks.cut(tokens, tuning.shrink.block_tokens)
    shrink = kernels.shrink_launch(x, blocks.order, cut, slots.table, h, z, tuning.shrink)
    y = torch.empty(tokens, sum(WIDTHS), dtype=dtype)
    cut = blocks.cut(tokens, tuning.expand.block_tokens)
    of_slots = (slots.table, blocks.sampled, slots.load, WIDTHS)
    expand = kernels.expand_launch(y, h, z, blocks.order, cut, *of_slots, tuning.expand)
    return shrink, expand


def cases() -> set[tuple[int, Tuning, int, torch.dtype, Gpu]]:
    """All that differ: which kernel, settings, the most tokens, dtype and GPU.

    Defaults may serve any GPU, stored settings theirs. Of a setting only what its kernel is
    compiled for counts, and batches of decode are alike.
    """
    settings = [(gpu, DEFAULTS) for gpu in GPUS]
    settings += [
        (OF_STORED[name.split()[1]], stored(name)) for name in json.loads(FILE.read_text())
    ]
    of_all = set()
    for gpu, of_gpu in settings:
        for tuning, most in zip(of_gpu, (*TOKEN_CLASSES, 2 * TOKEN_CLASSES[-1]), strict=True):
            of_shrink = replace(DEFAULTS[0], shrink=tuning.shrink)
            splits = replace(DEFAULTS[0].shrink, splits=tuning.shrink.splits)
            of_expand = replace(tuning, shrink=splits)
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                for kernel, alone in enumerate((of_shrink, of_expand)):
                    of_all.add((kernel, alone, max(most, DECODE), dtype, gpu))
    return of_all


@pytest.mark.parametrize(("kernel", "tuning", "tokens", "dtype", "gpu"), sorted(cases(), key=str))
def test_kernels_fit_the_gpu(kernel, tuning, tokens, dtype, gpu) -> None:
    launch = launches(tuning, tokens, dtype)[kernel]
    found = compiled(launch, gpu)
    assert found.spilled == 0, f"{found.spilled} bytes are spilled"
    assert found.shared <= min(gpu.of_program, OF_L40S) * 1024
    assert found.wide_loads > 0, "it loads less than 16 bytes at a time"
    if launch.kernel is kernels._expand:
        assert found.wide_stores > 0
    if tokens <= DECODE:
        assert found.programs(gpu) >= 4, (
            f"{found.registers} registers, {found.shared} bytes of shared memory"
        )
    if dtype != torch.float32:
        assert found.tensor_core_products, "it has no products on tensor cores"
    if launch.kernel is kernels._shrink and dtype != torch.float32 and tokens > TOKEN_CLASSES[-1]:
        assert "tf32" in found.tensor_core_products  # the routers' too
