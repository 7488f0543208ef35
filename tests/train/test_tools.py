"""Rows in which the assistant calls tools: what is learned of them, and what refuses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import trl
from datasets import Dataset
from pyarrow import parquet
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from guilomo_train.cli import main
from guilomo_train.data import load_rows
from guilomo_train.data.rendering import prompt_ids
from guilomo_train.errors import DataError
from guilomo_train.scoring import expected_text
from tests.train.tiny import CHAT_TEMPLATE, TOOL_TEMPLATE, tiny_llama, tiny_tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a place.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
]
QUESTION = {"role": "user", "content": "How is it in Rome?"}
FUNCTION = {"name": "weather", "arguments": '{"place": "Rome"}'}
CALLED = [{"id": "c1", "type": "function", "function": FUNCTION}]
CALL = {"role": "assistant", "content": None, "tool_calls": CALLED}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": '{"sky": "clear"}'}
ANSWER = {"role": "assistant", "content": "It is clear."}
CHAT = [QUESTION, CALL, RESULT, ANSWER]
WRITTEN_CALL = '<call>weather {"place": "Rome"}</call>'
OTHER = {"messages": [QUESTION, ANSWER]}


def with_arguments(arguments: Any) -> dict[str, Any]:
    call = CALL["tool_calls"][0]
    return {
        **CALL,
        "tool_calls": [{**call, "function": {"name": "weather", "arguments": arguments}}],
    }


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    return tokenizer


@pytest.fixture
def base(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def write(folder: Path, *rows: Any) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def learned(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != -100])


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "text"])
@pytest.mark.parametrize("call", [CALL, with_arguments({"place": "Rome"})], ids=["text", "object"])
def test_every_turn_of_the_assistant_is_learned_calls_too(
    tools: Any, call: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    source = write(tmp_path, {"messages": [QUESTION, call, RESULT, ANSWER], "tools": tools})
    (row,) = load_rows(source, tokenizer)
    text = tokenizer.decode(row["input_ids"])
    assert text.startswith('<|im_start|>system\nTools: [{"type": "function", "function"')
    assert '<|im_start|>tool\n{"sky": "clear"}<|im_end|>' in text
    assert learned(tokenizer, row) == "It is clear.<|im_end|>\n"
    assert row["answer"] == "It is clear."
    (row,) = load_rows(source, tokenizer, loss_on="all")
    assert tokenizer.decode(row["input_ids"]) == text
    assert learned(tokenizer, row) == f"{WRITTEN_CALL}<|im_end|>\nIt is clear.<|im_end|>\n"


def test_sharegpts_form_of_it_is_the_same_row(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    turns = [
        {"from": "human", "value": QUESTION["content"]},
        {"from": "function_call", "value": json.dumps(FUNCTION)},
        {"from": "observation", "value": RESULT["content"]},
        {"from": "gpt", "value": ANSWER["content"]},
    ]
    functions = json.dumps([tool["function"] for tool in TOOLS])
    rows = [
        {"messages": [{"role": "system", "content": "Be brief."}, *CHAT], "tools": TOOLS},
        {"conversations": turns, "tools": functions, "system": "Be brief."},
    ]
    first, second = load_rows(write(tmp_path, *rows), tokenizer, loss_on="all")
    assert first["input_ids"] == second["input_ids"]
    assert first["labels"] == second["labels"]


def test_a_row_may_end_in_a_call(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Then its answer is what the template makes of the call, as a model has to write it."""
    (row,) = load_rows(write(tmp_path, {"messages": CHAT[:2], "tools": TOOLS}), tokenizer)
    assert learned(tokenizer, row) == f"{WRITTEN_CALL}<|im_end|>\n"
    assert row["answer"] == expected_text(row) == WRITTEN_CALL
    asked = tokenizer.decode(prompt_ids(tokenizer, row))
    assert asked.startswith("<|im_start|>system\nTools: ")
    assert asked.endswith("How is it in Rome?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("turns", [2, 4])
def test_the_tokens_are_those_that_trl_would_learn(
    turns: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    source = write(tmp_path, {"messages": CHAT[:turns], "tools": TOOLS})
    (row,) = load_rows(source, tokenizer)
    call = {**with_arguments({"place": "Rome"}), "content": ""}
    messages = [QUESTION, call, RESULT, ANSWER][:turns]
    rows = [{"prompt": messages[:-1], "completion": messages[-1:], "tools": json.dumps(TOOLS)}]
    trainer = SFTTrainer(
        tiny_llama(len(tokenizer)),
        SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    (expected,) = trainer.train_dataset
    assert (row["input_ids"], row["labels"]) == (expected["input_ids"], expected["labels"])


@pytest.mark.parametrize(
    ("template", "call"),
    [
        (
            "qwen2_5",
            '<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>',
        ),
        ("llama3_1", '{"name": "weather", "parameters": {"place": "Rome"}}<|eot_id|>'),
        ("gptoss", 'to=functions.weather<|channel|>commentary json<|message|>{"place": "Rome"}'),
        ("llama3", None),
    ],
)
def test_templates_that_people_use(
    template: str, call: str | None, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """As TRL has them; of Llama 3 the first version knew no tools."""
    file = Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja"
    tokenizer.chat_template = file.read_text()
    source = write(tmp_path, {"messages": CHAT, "tools": TOOLS})
    if call is None:
        with pytest.raises(DataError, match="leaves out tools"):
            load_rows(source, tokenizer)
        return
    (row,) = load_rows(source, tokenizer)
    assert call in tokenizer.decode(row["input_ids"])
    assert "clear." in learned(tokenizer, row)
    assert call not in learned(tokenizer, row)
    (row,) = load_rows(source, tokenizer, loss_on="all")
    assert call in learned(tokenizer, row)


def test_rows_keep_their_own_tools_beside_others(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Arrow, which holds rows and reads Parquet, gives the objects of a column the same keys."""
    tools = json.loads(json.dumps(TOOLS, sort_keys=True))  # as some versions of Arrow do
    rows = [
        {"messages": [QUESTION, with_arguments({"place": "Rome"})], "tools": tools},
        {"messages": [QUESTION, with_arguments({"days": [1, 2], "when": {"hour": 3}})]},
        OTHER,
    ]
    filled = [
        {
            "messages": [{"tool_calls": None, **m} for m in row["messages"]],
            "tools": row.get("tools"),
        }
        for row in rows
    ]
    parquet.write_table(pyarrow.Table.from_pylist(filled), tmp_path / "rows.parquet")
    texts = {}
    for source in (write(tmp_path, *rows), str(tmp_path / "rows.parquet")):
        texts[source] = [tokenizer.decode(ids) for ids in load_rows(source, tokenizer)["input_ids"]]
    first, second = texts.values()
    assert first == second
    assert WRITTEN_CALL in first[0]
    assert '<call>weather {"days": [1, 2], "when": {"hour": 3}}</call>' in first[1]
    assert first[2].count("<|im_start|>") == 2
    many = write(tmp_path, *[OTHER] * 1200, *rows)  # in a file, and calls after many rows without
    loaded = load_rows(many, tokenizer)
    assert [tokenizer.decode(ids) for ids in loaded["input_ids"][-3:]] == first


NAMELESS = {"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": {}}}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [QUESTION, ANSWER], "tools": [{"nam": "f"}]},
            "tools has {'type': 'function', 'function': {'nam': 'f'}}, exp",
        ),
        ({"messages": [QUESTION, ANSWER], "tools": "f"}, "tools: not JSON"),
        ({"messages": [QUESTION, ANSWER], "tools": 3}, "tools is 3, expected a list of objects"),
        ({"messages": [QUESTION, NAMELESS]}, "tool_calls has "),
        ({"messages": [QUESTION, with_arguments("{")]}, "arguments: not JSON"),
        ({"messages": [QUESTION, with_arguments("[1]")]}, "arguments is [1], expected an object"),
        ({"messages": [QUESTION, with_arguments({"a": "\ud83d"})]}, "half a character"),
        ({"messages": [QUESTION, {**ANSWER, "content": None}]}, "expected an object with role"),
        ({"messages": CHAT[:3]}, "the last message is not the assistant's"),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "function_call", "value": "weather"},
                ]
            },
            "function_call: not JSON",
        ),
        (
            {"messages": [{**QUESTION, "tool_calls": CALL["tool_calls"]}, ANSWER]},
            "'tool_calls', wh",
        ),
    ],
)
def test_what_is_no_tool_or_call_is_refused_by_its_line(
    row: Any, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(DataError) as error:
        load_rows(write(tmp_path, OTHER, row), tokenizer)
    assert "rows.jsonl, line 2: " in str(error.value)
    assert message in str(error.value)


PLAIN_CALLS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.tool_calls or '' }}\n{% endfor %}"
)
RESULTS_LEFT_OUT = (
    "{{ tools }}{% for m in messages if m.role != 'tool' %}{{ m.content }}{{ m.tool_calls or '' }}"
    "\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "row", "left_out"),
    [
        (CHAT_TEMPLATE, {"messages": [QUESTION, ANSWER], "tools": TOOLS}, "tools"),
        (PLAIN_CALLS, {"messages": CHAT, "tools": TOOLS}, "tools"),
        (CHAT_TEMPLATE, {"messages": CHAT}, "the tool_calls of message 2"),
        (CHAT_TEMPLATE, {"messages": CHAT[:2]}, "the tool_calls of message 2"),
        (RESULTS_LEFT_OUT, {"messages": CHAT}, "what a tool returned in message 3"),
    ],
)
def test_a_template_that_leaves_tools_out_is_refused(
    template: str, row: Any, left_out: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(DataError) as error:
        load_rows(write(tmp_path, OTHER, row), tokenizer)
    assert f"line 2: the base's chat template leaves out {left_out}: take a base" in str(
        error.value
    )


def test_a_base_without_a_template_has_no_way_to_write_tools(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="line 2: has tools or calls of tools, which the base has"):
        load_rows(write(tmp_path, OTHER, {"messages": CHAT}), tokenizer)


def test_the_commands_take_and_show_them(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path, {"messages": CHAT, "tools": TOOLS}, {"messages": CHAT[:2]})
    assert main(["data", "--base", str(base), "--train", source, "--loss_on", "all"]) == 0
    out = capsys.readouterr().out
    assert f"[[{WRITTEN_CALL}<|im_end|>\n]]<|im_start|>tool\n" in out
    assert "[[It is clear.<|im_end|>\n]]" in out
    command = ["eval", "--base", base, "--data", source, "--max_new_tokens", "2"]
    assert main(list(map(str, command))) == 0
    assert "2 rows: exact match 0.000" in capsys.readouterr().out

    allocation = tmp_path / "allocation.json"
    command = ["baseline", "--base", base, "--kind", "lora", "--rank", "2", "--output", allocation]
    assert main(list(map(str, command))) == 0
    command = ["finetune", "--base", base, "--train", source, "--allocation", allocation,
               "--output", tmp_path / "run", "--epochs", "1"]  # fmt: skip
    assert main(list(map(str, command))) == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
