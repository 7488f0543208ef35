"""The configuration of a LoRA-MoE adapter in PEFT; saved, it is `adapter_config.json`."""

from __future__ import annotations

import warnings
from dataclasses import InitVar, dataclass, field
from typing import Any

from peft.config import PeftConfig
from peft.utils import PeftType

from guilomo_serve.adapter import FORMAT_VERSION, PEFT_TYPE, Expert


@dataclass
class LoraMoeConfig(PeftConfig):
    """What each adapted linear layer gets.

    Either every target gets `num_experts` experts of rank `expert_rank`, or `experts` says for
    each module, by its full name, what it gets; then the modules it names are the targets, and all
    others stay as they are.

    Raises:
        ValueError: a field is out of its range.
    """

    target_modules: list[str] | str | None = field(
        default="all-linear",
        metadata={
            "help": "Names of the linear layers to adapt, as in PEFT; 'all-linear' is every one "
            "but the output layer."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of linear layers to leave alone."}
    )
    num_experts: int = field(
        default=8, metadata={"help": "Experts of each layer, where `experts` is not given."}
    )
    expert_rank: int = field(
        default=8, metadata={"help": "Rank of each expert, where `experts` is not given."}
    )
    top_k: int = field(default=2, metadata={"help": "Experts that a token uses in a layer."})
    lora_alpha: float = field(
        default=16.0,
        metadata={"help": "Numerator of the default scaling lora_alpha / expert_rank."},
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout on the input of A; the router sees no dropout."}
    )
    experts: dict[str, list[dict[str, Any]]] | None = field(
        default=None,
        metadata={"help": "Module name -> list of {rank, scaling}, one entry an expert."},
    )
    stop_token_ids: list[int] | None = field(
        default=None,
        metadata={"help": "Tokens that end an answer, beside the end tokens of the base."},
    )
    r: int | None = field(
        default=None, metadata={"help": "Written: the largest total rank of a module."}
    )
    base_fingerprint: dict[str, Any] | None = field(
        default=None, metadata={"help": "Written: what tells the base model from others."}
    )
    search: dict[str, Any] | None = field(
        default=None, metadata={"help": "Written: the search that gave the allocation."}
    )
    format_version: int = field(
        default=FORMAT_VERSION, metadata={"help": "Written: version of the adapter format."}
    )
    # PEFT's other methods have it; here it is known only to be refused with the reason.
    modules_to_save: InitVar[list[str] | None] = None

    def __post_init__(self, modules_to_save: list[str] | None) -> None:
        super().__post_init__()
        self.peft_type = PeftType(PEFT_TYPE)
        if modules_to_save:
            raise ValueError(no_modules_to_save(modules_to_save))
        for name in ("num_experts", "expert_rank", "top_k"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected an integer >= 1")
        if self.r is not None and self.experts is None:
            raise ValueError(
                f"r is {self.r}, expected expert_rank={self.r}: each expert has a rank"
            )
        if self.top_k == 1 and self.num_experts > 1 and self.experts is None:
            warnings.warn(
                "top_k is 1: the one expert's weight is always 1, so the router learns from the "
                "load-balance loss alone; 2 or more let it learn which expert helps",
                stacklevel=3,
            )
        if self.experts is not None and not (self.experts and all(self.experts.values())):
            empty = next((m for m, listed in self.experts.items() if not listed), None)
            where = "" if empty is None else f" for {empty!r}"
            raise ValueError(
                f"experts has none{where}: expected a module at least, and in each at least one; "
                "a module without experts is left out"
            )
        if not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha is {self.lora_alpha!r}, expected a number > 0")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout is {self.lora_dropout!r}, expected 0 <= p < 1")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]

    def experts_of(self, module: str) -> tuple[Expert, ...]:
        """The experts of a module, by its full name."""
        if self.experts is not None:
            return tuple(Expert(e["rank"], e["scaling"]) for e in self.experts[module])
        scaling = self.lora_alpha / self.expert_rank
        return (Expert(self.expert_rank, scaling),) * self.num_experts

    def to_dict(self) -> dict[str, Any]:
        """The value of `adapter_config.json`; `experts` makes the uniform fields superfluous."""
        value = super().to_dict()
        if self.experts is not None:
            value["target_modules"] = sorted({module.split(".")[-1] for module in self.experts})
            del value["num_experts"], value["expert_rank"]
        return value


def no_modules_to_save(value: list[str]) -> str:
    """Why an adapter cannot come with trained modules of the base."""
    return (
        f"modules_to_save is {value}, expected none: an adapter folder holds experts and routers "
        "alone, so no whole module can be trained with them, and no task_type with a new head"
    )
