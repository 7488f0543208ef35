"""Copies beside the steps that come as late as they may: a GPU's stream at its slowest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from guilomo_serve.ops.memory import Beside


class LateCopies(Beside):
    """Each copy is done when a step waits for it, after those that were begun before."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self._queue: list[Callable[[], Any]] = []

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        self._queue.append(partial(target.copy_, source))
        return self._queue[-1]

    def wait(self, copy: Any) -> None:
        while copy in self._queue:
            self._queue.pop(0)()

    def wait_for_all(self) -> None:
        while self._queue:
            self._queue.pop(0)()
