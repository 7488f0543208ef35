"""The upper gradient of the bilevel problem: dL_val/dM through one unrolled optimiser step.

    min_g  L_val(w*(M), M)     with  w*(M) = argmin_w L_train(w, M)

for the masks M that the selection vectors g choose.

As in DARTS (Liu et al. 2019, eq. 6 to 8), w* is replaced by one step of the lower optimiser,

    w' = w - eta D dL_train/dw (w, M)

with D the diagonal by which the optimiser scales a gradient (Adam: 1 / (sqrt(v) + eps), held
fixed; 1 for SGD). With v = D dL_val/dw (w', M) and w+- = w +- eps v,

    dL_val(w'(M), M)/dM = dL_val/dM (w', M)
                          - eta [dL_train/dM (w+, M) - dL_train/dM (w-, M)] / (2 eps)

First order takes eta = 0: dL_val/dM (w, M), one pass instead of three.

The weights move while the passes run and are put back bit by bit. `.grad` is neither read nor
written, and the optimiser's state is only read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

Loss = Callable[[], torch.Tensor]
Reduce = Callable[[torch.Tensor], torch.Tensor]

# ||eps v|| as a share of ||w||. Small enough for the curvature, large enough that the
# difference of two bfloat16 passes is more than rounding.
RELATIVE_STEP = 0.01


def unchanged(gradient: torch.Tensor) -> torch.Tensor:
    """The `Reduce` of one process."""
    return gradient


@dataclass(frozen=True)
class UnrolledStep:
    """The lower optimiser's step to differentiate through.

    Attributes:
        learning_rate: eta.
        train_gradient: dL_train/dw (w, M), one tensor a weight.
        scales: gives D one tensor a weight, anew at each call, so that D is never held whole;
            None for plain SGD.
    """

    learning_rate: float
    train_gradient: Sequence[torch.Tensor]
    scales: Callable[[], Iterable[torch.Tensor]] | None

    def scaled(self, gradient: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """D times a gradient, tensor by tensor."""
        if self.scales is None:
            yield from gradient
        else:
            for g, d in zip(gradient, self.scales(), strict=True):
                yield g * d


def hypergradient(
    train_losses: Sequence[Loss],
    validation_losses: Sequence[Loss],
    weights: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    unrolled: UnrolledStep | None,
    relative_step: float = RELATIVE_STEP,
    reduce: Reduce = unchanged,
) -> list[torch.Tensor]:
    """dL_val/dM; see the head of this file.

    Args:
        train_losses: of the current weights and masks, on the parts of one batch; L_train is their
            sum. Each is called anew for each pass.
        validation_losses: likewise L_val, of another batch.
        weights: the lower level's parameters w.
        masks: M, leaf tensors with `requires_grad`.
        unrolled: the step to differentiate through (second order); None for first order.
        relative_step: ||eps v|| / ||w||.
        reduce: makes one gradient of those of several processes; v needs it, so that all of them
            move the weights the same way.

    Returns:
        One gradient a mask tensor, of this process's losses.
    """
    if unrolled is None:
        return _in_masks(validation_losses, masks, weights)

    before = [w.detach().clone() for w in weights]
    eta = unrolled.learning_rate
    try:
        _move(weights, before, unrolled.scaled(unrolled.train_gradient), -eta)
        gradients = _gradient(validation_losses, [*masks, *weights])
        direct, v = gradients[: len(masks)], gradients[len(masks) :]
        # In place and tensor by tensor: a search holds no more copies of the weights than it must.
        for by_weight, scaled in zip(v, unrolled.scaled(reduce(g) for g in v), strict=True):
            by_weight.copy_(scaled)
        v_norm = _norm(v)
        if v_norm == 0:
            return list(direct)
        step = relative_step * _norm(before) / v_norm
        _move(weights, before, v, step)
        plus = _in_masks(train_losses, masks, weights)
        _move(weights, before, v, -step)
        minus = _in_masks(train_losses, masks, weights)
        return [d - eta * (p - m) / (2 * step) for d, p, m in zip(direct, plus, minus, strict=True)]
    finally:
        with torch.no_grad():
            for w, kept in zip(weights, before, strict=True):
                w.copy_(kept)


def adam_scales(
    optimizer: torch.optim.Optimizer,
    weights: Sequence[torch.Tensor],
    gradient: Sequence[torch.Tensor],
) -> Iterator[torch.Tensor]:
    """D of the Adam (or AdamW) step that would be taken now with `gradient`, tensor by tensor.

        v_t = beta2 v + (1 - beta2) gradient^2        D = 1 / (sqrt(v_t / (1 - beta2^t)) + eps)

    Where v_t is 0 Adam does not move the weight, so D is 0. The optimiser's state is not changed.
    """
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for w, g in zip(weights, gradient, strict=True):
        group = group_of[id(w)]
        beta2, state = group["betas"][1], optimizer.state.get(w, {})
        second = (1 - beta2) * g.square()
        if "exp_avg_sq" in state:
            second += beta2 * state["exp_avg_sq"]
        steps = float(state.get("step", 0)) + 1
        scale = 1.0 / ((second / (1 - beta2**steps)).sqrt() + group["eps"])
        yield scale.masked_fill_(second == 0, 0.0)


def _in_masks(
    losses: Sequence[Loss], masks: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The gradient of a sum of losses in the masks alone, one graph after the other.

    The weights are constants meanwhile, so that the layers do not keep what only a gradient in
    the weights would need: the inputs of each layer, more than the adapter itself.
    """
    learn = [w.requires_grad for w in weights]
    for w in weights:
        w.requires_grad_(False)
    try:
        return _gradient(losses, masks)
    finally:
        for w, learns in zip(weights, learn, strict=True):
            w.requires_grad_(learns)


def _gradient(losses: Sequence[Loss], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Of the sum of losses, with one graph in memory at a time."""
    gradient = list(torch.autograd.grad(losses[0](), list(inputs)))
    for loss in losses[1:]:
        for total, part in zip(gradient, torch.autograd.grad(loss(), list(inputs)), strict=True):
            total += part
    return gradient


def _norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors]))


@torch.no_grad()
def _move(
    weights: Sequence[torch.Tensor],
    start: Sequence[torch.Tensor],
    direction: Iterable[torch.Tensor],
    step: float | torch.Tensor,
) -> None:
    """`weights = start + step * direction`, in place."""
    for w, s, d in zip(weights, start, direction, strict=True):
        w.copy_(s + step * d)
