"""The configuration of a LoRA-MoE adapter in PEFT; saved, it is `adapter_config.json`."""

from __future__ import annotations

import warnings
from dataclasses import InitVar, dataclass, field
from typing import Any

from peft.config import PeftConfig
from peft.utils import PeftType

from guilomo_serve.adapter import FORMAT_VERSION, PEFT_TYPE, Expert

# Options of PEFT's LoRA that a LoRA-MoE does not have: the values that leave them off, and what to
# do instead.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "bias": (("none",), "an adapter holds no biases"),
    "rank_pattern": (({},), "give each module's ranks in experts"),
    "alpha_pattern": (({},), "give each expert's scaling in experts"),
    "target_parameters": (([],), "only linear layers can be adapted; name them in target_modules"),
    "trainable_token_indices": (
        ([],),
        "to train new tokens name the embedding, and the output layer if it is not tied to it, in "
        "modules_to_save",
    ),
    "use_dora": (
        (False,),
        "DoRA scales a weight by the norm of its sum with the adapter, which is another one for "
        "each token here",
    ),
    "layer_replication": (([],), "an adapter is for the base as it is"),
}
# What only says which modules get what, superfluous where `experts` says it.
_RULES: dict[str, Any] = {
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "use_rslora": False,
    "init_lora_weights": True,
}


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
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Numbers of the blocks to adapt; by default all of them."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the list of blocks, where PEFT does not find it by itself."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules of the base to train whole, as a new head. PEFT saves and loads them; "
            "guilomo-serve refuses the adapter."
        },
    )
    num_experts: int | None = field(
        default=8, metadata={"help": "Experts of each layer, where `experts` is not given."}
    )
    expert_rank: int | None = field(
        default=8, metadata={"help": "Rank of each expert, where `experts` is not given."}
    )
    top_k: int = field(default=2, metadata={"help": "Experts that a token uses in a layer."})
    lora_alpha: float = field(
        default=16.0,
        metadata={"help": "Numerator of the default scaling lora_alpha / expert_rank."},
    )
    use_rslora: bool = field(
        default=False,
        metadata={"help": "Scale by lora_alpha / sqrt(expert_rank) instead (arXiv 2312.03732)."},
    )
    init_lora_weights: bool | str = field(
        default=True,
        metadata={
            "help": "True: A as in nn.Linear, B zero; 'gaussian': A normal with 1 / rank, B zero; "
            "False: A and B as in nn.Linear, so that a new adapter changes the model."
        },
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
    # Known only to be refused with the reason; see _REFUSED.
    bias: InitVar[Any] = "none"  # as an attribute PEFT reads it
    rank_pattern: InitVar[Any] = None
    alpha_pattern: InitVar[Any] = None
    target_parameters: InitVar[Any] = None
    trainable_token_indices: InitVar[Any] = None
    use_dora: InitVar[Any] = None
    layer_replication: InitVar[Any] = None

    def __post_init__(self, *refused: Any) -> None:
        super().__post_init__()
        self.peft_type = PeftType(PEFT_TYPE)
        for (name, (off, instead)), given in zip(_REFUSED.items(), refused, strict=True):
            if given is not None and given not in off:
                raise ValueError(f"{name} is {given!r}, which a LoRA-MoE does not have: {instead}")
        if self.experts is not None:
            self._take_experts(self.experts)
        for name in ("num_experts", "expert_rank", "top_k"):
            value = getattr(self, name)
            if (value is not None or name == "top_k" or self.experts is None) and (
                not isinstance(value, int) or value < 1
            ):
                raise ValueError(f"{name} is {value!r}, expected an integer >= 1")
        if self.r is not None and self.experts is None:
            raise ValueError(
                f"r is {self.r}, expected expert_rank={self.r}: each expert has a rank"
            )
        if self.top_k == 1 and self.experts is None and self.num_experts != 1:
            warnings.warn(
                "top_k is 1: the one expert's weight is always 1, so the router learns from the "
                "load-balance loss alone; 2 or more let it learn which expert helps",
                stacklevel=3,
            )
        if not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha is {self.lora_alpha!r}, expected a number > 0")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout is {self.lora_dropout!r}, expected 0 <= p < 1")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"init_lora_weights is {self.init_lora_weights!r}, expected True, False or "
                "'gaussian': others change the base, or are for a single pair of A and B"
            )
        self._check_layers()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]

    def _take_experts(self, experts: dict[str, list[dict[str, Any]]]) -> None:
        """Makes the other fields say what `experts` says, or nothing.

        Raises:
            ValueError: it has no expert at all, or none in a module.
        """
        if not (experts and all(experts.values())):
            empty = next((m for m, listed in experts.items() if not listed), None)
            where = "" if empty is None else f" for {empty!r}"
            raise ValueError(
                f"experts has none{where}: expected a module at least, and in each at least one; "
                "a module without experts is left out"
            )
        self.experts = experts
        counts = {len(listed) for listed in experts.values()}
        ranks = {expert["rank"] for listed in experts.values() for expert in listed}
        self.num_experts = counts.pop() if len(counts) == 1 else None
        self.expert_rank = ranks.pop() if len(ranks) == 1 else None
        for name, off in _RULES.items():
            setattr(self, name, off)

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is None and self.layers_pattern:
            raise ValueError("layers_pattern is given without layers_to_transform")
        if layers is not None:
            if not all(
                isinstance(n, int) for n in (layers if isinstance(layers, list) else [layers])
            ):
                raise ValueError(
                    f"layers_to_transform is {layers!r}, expected a number or a list of numbers"
                )
            if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
                raise ValueError(
                    "layers_to_transform goes with a list in target_modules, or 'all-linear', not "
                    "with a pattern, which can name the layers itself"
                )

    def experts_of(self, module: str) -> tuple[Expert, ...]:
        """The experts of a module, by its full name."""
        if self.experts is not None:
            return tuple(Expert(e["rank"], e["scaling"]) for e in self.experts[module])
        assert self.expert_rank is not None
        assert self.num_experts is not None
        rank = self.expert_rank
        scaling = self.lora_alpha / (rank**0.5 if self.use_rslora else rank)
        return (Expert(rank, scaling),) * self.num_experts

    def to_dict(self) -> dict[str, Any]:
        """The value of `adapter_config.json`; `experts` makes the uniform fields superfluous."""
        value = super().to_dict()
        if self.experts is not None:
            value["target_modules"] = sorted({module.split(".")[-1] for module in self.experts})
            for name in ("num_experts", "expert_rank", *_RULES):
                del value[name]
        return value
