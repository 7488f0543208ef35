"""The upper level of a search: what is drawn in a step, and how the selection vectors move.

It knows layers and losses alone, so that a search runs the same under TRL's trainer (trainer.py)
and on a bare model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from guilomo_train.lora_moe.layer import LoraMoeLayer, Masks
from guilomo_train.search.allocation import Allocation
from guilomo_train.search.estimators import AdamSteps, Estimator, MarginalWorth
from guilomo_train.search.hypergradient import (
    Loss,
    Reduce,
    UnrolledStep,
    hypergradient,
    unchanged,
)
from guilomo_train.search.selection import SelectionVectors

# The share of a search in which draws narrow from the whole space to the budget.
_NARROWING = 0.7


class UpperLevel:
    """Selection vectors, how they learn, and the layers they choose for.

    Args:
        layers: the adapted layers, in the order of the selection's modules.
        selection: the selection vectors.
        estimator: how they learn; see estimators.py.
        steps: upper steps that the search will take.
        learning_rate: of Adam, for the estimators that use it.
        seed: of what is drawn.
    """

    def __init__(
        self,
        layers: Sequence[LoraMoeLayer],
        selection: SelectionVectors,
        *,
        estimator: Estimator,
        steps: int,
        learning_rate: float,
        seed: int,
    ) -> None:
        self.layers = layers
        self.selection = selection
        self.learner: MarginalWorth | AdamSteps
        if estimator == "marginal":
            self.learner = MarginalWorth(selection, steps)
        else:
            self.learner = AdamSteps(selection, estimator, learning_rate)
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = steps
        self.draws = 0

    def draw(self, online: bool = False) -> None:
        """Draws the masks of one step and puts them into the layers.

        Args:
            online: the next backward pass leaves its gradient in the masks, for `step_online`.
        """
        self.selection.narrow(min(1.0, self.draws / (_NARROWING * self.steps)))
        self.draws += 1
        self.drawn = self.selection.draw(self.generator)
        self.masks = [mask.requires_grad_(online) for mask in self._on_device()]
        self._apply(*self.masks)

    def step_online(self, reduce: Reduce = unchanged) -> None:
        """Moves the selection vectors by what the last backward pass left in the masks.

        Args:
            reduce: makes one gradient of those of several processes.
        """
        experts, ranks = (mask.grad for mask in self.masks)
        assert experts is not None
        assert ranks is not None
        self._learn(experts, ranks, reduce)

    def step(
        self,
        train_losses: Sequence[Loss],
        validation_losses: Sequence[Loss],
        weights: Sequence[torch.Tensor],
        unrolled: UnrolledStep | None,
        reduce: Reduce = unchanged,
    ) -> None:
        """Moves the selection vectors by held-out rows, under the masks that were drawn.

        Weights, their gradients and their optimiser stay as they are.

        Args:
            train_losses: of the model on the parts of this step's batch, whose sum is its loss.
            validation_losses: likewise, of a batch of held-out rows.
            weights: the lower level's parameters.
            unrolled: their next step, for second order; None for first order.
            reduce: makes one gradient of those of several processes.
        """
        masks = [mask.requires_grad_() for mask in self._on_device()]
        self._apply(*masks)
        experts, ranks = hypergradient(
            train_losses, validation_losses, weights, masks, unrolled, reduce=reduce
        )
        self._learn(experts, ranks, reduce)

    def _learn(self, experts: torch.Tensor, ranks: torch.Tensor, reduce: Reduce) -> None:
        gradients = (reduce(g).to(self.drawn.experts) for g in (experts, ranks))
        self.learner.step(self.drawn, *gradients)

    def allocation(self) -> Allocation:
        """What the vectors have come to choose."""
        return self.learner.allocation()

    def findings(self) -> dict[str, Any]:
        """How sure the evidence is, for a run's record; nothing of estimators that do not say."""
        return self.learner.findings()

    def settle(self) -> Allocation:
        """Puts the masks of the allocation found into the layers, so that they compute what its
        adapter does and no longer what the last step drew."""
        found = self.allocation()
        space = self.selection.space
        counts = torch.tensor([len(ranks) for ranks in found.ranks.values()])
        ranks = torch.zeros(len(counts), space.max_experts, dtype=torch.long)
        for module, listed in enumerate(found.ranks.values()):
            ranks[module, : len(listed)] = torch.tensor(listed, dtype=torch.long)
        device = self._device
        experts = torch.arange(space.max_experts) < counts[:, None]
        rows = torch.arange(space.max_rank) < ranks[..., None]
        self._apply(experts.float().to(device), rows.float().to(device))
        return found

    def state_dict(self) -> dict[str, Any]:
        """All that a later process needs to go on where this one stands."""
        return {
            "selection": self.selection.state_dict(),
            "learner": self.learner.state_dict(),
            "generator": self.generator.get_state(),
            "draws": self.draws,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        self.selection.load_state_dict(state["selection"])
        self.learner.load_state_dict(state["learner"])
        self.generator.set_state(state["generator"])
        self.draws = state["draws"]

    def _on_device(self) -> list[torch.Tensor]:
        """Fresh copies of the masks where the layers compute."""
        return [m.to(self._device, copy=True) for m in (self.drawn.experts, self.drawn.ranks)]

    @property
    def _device(self) -> torch.device:
        return next(self.layers[0].lora_A.parameters()).device

    def _apply(self, experts: torch.Tensor, ranks: torch.Tensor) -> None:
        for layer, e, r in zip(self.layers, experts.unbind(), ranks.unbind(), strict=True):
            layer.masks = Masks(e, r)
