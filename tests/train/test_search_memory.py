"""Memory of a second-order search over fine-tuning, in copies of the adapter's parameters.

Counted from every allocation that torch makes and frees on the CPU, so that the figures are the
same in each run, on any machine.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch.profiler import ProfilerActivity, profile

from guilomo_serve.adapter import BaseModel
from guilomo_train.arguments import training_arguments
from guilomo_train.config import CommonConfig
from guilomo_train.lora_moe import LoraMoeConfig
from guilomo_train.search.selection import SelectionVectors
from guilomo_train.search.space import SearchSpace
from guilomo_train.search.trainer import SearchTrainer
from guilomo_train.trainer import LoraMoeTrainer
from tests.train.tiny import tiny_llama, tiny_tokenizer

EXPERTS = 4
COPIES = 3.0  # the weights before the unrolled step, their gradient, and the direction v
STEPS = 2  # the second has Adam's moments


def trained(search: bool, rank: int, length: int, folder: Path, layers: int = 1) -> int:
    """Trains for some steps; the bytes of the adapter's parameters."""
    tokenizer = tiny_tokenizer()
    base = tiny_llama(len(tokenizer), layers, hidden_size=64).bfloat16()
    linears = BaseModel.from_module(base).linears
    config = LoraMoeConfig(num_experts=EXPERTS, expert_rank=rank, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    ids = torch.randint(3, 200, (4 * STEPS, length)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    shared: dict[str, Any] = {
        "model": model,
        "args": training_arguments(
            CommonConfig(base="", train="", output=""),
            folder,
            epochs=1,
            batch_size=4,
            learning_rate=1e-2,
        ),
        "train_dataset": rows,
        "processing_class": tokenizer,
        "balance_coefficient": 0.01,
    }
    if search:
        space = SearchSpace(
            {m: linears[m] for m in model.peft_config["default"].experts}, EXPERTS, rank
        )
        budget = space.cost(EXPERTS, rank) // 2
        trainer: LoraMoeTrainer = SearchTrainer(
            **shared,
            selection=SelectionVectors(space, budget=budget),
            estimator="marginal",
            second_order=True,
            selection_learning_rate=0.1,
            validation_dataset=rows,
        )
    else:
        trainer = LoraMoeTrainer(**shared)
    trainer.train()
    assert trainer.state.global_step == STEPS
    return sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)


def highest(work: Callable[[], Any], folder: Path) -> int:
    """The most bytes that were live at once of what `work` allocated."""
    return max(_live(work, folder))


def peak(search: bool, rank: int, length: int, folder: Path, layers: int = 1) -> tuple[int, int]:
    """The most bytes that were live at once, model and optimiser among them; and the adapter's."""
    adapter = []
    live = _live(lambda: adapter.append(trained(search, rank, length, folder, layers)), folder)
    assert live[-1] == 0, "all that was allocated was freed, so nothing escaped the count"
    return max(live), adapter[0]


def _live(work: Callable[[], Any], folder: Path) -> list[int]:
    """Bytes that are live after each allocation and each release of `work`."""
    gc.collect()  # what others left is not to be freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
        gc.collect()
    trace = folder / "trace.json"
    profiled.export_chrome_trace(str(trace))
    changes = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    changes.sort(key=lambda e: (e["ts"], e["args"]["Ev Idx"]))
    return list(accumulate(e["args"]["Bytes"] for e in changes))


@pytest.mark.parametrize(
    ("rank", "length"), [(8, 64), (64, 8)], ids=["activations", "large adapter"]
)
def test_a_second_order_search_holds_three_copies_of_the_adapter_more(
    rank: int, length: int, tmp_path: Path
) -> None:
    """Where activations are most of the memory, and where the adapter is."""
    finetuning, adapter = peak(False, rank, length, tmp_path)
    searching, same = peak(True, rank, length, tmp_path)
    assert same == adapter
    assert (searching - finetuning) / adapter <= COPIES
