"""The loss of a LoRA-MoE model, on TRL's trainer.

    L = mean NLL of the completion's tokens + balance_coefficient * L_balance

L_balance is the load-balance loss of Switch Transformers (Fedus et al. 2022, eq. 4), averaged
over layers: `E sum_e f_e P_e` with f_e the share of choices that fell on expert e and P_e the
mean router probability of e, over the tokens that are not padding. It is 1 for an even load.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from trl import SFTConfig, SFTTrainer

from guilomo_train.errors import ConfigError, DataError, DivergedError
from guilomo_train.lora_moe import LoraMoeLayer
from guilomo_train.lora_moe.layer import Routing

_logger = logging.getLogger(__name__)


class LoraMoeTrainer(SFTTrainer):
    """TRL's SFTTrainer with the load-balance loss.

    The loss itself is computed here and not by TRL: on a CPU TRL scores every position against
    the whole vocabulary, prompts and padding too, which costs a small model a quarter of its
    step.

    Args:
        balance_coefficient: weight of the load-balance loss; 0 turns it off.

    Raises:
        ConfigError: gradient checkpointing is asked for in its reentrant form.
        DataError: no row of a data set has a token to learn from.
    """

    learning_rate_option = "--learning_rate"

    def __init__(self, *args: Any, balance_coefficient: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.gradient_checkpointing and (self.args.gradient_checkpointing_kwargs or {}).get(
            "use_reentrant"
        ):
            raise ConfigError(
                "gradient_checkpointing_kwargs has use_reentrant=True, expected False: reentrant "
                "checkpointing loses the gradient of the load-balance loss and of a search"
            )
        self.balance_coefficient = balance_coefficient
        self.layers = [m for m in self.model.modules() if isinstance(m, LoraMoeLayer)]
        for parameter in self.model.parameters():
            if parameter.requires_grad:  # TRL makes them bfloat16 where the base is quantised
                parameter.data = parameter.data.float()

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: SFTConfig, *rest: Any
    ) -> Dataset:
        """TRL's tokenized rows. TRL leaves out those of whose completion truncation leaves nothing
        and says nothing of it."""
        prepared = super()._prepare_dataset(dataset, processing_class, args, *rest)
        lost = len(dataset) - len(prepared)
        if lost:
            first = ""
            if "where" in dataset.column_names:
                kept = set(prepared["where"])
                first = f" (first: {next(w for w in dataset['where'] if w not in kept)})"
            found = (
                f"{lost} of {len(dataset)} rows have no token of their completion within "
                f"--max_length {args.max_length}{first}"
            )
            if lost == len(dataset):
                raise DataError(f"{found}; raise --max_length or shorten the prompts")
            _logger.warning("%s; they are left out", found)
        return prepared

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        if return_outputs:
            raise NotImplementedError("evaluate with guilomo_train.evaluate, not in the trainer")
        nll, balance = self.losses(model, inputs, num_items_in_batch)
        if not self.model.training:
            return nll
        self._metrics["train"]["nll"].append(self._finite(nll, "the loss"))
        if self.balance_coefficient > 0:
            self._metrics["train"]["balance"].append(balance.item())
        # With a token count of the whole accumulated batch, the sum over its parts is the mean.
        parts = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        return nll + self.balance_coefficient * balance / parts

    def losses(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        num_items: torch.Tensor | int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The completion's NLL and the load-balance loss of one batch, both differentiable.

        Args:
            model: the (possibly wrapped) model.
            inputs: `input_ids`, `attention_mask` and `labels` (-100: not scored), `[B, S]`.
            num_items: tokens to divide the NLL by; None for those of this batch.
        """
        if self.balance_coefficient == 0:
            nll = completion_nll(model, inputs, num_items)
            return nll, nll.new_zeros(())
        # Kept in this forward pass alone: gradient checkpointing runs layers again in the backward
        # pass, and what they would keep then holds their activations until the next step.
        for layer in self.layers:
            layer.keep_routing = True
        nll = completion_nll(model, inputs, num_items)
        routings = [layer.routing for layer in self.layers if layer.routing is not None]
        balance = balance_loss(routings, inputs["attention_mask"])
        for layer in self.layers:
            layer.keep_routing, layer.routing = False, None
        return nll, balance

    def _finite(self, loss: torch.Tensor, name: str) -> float:
        """The loss as a number.

        Raises:
            DivergedError: it is not finite; going on would only spoil the weights for good.
        """
        value, step = loss.item(), self.state.global_step + 1
        if math.isfinite(value):
            return value
        if step == 1:
            raise DivergedError(
                f"{name} is {value} in the first step, before any weight has moved: the base "
                "itself gives no finite numbers; try --dtype float32, or another base"
            )
        raise DivergedError(
            f"{name} is {value} in step {step} of {self.state.max_steps}: "
            f"lower {self.learning_rate_option} ({self.args.learning_rate:g})"
        )


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


def balance_loss(routings: list[Routing], attention_mask: torch.Tensor) -> torch.Tensor:
    """The mean load-balance loss of layers; see the head of this file.

    Args:
        routings: what the routers did; tensors `[B, S, E]`, E may differ from layer to layer.
        attention_mask: [B, S], 0 for padding.
    """
    if not routings:
        return torch.zeros((), device=attention_mask.device)
    tokens = attention_mask.bool()
    # One computation for all layers with as many experts: a loop over layers costs more calls
    # than a layer itself.
    by_experts: dict[int, list[Routing]] = defaultdict(list)
    for routing in routings:
        by_experts[routing.logits.shape[-1]].append(routing)
    total = torch.zeros((), device=attention_mask.device)
    for same in by_experts.values():
        logits = torch.stack([r.logits[tokens] for r in same])  # [layers, T, E]
        chosen = torch.stack([r.weights.detach()[tokens] for r in same]) > 0
        experts = torch.tensor(logits.shape[-1], device=logits.device)
        masks = [r.available for r in same if r.available is not None]
        if masks:  # a search runs: all layers have one
            available = torch.stack(masks)
            logits = logits.masked_fill(~available[:, None], -torch.inf)
            experts = available.sum(-1)
        choices = chosen.to(logits.dtype).mean(1)
        share = choices / choices.sum(-1, keepdim=True)
        probability = torch.softmax(logits, dim=-1).mean(1)
        total = total + (experts * (share * probability).sum(-1)).sum()
    return total / len(routings)
