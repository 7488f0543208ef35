"""One of two processes that share a layer's input features; test_kernels.py starts both.

    python split_rank.py RANK FILE    FILE: where the processes find one another

Ends with an error where the sum of what both add is not what the whole layer adds.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from guilomo_serve.ops import kernels
from guilomo_serve.ops.layer import Batch, LayerWeights, SliceWeights, Slots
from guilomo_serve.ops.triton_slots import TritonSlots

IN, WIDTH, TOP_K = 96, 80, 2
RANKS = ((3, 1, 7), (8,), (2,) * 16)  # the second has no router
SLOT_OF_TOKEN = np.array([0] * 19 + [2, 1, -1, 2])


def weights(ranks: tuple[int, ...]) -> LayerWeights:
    router = torch.randn(len(ranks), IN) if len(ranks) > 1 else None
    of_slice = SliceWeights(
        torch.randn(sum(ranks), IN) / IN**0.5,
        torch.randn(WIDTH, sum(ranks)),
        router,
        ranks,
        (1.5,) * len(ranks),
    )
    return LayerWeights.stack([of_slice], (WIDTH,), TOP_K, torch.float32)


def summed(part: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(part)
    return part


def main() -> None:
    assert kernels.INTERPRETED
    rank, file = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    whole, x = Slots(len(RANKS)), torch.randn(len(SLOT_OF_TOKEN), IN)
    mine = slice(rank * IN // 2, (rank + 1) * IN // 2)
    part = TritonSlots(len(RANKS), IN // 2, (WIDTH,), torch.float32, "cpu", summed)
    for slot, ranks in enumerate(RANKS):
        of_slot = weights(ranks)
        whole.set(slot, of_slot)
        part.set(
            slot,
            replace(of_slot, lora_a=of_slot.lora_a[:, mine], router=of_slot.router[:, mine]),
        )
    batch = Batch(SLOT_OF_TOKEN)
    want, found = torch.zeros(2, len(x), WIDTH)
    whole.apply_(want, x, batch)
    part.apply_(found, x[:, mine].contiguous(), batch)
    torch.testing.assert_close(summed(found), want, rtol=1e-5, atol=1e-4)


if __name__ == "__main__":
    main()
