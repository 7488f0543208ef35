"""The LoRA-MoE layer: a frozen linear layer `W` and its experts in fused form.

    z  = W_r x                                        router logits in float32    [..., E]
    w  = softmax over the top_k largest z             GuiLoMo, arXiv 2506.14646   [..., E]
    y  = W x + B ((A x) * (w S))                      S[e, row] = s_e if the row is expert e's

`A [R, in]` and `B [out, R]` hold all experts' rows one after another, R the sum of their ranks,
so that neither tokens nor experts are looped over. `guilomo_serve.ops.reference` is the same
maths expert by expert.

While a search runs, masks of 0 and 1 say which experts (`M_E`, see routing.py) and which of their
rank rows (`M_R`) are there, and have derivatives. Without any expert the layer is `W x`:

    y  = W x + B ((A x) * (w(M_E) (S * M_R)))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional as F

from guilomo_serve.adapter import Expert, linear_sizes
from guilomo_train.lora_moe.config import LoraMoeConfig
from guilomo_train.lora_moe.routing import masked_top_k_softmax, top_k_softmax


@dataclass
class Masks:
    """Selection masks of one layer during a search: `experts [E]`, `ranks [E, r]`, 0 or 1."""

    experts: torch.Tensor
    ranks: torch.Tensor


@dataclass
class Routing:
    """What the router of one layer did in the last forward pass.

    `logits [..., E]` and `weights [..., E]` (0 where not chosen); `available [E]` says which
    experts could be chosen.
    """

    logits: torch.Tensor
    weights: torch.Tensor
    available: torch.Tensor | None


class LoraMoeLayer(BaseTunerLayer):
    """The adapters of one linear layer; see the head of this file for the maths."""

    adapter_layer_names: tuple[str, ...] = ("lora_A", "lora_B", "lora_router")
    other_param_names: tuple[str, ...] = ("lora_dropout",)

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_router = nn.ModuleDict()
        self.lora_dropout = nn.ModuleDict()
        self.top_k: dict[str, int] = {}
        self.experts: dict[str, tuple[Expert, ...]] = {}
        self._expand: dict[str, torch.Tensor] = {}  # made where it is needed, see _expand_on
        self.masks: Masks | None = None
        self.keep_routing = False
        self.routing: Routing | None = None
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        sizes = linear_sizes(base_layer)
        assert sizes is not None
        self.out_features, self.in_features = sizes

    def update_layer(
        self, adapter_name: str, experts: tuple[Expert, ...], config: LoraMoeConfig
    ) -> None:
        """Adds (or replaces) an adapter; the router starts as `nn.Linear` does."""
        rank = sum(e.rank for e in experts)
        self.experts[adapter_name] = experts
        self.top_k[adapter_name] = config.top_k
        self._expand.pop(adapter_name, None)
        self.lora_dropout[adapter_name] = (
            nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        )
        self.lora_A[adapter_name] = nn.Linear(self.in_features, rank, bias=False)
        self.lora_B[adapter_name] = nn.Linear(rank, self.out_features, bias=False)
        if config.init_lora_weights is not False:
            nn.init.zeros_(_weight(self.lora_B[adapter_name]))
        if config.init_lora_weights == "gaussian":
            for rows in _weight(self.lora_A[adapter_name]).split([e.rank for e in experts]):
                nn.init.normal_(rows, std=1 / len(rows))
        if len(experts) > 1:
            self.lora_router[adapter_name] = nn.Linear(self.in_features, len(experts), bias=False)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        if adapter_name in self.lora_router:
            self.lora_router[adapter_name].float()  # near ties are decided in float32 everywhere

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        for kept in (self.experts, self.top_k, self._expand):
            kept.pop(adapter_name, None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "a LoRA-MoE adapter cannot be merged: its weights depend on the token; "
            "serve it with guilomo-serve"
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False


class LoraMoeLinear(nn.Module, LoraMoeLayer):
    """A linear layer with LoRA-MoE adapters; quantised bases work as they offer a forward."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        experts: tuple[Expert, ...],
        config: LoraMoeConfig,
    ) -> None:
        super().__init__()
        LoraMoeLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, experts, config)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`x [..., in]` to `[..., out]`, in the base layer's dtype."""
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for adapter in self.active_adapters:  # type: ignore[union-attr]
            if adapter in self.lora_A:
                y = y + self._delta(adapter, x).to(y.dtype)
        return y

    def _delta(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        # The parameters stay in their own (float32) precision; the products run in x's.
        b = _weight(self.lora_B[adapter]).to(x.dtype)
        return F.linear(self.rank_rows(adapter, x), b)

    def rank_rows(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """`(A x) * (w S)`, `[..., R]`: what B makes the adapter's output of."""
        a = _weight(self.lora_A[adapter]).to(x.dtype)
        expand = self._expand_on(adapter, x.device)
        if self.masks is not None:
            expand = expand.to(self.masks.ranks.dtype) * self.masks.ranks.reshape(1, -1)
        h = F.linear(self.lora_dropout[adapter](x), a)
        if adapter in self.lora_router:
            gates = self._expert_weights(adapter, x) @ expand
        else:  # one expert, whose weight is 1 while it is there
            gates = expand[0] if self.masks is None else self.masks.experts @ expand
        return h * gates.to(x.dtype)

    def _expert_weights(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """`[..., E]` in the router's precision, at least float32."""
        weight = _weight(self.lora_router[adapter])
        weight = weight.to(_at_least_float32(weight))
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(weight.dtype), weight)
            if self.masks is None:
                weights = top_k_softmax(logits, self.top_k[adapter])
            else:
                weights = masked_top_k_softmax(logits, self.masks.experts, self.top_k[adapter])
        if self.keep_routing:
            available = None if self.masks is None else self.masks.experts.detach() > 0
            self.routing = Routing(logits, weights, available)
        return weights

    def _expand_on(self, adapter: str, device: torch.device) -> torch.Tensor:
        # Not when the layer is made: that may be on the meta device, and weights be put in later.
        matrix = self._expand.get(adapter)
        if matrix is None or matrix.device != device:
            with torch.inference_mode(False):  # training goes on with it
                matrix = self._expand[adapter] = expansion(self.experts[adapter], device)
        if adapter in self.lora_router:
            matrix = matrix.to(_at_least_float32(_weight(self.lora_router[adapter])))
        return matrix

    def __repr__(self) -> str:
        return "guilomo." + super().__repr__()


def _weight(linear: nn.Module) -> torch.Tensor:
    """The weight of a module that is an `nn.Linear`, as type checkers cannot know."""
    return linear.weight  # type: ignore[return-value]


def _at_least_float32(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def expansion(experts: tuple[Expert, ...], device: torch.device | str = "cpu") -> torch.Tensor:
    """`S [E, R]`: an expert's scaling in the columns of its rank rows, 0 elsewhere.

    `weights @ S` spreads expert weights over rows; as a product it is cheaper than an index,
    above all backwards.
    """
    blocks = [torch.full((1, e.rank), e.scaling, device=device) for e in experts]
    return torch.block_diag(*blocks)
