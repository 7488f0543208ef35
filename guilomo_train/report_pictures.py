"""The pictures of the report page: losses, how a search moved, and what the routers do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guilomo_train.pictures import Cells, cells_of, heat, label_layers, save, subplots
from guilomo_train.run_files import Curve


def loss_picture(panels: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    """NLL over the steps: a panel a stage, a curve a run."""
    figure, axes = subplots(1, len(panels), width=5.2 * len(panels), height=3.4)
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        for i, (name, curve) in enumerate(curves.items()):
            colour = f"C{i}"
            axis.plot(curve.steps, curve.values, color=colour, linewidth=0.8, alpha=0.4)
            axis.plot(
                curve.steps, _smooth(curve.values), color=colour, linewidth=1.8, label=name,
                marker="o" if len(curve.steps) == 1 else None,
            )  # fmt: skip
        values = [v for curve in curves.values() for v in curve.values if v > 0]
        if values and max(values) > 10 * min(values):
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
        axis.set_title(title, fontsize=10)
        _steps(axis)
        axis.set_ylabel("NLL (nats a token)", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        if len(curves) > 1:
            axis.legend(fontsize=8)
    save(figure, path)


def search_picture(
    totals: Mapping[str, Curve],
    steps: Sequence[int],
    by_kind: Mapping[str, Sequence[float]],
    by_layer: Mapping[str, Sequence[float]],
    path: Path,
) -> None:
    """How the allocation moved while it was searched.

    Args:
        totals: total rank of all modules over the steps, by what it is.
        steps: of the snapshots.
        by_kind, by_layer: mean total rank of a module at each snapshot, by kind and by layer.
        path: the PNG.
    """
    figure, axes = subplots(1, 3, width=13.5, height=max(3.4, 1.2 + 0.13 * len(by_layer)))
    sizes, kinds, layers = axes[0]
    for name, curve in totals.items():
        sizes.plot(curve.steps, curve.values, label=name, linewidth=1.6)
    sizes.set_title("total rank of the adapter", fontsize=10)
    sizes.set_ylabel("rank rows", fontsize=9)
    _steps(sizes)
    sizes.tick_params(labelsize=8)
    sizes.grid(alpha=0.25)
    sizes.legend(fontsize=8)
    values = [v for groups in (by_kind, by_layer) for row in groups.values() for v in row]
    for axis, groups, title in ((kinds, by_kind, "by kind"), (layers, by_layer, "by layer")):
        names = list(groups)
        # A snapshot's column reaches back to the one before it.
        mesh = axis.pcolormesh(
            [0, *steps], range(len(names) + 1), list(groups.values()),
            vmin=min(values), vmax=max(values), cmap="viridis",
        )  # fmt: skip
        axis.invert_yaxis()
        step = math.ceil(len(names) / 32)
        axis.set_yticks([i + 0.5 for i in range(0, len(names), step)], names[::step], fontsize=7)
        axis.set_title(f"most likely total rank, {title}", fontsize=10)
        _steps(axis)
    layers.set_ylabel("layer", fontsize=9, labelpad=6)
    bar = figure.colorbar(mesh, ax=[kinds, layers], aspect=35, pad=0.01)
    bar.set_label("rank rows a linear layer", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    save(figure, path)


def router_picture(
    routers: Mapping[str, Mapping[str, Any]],
    layers: Sequence[str],
    kinds: Sequence[str],
    cells: Cells,
    path: Path,
) -> None:
    """Load of each expert, with the dead ones crossed out, and entropy of each router.

    Args:
        routers: module -> `load`, `dead` and `entropy`, as history.json has them.
        layers, kinds, cells: where a module stands (`allocation_map.grid`).
        path: the PNG.
    """
    most = {
        kind: max(
            len(routers[cells[layer, kind]]["load"]) if cells.get((layer, kind)) in routers else 0
            for layer in layers
        )
        for kind in kinds
    }
    shown = [kind for kind in kinds if most[kind] > 0]
    loads, dead = [], []
    for row, layer in enumerate(layers):
        line: list[float] = []
        for kind in shown:
            figures = routers.get(cells.get((layer, kind), ""), {"load": [], "dead": []})
            dead += [(len(line) + e, row) for e in figures["dead"]]
            line += [*figures["load"], *[math.nan] * (most[kind] - len(figures["load"]))]
        loads.append(line)
    width = 0.13 * sum(most.values())
    figure, axes = subplots(
        1, 2, width=max(6.0, width) + 1.5 + 0.42 * len(shown),
        height=max(3.2, 1.4 + 0.19 * len(layers)),
        gridspec_kw={"width_ratios": [max(4.5, width), 0.42 * len(shown)]},
    )  # fmt: skip
    axis, entropy = axes[0]
    image = axis.imshow(loads, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="none")
    if dead:
        axis.scatter(*zip(*dead, strict=True), marker="x", color="black", s=14, linewidths=1)
    axis.set_facecolor("0.88")
    starts = [sum(most[k] for k in shown[:i]) for i in range(len(shown))]
    for start in starts[1:]:
        axis.axvline(start - 0.5, color="black", linewidth=0.8)
    middles = [s + (most[k] - 1) / 2 for s, k in zip(starts, shown, strict=True)]
    axis.set_xticks(middles, shown, fontsize=8)
    axis.tick_params(axis="x", length=0)
    label_layers(axis, layers)
    axis.set_title("load of each expert (crosses: dead; grey: no such expert)", fontsize=10)
    bar = figure.colorbar(image, ax=axis, aspect=35, extend="max", pad=0.01)
    bar.set_label("load / even load", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    values = {module: figures["entropy"] for module, figures in routers.items()}
    heat(
        entropy, cells_of(layers, shown, cells, values), layers, shown,
        title="router entropy", low=0, high=1,
    )  # fmt: skip
    entropy.set_facecolor("0.88")
    entropy.set_ylabel("")
    save(figure, path)


def _steps(axis: Any) -> None:
    """Steps along the x axis: whole ones."""
    axis.set_xlabel("step", fontsize=9)
    axis.tick_params(axis="x", labelsize=8)
    axis.xaxis.get_major_locator().set_params(integer=True)


def _smooth(values: Sequence[float]) -> list[float]:
    """A mean over the last twentieth of the curve, so that it ends where the raw one does."""
    window = max(1, len(values) // 20)
    return [
        sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(values))
    ]
