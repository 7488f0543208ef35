"""Allocations without a search: what one look at the frozen base says that rank rows are worth.

All scores are of G = dL/dW, the mean gradient of the frozen weight W over some batches:

    gradient  ||G||^2 (Frobenius): by how much a small step of W lowers the loss
    snip      sum |W * G|: how much the loss depends on W (after SNIP, Lee et al. 2019)
    spectrum  sigma_i^2 of G: the best step of rank R has the R largest, so row i is worth the i-th

The first two are scores of a module, without a curve over its rows. There row i is worth 1/i of the
score, so that `fill` gives rows in proportion to the score over a row's parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn

from guilomo_train.search.hypergradient import Loss
from guilomo_train.search.space import SearchSpace

Score = Literal["gradient", "snip", "spectrum"]


def one_shot_worths(
    model: nn.Module, space: SearchSpace, losses: Iterable[Loss]
) -> dict[Score, torch.Tensor]:
    """What each row of each module is worth by each score, as `fill` takes it.

    Memory: G of all modules at once, as large as their weights in float32.

    Args:
        model: the base. Neither `.grad` nor `requires_grad` of its parameters is touched.
        space: its linear layers, quantised ones too.
        losses: each a mean over a batch; called once.

    Returns:
        `[M, E * r]` on the CPU.
    """
    gradients = mean_gradients(model, space, losses)
    rows = space.max_experts * space.max_rank
    norms, snips, spectra = [], [], []
    for name, gradient in gradients.items():
        weight = _weight(model.get_submodule(name), gradient.shape[1])
        norms.append(gradient.square().sum().cpu())
        snips.append((weight * gradient).abs().sum().cpu())
        largest = torch.linalg.svdvals(gradient)[:rows].square().cpu()
        spectra.append(nn.functional.pad(largest, (0, rows - len(largest))))
    return {
        "gradient": shared(torch.stack(norms), rows),
        "snip": shared(torch.stack(snips), rows),
        "spectrum": torch.stack(spectra),
    }


def shared(scores: torch.Tensor, rows: int) -> torch.Tensor:
    """Worths `[M, rows]` of scores `[M]` that have no curve: 1/i of it for row i."""
    return scores[:, None] / torch.arange(1, rows + 1)


def mean_gradients(
    model: nn.Module, space: SearchSpace, losses: Iterable[Loss]
) -> dict[str, torch.Tensor]:
    """dL/dW `[out, in]` of each module, the mean over losses, in float32 at least.

    A layer that no loss depends on has 0.
    """
    sums = {name: torch.zeros(()) for name in space.linears}
    # Added to every layer's output, so that autograd goes through all of them, frozen as they are.
    zero = torch.zeros((), requires_grad=True)

    def watch(name: str) -> Callable[..., torch.Tensor]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            x = inputs[0].detach().flatten(0, -2)

            def add(by_output: torch.Tensor) -> None:
                precise = torch.promote_types(x.dtype, torch.float32)
                by_output = by_output.flatten(0, -2).to(precise)
                sums[name] = sums[name].to(by_output) + by_output.T @ x.to(precise)

            output = output + zero
            output.register_hook(add)
            return output

        return hook

    handles = [model.get_submodule(n).register_forward_hook(watch(n)) for n in space.linears]
    count = 0
    try:
        for loss in losses:
            torch.autograd.grad(loss(), zero)
            count += 1
    finally:
        for handle in handles:
            handle.remove()
    return {name: (sums[name] / count).expand(shape) for name, shape in space.linears.items()}


@torch.no_grad()
def _weight(layer: nn.Module, in_features: int) -> torch.Tensor:
    """W `[out, in]`; of a quantised layer what it computes with."""
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    if weight.is_floating_point():
        return weight.detach()
    identity = torch.eye(in_features, device=weight.device)
    return (layer(identity) - layer(torch.zeros_like(identity[:1]))).T
