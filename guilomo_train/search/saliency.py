"""Allocations without a search: what one look at the frozen base says that rank rows are worth.

All scores are of G = dL/dW, the mean gradient of the frozen weight W over some batches:

    gradient  ||G||^2 (Frobenius): by how much a small step of W lowers the loss
    snip      sum |W * G|: how much the loss depends on W (after SNIP, Lee et al. 2019)
    spectrum  sigma_i^2 of G: the best step of rank R has the R largest, so row i is worth the i-th

The first two are scores of a module, without a curve over its rows. There row i is worth 1/i of the
score, so that `fill` gives rows in proportion to the score over a row's parameters.

All three depend on the scale of a layer's inputs or weights, on which its function does not. So
there is one more:

    whitened  sigma_i^2 of G S^(-1/2), S the mean of x x^T over inputs x: how much the i-th row of
              the best step gains, up to a factor, if the loss curves alike in all layers' outputs
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from guilomo_train.search.fill import shared
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
        spectra.append(_spectrum(gradient, rows))
    return {
        "gradient": shared(torch.stack(norms), rows),
        "snip": shared(torch.stack(snips), rows),
        "spectrum": torch.stack(spectra),
    }


def whitened_worths(model: nn.Module, space: SearchSpace, losses: Sequence[Loss]) -> torch.Tensor:
    """`[M, E * r]` of the whitened score, as `one_shot_worths`; each loss is called twice."""
    rows = space.max_experts * space.max_rank
    gradients, moments = mean_gradients(model, space, losses), input_moments(model, space, losses)
    return torch.stack(
        [_spectrum(gradients[n] @ _inverse_root(moments[n]), rows) for n in space.linears]
    )


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
def input_moments(
    model: nn.Module, space: SearchSpace, losses: Iterable[Loss]
) -> dict[str, torch.Tensor]:
    """The mean of x x^T `[in, in]` over all inputs x of each module, in float32 at least."""
    sums = {name: torch.zeros(()) for name in space.linears}
    counts = dict.fromkeys(space.linears, 0)

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            x = inputs[0].flatten(0, -2)
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            sums[name] = sums[name].to(x) + x.T @ x
            counts[name] += len(x)

        return hook

    handles = [model.get_submodule(n).register_forward_hook(watch(n)) for n in space.linears]
    try:
        for loss in losses:
            loss()
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: (sums[name] / max(counts[name], 1)).expand(in_features, in_features)
        for name, (_, in_features) in space.linears.items()
    }


def _spectrum(matrix: torch.Tensor, rows: int) -> torch.Tensor:
    """The squares of the largest singular values `[rows]`, 0 beyond the last, on the CPU."""
    largest = torch.linalg.svdvals(matrix)[:rows].square().cpu()
    return nn.functional.pad(largest, (0, rows - len(largest)))


def _inverse_root(moment: torch.Tensor) -> torch.Tensor:
    """S^(-1/2); 0 in directions that no input has."""
    values, vectors = torch.linalg.eigh(moment)
    least = values.max() * len(values) * torch.finfo(values.dtype).eps
    roots = torch.where(values > least, values.clamp_min(least).rsqrt(), 0.0)
    return vectors * roots @ vectors.T


@torch.no_grad()
def _weight(layer: nn.Module, in_features: int) -> torch.Tensor:
    """W `[out, in]`; of a quantised layer what it computes with."""
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    if weight.is_floating_point():
        return weight.detach()
    identity = torch.eye(in_features, device=weight.device)
    return (layer(identity) - layer(torch.zeros_like(identity[:1]))).T
