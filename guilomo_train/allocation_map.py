"""An allocation over layers and kinds of module, as people see it: a table and a heat map."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from guilomo_serve.adapter import AdapterSpec
from guilomo_train.pictures import cells_of, heat, save, subplots
from guilomo_train.search.allocation import Allocation

_LAYER = re.compile(r"\.(\d+)\.")


def allocation_of(spec: AdapterSpec, modules: Iterable[str] = ()) -> Allocation:
    """The allocation that an adapter has.

    Args:
        spec: it names the modules with experts alone.
        modules: those that it could have adapted, where that is known.
    """
    ranks = {m: tuple(e.rank for e in experts) for m, experts in spec.experts.items()}
    max_rank = max(r for listed in ranks.values() for r in listed)
    return Allocation({**dict.fromkeys(modules, ()), **ranks}, spec.top_k, max_rank)


def grid(modules: Iterable[str]) -> tuple[list[str], list[str], dict[tuple[str, str], str]]:
    """Layers by their number, kinds (`q_proj`, ...), and the module at each (layer, kind)."""
    layers: dict[str, None] = {}
    kinds: dict[str, None] = {}
    cells = {}
    for module in modules:
        found = _LAYER.search(module)
        layer = found.group(1) if found else "-"
        kind = module.split(".")[-1]
        layers[layer], kinds[kind] = None, None
        cells[layer, kind] = module
    by_number = sorted(layers, key=lambda layer: int(layer) if layer.isdigit() else -1)
    return by_number, list(kinds), cells


def table(allocation: Allocation) -> str:
    """One line a layer: for each kind of module its number of experts and their total rank.

    A `*` marks a module whose experts are all used by each token: its router only weighs them.
    """
    layers, kinds, cells = grid(allocation.ranks)
    width = max(9, *(len(k) + 1 for k in kinds))
    lines = ["layer" + "".join(k.rjust(width) for k in kinds) + "     rank"]
    for layer in layers:
        line, total = layer.rjust(5), 0
        for kind in kinds:
            ranks = allocation.ranks.get(cells.get((layer, kind), ""), ())
            dense = "*" if 1 < len(ranks) <= allocation.top_k else ""
            line += (f"{len(ranks)}{dense} x {sum(ranks)}" if ranks else "-").rjust(width)
            total += sum(ranks)
        lines.append(line + str(total).rjust(9))
    modules, adapted = len(allocation.ranks), len(allocation.adapted)
    without = f", {modules - adapted} without adapter" if adapted < modules else ""
    lines.append(
        f"{modules} modules{without}: {allocation.total_experts} experts "
        f"({allocation.total_experts / modules:.2f} a module), total rank {allocation.total_rank} "
        f"({allocation.total_rank / modules:.1f} a module). Cells: experts x total rank; "
        f"* = every token uses all of them; - = no adapter."
    )
    return "\n".join(lines)


def heat_map(allocation: Allocation, path: Path) -> None:
    """Draws experts and total rank over layers and kinds of module into a PNG."""
    layers, kinds, cells = grid(allocation.ranks)
    figure, axes = subplots(1, 2, width=3 + 1.1 * len(kinds), height=1.6 + 0.24 * len(layers))
    for axis, title in zip(axes[0], ("experts", "total rank"), strict=True):
        values = {
            module: len(ranks) if title == "experts" else sum(ranks)
            for module, ranks in allocation.ranks.items()
        }
        heat(
            axis, cells_of(layers, kinds, cells, values), layers, kinds,
            title=title, low=0, high=max(values.values()),
        )  # fmt: skip
    save(figure, path)
