"""The loss of a LoRA-MoE model, on TRL's trainer.

    L = mean NLL of the completion's tokens + balance_coefficient * L_balance

L_balance is the load-balance loss of Switch Transformers (Fedus et al. 2022, eq. 4), averaged
over layers: `E sum_e f_e P_e` with f_e the share of choices that fell on expert e and P_e the
mean router probability of e, over the tokens that are not padding. It is 1 for an even load.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from trl import SFTTrainer

from guilomo_train.health import RouterFigures, RouterHealth
from guilomo_train.lora_moe import LoraMoeLayer
from guilomo_train.lora_moe.layer import Routing


class LoraMoeTrainer(SFTTrainer):
    """TRL's SFTTrainer with the load-balance loss.

    The loss itself is computed here and not by TRL: on a CPU TRL scores every position against
    the whole vocabulary, prompts and padding too, which costs a small model a quarter of its
    step.

    Args:
        balance_coefficient: weight of the load-balance loss; 0 turns it off.
    """

    def __init__(self, *args: Any, balance_coefficient: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.balance_coefficient = balance_coefficient
        self.layers = [m for m in self.model.modules() if isinstance(m, LoraMoeLayer)]
        self.health = RouterHealth()
        for layer in self.layers:
            layer.keep_routing = balance_coefficient > 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        if return_outputs:
            raise NotImplementedError("evaluate with guilomo_train.evaluate, not in the trainer")
        health = self.health if self.model.training else None
        nll, balance = self.losses(model, inputs, num_items_in_batch, health)
        if not self.model.training:
            return nll
        self._metrics["train"]["nll"].append(nll.item())
        if self.balance_coefficient > 0:
            self._metrics["train"]["balance"].append(balance.item())
        # With a token count of the whole accumulated batch, the sum over its parts is the mean.
        parts = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        return nll + self.balance_coefficient * balance / parts

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs.update(
            self.health.scalars(lambda counts: self.accelerator.reduce(counts, reduction="sum"))
        )
        super().log(logs, start_time)

    def routers(self) -> dict[str, RouterFigures]:
        """Health of each router in the last steps, by its module's full name."""
        names = [
            name.removeprefix("base_model.model.")
            for name, layer in self.model.named_modules()
            if isinstance(layer, LoraMoeLayer) and len(layer.router) > 0
        ]
        return {names[place]: figures for place, figures in self.health.figures.items()}

    def losses(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        num_items: torch.Tensor | int | None = None,
        health: RouterHealth | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The completion's NLL and the load-balance loss of one batch, both differentiable.

        Args:
            model: the (possibly wrapped) model.
            inputs: `input_ids`, `attention_mask` and `labels` (-100: not scored), `[B, S]`.
            num_items: tokens to divide the NLL by; None for those of this batch.
            health: counts what the routers did.
        """
        nll = completion_nll(model, inputs, num_items)
        if self.balance_coefficient == 0:
            return nll, nll.new_zeros(())
        routings = [layer.routing for layer in self.layers if layer.routing is not None]
        balance = balance_loss(routings, inputs["attention_mask"], health)
        for layer in self.layers:
            layer.routing = None  # it holds the graph
        return nll, balance


def completion_nll(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Negative log-likelihood of the labelled tokens, per token.

    The output layer runs on the columns alone in which some row of the batch has a label.
    """
    targets = inputs["labels"][:, 1:]
    scored = targets != -100
    columns = scored.any(dim=0).nonzero().squeeze(-1)
    logits = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        logits_to_keep=columns,
        use_cache=False,
    ).logits
    kept = scored[:, columns]
    wide = logits[kept].to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(wide, targets[:, columns][kept], reduction="sum")
    return nll / (scored.sum() if num_items is None else num_items)


def balance_loss(
    routings: list[Routing], attention_mask: torch.Tensor, health: RouterHealth | None = None
) -> torch.Tensor:
    """The mean load-balance loss of layers; see the head of this file.

    Args:
        routings: what the routers did; tensors `[B, S, E]`, E may differ from layer to layer.
        attention_mask: [B, S], 0 for padding.
        health: counts what the routers did.
    """
    if not routings:
        return torch.zeros((), device=attention_mask.device)
    tokens = attention_mask.bool()
    # One computation for all layers with as many experts: a loop over layers costs more calls
    # than a layer itself.
    by_experts: dict[int, list[int]] = defaultdict(list)
    for place, routing in enumerate(routings):
        by_experts[routing.logits.shape[-1]].append(place)
    total = torch.zeros((), device=attention_mask.device)
    for places in by_experts.values():
        same = [routings[place] for place in places]
        logits = torch.stack([r.logits[tokens] for r in same])  # [layers, T, E]
        chosen = torch.stack([r.weights.detach()[tokens] for r in same]) > 0
        experts = torch.tensor(logits.shape[-1], device=logits.device)
        masks = [r.available for r in same if r.available is not None]
        available = None
        if masks:  # a search runs: all layers have one
            available = torch.stack(masks)
            logits = logits.masked_fill(~available[:, None], -torch.inf)
            experts = available.sum(-1)
        choices = chosen.to(logits.dtype).mean(1)
        share = choices / choices.sum(-1, keepdim=True)
        probabilities = torch.softmax(logits, dim=-1)
        probability = probabilities.mean(1)
        if health is not None:
            health.add(tuple(places), choices, probabilities.detach(), available)
        total = total + (experts * (share * probability).sum(-1)).sum()
    return total / len(routings)
