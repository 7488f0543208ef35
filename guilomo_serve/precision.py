"""The precision in which a model is fast on this machine, where none was asked for."""

from __future__ import annotations

import torch


def half_precision_is_slow() -> bool:
    """Whether float32 is many times as fast here as bfloat16 and float16.

    So on an x86 CPU without AVX-512, and without a GPU: torch has no matrix product of half
    precision there but a plain loop. On an AMD EPYC with AVX2 its backward pass takes forty times
    as long as float32's.
    """
    can = torch.cpu.get_capabilities()
    return can["architecture"] == "x86_64" and not (
        torch.cuda.is_available() or can["avx512_f"] or can["avx_ne_convert"]
    )
