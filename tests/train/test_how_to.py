"""The how-tos' commands and settings, as written but for the base."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from guilomo_serve.adapter import read_spec
from guilomo_train.cli import COMMANDS, main
from guilomo_train.data import load_rows
from tests.train.test_foreign import saved
from tests.train.tiny import TOOL_TEMPLATE, tiny_tokenizer

DOCS = Path(__file__).parent.parent.parent / "docs"
BASE = ".cache/smollm2-135m-instruct"
ROWS = [{"prompt": f"number {i}", "completion": "odd" if i % 2 else "even"} for i in range(24)]


def blocks(page: str, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)```", (DOCS / page).read_text(), re.M | re.S)
    return [re.sub(f"^{indent}", "", text, flags=re.M) for indent, text in found]


def commands_of(page: str) -> list[list[str]]:
    """The arguments of what a page says of `guilomo-train`."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("guilomo-train ")]


def test_a_first_adapter(
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (settings,) = blocks("first_adapter.md", "yaml")
    Path("run.yaml").write_text(settings)
    for name, rows in (("rows", ROWS), ("test", ROWS[:4])):
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path(".cache").mkdir()
    Path(BASE).symlink_to(tiny_base)
    ours = commands_of("first_adapter.md")
    assert [command[0] for command in ours] == ["data", "run", "inspect", "eval"]
    for command in ours:
        assert main(command) == 0, command
    out = capsys.readouterr().out
    assert "[[even<|im_end|>" in out
    assert out.count("4 rows: exact match") == 2
    for file in ("report.md", "run.json", "adapter/README.md"):
        assert (Path("runs/first") / file).is_file()


def test_a_row_that_calls_tools(tmp_path: Path) -> None:
    (row,) = blocks("first_adapter.md", "json")
    (tmp_path / "rows.jsonl").write_text(row.replace("\n", " "))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    (loaded,) = load_rows(str(tmp_path / "rows.jsonl"), tokenizer, loss_on="all")
    learned = tokenizer.decode([label for label in loaded["labels"] if label != -100])
    assert '<call>weather {"place": "Rome"}</call>' in learned
    assert "It is clear." in learned


def test_an_adapter_from_elsewhere(
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("MODEL").symlink_to(tiny_base)
    Path("test.jsonl").write_text("\n".join(map(json.dumps, ROWS[:2])))
    for folder, kind in (("mola", "MoLA"), ("loramoe", "LoRAMoE"), ("hydra", "HydraLoRA")):
        saved(Path(folder), kind)
    ours = commands_of("adapter_from_elsewhere.md")
    assert [command[0] for command in ours] == [*["import"] * 3, "inspect", "eval"]
    for command in ours:
        assert main(command) == 0, command
    out = capsys.readouterr().out
    assert out.count("the same function") == 3
    assert "2 rows: exact match" in out
    assert {read_spec(path).top_k for path in Path("adapters").iterdir()} == {2, 3, 4}


def test_settings_for_a_large_base_are_ones_that_exist() -> None:
    (settings,) = blocks("large_bases.md", "yaml")
    given = yaml.safe_load(settings)
    known = {f.name for kind in COMMANDS["run"].settings for f in fields(kind)}
    assert given.keys() <= known
    for kind in COMMANDS["run"].settings:  # and values that they take
        mine = {f.name for f in fields(kind)} & given.keys()
        numbers = {key: float(v) if key.endswith("rate") else v for key, v in given.items()}
        kind(**{key: numbers[key] for key in mine})
