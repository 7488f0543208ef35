"""Rows in every form people have become prompt and completion; bad ones say where they are."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import tempfile
import tracemalloc
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from guilomo_train.cli import main
from guilomo_train.config import CommonConfig
from guilomo_train.data import load_rows, search_rows
from guilomo_train.data.messages import chat_of
from guilomo_train.errors import DataError
from guilomo_train.search.allocation import Allocation
from tests.train.tiny import CHAT_TEMPLATE, TOOL_TEMPLATE, save_tiny_base, tiny_tokenizer

PROMPT = [{"role": "user", "content": "2 + 2?"}]
COMPLETION = [{"role": "assistant", "content": "4"}]
CHAT = json.dumps(PROMPT[0])


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_base)


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?", "completion": "4"},
        {"prompt": PROMPT, "completion": COMPLETION},
        {"messages": PROMPT + COMPLETION},
        {"instruction": "2 + 2?", "output": "4"},
        {"instruction": "2 + 2?", "input": "", "output": "4"},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"prompt": "2 + 2?", "completion": "4", "system": None, "history": [], "tools": None},
        {"messages": [*PROMPT, {**COMPLETION[0], "tool_calls": None, "weight": 1}], "id": 7},
    ],
)
def test_every_form_gives_the_same_row(
    row: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (loaded,) = load_rows(write(tmp_path / "rows.jsonl", [row]), tokenizer)
    assert loaded.pop("where").endswith("rows.jsonl, line 1")
    ids, labels = loaded.pop("input_ids"), loaded.pop("labels")
    assert loaded == {"prompt": PROMPT, "completion": COMPLETION, "answer": "4",
                      "expected": "4", "chat": "", "dropped": ""}  # fmt: skip
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(
        PROMPT + COMPLETION, tokenize=False
    )
    assert learned(tokenizer, {"labels": labels}) == "4<|im_end|>\n"


def test_alpaca_input_follows_the_instruction_and_answer_is_kept(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    row = {"instruction": "Add.", "input": "2 and 2", "output": "It is 4", "answer": 4}
    (loaded,) = load_rows(write(tmp_path / "rows.jsonl", [row]), tokenizer)
    assert loaded["prompt"][0]["content"] == "Add.\n\n2 and 2"
    assert loaded["answer"] == "4"


def test_a_system_text_and_earlier_turns_come_before_the_prompt(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    row = {
        "instruction": "2 + 2?",
        "output": "4",
        "system": "Be brief.",
        "history": [["Hi", "Hi!"]],
    }
    (loaded,) = load_rows(write(tmp_path / "rows.jsonl", [row]), tokenizer)
    assert [m["role"] for m in loaded["prompt"]] == ["system", "user", "assistant", "user"]
    assert [m["content"] for m in loaded["prompt"]] == ["Be brief.", "Hi", "Hi!", "2 + 2?"]


LINE_SEPARATOR = {"prompt": "one\u2028two\x85three", "completion": "4"}


def files_of(rows: list[dict[str, str]], folder: Path, name: str) -> dict[str, Path]:
    """The same rows in a file of each kind."""
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    texts = {
        ".jsonl": lines,
        ".json": json.dumps(rows, indent=1),
        ".csv": "prompt,completion\n" + "\n".join(f"{r['prompt']},{r['completion']}" for r in rows),
        ".tsv": "prompt\tcompletion\n" + "\n".join("\t".join(r.values()) for r in rows),
    }
    files = {}
    for kind, text in texts.items():
        for mark, encoding in (("", "utf-8"), ("bom", "utf-8-sig")):
            files[kind + mark] = folder / (kind[1:] + mark) / f"{name}{kind}"
            files[kind + mark].parent.mkdir(exist_ok=True)
            files[kind + mark].write_bytes(text.encode(encoding))
        files[f"{kind}.gz"] = folder / f"{kind[1:]}gz" / f"{name}{kind}.gz"
        files[f"{kind}.gz"].parent.mkdir(exist_ok=True)
        files[f"{kind}.gz"].write_bytes(gzip.compress(text.encode()))
    files[".parquet"] = folder / "parquet" / f"{name}.parquet"
    files[".parquet"].parent.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), files[".parquet"])
    return files


def test_files_and_folders_of_every_kind_have_the_same_rows(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [LINE_SEPARATOR, {"prompt": "2 + 2?", "completion": "4"}]
    for kind, file in files_of(rows, tmp_path, "train").items():
        for source in (file, file.parent):
            loaded = load_rows(str(source), tokenizer)
            found = [row["prompt"][0]["content"] for row in loaded]
            assert found == [row["prompt"] for row in rows], (kind, source)


def test_rows_of_several_forms_are_read_from_a_file_and_its_folder(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [
        {"prompt": "2 + 2?", "completion": "4", "id": 1},
        {"messages": PROMPT + COMPLETION, "id": "two"},
        {"instruction": "2 + 2?", "output": "4"},
    ]
    for source in (write(tmp_path / "train.jsonl", rows), str(tmp_path)):
        loaded = load_rows(source, tokenizer)
        assert loaded["prompt"][:] == [PROMPT] * 3, source
        assert loaded["completion"][:] == [COMPLETION] * 3


def test_rows_beyond_a_limit_are_not_rendered(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = []
    render = type(tokenizer).apply_chat_template

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        rendered.append(args)
        return render(self, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", counted)
    rows = [{"prompt": "p", "completion": str(i)} for i in range(500)]
    assert len(load_rows(write(tmp_path / "rows.jsonl", rows), tokenizer, 3)) == 3
    assert len(rendered) == 12  # a prompt and a whole row each, as text and as tokens


def test_without_a_chat_template_rows_stay_text(tmp_path: Path, tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = None
    source = write(tmp_path / "rows.jsonl", [{"messages": PROMPT + COMPLETION}])
    (loaded,) = load_rows(source, tokenizer)
    del loaded["where"]
    assert loaded == {"prompt": "2 + 2?", "completion": "4", "answer": "4"}


def test_a_data_set_is_loaded_by_name_and_split(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = tmp_path / "sums"
    folder.mkdir()
    write(folder / "train.jsonl", [{"prompt": f"{i}", "completion": "x"} for i in range(5)])
    write(folder / "test.jsonl", [{"prompt": "2 + 2?", "completion": "4"}])
    assert len(load_rows(str(folder), tokenizer)) == 5
    assert load_rows(f"{folder}:test", tokenizer)[0]["prompt"] == PROMPT


def test_a_limit_draws_rows_by_the_seed(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "p", "completion": str(i)} for i in range(50)]
    source = write(tmp_path / "rows.jsonl", rows)
    drawn = [load_rows(source, tokenizer, 3, seed)["answer"] for seed in (0, 1, 1)]
    assert load_rows(source, tokenizer, 3)["answer"] == drawn[0]
    assert drawn[1] == drawn[2] != drawn[0]
    # A file sorted by its answers would give one of them alone.
    assert ["0", "1", "2"] not in drawn
    assert len(set(drawn[0])) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "completion": "b"}\n\n{"prompt": ', "line 3: not JSON"),
        ('{"question": "a"}', r"line 1: has \['question'\], expected prompt and completion"),
        ('["a"]', "line 1: found list"),
        ('{"prompt": "a", "completion": " "}', "line 1: completion is empty"),
        ('{"prompt": 3, "completion": "b"}', "line 1: prompt is 3"),
        ('{"messages": [{"role": "user"}, {"role": "assistant"}]}', "role and content"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
            "not the assistant's",
        ),
        ("\n", "has no rows"),
        ('{"prompt": "a", "completion": "b", "functions": [{"name": "f"}]}', "has 'functions'"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", '
            '"weight": 0}]}',
            "completion has a message with 'weight'",
        ),
        ('{"prompt": "a", "completion": "b", "reasoning_content": "c"}', "has 'reasoning_content'"),
        (
            f'{{"messages": [{CHAT}, {{"role": "assistant", "content": "b", '
            '"reasoning_content": "c"}]}',
            "completion has a message with 'reasoning_content'",
        ),
        (
            '{"prompt": "a", "completion": "hi \\ud83d"}',
            r"completion has half a character \(\\ud83d",
        ),
        ('{"instruction": null, "output": "b"}', "instruction is None"),
        ('{"conversations": [{"from": "bot", "value": "a"}, 1]}', "a turn from 'bot'"),
        (
            '{"conversations": [{"from": "system", "value": "a"}, {"from": "gpt", "value": "b"}], '
            '"system": "c"}',
            "beside messages",
        ),
        ('{"instruction": "a", "output": "b", "history": ["c"]}', "expected a pair"),
        (f'{{"messages": [{CHAT}, {CHAT}], "system": "c"}}', "beside messages"),
        ("[" * 10**5, "line 1: not JSON"),
        (
            f'{{"messages": [{CHAT}]}}',
            r"messages is \[\{'role': .*, expected a list of two or more",
        ),
        ('{"conversations": "a"}', "conversations is 'a', expected a list of two or more"),
        (json.dumps({"prompt": ["a" * 10**5], "completion": "b"}), r"has 'a+\.\.\., expected"),
    ],
)
def test_a_bad_row_is_named(
    text: str, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as error:
        load_rows(str(path), tokenizer)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", b"[{]", r"rows\.json: not JSON"),
        ("rows.csv", b"prompt,completion\na,b\nc", "line 3: has not the 2 columns"),
        ("rows.csv", b'prompt,completion\na,"b', "not a table"),
        ("rows.jsonl.gz", b"{}", "cannot be read as text"),
        ("rows.parquet", b"{}", "cannot be read as Parquet"),
        ("rows.jsonl", b"\xff", "cannot be read as text"),
    ],
)
def test_a_broken_file_is_named(
    name: str, content: bytes, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_rows(str(tmp_path / name), tokenizer)


def test_a_folder_without_the_split_says_which_it_has(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    write(tmp_path / "train.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match=r"no split 'dev', only \['train'\]"):
        load_rows(f"{tmp_path}:dev", tokenizer)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content + 1 }}", "rejects messages of the roles"),
        (
            "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}"
            "{% endfor %}",
            "leaves out the completion's text",
        ),
    ],
)
def test_a_template_that_does_not_take_text_is_no_traceback(
    template: str, message: str, tmp_path: Path, tiny_base: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = template
    source = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match=message):
        load_rows(source, tokenizer)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
KEYS = ["prompt", "completion", "messages", "conversations", "instruction", "input", "output",
        "answer", "system", "history", "weight", "tools"]  # fmt: skip
FUNCTIONS = st.fixed_dictionaries(
    {}, optional={"name": VALUES | st.just("f"), "arguments": VALUES | st.just('{"a": 1}')}
)
CALLS = st.lists(
    st.fixed_dictionaries(
        {}, optional={"function": FUNCTIONS, "type": VALUES | st.just("function"), "id": VALUES}
    ),
    max_size=2,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={"role": st.sampled_from(["user", "assistant", "tool", 1]), "content": VALUES,
                  "from": VALUES | st.just("function_call"), "tool_call_id": VALUES,
                  "value": VALUES | FUNCTIONS.map(json.dumps), "weight": VALUES,
                  "name": VALUES, "tool_calls": VALUES | CALLS | CALLS.map(json.dumps)},
    ),
    max_size=3,
)  # fmt: skip
ROWS = st.dictionaries(st.sampled_from(KEYS), VALUES | MESSAGES | CALLS) | VALUES


@settings(max_examples=300, deadline=None)
@given(
    st.lists(ROWS.map(json.dumps) | st.text(st.characters(codec="utf-8")), max_size=3),
    st.sampled_from([CHAT_TEMPLATE, TOOL_TEMPLATE]),
)
def test_whatever_a_file_has_ends_in_rows_or_a_named_error(lines: list[str], template: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("\n".join(lines))
        rows, refusal = [], str(path)
        try:
            rows = list(load_rows(str(path), fuzzed_tokenizer(template)))
        except DataError as e:
            refusal = str(e)
    assert str(path) in refusal
    for row in rows:
        for message in chat_of(row).messages:
            json.dumps(message, ensure_ascii=False).encode()


@cache
def fuzzed_tokenizer(template: str) -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_a_missing_file_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        load_rows("nowhere.jsonl", tokenizer)


def test_validation_rows_are_split_off_and_too_few_are_refused() -> None:
    rows = Dataset.from_list([{"answer": str(i)} for i in range(100)])
    common = CommonConfig(base="", train="", output="")
    lower, upper = search_rows(rows, common, None, held_out=True)
    assert upper is not None
    assert (len(lower), len(upper)) == (80, 20)
    assert set(lower["answer"]).isdisjoint(upper["answer"])
    for few, held_out in ((20, True), (7, False)):
        with pytest.raises(DataError, match="too few"):
            search_rows(rows.select(range(few)), common, None, held_out)
    assert search_rows(rows, common, upper, held_out=True) == (rows, upper)
    assert search_rows(rows, common, None, held_out=False) == (rows, None)


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "3 + 3?"},
    {"role": "assistant", "content": "six"},
]


def learned(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def test_the_loss_can_be_on_every_turn_of_the_assistant(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    source = write(tmp_path / "rows.jsonl", [{"messages": TURNS}])
    (row,) = load_rows(source, tokenizer, loss_on="all")
    assert learned(tokenizer, row) == "four<|im_end|>\nsix<|im_end|>\n"
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(
        TURNS, tokenize=False
    )
    # A template that drops earlier turns' text when others follow leaves nothing to learn from.
    other = tiny_tokenizer()
    other.chat_template = (
        "{% for m in messages %}[{{ m.content if loop.last or m.role != 'assistant' else '' }}]"
        "{% endfor %}"
    )
    with pytest.raises(DataError, match=r"line 1: .* renders message 3 otherwise when others"):
        load_rows(source, other, loss_on="all")


def test_a_template_that_rejects_what_comes_before_a_turn_is_no_traceback(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if 'user' not in (messages | map(attribute='role')) %}"
        "{{ raise_exception('No user query found') }}{% endif %}" + CHAT_TEMPLATE
    )
    messages = [{"role": "assistant", "content": "How can I help?"}, *PROMPT, *COMPLETION]
    source = write(tmp_path / "rows.jsonl", [{"messages": messages}])
    assert len(load_rows(source, tokenizer)) == 1
    with pytest.raises(DataError, match=r"line 1: .* rejects what comes up to message 1.*No user"):
        load_rows(source, tokenizer, loss_on="all")


def test_sources_are_mixed_by_their_weights_without_a_row_twice(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    sources = [
        write(
            tmp_path / f"{name}.jsonl", [{"prompt": name, "completion": str(i)} for i in range(n)]
        )
        for name, n in (("a", 30), ("b", 10))
    ]

    def counts(**how: Any) -> tuple[int, int]:
        rows = load_rows(sources, tokenizer, **how)
        assert len(set(rows["where"])) == len(rows)
        names = [row["prompt"][0]["content"] for row in rows]
        return names.count("a"), names.count("b")

    assert counts() == (30, 10)
    assert counts(weights=[1, 1]) == (10, 10)
    assert counts(weights=[3, 1]) == (30, 10)
    assert counts(weights=[0.9, 0.1]) == (30, 3)
    assert counts(weights=[1, 4], limit=10) == (2, 8)
    assert sum(counts(limit=7)) == 7


@pytest.mark.parametrize("limit", [None, 7999])
def test_rows_are_read_one_after_another(limit: int | None, tmp_path: Path) -> None:
    rows = [{"prompt": "p" * 2000, "completion": "b"}] * 8000
    source = write(tmp_path / "rows.jsonl", rows)
    size = Path(source).stat().st_size
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tracemalloc.start()
    loaded = load_rows(source, tokenizer, limit)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(loaded) == (limit or 8000)
    assert loaded.cache_files, "the rows are on disk"
    assert most < size / 3, (most, size)


# Trains on ten rows, then on many, and says by how much this process's own memory grew with these.
GROWTH = """
import re, sys, threading
from pathlib import Path
from guilomo_train.cli import main

def taken():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def watch():
    while not done.wait(0.02):
        seen.append(taken())

few, many, *flags = sys.argv[1:]
seen, done = [], threading.Event()
assert main(["finetune", "--train", few, "--output", "few", *flags]) == 0
before, watcher = taken(), threading.Thread(target=watch)
watcher.start()
try:
    flags += ["--train_rows", "4999"]
    assert main(["finetune", "--train", many, "--output", "many", *flags]) == 0
finally:
    done.set()
print("grew by", max(seen) - before)
"""


def test_a_training_has_a_part_of_its_rows_in_memory(tmp_path: Path) -> None:
    save_tiny_base(tmp_path / "base")
    row = {"prompt": "p" * 1000, "completion": "b"}
    few, many = (write(tmp_path / f"{n}.jsonl", [row] * n) for n in (10, 5000))
    Allocation.uniform(("model.layers.0.self_attn.q_proj",), 2, 2).save(tmp_path / "a.json")
    command = [sys.executable, "-c", GROWTH, few, many, "--base", "base", "--allocation", "a.json"]
    command += ["--epochs", "0.0001", "--batch_size", "1", "--save_steps", "0"]  # a step
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    grew = int(re.findall(r"grew by (\d+)", done.stdout)[0])
    # A list of the tokens of all rows alone would take this; a thousand rows are taken at a time.
    assert grew < 5000 * 1000 * 8, grew


def test_the_data_command_shows_what_is_learned_and_what_is_left_out(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"messages": TURNS},
        {"prompt": "word " * 90, "completion": "lost"},
        {"prompt": "p", "completion": "word " * 90},
        {"prompt": "p", "completion": "fine"},
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    command = ["data", "--base", str(tiny_base), "--train", source, "--max_length", "64"]
    assert main([*command, "--loss_on", "all", "--show", "1"]) == 0
    out = capsys.readouterr().out
    assert "[[four<|im_end|>\n]]<|im_start|>user\n3 + 3?" in out
    assert "[[six<|im_end|>\n]]" in out
    assert out.count("what is learned stands in") == 1
    assert "4 rows of " in out
    assert "left out: 1 have no token to learn within --max_length 64, first " in out
    assert f"cut: 1 go on after --max_length 64 and teach no end, first {source}, line 3" in out
    # The same rows are what a training gets.
    command[-1] = "1024"
    assert main([*command, "--show", "4"]) == 0
    assert "four<|im_end|>\n<|im_start|>user\n3 + 3?" in capsys.readouterr().out

    with open(source, "a") as file:
        file.write(json.dumps({"prompt": "p"}))
    assert main(command) == 2
    assert f"1 of 5 rows are refused, first {source}, line 5" in capsys.readouterr().err
