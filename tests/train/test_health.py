"""Router health against a count by hand, with padding, search masks and several windows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from trl import SFTConfig

from guilomo_train.balance import balance_loss
from guilomo_train.health import RouterHealth
from guilomo_train.lora_moe import LoraMoeConfig
from guilomo_train.lora_moe.layer import Routing
from guilomo_train.lora_moe.routing import masked_top_k_softmax, top_k_softmax
from guilomo_train.trainer import LoraMoeTrainer
from tests.train.tiny import tiny_llama, tiny_tokenizer


def routing(logits: torch.Tensor, top_k: int = 2, mask: torch.Tensor | None = None) -> Routing:
    """What a router with these logits [T, E] does, as one row of a batch."""
    if mask is None:
        return Routing(logits[None], top_k_softmax(logits, top_k)[None], None)
    weights = masked_top_k_softmax(logits, mask, top_k)
    return Routing(logits[None], weights[None], mask > 0)


def same(counts: torch.Tensor) -> torch.Tensor:
    return counts


def normal_entropy(logits: torch.Tensor) -> float:
    p = torch.softmax(logits, -1)
    return float(-(p * p.log()).sum(-1).mean() / math.log(logits.shape[-1]))


def test_load_entropy_and_dead_experts_are_those_of_a_count_by_hand() -> None:
    torch.manual_seed(0)
    first, second, small = torch.randn(400, 4), torch.randn(400, 4), torch.randn(400, 2)
    first[:, 3] = -20  # no token ever chooses it
    padding = torch.ones(1, 401)
    padding[0, -1] = 0
    odd = torch.full((1, 4), 0.0)
    odd[0, 3] = 99.0  # padding would choose it

    health = RouterHealth()
    routings = [
        routing(torch.cat([logits, odd[:, : logits.shape[1]]])) for logits in (first, small, second)
    ]
    before = balance_loss(routings, padding)
    assert torch.equal(balance_loss(routings, padding, health=health), before), (
        "watching changes nothing"
    )
    scalars = health.scalars(same)

    by_hand = []
    for logits in (first, small, second):
        chosen = logits.topk(2).indices
        load = [
            float((chosen == e).any(-1).float().mean()) * logits.shape[1] / 2
            for e in range(logits.shape[1])
        ]
        by_hand.append((load, normal_entropy(logits)))
    assert list(health.figures) == [0, 1, 2]
    for place, (load, entropy) in enumerate(by_hand):
        assert health.figures[place].load == pytest.approx(load, abs=1e-5)
        assert health.figures[place].entropy == pytest.approx(entropy, abs=1e-5)
    assert [f.dead for f in health.figures.values()] == [(3,), (), ()]
    assert health.figures[1].load == pytest.approx([1, 1]), "both are always used"
    assert scalars == pytest.approx(
        {
            "router_entropy": sum(e for _, e in by_hand) / 3,
            "max_load": sum(max(load) for load, _ in by_hand) / 3,
            "dead_experts": 1 / 10,
        },
        abs=1e-5,
    )


def test_experts_that_a_search_masks_out_are_not_dead() -> None:
    torch.manual_seed(1)
    health = RouterHealth()
    tokens = torch.ones(1, 300)
    for mask in ([1.0, 1, 1, 0], [1.0, 1, 0, 0]):
        drawn = routing(torch.randn(300, 4), mask=torch.tensor(mask))
        balance_loss([drawn], tokens, health=health)
    health.scalars(same)
    (figures,) = health.figures.values()
    assert figures.dead == ()
    # Expert 2 was there in the first batch alone and counts there alone.
    assert figures.load[2] == pytest.approx(1, abs=0.15)
    assert 0.5 < figures.entropy < 1


def test_steps_in_which_a_search_leaves_a_router_no_choice_do_not_count() -> None:
    torch.manual_seed(3)
    tokens = torch.ones(1, 200)
    chosen, other = torch.randn(200, 4), torch.randn(200, 4)
    masks = [torch.tensor([1.0, 1, 1, 0]), torch.tensor([1.0, 0, 0, 0]), torch.zeros(4)]
    never = [routing(torch.randn(200, 4), mask=masks[i]) for i in (1, 2)]

    alone, beside = RouterHealth(), RouterHealth()
    balance_loss([routing(chosen, mask=masks[0])], tokens, health=alone)
    for mask, logits, idle in zip(masks, (chosen, other, other), [*never, never[0]], strict=True):
        balance_loss([idle, routing(logits, mask=mask)], tokens, health=beside)
    assert beside.scalars(same) == pytest.approx(alone.scalars(same))
    assert beside.figures == {1: alone.figures[0]}, "the first router never had a choice"

    balance_loss(never, tokens, health=beside)
    assert beside.scalars(same) == {}
    assert beside.figures == {1: alone.figures[0]}, "of the last two windows"


def test_a_log_line_ends_a_window_and_the_figures_that_stay_look_at_two() -> None:
    health = RouterHealth()
    tokens = torch.ones(1, 2)
    left = torch.tensor([[5.0, 4, 0, 0], [5.0, 4, 0, 0]])
    lines = []
    for logits in (left, left.flip(-1)):
        balance_loss([routing(logits)], tokens, health=health)
        lines.append(health.scalars(same))
    assert lines[0]["dead_experts"] == lines[1]["dead_experts"] == 0.5
    assert health.figures[0].dead == ()
    assert health.figures[0].load == pytest.approx([1, 1, 1, 1])
    assert health.scalars(same) == {}, "nothing was counted since"
    assert len(health.figures) == 1


def test_counts_of_several_processes_are_summed() -> None:
    one, two = RouterHealth(), RouterHealth()
    torch.manual_seed(2)
    logits = torch.randn(100, 4)
    balance_loss([routing(logits[:50])], torch.ones(1, 50), health=one)
    balance_loss([routing(logits[50:])], torch.ones(1, 50), health=two)
    others = iter(two._counts[(0,)].tensors())
    both = RouterHealth()
    balance_loss([routing(logits)], torch.ones(1, 100), health=both)
    assert one.scalars(lambda counts: counts + next(others)) == pytest.approx(both.scalars(same))


def test_routers_are_watched_without_a_load_balance_loss(tmp_path: Path) -> None:
    """Experts die where nothing keeps their load even; watching changes no weight."""

    def trained(balance: float) -> tuple[dict[str, float], list[torch.Tensor]]:
        tokenizer = tiny_tokenizer()
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(len(tokenizer)), LoraMoeConfig(task_type="CAUSAL_LM"))
        rows = [{"prompt": f"number {i}", "completion": "odd"} for i in range(8)]
        trainer = LoraMoeTrainer(
            model=model,
            args=SFTConfig(
                output_dir=str(tmp_path), bf16=False, use_cpu=True, max_steps=2, logging_steps=2,
                per_device_train_batch_size=4, report_to="none", save_strategy="no",
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            balance_coefficient=balance,
        )  # fmt: skip
        trainer.train()
        weights = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        return trainer.state.log_history[0], weights

    log, weights = trained(0.0)
    assert 0 < log["router_entropy"] <= 1
    assert log["balance"] > 0
    assert log["loss"] == pytest.approx(log["nll"], rel=1e-3)
    tiny_log, tiny_weights = trained(1e-12)
    assert log["dead_experts"] == tiny_log["dead_experts"]
    for one, other in zip(weights, tiny_weights, strict=True):
        torch.testing.assert_close(one, other)
