"""What slopes say of worths: nothing where there is nothing, and how surely elsewhere."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.null_beds import (
    BUDGET,
    IN_BLOCKS,
    MODULES,
    NULL,
    SPACE,
    STEPS,
    Slopes,
    coverage,
    draws,
    is_even,
    normal,
    searched,
    sizes,
    trained,
    values_of,
)
from guilomo_train.search.estimators import MarginalWorth
from guilomo_train.search.evidence import BLOCKS, Evidence, flip_test, shrunk
from guilomo_train.search.fill import even
from guilomo_train.search.selection import SelectionVectors


@pytest.mark.slow
@pytest.mark.parametrize("kind", NULL)
def test_noise_becomes_the_even_allocation(kind: str) -> None:
    """In at least 95 of 100 searches, whatever the noise."""
    assert sum(is_even(kind, seed) for seed in range(100)) >= 95


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pure", "shared unequally"])
def test_noise_is_even_where_modules_are_in_groups(kind: str) -> None:
    assert sum(is_even(kind, seed, IN_BLOCKS) for seed in range(100)) >= 95


@pytest.mark.parametrize("level", ["kinds", "blocks"])
def test_modules_in_groups_are_known_by_what_their_group_shows(level: str) -> None:
    module = torch.arange(MODULES)
    group = module % 6 if level == "kinds" else module // 6
    true = torch.tensor([0.3, -0.2, -0.1, 0.2, -0.2, 0.0])[group]

    def slopes(generator: torch.Generator, step: int) -> torch.Tensor:
        return normal(generator) - true

    def spread(rows: torch.Tensor) -> int:
        """Of rows within a group, the largest."""
        return int(max(rows[group == g].max() - rows[group == g].min() for g in range(5)))

    alone, grouped = searched(slopes, 1), searched(slopes, 1, space=IN_BLOCKS)
    worths = grouped.evidence.worths()
    assert [name for name, found in worths.levels.items() if found.sure] == [level]
    assert alone.evidence.worths().levels[level].p_value == 1  # no groups
    rows, rows_alone = (
        torch.tensor([sum(ranks) for ranks in learner.allocation().ranks.values()])
        for learner in (grouped, alone)
    )
    assert rows[true > 0.25].min() > rows[true < -0.15].max()
    assert spread(rows) <= 1 < spread(rows_alone)


def test_the_even_allocation_is_what_a_search_without_evidence_returns() -> None:
    learner = searched(NULL["pure"], 0)
    assert not learner.evidence.worths().told_apart
    assert learner.allocation() == even(SPACE, BUDGET)
    rows = [sum(ranks) for ranks in learner.allocation().ranks.values()]
    assert min(rows) > 10  # an even allocation of the whole budget, not an empty one


@pytest.mark.slow
def test_credible_intervals_cover_as_often_as_they_say() -> None:
    covered = coverage(range(60))
    assert covered["90"] == pytest.approx(0.9, abs=0.025)
    assert covered["50"] == pytest.approx(0.5, abs=0.04)
    assert covered["width"] < 0.5


def test_differences_are_found_and_rank_follows_them() -> None:
    true = torch.linspace(-1, 1, MODULES)
    learner = searched(lambda g, step: normal(g) - true, 0)
    assert learner.evidence.worths().told_apart
    rows = [sum(ranks) for ranks in learner.allocation().ranks.values()]
    assert min(rows[-8:]) > max(rows[:8])


def test_one_step_of_one_module_moves_it_by_little() -> None:
    """It moved a module from a total rank of 8 to 64 when slopes were in units of its own size."""
    true = torch.linspace(-1, 1, MODULES)

    def slopes(factor: float) -> Slopes:
        def of_step(generator: torch.Generator, step: int) -> torch.Tensor:
            found = -true + normal(generator)
            found[4] *= factor if step == 40 else 1.0
            return found

        return of_step

    before, after = (searched(slopes(factor), 0).evidence.worths() for factor in (1.0, 5.0))
    moved = after.levels["modules"].mean - before.levels["modules"].mean
    assert moved.abs().max() < 0.5 * before.levels["modules"].sd.mean()


def test_rank_does_not_follow_noise() -> None:
    """Equal worths under noise that differs a hundredfold."""
    rows = torch.zeros(MODULES)
    for seed in range(20):
        learner = searched(lambda g, step: -1.0 + normal(g) * sizes(), seed)
        rows += torch.tensor([sum(r) for r in learner.allocation().ranks.values()])
    assert (rows[:10].mean() - rows[-10:].mean()).abs() <= 0.02 * rows.mean()


def test_steps_are_the_unit_of_evidence() -> None:
    """What all slopes of a module share in a step is no more evidence for being seen often."""
    module = torch.zeros(MODULES)
    module[3] = 1.0

    def one_loud_step(generator: torch.Generator, step: int) -> torch.Tensor:
        return normal(generator) + (20.0 * module if step == 5 else 0.0)

    level = searched(one_loud_step, 0).evidence.worths().levels["modules"]
    assert not level.sure
    # The error is what a module's value varies by from step to step over the root of their number,
    # though a step has a dozen slopes of a module.
    quiet = searched(NULL["pure"], 1).evidence
    values = torch.stack(list(values_of(NULL["pure"], 1, STEPS)))
    of_steps = (values / trained()).mean((2, 3)) / (values / trained()).mean((2, 3)).abs().median()
    by_step = quiet.worths().levels["modules"].by_step
    error = by_step.square().sum(0).sqrt().mean()
    assert error == pytest.approx(of_steps.std(0).mean().item() / STEPS**0.5, rel=0.3)


def test_steps_that_can_show_nothing_are_no_evidence() -> None:
    """As long as B is 0 every slope is exactly 0."""
    plain = searched(NULL["pure"], 0).evidence
    waited = Evidence(SPACE)
    for draw in draws():  # so that entries are trained as often as in the other
        waited.see(draw, torch.zeros(MODULES, 8), torch.zeros(MODULES, 8, 8))
    assert waited.steps == 0
    assert not waited.worths().told_apart
    assert waited.worths().error() == 0
    assert plain.steps == STEPS
    assert plain.worths().error() > 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_slope_that_is_no_number_is_not_seen(value: float) -> None:
    """One of them froze all vectors for the rest of a search."""
    true = torch.linspace(-1, 1, MODULES)
    learner = MarginalWorth(SelectionVectors(SPACE, budget=BUDGET), STEPS)
    values = values_of(lambda g, step: normal(g) - true, 0, STEPS)
    for step, (draw, ranks) in enumerate(zip(draws(), values, strict=True)):
        if step == 3:
            ranks[5] = value
        learner.step(draw, ranks[..., 0] * draw.ranks.sum(-1), ranks)
    assert learner.selection.experts.isfinite().all()
    assert learner.selection.experts.abs().sum() > 0
    rows = [sum(ranks) for ranks in learner.allocation().ranks.values()]
    assert min(rows[-8:]) > max(rows[:8])


def test_a_long_search_adds_steps_up_to_blocks() -> None:
    true = torch.linspace(-1, 1, MODULES)
    learner = searched(lambda g, step: normal(g) - true, 0, steps=BLOCKS * 2 + 10)
    assert learner.evidence.steps == BLOCKS * 2 + 10
    assert learner.evidence.width == 4
    single = searched(lambda g, step: normal(g) - true, 0, steps=4).evidence
    assert torch.equal(learner.evidence.seen[0], torch.stack(single.seen).sum(0))
    assert len(learner.evidence.seen) == 35
    worths = learner.evidence.worths()
    centred = (true - true.mean()).double()
    found = worths.levels["modules"].mean[:, 0]
    assert torch.corrcoef(torch.stack([found, centred]))[0, 1] > 0.98


def test_shrinking_by_hand() -> None:
    """Three effects of one error, against the integral over the spread in plain numbers."""
    estimate, error = [1.0, -2.0, 0.5], 0.7
    most = 3 * math.sqrt(sum(x * x for x in estimate) / 3 + error**2)
    top, bottom = [0.0, 0.0, 0.0], 0.0
    for i in range(200):
        tau = most * i / 199
        variance = tau**2 + error**2
        weight = math.exp(-sum(x * x for x in estimate) / (2 * variance)) / variance**1.5
        bottom += weight
        for k, x in enumerate(estimate):
            top[k] += weight * tau**2 / variance * x
    mean, sd = shrunk(torch.tensor(estimate).double(), torch.full((3,), error).double())
    assert mean.tolist() == pytest.approx([t / bottom for t in top])
    assert (sd > 0).all()
    assert (sd < 1.1 * error).all()


def test_flips_are_exact_for_steps_that_share_everything() -> None:
    """All modules see one noise: a p-value is then that of a single one, uniform under noise."""
    generator = torch.Generator().manual_seed(0)
    loud = torch.arange(1.0, 41.0)
    p = [flip_test(torch.randn(60, 1, generator=generator) * loud) for _ in range(200)]
    for share in (0.05, 0.2, 0.5):
        below = sum(value <= share for value in p) / len(p)
        assert below == pytest.approx(share, abs=3 * math.sqrt(share * (1 - share) / len(p)))
