"""What an adapted module costs in serving on this machine, for budgets in serving time.

    .venv/bin/python benchmarks/serving_prices.py BASE --out prices.json

For each shape that the base's linear layers have, the op that serves them here (the native one on a
CPU, Triton's kernels on a GPU) is timed in a batch as in decode, all of one adapter, at several
numbers of experts and rank rows, and a price is fitted to each part by least squares:

    seconds = present + row * total rank + router * experts (if more than one)

No price is below 0. What is fitted are relative errors, so that small modules count as much as
large ones; their mean and largest are printed. A call is as in eager mode, in which adapters are
served: from Python on, one call behind another, without CUDA graphs. It is that of a module alone,
where vLLM packs some (q, k and v) into a layer with one call for all, so `present` is too high for
those. On a CPU it takes the threads of OMP_NUM_THREADS, and the machine should have no other work:
each call waits for the last of its threads.

A setting's calls go through copies of the layer, and settings take turns, so that weights come from
memory as they do when a whole model runs between two uses of them.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from common import BASE, report

from guilomo_serve.ops.layer import Batch, LayerWeights, SliceWeights
from guilomo_serve.ops.slots import make_slots
from guilomo_serve.precision import half_precision_is_slow
from guilomo_train.base import sizes_of
from guilomo_train.config import targets_of

TOP_K = 2
# (experts, total rank): from the least that a module may have to the most of a search's default.
SETTINGS = ((1, 1), (1, 8), (2, 4), (2, 16), (4, 8), (4, 32), (8, 16), (8, 64))
# Of one setting's copies, as far as their number allows: all settings together exceed a cache.
BYTES_OF_COPIES = 16 * 2**20
COPIES = (8, 256)  # at least, at most
PARTS = ("present", "row", "router")

Setting = tuple[int, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", nargs="?", type=Path, default=BASE, help="the base model's folder")
    parser.add_argument("--target-modules", default="all-linear", help="as in guilomo-train")
    parser.add_argument("--tokens", type=int, default=8, help="of the batch")
    parser.add_argument("--repeats", type=int, default=40, help="turns that a median is of")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if half_precision_is_slow() else torch.bfloat16
    sizes = sizes_of(str(args.base), targets_of(args.target_modules))
    shapes, measured = {}, {}
    for out_features, in_features in sorted({sizes.linears[module] for module in sizes.adapted}):
        shape = f"{out_features}x{in_features}"
        seconds = measure(out_features, in_features, args.tokens, args.repeats, dtype, device)
        prices = fit(seconds)
        errors = [abs(cost(prices, setting) / found - 1) for setting, found in seconds.items()]
        shapes[shape] = {part: float(f"{price:.4g}") for part, price in prices.items()}
        measured[shape] = {f"{e}x{r}": float(f"{found:.4g}") for (e, r), found in seconds.items()}
        parts = ", ".join(f"{part} {1e6 * price:.3f}" for part, price in prices.items())
        print(
            f"{shape:>12}: {parts} us; the fit is off by {statistics.mean(errors):.1%} on average, "
            f"{max(errors):.1%} at most",
            flush=True,
        )
    result = {
        "tokens": args.tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "shapes": shapes,
        "measured": measured,
    }
    report(result, args, args.out)


def measure(
    out_features: int,
    in_features: int,
    tokens: int,
    repeats: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[Setting, float]:
    """Seconds of a call for each setting; the median of `repeats` turns."""
    batch = Batch(np.zeros(tokens, dtype=np.int64))
    x = torch.randn(tokens, in_features, device=device).to(dtype)
    y = torch.zeros(tokens, out_features, device=device, dtype=dtype)
    calls = {
        (experts, rank): copies(out_features, in_features, experts, rank, dtype, device)
        for experts, rank in SETTINGS
    }
    times: dict[Setting, list[float]] = {setting: [] for setting in SETTINGS}
    for turn in range(repeats + 1):
        for setting, of_setting in calls.items():
            _wait(device)
            begin = time.perf_counter()
            for apply_ in of_setting:
                apply_(y, x, batch)
            _wait(device)
            if turn:  # the first one compiles, and fills what is cached on first use
                times[setting].append((time.perf_counter() - begin) / len(of_setting))
    return {setting: statistics.median(found) for setting, found in times.items()}


def copies(
    out_features: int,
    in_features: int,
    experts: int,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Callable[[torch.Tensor, torch.Tensor, Batch], None]]:
    """The op of layers with the same adapter, each with memory of its own."""
    ranks = tuple((rank + experts - 1 - e) // experts for e in range(experts))
    weights = SliceWeights(
        torch.randn(rank, in_features) / in_features**0.5,
        torch.randn(out_features, rank) / 1000,  # each call adds to the same y
        torch.randn(experts, in_features) / in_features**0.5 if experts > 1 else None,
        ranks,
        (1.0,) * experts,
    )
    size = rank * (in_features + out_features) * dtype.itemsize
    count = int(np.clip(BYTES_OF_COPIES // size, *COPIES))
    calls = []
    for _ in range(count):
        slots = make_slots(1, in_features, (out_features,), dtype, device)
        slots.set(0, LayerWeights.stack([weights], (out_features,), TOP_K, dtype, device))
        calls.append(slots.apply_)
    return calls


def fit(seconds: Mapping[Setting, float]) -> dict[str, float]:
    """The prices of least squared relative error, none of them below 0."""
    found = np.array(list(seconds.values()))
    # Each row over its time, and 1 as what it should come to.
    table = np.array([_amounts(setting) for setting in seconds]) / found[:, None]
    best, least = np.zeros(len(PARTS)), np.inf
    # The best is that of some parts alone, the others 0; there are few.
    for some in _subsets(range(len(PARTS))):
        prices = np.zeros(len(PARTS))
        prices[list(some)] = np.linalg.lstsq(table[:, some], np.ones(len(found)), rcond=None)[0]
        off = float(np.square(table @ prices - 1).sum())
        if off < least and (prices >= 0).all():
            best, least = prices, off
    return dict(zip(PARTS, best.tolist(), strict=True))


def cost(prices: Mapping[str, float], setting: Setting) -> float:
    """Seconds of a call by the prices."""
    return sum(prices[part] * n for part, n in zip(PARTS, _amounts(setting), strict=True))


def _amounts(setting: Setting) -> tuple[int, int, int]:
    """How often each part is paid."""
    experts, rank = setting
    return 1, rank, experts if experts > 1 else 0


def _subsets(places: Sequence[int]) -> list[tuple[int, ...]]:
    sizes = range(1, len(places) + 1)
    return [some for size in sizes for some in itertools.combinations(places, size)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
