"""The kernels as GPUs would run them: compiled ahead of time, which needs no GPU, and read.

Compiled is what a launch would compile: the launch itself is made, from tensors on the CPU. The
classes of batches that CI leaves out are compiled by `make test-kernels`.
"""

from __future__ import annotations

import os
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

from guilomo_serve.ops import kernels, two_steps
from guilomo_serve.ops.layer import Batch
from guilomo_serve.ops.triton_slots import TritonSlots
from guilomo_serve.ops.tuning import DEFAULTS, TOKEN_CLASSES

pytestmark = pytest.mark.skipif(
    kernels.INTERPRETED, reason="in the interpreter nothing is compiled"
)
EVERY = bool(os.environ.get("GUILOMO_EVERY_KERNEL"))
IN, WIDTHS = 4096, (4096, 1024, 1024)
REGISTERS = 65536  # of a multiprocessor, of all three


@dataclass(frozen=True)
class Gpu:
    """Of its compute capability: shared memory in KiB, of a program and of a multiprocessor."""

    capability: int
    of_program: int
    of_multiprocessor: int


GPUS = (Gpu(80, 163, 164), Gpu(90, 227, 228), Gpu(100, 227, 228))
# L40S has the instructions of sm_80 and less shared memory.
L40S = Gpu(89, 99, 100)


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


def launches(tuning, tokens: int, dtype: torch.dtype) -> tuple[kernels.Launch, kernels.Launch]:
    """Of both kernels, for a layer of a real size."""
    slots = TritonSlots(1, IN, WIDTHS, dtype, "cpu")
    x = torch.empty(tokens, IN, dtype=dtype)
    blocks = Batch(np.zeros(tokens, dtype=np.int64)).blocks(x.device)
    h, z = two_steps.empty_results(x, len(WIDTHS), tuning.shrink.splits)
    cut = blocks.of_size[tuning.shrink.block_tokens]
    shrink = kernels.shrink_launch(x, blocks.order, cut, slots.table, h, z, tuning.shrink)
    y = torch.empty(tokens, sum(WIDTHS), dtype=dtype)
    cut = blocks.of_size[tuning.expand.block_tokens]
    of_slots = (slots.table, blocks.sampled, slots.load, WIDTHS)
    expand = kernels.expand_launch(y, h, z, blocks.order, cut, *of_slots, tuning.expand)
    return shrink, expand


# (class of tokens, dtype, GPU): in CI the first and the last, which differ most.
CASES = [
    (index, dtype, gpu)
    for index in range(len(DEFAULTS))
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for gpu in GPUS
    if EVERY or (index in (0, len(DEFAULTS) - 1) and (dtype != torch.float16 or gpu == GPUS[0]))
]


@pytest.mark.parametrize(("index", "dtype", "gpu"), CASES, ids=str)
def test_kernels_fit_the_gpu(index, dtype, gpu) -> None:
    tuning = DEFAULTS[index]
    tokens = (*TOKEN_CLASSES, 2 * TOKEN_CLASSES[-1])[index]
    for launch in launches(tuning, tokens, dtype):
        kernel = compiled(launch, gpu)
        name = launch.kernel.__name__
        assert kernel.spilled == 0, f"{name} spills {kernel.spilled} bytes"
        assert kernel.shared <= min(gpu.of_program, L40S.of_program) * 1024
        assert kernel.wide_loads > 0, f"{name} loads less than 16 bytes at a time"
        if launch.kernel is kernels._expand:
            assert kernel.wide_stores > 0
        if tokens <= 256:
            assert kernel.programs(gpu) >= 4, (
                f"{name}: {kernel.registers} registers, {kernel.shared} bytes of shared memory"
            )
        if dtype != torch.float32:
            assert kernel.tensor_core_products, f"{name} has no products on tensor cores"
        if launch.kernel is kernels._shrink and dtype != torch.float32 and tokens > 1024:
            assert "tf32" in kernel.tensor_core_products  # the routers' too
