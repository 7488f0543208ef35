"""The how-tos' commands and settings, as written but for the base."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from guilomo_train.cli import COMMANDS, main

DOCS = Path(__file__).parent.parent.parent / "docs"
BASE = ".cache/smollm2-135m-instruct"
ROWS = [{"prompt": f"number {i}", "completion": "odd" if i % 2 else "even"} for i in range(24)]


def blocks(page: str, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)```", (DOCS / page).read_text(), re.M | re.S)
    return [re.sub(f"^{indent}", "", text, flags=re.M) for indent, text in found]


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
    commands = [line for block in blocks("first_adapter.md", "bash") for line in block.splitlines()]
    ours = [shlex.split(line)[1:] for line in commands if line.startswith("guilomo-train ")]
    assert [command[0] for command in ours] == ["data", "run", "inspect", "eval"]
    for command in ours:
        assert main(command) == 0, command
    out = capsys.readouterr().out
    assert "[[even<|im_end|>" in out
    assert out.count("4 rows: exact match") == 2
    for file in ("report.md", "run.json", "adapter/README.md"):
        assert (Path("runs/first") / file).is_file()


def test_settings_for_a_large_base_are_ones_that_exist() -> None:
    (settings,) = blocks("large_bases.md", "yaml")
    given = yaml.safe_load(settings)
    known = {f.name for kind in COMMANDS["run"].settings for f in fields(kind)}
    assert given.keys() <= known
    for kind in COMMANDS["run"].settings:  # and values that they take
        mine = {f.name for f in fields(kind)} & given.keys()
        numbers = {key: float(v) if key.endswith("rate") else v for key, v in given.items()}
        kind(**{key: numbers[key] for key in mine})
