"""The upper level of a search: what is drawn in a step, and how the selection vectors move.

It knows layers and losses alone, so that a search runs the same under TRL's trainer (search.py)
and on a bare model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from guilomo_train.lora_moe.layer import LoraMoeLayer, Masks
from guilomo_train.search.hypergradient import UnrolledStep, hypergradient
from guilomo_train.search.selection import SelectionVectors

Loss = Callable[[], torch.Tensor]

# Adam of the selection vectors as in DARTS: little momentum, the vectors' gradients are noisy.
SELECTION_BETAS = (0.5, 0.999)


class UpperLevel:
    """Selection vectors, their optimiser, and the layers they choose for.

    Args:
        layers: the adapted layers, in the order of the selection's modules.
        selection: the selection vectors, on the layers' device.
        learning_rate: of the selection vectors.
        seed: of what is drawn.
    """

    def __init__(
        self,
        layers: Sequence[LoraMoeLayer],
        selection: SelectionVectors,
        learning_rate: float,
        seed: int,
    ) -> None:
        self.layers = layers
        self.selection = selection
        self.optimizer = torch.optim.Adam(
            selection.parameters(), lr=learning_rate, betas=SELECTION_BETAS
        )
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> None:
        """Draws the masks of one step and puts them into the layers."""
        self.noise = self.selection.noise(self.generator)
        with torch.no_grad():
            self._apply_masks()

    def step(
        self,
        train_loss: Loss,
        validation_loss: Loss,
        weights: Sequence[torch.Tensor],
        unrolled: UnrolledStep | None,
        reduce: Callable[[torch.Tensor], torch.Tensor] = lambda gradient: gradient,
    ) -> None:
        """Moves the selection vectors, under the masks that were drawn.

        Weights, their gradients and their optimiser stay as they are.

        Args:
            train_loss, validation_loss: losses of the model on a fixed batch each.
            weights: the lower level's parameters.
            unrolled: their next step, for second order; None for first order.
            reduce: makes one gradient of those of several processes.
        """

        def masked(loss: Loss) -> Loss:
            def run() -> torch.Tensor:
                self._apply_masks()
                return loss()

            return run

        vectors = list(self.selection.parameters())
        gradients = hypergradient(
            masked(train_loss), masked(validation_loss), weights, vectors, unrolled, reduce=reduce
        )
        for vector, gradient in zip(vectors, gradients, strict=True):
            vector.grad = reduce(gradient)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """All that a later process needs to go on where this one stands."""
        return {
            "selection": self.selection.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        self.selection.load_state_dict(state["selection"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])

    def _apply_masks(self) -> None:
        experts, ranks = self.selection.masks(self.noise)
        for layer, e, r in zip(self.layers, experts.unbind(), ranks.unbind(), strict=True):
            layer.masks = Masks(e, r)
