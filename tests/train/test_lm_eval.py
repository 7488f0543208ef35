"""lm-evaluation-harness on an adapter, in process and against a server, as docs/evaluation.md has
it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import guilomo
from tests.conftest import REPOSITORY
from tests.serve.helpers import guilomo_serve, serving
from tests.train.tiny import tiny_llama, tiny_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: make test-extras")

PAGE = (REPOSITORY / "docs" / "evaluation.md").read_text()
TASKS = {name: text for text, name in re.findall(r"```yaml\n(task: (\w+)\n.*?)```", PAGE, re.S)}
IN_PROCESS, CHATS, LIKELIHOODS = re.findall(r"```sh\n(.*?)```", PAGE, re.S)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base in MODEL, an adapter in runs/mine/adapter, and the page's tasks, in the working
    folder."""
    from peft import get_peft_model

    tokenizer = tiny_tokenizer()
    model = tiny_llama(len(tokenizer), hidden_size=128)  # vLLM has no narrower heads
    for token in range(len(tokenizer)):  # a server writes parts of characters otherwise
        if not tokenizer.decode(token).isascii():
            model.get_input_embeddings().weight.data[token] = 0  # never the likeliest
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "MODEL")
    config = guilomo.LoraMoeConfig(
        num_experts=2, expert_rank=2, task_type="CAUSAL_LM", init_lora_weights=False
    )
    get_peft_model(model, config).save_pretrained(tmp_path / "runs" / "mine" / "adapter")
    (tmp_path / "tasks").mkdir()
    rows = [{"prompt": f"number {i}", "completion": "even"} for i in range(4)]
    for name, text in TASKS.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text)
        choices = [{**row, "choices": ["odd", "even"]} for row in rows]
        (tmp_path / "tasks" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, choices)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluated(command: str, task: str, url: str | None = None) -> list[dict[str, Any]]:
    """What a command of the page says of each row."""
    if url is not None:
        assert "http://localhost:8000" in command
        command = command.replace("http://localhost:8000", url)
    program, *flags = shlex.split(command.replace("\\\n", " "))
    start = [sys.executable] if program == "python" else [sys.executable, "-m", program]
    subprocess.run(
        [*start, *flags, "--output_path", f"out/{task}", "--log_samples"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=True,
        timeout=600,
    )
    (samples,) = Path(f"out/{task}").rglob("samples_*.jsonl")
    return [json.loads(line) for line in samples.read_text().splitlines()]


def in_process(task: str) -> list[dict[str, Any]]:
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args="pretrained=MODEL,peft=runs/mine/adapter,dtype=float32,device=cpu",
        tasks=[task],
        task_manager=lm_eval.tasks.TaskManager(include_path="tasks", include_defaults=False),
        apply_chat_template=task == "intents",
    )
    return results["samples"][task]


def said(samples: list[dict[str, Any]]) -> list[str]:
    return [sample["resps"][0][0] for sample in samples]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_server_and_a_process_give_the_same_answers_and_likelihoods(folder: Path) -> None:
    answers = said(in_process("intents"))
    assert said(evaluated(IN_PROCESS, "intents")) == answers
    command = guilomo_serve(
        folder / "MODEL",
        {"support": folder / "runs" / "mine" / "adapter"},
        *("--dtype", "float32", "--enforce-eager"),
    )
    with serving(command, folder / "server.log") as server:
        asked = evaluated(CHATS, "chats", server.url)
        likely = evaluated(LIKELIHOODS, "choices", server.url)
    assert said(asked) == answers
    for mine, theirs in zip(in_process("choices"), likely, strict=True):
        one, other = ([float(r[0]) for r in s["filtered_resps"]] for s in (mine, theirs))
        assert other == pytest.approx(one, abs=1e-3)
