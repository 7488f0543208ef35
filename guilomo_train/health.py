"""Router health: how the routers of a model share the tokens out, watched while it trains.

It counts what the load-balance loss has before it anyway, in tensors that stay on the device until
a logging step reads them. Over the tokens of a window, padding left out,

    load of an expert   share of the tokens that chose it / share it would have if all were even
                        (1: even; 0: never chosen)
    entropy             of the router's softmax over its experts / log of their number, mean over
                        tokens (1: it cannot tell them apart; 0: always certain)
    dead                chosen by less than DEAD of the tokens

A router whose experts are all used by every token (as many as top_k) has load 1 everywhere: it
only weighs them. While a search runs, an expert counts in the steps that it was there with another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

DEAD = 0.01  # of the tokens; at 2 of 8 an even load is 0.25


@dataclass(frozen=True)
class RouterFigures:
    """The health of one router: the load of each expert, entropy, and which experts are dead."""

    load: tuple[float, ...]
    entropy: float
    dead: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "load": [round(x, 4) for x in self.load],
            "entropy": round(self.entropy, 4),
            "dead": list(self.dead),
        }


@dataclass
class _Counts:
    """Sums over tokens for routers with as many experts: `[routers, E]`, and `[routers]`."""

    chosen: torch.Tensor  # tokens that chose the expert
    even: torch.Tensor  # tokens that would have, were the load even
    could: torch.Tensor  # tokens for which the expert was there
    entropy: torch.Tensor
    tokens: torch.Tensor

    def __add__(self, other: _Counts) -> _Counts:
        return _Counts(*(a + b for a, b in zip(self.tensors(), other.tensors(), strict=True)))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.chosen, self.even, self.could, self.entropy, self.tokens


_Window = dict[tuple[int, ...], _Counts]
_WINDOWS = ("counts", "last", "last_two")  # as a checkpoint has them


class RouterHealth:
    """Counts since the last `scalars`, for routers in a fixed order.

    Routers with as many experts are counted together, as the load-balance loss computes them.
    """

    def __init__(self) -> None:
        # By the places of the routers in their order.
        self._counts: _Window = {}  # of this process, since the last `scalars`
        self._last: _Window = {}  # of all processes, the window that it ended
        self._last_two: _Window = {}  # and the one before: a training's last may be short

    @property
    def figures(self) -> dict[int, RouterFigures]:
        """Those of each router, by its place in their order, over the last two windows."""
        return _figures(self._last_two)

    @torch.no_grad()
    def add(
        self,
        places: tuple[int, ...],
        choices: torch.Tensor,
        probabilities: torch.Tensor,
        available: torch.Tensor | None,
    ) -> None:
        """Counts one batch of the routers at some places.

        Args:
            places: which routers these are.
            choices: [routers, E], how many tokens chose each expert.
            probabilities: [routers, tokens, E], the routers' softmax.
            available: [routers, E], False for experts that a search has masked out.
        """
        there = torch.ones_like(choices) if available is None else available.to(choices.dtype)
        there = there * (there.sum(-1, keepdim=True) > 1)
        experts = there.sum(-1)  # [routers], 0 where the router had no choice
        routed = (experts > 0).to(choices.dtype)
        tokens = probabilities.shape[1] * routed
        chosen = choices * routed[:, None]
        batch = _Counts(
            chosen,
            there * (chosen.sum(-1) / experts.clamp(min=1))[:, None],
            there * tokens[:, None],
            torch.special.entr(probabilities).sum((1, 2)) * routed / experts.clamp(min=2).log(),
            tokens,
        )
        before = self._counts.get(places)
        self._counts[places] = batch if before is None else before + batch

    def scalars(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Figures for a log line, of the window since the last call; it ends here.

        `router_entropy` and `max_load` (of a router's experts the largest load) are means over
        routers; `dead_experts` is a share of their experts. Empty where nothing was counted.

        Args:
            reduce: sums a tensor of counts over processes.
        """
        if not self._counts:
            return {}
        window = _reduced(self._counts, reduce)
        self._counts = {}
        self._last_two = {p: c + self._last[p] if p in self._last else c for p, c in window.items()}
        self._last = window
        found = _figures(window).values()
        if not found:
            return {}
        experts = sum(len(f.load) for f in found)
        return {
            "router_entropy": sum(f.entropy for f in found) / len(found),
            "max_load": sum(max(f.load) for f in found) / len(found),
            "dead_experts": sum(len(f.dead) for f in found) / experts,
        }

    def state_dict(self, mean: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        """What another process needs to count on: plain containers and tensors.

        Args:
            mean: of a tensor over processes; each takes the mean, their sum stays what it was.
        """
        windows = (_reduced(self._counts, mean), self._last, self._last_two)
        return {
            name: {places: counts.tensors() for places, counts in window.items()}
            for name, window in zip(_WINDOWS, windows, strict=True)
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Takes what `state_dict` gave."""
        self._counts, self._last, self._last_two = (
            {
                places: _Counts(*(t.to(device) for t in tensors))
                for places, tensors in state[name].items()
            }
            for name in _WINDOWS
        )


def _reduced(window: _Window, reduce: Callable[[torch.Tensor], torch.Tensor]) -> _Window:
    return {
        places: _Counts(*(reduce(t) for t in counts.tensors())) for places, counts in window.items()
    }


def _figures(counts: _Window) -> dict[int, RouterFigures]:
    """The figures of each router that had a choice, by its place. Reads the device by tensors."""
    figures = {}
    for places, c in counts.items():
        # An expert that was never there while a search ran has no load; it counts as even.
        load = torch.where(c.even > 0, c.chosen / c.even, 1.0).tolist()
        dead = (c.chosen < DEAD * c.could).tolist()
        entropy, tokens = (c.entropy / c.tokens).tolist(), c.tokens.tolist()
        for i, place in enumerate(places):
            if tokens[i]:
                of_router = tuple(e for e, is_dead in enumerate(dead[i]) if is_dead)
                figures[place] = RouterFigures(tuple(load[i]), entropy[i], of_router)
    return dict(sorted(figures.items()))
