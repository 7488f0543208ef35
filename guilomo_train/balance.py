"""The load-balance loss of routers, and how TRL's trainers get it.

It is that of Switch Transformers (Fedus et al. 2022, eq. 4), averaged over layers:
`E sum_e f_e P_e` with f_e the share of choices that fell on expert e and P_e the mean router
probability of e, over the tokens that are not padding. It is 1 for an even load. A layer with fewer
than two experts, as a search may draw it too, has none. Over several processes f_e counts the
choices of all, and P_e, in which the loss is then linear, is a sum over processes.

Supervised training has it in `LoraMoeTrainer`. Any other trainer of TRL gets it from a class of two
lines, of which `RouterWatch` is what both share:

    class BalancedDPO(BalanceLoss, DPOTrainer):
        balance_coefficient = 0.01

    trainer = BalancedDPO(model=base, peft_config=LoraMoeConfig(), ...)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from guilomo_train.health import RouterHealth
from guilomo_train.lora_moe import LoraMoeLayer
from guilomo_train.lora_moe.layer import Routing


class RouterWatch:
    """A trainer's part that knows the routers of its model: what they do in a forward pass, the
    load-balance loss of that, and their health. To be named before the trainer among the bases."""

    balance_coefficient = 0.01

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        self.layers = [m for m in trainer.model.modules() if isinstance(m, LoraMoeLayer)]
        self.health = RouterHealth()

    def keep_routings(self, keep: bool) -> None:
        """Whether the next forward pass keeps what the routers do.

        In that pass alone: gradient checkpointing runs layers again in the backward pass, and what
        they would keep then holds their activations until the next step.
        """
        for layer in self.layers:
            layer.keep_routing = keep

    def kept_routings(self) -> list[Routing]:
        """What was kept; the layers let go of it."""
        routings = [layer.routing for layer in self.layers if layer.routing is not None]
        for layer in self.layers:
            layer.keep_routing, layer.routing = False, None
        return routings

    def balance_of(
        self, routings: list[Routing], tokens: torch.Tensor, health: RouterHealth | None
    ) -> torch.Tensor:
        """The load-balance loss; its mean over the processes is that of the batch of them all.

        Args: as those of `balance_loss`.
        """
        accelerator: Any = self.accelerator  # type: ignore[attr-defined]
        return accelerator.num_processes * balance_loss(
            routings, tokens, lambda t: accelerator.reduce(t, reduction="sum"), health
        )

    def weighted(self, balance: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor:
        """The summand of a step's loss, or of a part of it; the next log line has `balance`.

        Args:
            balance: of `balance_of`.
            num_items: as the trainer's `compute_loss` is told it.
        """
        mine: Any = self
        mine._metrics["train"]["balance"].append(
            mine.accelerator.reduce(balance.detach(), reduction="mean").item()
        )
        # Either transformers takes the mean over accumulated parts, or the loss has to.
        scaled = getattr(mine, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = mine.compute_loss_func is not None or (
                mine.model_accepts_loss_kwargs and num_items is not None
            )
        parts = mine.current_gradient_accumulation_steps if scaled else 1
        return self.balance_coefficient * balance / parts

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        trainer: Any = self
        if trainer.model.training:
            logs.update(self.health.scalars(lambda t: trainer.accelerator.reduce(t, "sum")))
        parent: Any = super()
        parent.log(logs, start_time)


class BalanceLoss(RouterWatch):
    """Adds the load-balance loss to a trainer's own; to be named before it among the bases.

    It takes the routers' choices in each forward pass that a gradient will go through, so neither
    those of a reference model nor of generation; where a step has several, their mean counts. The
    trainer's log gets `balance` and the routers' health, as fine-tuning's has them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        self.balances: list[torch.Tensor] = []  # of the forward passes since the last loss
        trainer.model.register_forward_pre_hook(self._begin)
        trainer.model.register_forward_hook(self._end, with_kwargs=True)

    def _begin(self, model: nn.Module, args: Any) -> None:
        self.keep_routings(model.training and torch.is_grad_enabled())

    def _end(self, model: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
        routings = self.kept_routings()
        if not routings:
            return
        tokens = kwargs.get("attention_mask")
        if tokens is None:
            tokens = torch.ones(routings[0].logits.shape[:2], device=routings[0].logits.device)
        self.balances.append(self.balance_of(routings, tokens, self.health))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        self.balances = []
        trainer: Any = super()
        found = trainer.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.balances:  # an evaluation
            return found
        balance, self.balances = torch.stack(self.balances).mean(), []
        added = self.weighted(balance, num_items_in_batch)
        return (found[0] + added, found[1]) if return_outputs else found + added


def balance_loss(
    routings: list[Routing],
    tokens: torch.Tensor,
    over_processes: Callable[[torch.Tensor], torch.Tensor] = lambda counts: counts,
    health: RouterHealth | None = None,
) -> torch.Tensor:
    """The mean load-balance loss of layers; see the head of this file.

    Args:
        routings: what the routers did; tensors `[B, S, E]`, E may differ from layer to layer.
        tokens: [B, S], 0 for those left out: padding.
        over_processes: sums a tensor over all processes.
        health: counts what the routers did in this process.

    Returns:
        This process's summand of the loss of the batch that all processes took together.
    """
    if not routings:
        return torch.zeros((), device=tokens.device)
    tokens = tokens.bool()
    # One computation for all layers with as many experts: a loop over layers costs more calls
    # than a layer itself.
    by_experts: dict[int, list[int]] = defaultdict(list)
    for place, routing in enumerate(routings):
        by_experts[routing.logits.shape[-1]].append(place)
    experts, choices, probabilities = [], [], []  # experts to choose from: 0 for no choice
    for places in by_experts.values():
        same = [routings[place] for place in places]
        logits = torch.stack([r.logits[tokens] for r in same])  # [layers, T, E]
        chosen = torch.stack([r.weights.detach()[tokens] for r in same]) > 0
        masks = [r.available for r in same if r.available is not None]
        available = None
        if masks:  # a search runs: all layers have one
            available = torch.stack(masks)
            there = available.sum(-1)
            routed = there > 1
            # The others have no loss, but a softmax of nothing would make NaN of its gradient.
            logits = logits.masked_fill(~available[:, None] & routed[:, None, None], -torch.inf)
            experts.append(there * routed)
        else:
            experts.append(torch.full((len(same),), logits.shape[-1], device=logits.device))
        probability = torch.softmax(logits, dim=-1)
        choices.append(chosen.to(logits.dtype).sum(1))
        probabilities.append(probability.sum(1))
        if health is not None:
            health.add(tuple(places), choices[-1], probability.detach(), available)
    # Sums of all processes in one exchange: [layers, E] of each group, and the number of tokens.
    local = torch.cat([*(c.flatten() for c in choices), tokens.sum().to(choices[0]).view(1)])
    *counts, total = over_processes(local).split([*(c.numel() for c in choices), 1])
    loss = torch.zeros((), device=tokens.device)
    for number, count, probability in zip(experts, counts, probabilities, strict=True):
        share = count.view_as(probability)
        share = share / share.sum(-1, keepdim=True).clamp(min=1)
        loss = loss + (number * (share * probability / total).sum(-1)).sum()
    return loss / torch.cat(experts).count_nonzero().clamp(min=1)
