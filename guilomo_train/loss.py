"""The loss of a model on the completions of a batch."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def completion_nll(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Negative log-likelihood of the labelled tokens, per token, in nats.

    The output layer runs on the columns alone in which some row of the batch has a label.

    Args:
        model: a causal language model.
        inputs: `input_ids`, `attention_mask` and `labels` (-100: not scored), `[B, S]`; of packed
            rows `position_ids` as well, from 0 in each of them.
        num_items: what to divide by; None for the labelled tokens of this batch.

    Returns:
        A scalar, in float32 at least.
    """
    targets = inputs["labels"][:, 1:]
    scored = targets != -100
    columns = scored.any(dim=0).nonzero().squeeze(-1)
    positions = inputs.get("position_ids")
    if positions is None:
        seen = {"attention_mask": inputs["attention_mask"]}
    else:  # of packed rows: without a mask transformers keeps apart what begins at 0
        seen = {"position_ids": positions}
    logits = model(
        input_ids=inputs["input_ids"],
        **seen,
        logits_to_keep=columns,
        use_cache=False,
    ).logits
    kept = scored[:, columns]
    wide = logits[kept].to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(wide, targets[:, columns][kept], reduction="sum")
    return nll / (scored.sum() if num_items is None else num_items)
