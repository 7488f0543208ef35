"""How an answer ends: in a token that generation stops at, or in none.

A base may render chats with one token at the end of a turn and stop at another: base models of the
Qwen family end turns with `<|im_end|>` and stop at `<|endoftext|>`. An adapter learns what the
template writes, so it needs the template's token as a stop token of its own. A template may also
write no token there, as one of plain text with headings; then rows get the end token.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

_TURN = {"role": "user", "content": "a"}


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Where generation with a base stops, in vLLM too: by its generation config or tokenizer."""
    ends = configured_ends(getattr(model, "generation_config", None))
    return ends if tokenizer.eos_token_id is None else ends | {tokenizer.eos_token_id}


def configured_ends(config: Any) -> set[int]:
    """The end tokens that a generation config has, as one or as a list."""
    configured = getattr(config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in listed if token is not None}


def written_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that stand behind an assistant's text in a row, in order.

    Without a chat template that is the end token, which TRL writes there. For a template that
    takes no plain exchange of a user and an assistant the same is supposed.
    """
    if tokenizer.chat_template is None:
        return [tokenizer.eos_token_id]
    try:
        one, other = (
            tokenizer.apply_chat_template(
                [_TURN, {"role": "assistant", "content": text}], return_dict=True
            )["input_ids"]
            for text in ("b", "7")
        )
    except Exception:  # a template raises what it likes
        return [tokenizer.eos_token_id]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    behind: list[int] = []
    for token, same in zip(reversed(one), reversed(other), strict=False):
        if token != same:
            break
        behind.append(token)
    return [token for token in reversed(behind) if token in special]


def stop_tokens(ends: Set[int], written: list[int]) -> tuple[int, ...]:
    """The tokens that an adapter has to stop at beside its base's own.

    Args:
        ends: as `end_tokens` gives them.
        written: as `written_ends` gives them.
    """
    return () if not written or ends & set(written) else (written[0],)
