"""An allocation: the ranks of the experts of each module, as a small readable value.

A module may have several experts and a router, one expert without a router, or none. Then it is as
in the base, and the adapter does not name it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guilomo_serve.adapter import Expert
from guilomo_train.errors import AllocationError
from guilomo_train.limits import replace_file

FORMAT_VERSION = 1
NO_EXPERTS = "gives no module an expert, so there is no adapter to train: expected one at least"


@dataclass(frozen=True)
class Allocation:
    """How many experts each module has, and the rank of each.

    Attributes:
        ranks: full module name -> the ranks of its experts; empty for no adapter there.
        top_k: experts that a token uses.
        max_rank: the largest rank an expert could have had. All experts share the scaling
            lora_alpha / max_rank: the one under which the search measured them.
    """

    ranks: Mapping[str, tuple[int, ...]]
    top_k: int
    max_rank: int

    @classmethod
    def uniform(
        cls, modules: tuple[str, ...], experts: int, rank: int, top_k: int = 2
    ) -> Allocation:
        """The same number of experts of the same rank everywhere."""
        return cls(dict.fromkeys(modules, (rank,) * experts), top_k, rank)

    @property
    def adapted(self) -> tuple[str, ...]:
        """The modules that have an adapter."""
        return tuple(module for module, ranks in self.ranks.items() if ranks)

    @property
    def total_experts(self) -> int:
        return sum(len(ranks) for ranks in self.ranks.values())

    @property
    def total_rank(self) -> int:
        return sum(sum(ranks) for ranks in self.ranks.values())

    def parameters(self, linears: Mapping[str, tuple[int, int]]) -> int:
        """Numbers an adapter of this allocation has, for layers of (out, in) features."""
        count = 0
        for module, ranks in self.ranks.items():
            out_features, in_features = linears[module]
            routers = len(ranks) if len(ranks) > 1 else 0
            count += sum(ranks) * (out_features + in_features) + routers * in_features
        return count

    def experts(self, lora_alpha: float) -> dict[str, tuple[Expert, ...]]:
        """The experts as the adapter format has them: of the modules that have any.

        Raises:
            AllocationError: none has.
        """
        if not self.adapted:
            raise AllocationError(f"the allocation {NO_EXPERTS}")
        scaling = lora_alpha / self.max_rank
        return {m: tuple(Expert(rank, scaling) for rank in self.ranks[m]) for m in self.adapted}

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "top_k": self.top_k,
            "max_rank": self.max_rank,
            "ranks": {module: list(ranks) for module, ranks in self.ranks.items()},
        }

    def save(self, path: Path) -> None:
        """Writes the allocation as JSON, a module a line.

        Raises:
            OutputError: the file cannot be written.
        """
        modules = ",\n".join(
            f"    {json.dumps(m)}: {json.dumps(list(r))}" for m, r in self.ranks.items()
        )
        text = (
            f'{{\n  "format_version": {FORMAT_VERSION},\n  "top_k": {self.top_k},\n'
            f'  "max_rank": {self.max_rank},\n  "ranks": {{\n{modules}\n  }}\n}}\n'
        )
        with replace_file(path) as partial:
            partial.write_text(text)

    @classmethod
    def load(cls, path: Path) -> Allocation:
        """Reads what `save` wrote.

        Raises:
            AllocationError: the file is missing or no allocation, or has no expert in any module;
                the message names the key.
        """
        try:
            value = json.loads(path.read_text())
        except FileNotFoundError:
            raise AllocationError(f"{path}: no such file; guilomo-train search writes it") from None
        except (OSError, ValueError) as e:
            raise AllocationError(f"{path}: not a JSON file ({e})") from None
        if not isinstance(value, dict) or value.get("format_version") != FORMAT_VERSION:
            raise AllocationError(f"{path}: format_version is not {FORMAT_VERSION}")
        for key in ("top_k", "max_rank"):
            if not isinstance(value.get(key), int) or value[key] < 1:
                raise AllocationError(f"{path}: {key} is {value.get(key)!r}, expected an int >= 1")
        modules = value.get("ranks")
        if not isinstance(modules, dict) or not modules:
            raise AllocationError(f"{path}: ranks is not an object of module -> list of ranks")
        for module, ranks in modules.items():
            if not isinstance(ranks, list) or not all(
                isinstance(r, int) and 1 <= r <= value["max_rank"] for r in ranks
            ):
                raise AllocationError(
                    f"{path}: ranks[{module!r}] is {ranks!r}, expected a list of integers "
                    f"from 1 to max_rank ({value['max_rank']}), or [] for no adapter there"
                )
        if not any(modules.values()):
            raise AllocationError(f"{path}: {NO_EXPERTS}")
        return cls({m: tuple(r) for m, r in modules.items()}, value["top_k"], value["max_rank"])
