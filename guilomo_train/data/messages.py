"""A raw row, in whichever form, as the chat that training and evaluation are about.

    {"prompt": "...", "completion": "..."}                     both may be lists of messages
    {"messages": [..., {"role": "assistant", ...}]}            the last message is the completion
    {"conversations": [{"from": "human", "value": ...}, ...]}  ShareGPT; likewise, and `system`
    {"instruction": "...", "input": "...", "output": "..."}    Alpaca; input may be missing

Beside a text as prompt, `system` is a system message and `history` the turns before, pairs of
texts. `answer` is what an evaluation compares with; it is the completion where a row has none.

Beside messages, `tools` are the functions that may be called, as OpenAI's API has them, or a JSON
text of these. The assistant calls them by `tool_calls`, and messages of the role `tool` are what
they returned (ShareGPT: function_call, whose text is the call, and observation). Arguments may be
an object or a JSON text; templates get objects, as in serving.

What would change what is learned and is not known here (images, weights of messages) is refused by
its name. Other columns, such as a row's number or source, are left alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from guilomo_train.errors import DataError

Message = dict[str, Any]

FORMS = "prompt and completion, or messages, or conversations, or instruction and output"
# What a key that other rows need has in one that does not.
_EMPTY: tuple[Any, ...] = (None, "", [], {})
# Columns by which other trainers change what a row teaches.
_REFUSED = (
    "functions", "documents", "chat_template_kwargs",
    "image", "images", "audio", "audios", "video", "videos",
    "reasoning_content", "weight", "loss_mask",
)  # fmt: skip
_SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
             "system": "system", "function_call": "assistant", "observation": "tool",
             "tool": "tool"}  # fmt: skip
# What messages of a role may have beside role and content.
_MORE = {"assistant": ("tool_calls",), "tool": ("tool_call_id", "name")}


@dataclass(frozen=True)
class Chat:
    """A row: messages up to an answer, the answer, and the tools that could be called."""

    prompt: list[Message]
    completion: list[Message]
    tools: list[dict[str, Any]] | None = None

    @property
    def messages(self) -> list[Message]:
        return self.prompt + self.completion

    @property
    def calls_tools(self) -> bool:
        return self.tools is not None or any(
            message["role"] == "tool" or "tool_calls" in message for message in self.messages
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def chat_of(row: dict[str, Any]) -> Chat:
    """The chat of a row as `data.load_rows` has it, of a base with a chat template."""
    if row.get("chat"):
        return Chat(**json.loads(row["chat"]))
    return Chat(row["prompt"], row["completion"])


def read_row(row: Any, where: str) -> tuple[Chat, str | None]:
    """Reads a raw row.

    Args:
        row: as a source has it.
        where: its file and line, for messages.

    Returns:
        The chat, and the row's `answer`, None where it has none.

    Raises:
        DataError: it has none of the known forms.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: found {type(row).__name__}, expected an object with {FORMS}")
    for key in _REFUSED:
        if row.get(key) not in _EMPTY:
            raise DataError(f"{where}: has {shown(key)}, which is not used here: leave it out")
    takes_before = False  # `system` and `history`, which say what comes before a prompt
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        takes_before = isinstance(prompt, str)
    elif isinstance(row.get("messages"), list) and len(row["messages"]) >= 2:
        prompt, completion = row["messages"][:-1], row["messages"][-1:]
    elif isinstance(row.get("conversations"), list) and len(row["conversations"]) >= 2:
        turns = [_of_sharegpt(turn, where) for turn in row["conversations"]]
        prompt, completion = turns[:-1], turns[-1:]
        has_system = isinstance(turns[0], dict) and turns[0].get("role") == "system"
        takes_before = not (has_system or row.get("history"))
    elif "instruction" in row and "output" in row:
        prompt, completion = _instruction(row, where), row["output"]
        takes_before = True
    elif short := next((key for key in ("messages", "conversations") if key in row), None):
        raise DataError(f"{where}: {short} is {shown(row[short])}, expected a list of two or more")
    else:
        raise DataError(f"{where}: has {shown(sorted(map(str, row)))}, expected {FORMS}")
    before = _before(row, where)
    if before and not takes_before:
        raise DataError(
            f"{where}: has 'system' or 'history' beside messages, expected them among the messages"
        )
    chat = Chat(
        before + _messages(prompt, "user", f"{where}: prompt"),
        _messages(completion, "assistant", f"{where}: completion", learned=True),
        _tools(row.get("tools"), f"{where}: tools"),
    )
    if chat.completion[-1]["role"] != "assistant":
        raise DataError(f"{where}: the last message is not the assistant's")
    given = row.get("answer")
    return chat, None if given is None else text_of(str(given), f"{where}: answer")


def shown(value: Any) -> str:
    """A value in a message for people, who may have put a whole book into it."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def text_of(value: Any, where: str) -> str:
    """A value that has to be text, and whole characters.

    Raises:
        DataError: it is none.
    """
    if not isinstance(value, str):
        raise DataError(f"{where} is {shown(value)}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        broken = value[e.start].encode("unicode_escape").decode()
        raise DataError(
            f"{where} has half a character ({broken}, at {e.start}), as a text that was cut within "
            "an emoji: no tokenizer can read it"
        ) from None
    return value


def _instruction(row: dict[str, Any], where: str) -> str:
    instruction = text_of(row["instruction"], f"{where}: instruction")
    given = text_of(row.get("input") or "", f"{where}: input")
    return f"{instruction}\n\n{given}" if given else instruction


def _before(row: dict[str, Any], where: str) -> list[Message]:
    """The messages that `system` and `history` stand for."""
    messages: list[Message] = []
    if row.get("system"):
        messages.append({"role": "system", "content": text_of(row["system"], f"{where}: system")})
    history = row.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"{where}: history is {shown(history)}, expected a list of pairs of texts")
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2:
            raise DataError(f"{where}: history has {shown(turn)}, expected a pair of texts")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": text_of(text, f"{where}: history")})
    return messages


def _of_sharegpt(turn: Any, where: str) -> Any:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn  # as other messages, or refused as one of them
    if not isinstance(turn["from"], str) or turn["from"] not in _SHAREGPT:
        raise DataError(
            f"{where}: conversations has a turn from {shown(turn['from'])}, expected "
            f"{', '.join(_SHAREGPT)}"
        )
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    message = {"role": _SHAREGPT[turn["from"]], "content": turn.get("value"), **others}
    if turn["from"] == "function_call":  # its text is a call, or several, as JSON
        called = turn.get("value")
        value = _parsed(called, f"{where}: function_call") if isinstance(called, str) else called
        calls = value if isinstance(value, list) else [value]
        message |= {"content": None, "tool_calls": [{"function": call} for call in calls]}
    return message


def _messages(value: Any, role: str, where: str, learned: bool = False) -> list[Message]:
    """Messages of a text or a list; `learned` says whether the last one is what a row teaches."""
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} is {shown(value)}, expected text or a list of messages")
    messages = [_message(message, where, learned) for message in value]
    last = messages[-1]
    if last["role"] != "tool" and not last["content"].strip() and "tool_calls" not in last:
        raise DataError(f"{where} is empty")
    return messages


def _message(message: Any, where: str, learned: bool) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"{where} has {shown(message)}, expected an object with role and content")
    more = {key: message[key] for key in _MORE.get(message["role"], ()) if message.get(key)}
    for key, given in message.items():
        if key == "weight" and given == (1 if learned else 0):
            continue  # what happens anyway
        if key not in ("role", "content", *more) and given not in _EMPTY:
            raise DataError(f"{where} has a message with {shown(key)}, which is not used here")
    content = message.get("content")
    if content is None and "tool_calls" in more:
        content = ""  # as servers give it to the template
    if not isinstance(content, str):
        raise DataError(f"{where} has {shown(message)}, expected an object with role and content")
    if "tool_calls" in more:
        more["tool_calls"] = _calls(more["tool_calls"], f"{where}: tool_calls")
    for key in _MORE["tool"]:
        if key in more:
            more[key] = text_of(more[key], f"{where}: {key}")
    return {"role": message["role"], "content": text_of(content, where), **more}


def _tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    if value in _EMPTY:
        return None
    tools = []
    for tool in _listed(value, where):
        if isinstance(tool, dict) and "function" not in tool:
            tool = {"type": "function", "function": tool}
        tools.append(tool)
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f'{where} has {shown(tool)}, expected {{"type": "function", "function": '
                '{"name": ..., "description": ..., "parameters": ...}}'
            )
    return tools


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    calls = []
    for call in _listed(value, where):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f'{where} has {shown(call)}, expected {{"type": "function", "function": '
                '{"name": ..., "arguments": ...}}'
            )
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = _parsed(arguments, f"{where}: arguments")
        if not isinstance(arguments, dict):
            raise DataError(f"{where}: arguments is {shown(arguments)}, expected an object")
        calls.append({"type": "function", **call, "function": {**function, "arguments": arguments}})
    return calls


def _listed(value: Any, where: str) -> list[Any]:
    """A list that is not empty, as such or as JSON text, of whole characters."""
    value = _parsed(value, where) if isinstance(value, str) else value
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where} is {shown(value)}, expected a list of objects, or JSON text of one"
        )
    try:
        text_of(json.dumps(value, ensure_ascii=False), where)
    except (TypeError, ValueError) as e:  # Parquet has dates and bytes
        raise e if isinstance(e, DataError) else DataError(f"{where}: not JSON ({e})") from None
    return value


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}: not JSON ({e})") from None
