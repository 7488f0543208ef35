"""lm-evaluation-harness on an adapter, in process, with the task file of docs/evaluation.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import guilomo
from tests.conftest import REPOSITORY
from tests.train.tiny import tiny_llama, tiny_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install lm_eval[hf]")


def test_the_task_of_the_docs_scores_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import get_peft_model

    tokenizer = tiny_tokenizer()
    model = tiny_llama(len(tokenizer))
    for folder in (model, tokenizer):
        folder.save_pretrained(tmp_path / "base")
    config = guilomo.LoraMoeConfig(num_experts=2, expert_rank=2, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    page = (REPOSITORY / "docs" / "evaluation.md").read_text()
    yaml = next(t for t in re.findall(r"```yaml\n(.*?)```", page, re.S) if "task: intents" in t)
    (tasks / "intents.yaml").write_text(yaml)
    rows = [{"prompt": f"number {i}", "completion": "even"} for i in range(4)]
    (tasks / "intents.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args="pretrained=base,peft=adapter,dtype=float32,device=cpu",
        tasks=["intents"],
        task_manager=lm_eval.tasks.TaskManager(include_path="tasks", include_defaults=False),
        apply_chat_template=True,
    )
    assert results["results"]["intents"]["exact_match,none"] == 0.0
    assert len(results["samples"]["intents"]) == 4
