"""A plain LoRA whose config is not what PEFT writes: refused, or served with a warning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import openai
import pytest

from guilomo_serve.adapter import CONFIG_FILE
from guilomo_serve.catalogue import command
from tests.serve.helpers import text_of

pytestmark = pytest.mark.slow

PROMPT = "My card has not arrived."


def changed(source: Path, folder: Path, **changes: Any) -> Path:
    """A copy of an adapter with another config."""
    shutil.copytree(source, folder)
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    "wrong",
    [
        {"base_model_name_or_path": ["a", "list"]},
        {"task_type": {"an": "object"}},
        {"r": "8"},
        {"target_modules": 3},
        {"bias": "all"},
        {"task_type": "SEQ_CLS"},
        {"unheard_of": 1},
    ],
    ids=str,
)
def test_a_config_of_other_types_is_refused_wherever_it_comes_from(opened, root, wrong):
    """Put, or brought in by a request: the list of adapters stays whole."""
    (key,) = wrong
    name = f"wrong-{key}-{len(str(wrong))}"
    folder = changed(root / "plain", root / name, **wrong)
    refused = opened.put("wrong", folder)
    assert refused.status_code == 400, refused.text
    message = refused.json()["error"]["message"]
    assert str(folder / CONFIG_FILE) in message
    assert key in message
    assert "expected" in message or "would not apply it" in message
    with pytest.raises(openai.BadRequestError, match=key):
        text_of(opened, name, PROMPT)
    listed = opened.admin("GET")
    assert listed.status_code == 200, listed.text
    assert name not in {entry["name"] for entry in listed.json()["data"]}


def test_what_cannot_be_known_is_a_warning(opened, root, capsys):
    """Another name of the base, which may be the same base: in PUT's answer, the list and `ls`."""
    folder = changed(
        root / "plain",
        root / "of-another-base",
        base_model_name_or_path="somebody/another-base",
        brand_new_option=None,
    )
    answer = opened.put("doubtful", folder).json()
    unknown, other_base = answer["warnings"]
    assert "'brand_new_option'" in unknown
    assert "somebody/another-base" in other_base
    assert text_of(opened, "doubtful", PROMPT) == text_of(opened, "plain", PROMPT)
    assert opened.admin("GET", "/doubtful").json()["warnings"] == answer["warnings"]
    assert opened.put("doubtful", folder, dry_run=True).json()["warnings"] == answer["warnings"]
    assert opened.put("sure", root / "plain").json()["warnings"] == []
    assert opened.put("sure", root / "first").json()["warnings"] == []
    capsys.readouterr()
    assert command.main(["ls", "--url", opened.url]) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if "somebody" in line]
    assert len(warned) == 1
    assert warned[0].startswith("warning: doubtful: ")
    for name in ("doubtful", "sure"):
        assert opened.admin("DELETE", f"/{name}").status_code == 200
