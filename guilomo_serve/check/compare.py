"""What counts as equal: log-probabilities, chosen experts and the products of served layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from guilomo_serve.check.hf import Modules, Wanted
from guilomo_serve.check.served import Served
from guilomo_serve.ops.selfcheck import PRODUCT_TOLERANCE, product_error


@dataclass(frozen=True)
class Tolerance:
    """What rounding may do.

    Attributes:
        product: of a token's product, as a share of its norm.
        near_tie: two router logits as far apart may change places, as a share of the spread of the
            module's logits: transformers' activations are rounded in another order.
        agreed: the share of equal choices below which near ties are too many.
        base: mean difference of the base's own log-probabilities, in nats.
        slack: by which the adapter's mean difference may exceed twice the base's own, in nats.
    """

    product: float
    near_tie: float
    agreed: float
    base: float
    slack: float


FLOAT32 = Tolerance(
    product=PRODUCT_TOLERANCE[torch.float32], near_tie=0.01, agreed=0.99, base=2e-3, slack=2e-3
)
HALF = Tolerance(
    product=PRODUCT_TOLERANCE[torch.bfloat16], near_tie=0.15, agreed=0.97, base=0.1, slack=0.02
)

# Rounding the sum and its second part is half an eps each; sums of many parts in float32 are more.
_MOST_UNSUMMED = 2.0


@dataclass(frozen=True)
class Row:
    """One prompt compared; errors are differences of log-probabilities in nats.

    Attributes:
        tokens: of the prompt.
        error: mean with the adapter.
        worst: the largest with the adapter.
        base_error: mean without it.
        choices: tokens times modules that choose among experts.
        agreed: choices that are equal.
        clear: the first module where a choice differs though transformers' was no near tie, and
            no choice of the token did before.
        product_error: the largest of a module and token, as a share of the product's norm.
        product: the first module whose product differs, with by how much; None if all are equal.
    """

    tokens: int
    error: float
    worst: float
    base_error: float
    choices: int
    agreed: int
    clear: str | None
    product_error: float
    product: str | None


def tolerance_of(dtype: torch.dtype) -> Tolerance:
    return FLOAT32 if dtype == torch.float32 else HALF


def compare(
    base: Served, ours: Served, base_wanted: Wanted, wanted: Wanted, modules: Modules
) -> Row:
    """Compares one prompt: vLLM without and with the adapter, transformers likewise."""
    tolerance = tolerance_of(next(iter(ours.products.values())).x.dtype)
    worst_product, differs = 0.0, None
    for name, product in ours.products.items():
        error = product_error(product.x, product.added, modules.weights.get(name), modules.top_k)
        worst_product = max(worst_product, error)
        if differs is None and not error <= tolerance.product:
            differs = f"{name}: the product is off by {error:.2%}"
        if differs is None and not product.unsummed <= _MOST_UNSUMMED:
            differs = f"{name}: the product is not what the layer's output grows by"
    missing = sorted(modules.weights.keys() - ours.products.keys())
    if missing:
        differs = f"{missing[0]}: vLLM adds nothing"

    choices = agreed = 0
    clear = None
    # Behind a near tie that fell the other way a token's inputs are others; in the model's order.
    as_wanted = torch.ones(len(ours.logprobs) + 1, dtype=torch.bool)
    for name, logits in wanted.router_logits.items():
        if logits.shape[-1] <= modules.top_k or name not in ours.products:
            continue
        router = modules.weights[name].router
        assert router is not None
        served = torch.nn.functional.linear(ours.products[name].x.float(), router)
        same, margin = compare_choices(served, logits, modules.top_k)
        choices += same.numel()
        agreed += int(same.sum())
        is_clear = margin >= tolerance.near_tie * logits.std()
        if clear is None and bool((as_wanted & ~same & is_clear).any()):
            clear = name
        as_wanted &= same

    errors = (ours.logprobs - wanted.logprobs).abs()
    return Row(
        tokens=len(errors) + 1,
        error=errors.mean().item(),
        worst=errors.max().item(),
        base_error=(base.logprobs - base_wanted.logprobs).abs().mean().item(),
        choices=choices,
        agreed=agreed,
        clear=clear,
        product_error=worst_product,
        product=differs,
    )


def compare_choices(
    ours: torch.Tensor, wanted: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each token's chosen set is the same [T], and by how much `wanted` was clear [T].

    Args:
        ours, wanted: router logits [T, E], E > top_k.
        top_k: experts that a token uses.
    """
    ranked = wanted.sort(dim=-1, descending=True).values
    sets = [logits.topk(top_k, dim=-1).indices.sort(dim=-1).values for logits in (ours, wanted)]
    return (sets[0] == sets[1]).all(-1), ranked[:, top_k - 1] - ranked[:, top_k]


def difference(rows: Sequence[Row], tolerance: Tolerance, quantized: bool) -> str | None:
    """What differs first, over all prompts; None if nothing does.

    On a quantised base vLLM and transformers round activations to a few bits in kernels of their
    own, so that what is behind the first layer differs without any adapter. There the products
    alone say whether a choice is right, and log-probabilities may be as far apart as the base's.
    """
    for number, row in enumerate(rows, 1):
        if row.product is not None:
            return f"prompt {number}, {row.product}"
    tokens = sum(row.tokens - 1 for row in rows)
    error = sum(row.error * (row.tokens - 1) for row in rows) / tokens
    base_error = sum(row.base_error * (row.tokens - 1) for row in rows) / tokens
    if not quantized:
        if not base_error <= tolerance.base:
            worst = max(range(len(rows)), key=lambda i: rows[i].base_error)
            return (
                f"prompt {worst + 1}, without the adapter: log-probabilities differ by "
                f"{rows[worst].base_error:.4f}"
            )
        for number, row in enumerate(rows, 1):
            if row.clear is not None:
                return f"prompt {number}, {row.clear}: other experts are chosen"
        choices, agreed = sum(row.choices for row in rows), sum(row.agreed for row in rows)
        if agreed < tolerance.agreed * choices:
            return f"other experts are chosen in {1 - agreed / choices:.1%} of all choices"
    if not error <= 2 * base_error + tolerance.slack:
        worst = max(range(len(rows)), key=lambda i: rows[i].error)
        return f"prompt {worst + 1}: log-probabilities differ by {rows[worst].error:.4f}"
    return None


def table(rows: Sequence[Row]) -> str:
    """The rows as text; log-probabilities in nats."""
    head = ("prompt", "tokens", "mean", "largest", "base", "choices", "equal", "product")
    lines = ["".join(f"{cell:>9}" for cell in head)]
    for number, row in enumerate(rows, 1):
        numbers = f"{row.error:>9.4f}{row.worst:>9.4f}{row.base_error:>9.4f}"
        chosen = f"{row.choices:>9}{row.agreed:>9}" if row.choices else f"{'-':>9}{'-':>9}"
        lines.append(f"{number:>9}{row.tokens:>9}{numbers}{chosen}{row.product_error:>9.2%}")
    return "\n".join(lines)
