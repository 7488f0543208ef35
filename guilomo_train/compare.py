"""Two allocations of one base side by side: how far does an allocation depend on the task?

A module without adapter has the total rank 0. An allocation.json lists it; an adapter folder names
the modules with experts alone, so what it lacks of the other's has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from guilomo_train.adapters import read_trained_spec
from guilomo_train.allocation_map import allocation_of, grid
from guilomo_train.errors import AllocationError
from guilomo_train.pictures import cells_of, heat, save, subplots
from guilomo_train.search.allocation import Allocation


@dataclass(frozen=True)
class Comparison:
    """Two allocations over the same modules, with the names they are shown by."""

    names: tuple[str, str]
    allocations: tuple[Allocation, Allocation]

    @classmethod
    def read(cls, first: Path, second: Path) -> Comparison:
        """Reads two adapter folders or allocation.json files.

        Raises:
            AllocationError, AdapterError: one cannot be read, or they are of different bases.
        """
        (a, base_a), (b, base_b) = _read(first), _read(second)
        if base_a is not None and base_b is not None and base_a != base_b:
            raise AllocationError(
                f"{first} and {second} are of different bases ({base_a} and {base_b}), so their "
                "allocations cannot be compared"
            )
        for here, there, path in ((a, b, second), (b, a, first)):
            missing = [module for module in here.ranks if module not in there.ranks]
            if missing and not path.is_dir():
                raise AllocationError(
                    f"{path} lacks {len(missing)} of the modules of the other, such as "
                    f"{missing[0]}: expected two allocations of the same layers of one base"
                )
        # In the order of the one that has more, all of them if it is an allocation.json.
        fewer, more = sorted((a.ranks, b.ranks), key=len)
        modules = dict.fromkeys([*more, *fewer])
        a, b = (replace(x, ranks={m: x.ranks.get(m, ()) for m in modules}) for x in (a, b))
        return cls((str(first), str(second)), (a, b))

    @property
    def total_ranks(self) -> tuple[list[int], list[int]]:
        """Total rank of each module, in the first allocation's order."""
        a, b = self.allocations
        return [sum(a.ranks[m]) for m in a.ranks], [sum(b.ranks[m]) for m in a.ranks]

    def table(self) -> str:
        """A line a layer; a cell has experts x total rank of both and the difference in rank."""
        a, b = self.allocations
        layers, kinds, cells = grid(a.ranks)
        rows = [["layer", *kinds, "rank"]]
        for layer in layers:
            row, totals = [layer], [0, 0]
            for kind in kinds:
                module = cells.get((layer, kind))
                if module is None:
                    row.append("-")
                    continue
                pair = a.ranks[module], b.ranks[module]
                row.append(_cell([len(r) for r in pair], [sum(r) for r in pair]))
                totals = [t + sum(r) for t, r in zip(totals, pair, strict=True)]
            rows.append([*row, _difference(totals)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
        return "\n".join([*self._head(), "", *lines, "", *self._totals()])

    def _head(self) -> list[str]:
        return [
            f"A: {self.names[0]}",
            f"B: {self.names[1]}",
            "Cells: experts x total rank of A, of B (-: no adapter), and the rank B has more.",
        ]

    def _totals(self) -> list[str]:
        a, b = self.allocations
        lines = [
            f"{name}: {allocation.total_experts} experts, total rank {allocation.total_rank}, "
            f"top {allocation.top_k} a token"
            for name, allocation in zip("AB", self.allocations, strict=True)
        ]
        same = sum(len(a.ranks[m]) == len(b.ranks[m]) for m in a.ranks)
        ranks = self.total_ranks
        changed = sum(abs(x - y) for x, y in zip(*ranks, strict=True)) / len(a.ranks)
        return [
            *lines,
            f"{len(a.ranks)} modules, {same} with as many experts; total rank differs by "
            f"{changed:.1f} a module on average",
            f"Spearman correlation of total rank over modules: {self.correlation}",
        ]

    @property
    def correlation(self) -> str:
        """Spearman's, as text."""
        rho = spearman(*self.total_ranks)
        if math.isnan(rho):
            return "none, one of the two has the same rank everywhere"
        return f"{rho:.2f}"


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation, ties at their mean rank; NaN where one is constant."""
    a, b = _mean_ranks(x), _mean_ranks(y)
    middle = (len(x) + 1) / 2
    covariance = sum((p - middle) * (q - middle) for p, q in zip(a, b, strict=True))
    spread = math.sqrt(sum((p - middle) ** 2 for p in a) * sum((q - middle) ** 2 for q in b))
    return covariance / spread if spread > 0 else math.nan


def picture(comparison: Comparison, path: Path) -> None:
    """Draws experts and total rank of both, and their differences, into a PNG."""
    layers, kinds, cells = grid(comparison.allocations[0].ranks)
    figure, axes = subplots(
        2, 3, width=2.2 + 1.35 * len(kinds), height=2 * (1.2 + 0.17 * len(layers))
    )
    for row, what in zip(axes, ("experts", "total rank"), strict=True):
        first, second = (
            {m: len(ranks) if what == "experts" else sum(ranks) for m, ranks in a.ranks.items()}
            for a in comparison.allocations
        )
        largest = max(*first.values(), *second.values())
        for axis, name, values in ((row[0], "A", first), (row[1], "B", second)):
            heat(
                axis, cells_of(layers, kinds, cells, values), layers, kinds,
                title=f"{name}: {what}", low=0, high=largest,
            )  # fmt: skip
        difference = {module: second[module] - first[module] for module in first}
        most = max(1, *(abs(d) for d in difference.values()))
        heat(
            row[2], cells_of(layers, kinds, cells, difference), layers, kinds,
            title=f"B - A: {what}", low=-most, high=most, cmap="RdBu_r",
        )  # fmt: skip
        for axis in row[1:]:
            axis.set_ylabel("")
    figure.suptitle(
        f"A: {comparison.names[0]}\nB: {comparison.names[1]}\n"
        f"Spearman correlation of total rank: {comparison.correlation}",
        fontsize=9,
    )
    save(figure, path)


def _read(path: Path) -> tuple[Allocation, str | None]:
    """An allocation, and what is known of its base."""
    if not path.is_dir():
        return Allocation.load(path), None
    spec, _ = read_trained_spec(path)
    base = spec.base
    if base is None:
        return allocation_of(spec), None
    return allocation_of(spec), (
        f"{base.architecture} with {base.num_hidden_layers} layers of {base.hidden_size} and "
        f"{base.vocab_size} tokens"
    )


def _cell(experts: list[int], ranks: list[int]) -> str:
    first, second = (f"{n}x{r}" if n else "-" for n, r in zip(experts, ranks, strict=True))
    return f"{first:>4} {second:>4} {ranks[1] - ranks[0]:+3d}"


def _difference(totals: list[int]) -> str:
    return f"{totals[0]:3d} {totals[1]:3d} {totals[1] - totals[0]:+4d}"


def _mean_ranks(values: Sequence[float]) -> list[float]:
    """1-based ranks; equal values share the mean of theirs."""
    ordered = sorted(values)
    first = {v: i for i, v in reversed(list(enumerate(ordered)))}
    last = {v: i for i, v in enumerate(ordered)}
    return [(first[v] + last[v]) / 2 + 1 for v in values]
