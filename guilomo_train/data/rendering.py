"""A chat as the base's chat template writes it, its tokens, and which of them are learned.

Training learns from where a row differs from its prompt alone (TRL's rule): a template may end a
prompt in what a whole row does not have, and a plain text's last token may join the completion's
first. Evaluation scores the same tokens.
"""

from __future__ import annotations

import itertools
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from guilomo_train.data.messages import Chat, Message, chat_of
from guilomo_train.errors import DataError

NOT_LEARNED = -100  # as a label
# What is to be said of a row whose prompt, opened for an answer, is not how the whole row begins.
DROPPED = "a whole row does not have, so that answers are learned without it and asked for with it"
# What chat templates raise of themselves for messages that they do not like.
_OF_TEMPLATES = (TemplateError, TypeError, ValueError, LookupError, AttributeError)


def encode(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], written: list[int]
) -> tuple[list[int], list[int]]:
    """Token ids of a row and its labels, with its end.

    Args:
        tokenizer: of the base.
        row: as `data.load_rows` has it: plain text, or a chat.
        written: as `endings.written_ends` gives them; where there are none, rows get the end token.
    """
    if isinstance(row["prompt"], str):
        end = [tokenizer.eos_token_id]
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + end
        start = common_length(prompt_ids(tokenizer, row), ids)
        return ids, [NOT_LEARNED] * start + ids[start:]
    ids, labels, _ = encode_last_turn(tokenizer, chat_of(row))
    end = [] if written else [tokenizer.eos_token_id]
    return ids + end, labels + end


def prompt_ids(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> list[int]:
    """Token ids of a row's prompt, opened for an answer."""
    if isinstance(row["prompt"], str):
        return tokenizer(row["prompt"])["input_ids"]
    chat = chat_of(row)
    return _ids(tokenizer, chat.prompt, chat.tools, opened=True)


def encode_last_turn(
    tokenizer: PreTrainedTokenizerBase, chat: Chat
) -> tuple[list[int], list[int], str]:
    """Token ids of a chat and its labels, with its completion; and the end of the prompt that the
    whole chat does not have, "" for none."""
    ids = _ids(tokenizer, chat.messages, chat.tools, opened=False)
    prompt = _ids(tokenizer, chat.prompt, chat.tools, opened=True)
    start = common_length(prompt, ids)
    return ids, [NOT_LEARNED] * start + ids[start:], tokenizer.decode(prompt[start:])


def encode_all_turns(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, where: str
) -> tuple[list[int], list[int]]:
    """Token ids of a chat and its labels, with all turns of the assistant.

    A turn is what the template writes after what it writes before the turn, opened for an answer.

    Raises:
        DataError: the template writes a turn otherwise when others follow, or rejects what comes
            before it.
    """
    messages = chat.messages

    def ids_of(upto: int, opened: bool) -> list[int]:
        try:
            return _ids(tokenizer, messages[:upto], chat.tools, opened)
        except _OF_TEMPLATES as e:
            raise DataError(
                f"{where}: the base's chat template rejects what comes up to message {upto}, which "
                f"has to be known for the loss on all turns: give --loss_on last ({e})"
            ) from None

    ids = ids_of(len(messages), False)
    labels = [NOT_LEARNED] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = common_length(ids_of(turn, True), ids) if turn else 0
        upto = ids_of(turn + 1, False)
        if ids[: len(upto)] != upto:
            raise DataError(
                f"{where}: the base's chat template renders message {turn + 1} otherwise "
                "when others follow, so the loss cannot be on it: give --loss_on last"
            )
        labels[start : len(upto)] = ids[start : len(upto)]
    return ids, labels


def common_length(first: list[int], second: list[int]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def check_template(tokenizer: PreTrainedTokenizerBase, chat: Chat, where: str) -> None:
    """Renders a chat as training and generation will; templates have rules of their own.

    Raises:
        DataError: the template rejects it, or leaves out the completion's text, tools, calls, or
            what tools returned.
    """
    messages = chat.messages
    try:
        _text(tokenizer, chat.prompt, chat.tools, opened=True)
        rendered = _text(tokenizer, messages, chat.tools, opened=False)
    except _OF_TEMPLATES as e:
        roles = [message["role"] for message in messages]
        raise DataError(
            f"{where}: the base's chat template rejects messages of the roles {roles}: {e}"
        ) from None
    # The last line: templates may move what comes before it, such as reasoning.
    text = messages[-1]["content"].strip()
    if text and text.splitlines()[-1].strip() not in rendered:
        raise DataError(
            f"{where}: the base's chat template leaves out the completion's text; it may "
            "expect content in another form than text"
        )
    if chat.calls_tools:
        _check_tools(tokenizer, chat, rendered, where)


def _check_tools(tokenizer: PreTrainedTokenizerBase, chat: Chat, rendered: str, where: str) -> None:
    """Whether the text is another one without tools, calls and results, each by itself.

    Templates that know nothing of tools leave them out without a word.
    """
    without: list[tuple[str, list[Message], Any]] = []
    if chat.tools is not None:
        without.append(("tools", chat.messages, None))
    for i, message in enumerate(chat.messages):
        less = {key: value for key, value in message.items() if key != "tool_calls"}
        what = f"the tool_calls of message {i + 1}"
        if message["role"] == "tool":
            less, what = {**message, "content": ""}, f"what a tool returned in message {i + 1}"
        if less != message:
            changed = [*chat.messages[:i], less, *chat.messages[i + 1 :]]
            without.append((what, changed, chat.tools))
    for what, messages, tools in without:
        try:
            same = _text(tokenizer, messages, tools, opened=False) == rendered
        except _OF_TEMPLATES:
            continue  # it misses what was taken away
        if same:
            raise DataError(
                f"{where}: the base's chat template leaves out {what}: take a base whose template "
                "knows tools, give its tokenizer such a template, or write tools and calls into "
                "the messages' text"
            )


def _text(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Any, opened: bool
) -> str:
    """What the template writes of messages; `opened` for an answer of the assistant."""
    text = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=opened, tokenize=False
    )
    assert isinstance(text, str)
    return text


def _ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Any, opened: bool
) -> list[int]:
    """The tokens of that."""
    encoded = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=opened, return_dict=True
    )
    return encoded["input_ids"]
