"""`guilomo-train push` against a stand-in of the Hub, with the library that asks the real one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from guilomo_serve.adapter import read_adapter, write_adapter
from guilomo_train.adapters import adapter_of, with_adapter
from guilomo_train.cli import main
from guilomo_train.lora_moe import LoraMoeConfig
from guilomo_train.model_card import model_card
from tests.serve.hub_stand_in import HubStandIn
from tests.train.tiny import tiny_llama


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that was trained on a folder."""
    folder = tmp_path_factory.mktemp("adapter") / "support"
    config = LoraMoeConfig(num_experts=3, expert_rank=2, task_type="CAUSAL_LM")
    made = adapter_of(with_adapter(tiny_llama(64), config))
    made = replace(made, spec=replace(made.spec, base_model_name_or_path=str(folder.parent)))
    write_adapter(made, folder, model_card(made.spec, "rows.jsonl (48 rows)", 10, None))
    return folder


def push(hub: HubStandIn, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The program as a user runs it; the library reads the Hub's address when it is imported."""
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "guilomo_train.cli", "push", *map(str, arguments)]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=120, check=False
    )


def test_an_adapter_is_pushed_with_its_card_and_picture(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--adapter", adapter, "--repo", "acme/support"]
    with HubStandIn() as hub:
        done = push(hub, *given, "--base", "acme/tiny")
        assert done.returncode == 0, done.stderr
        sha, files = list(hub.repositories["acme/support"].items())[-1]
        assert done.stdout.strip() == f"{hub.url}/acme/support/commit/{sha}"
        assert {key for _, path, key in hub.requests if "/commit/" in path} == {"Bearer hf_secret"}

        hub.denied.add("acme/other")
        refused = push(hub, "--adapter", adapter, "--repo", "acme/other", "--base", "acme/tiny")
        assert refused.returncode == 2
        assert "--repo acme/other: the Hub does not take it (" in refused.stderr.splitlines()[-1]

    assert main(["push", *map(str, given)]) == 2
    assert "a folder that others do not have: give --base" in capsys.readouterr().err
    assert files["allocation.png"][:4] == b"\x89PNG"
    card = files["README.md"].decode()
    assert "base_model: acme/tiny" in card
    assert "rows.jsonl (48 rows)" in card
    assert (
        "guilomo-serve acme/tiny --adapter-root hf://acme` and ask for the model `support`" in card
    )
    assert 'from_pretrained("acme/support")' in card
    assert "![Experts and ranks of the layers](allocation.png)" in card
    assert str(adapter.parent) not in card
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    pushed, mine = read_adapter(tmp_path), read_adapter(adapter)
    assert pushed.spec.base_model_name_or_path == "acme/tiny"
    assert pushed.spec.experts == mine.spec.experts
    for module, weights in mine.weights.items():
        assert pushed.weights[module].lora_a.equal(weights.lora_a)
