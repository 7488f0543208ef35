"""What all pictures share: a canvas, heat maps over layers and kinds of module, and the file.

They are drawn without a display and written whole or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guilomo_train.limits import replace_file

Cells = Mapping[tuple[str, str], str]


def subplots(
    rows: int, columns: int, width: float, height: float, **options: Any
) -> tuple[Any, Any]:
    """A figure of so many inches and its axes as an array `[rows, columns]`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(
        rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **options
    )


def save(figure: Any, path: Path) -> None:
    """Writes a PNG; one of that name is replaced only when all is written."""
    from matplotlib import pyplot as plt

    with replace_file(path) as partial:
        figure.savefig(partial, dpi=130, format="png")
    plt.close(figure)


def cells_of(
    layers: Sequence[str], kinds: Sequence[str], cells: Cells, values: Mapping[str, float]
) -> list[list[float]]:
    """Values of modules as rows of layers and columns of kinds; NaN where there is no module."""
    return [
        [values.get(cells.get((layer, kind), ""), math.nan) for kind in kinds] for layer in layers
    ]


def heat(
    axis: Any,
    numbers: Sequence[Sequence[float]],
    layers: Sequence[str],
    kinds: Sequence[str],
    *,
    title: str,
    low: float,
    high: float,
    cmap: str = "viridis",
) -> None:
    """A heat map of layers by kinds of module, with its scale beside it."""
    image = axis.imshow(numbers, aspect="auto", cmap=cmap, vmin=low, vmax=high)
    axis.set_title(title, fontsize=10)
    axis.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right", fontsize=8)
    label_layers(axis, layers)
    axis.figure.colorbar(image, ax=axis, aspect=35).ax.tick_params(labelsize=8)


def label_layers(axis: Any, layers: Sequence[str]) -> None:
    """Layers as labels of the y axis; every n-th where all would not fit."""
    step = math.ceil(len(layers) / 32)
    axis.set_yticks(range(0, len(layers), step), layers[::step], fontsize=7)
    axis.set_ylabel("layer", fontsize=9)
