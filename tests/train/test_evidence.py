"""What slopes say of worths: nothing where there is nothing, and how surely elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle

import pytest
import torch

from guilomo_train.search.estimators import MarginalWorth
from guilomo_train.search.evidence import BLOCKS, Evidence, flip_test, shrunk
from guilomo_train.search.fill import even
from guilomo_train.search.selection import Draw, SelectionVectors
from guilomo_train.search.space import SearchSpace

MODULES, STEPS = 30, 75
SPACE = SearchSpace({f"m{i}": (64, 64) for i in range(MODULES)})
BUDGET = SPACE.cost(8, 8) / 3
Slopes = Callable[[torch.Generator, int], torch.Tensor]  # of a step: a value a module, [M]


@cache
def draws() -> list[Draw]:
    selection = SelectionVectors(SPACE, budget=BUDGET)
    generator = torch.Generator().manual_seed(0)
    return [selection.draw(generator) for _ in range(STEPS)]


@cache
def trained() -> torch.Tensor:
    """The share of steps in which an entry is trained, `[E, r]`."""
    return torch.stack([(d.experts[..., None] * d.ranks).mean(0) for d in draws()]).mean(0)


def searched(slopes: Slopes, seed: int, steps: int = STEPS) -> MarginalWorth:
    """What a search has learned from modules' slopes and as much noise of single entries."""
    learner = MarginalWorth(SelectionVectors(SPACE, budget=BUDGET), 10**9)
    for draw, values in zip(cycle(draws()), values_of(slopes, seed, steps), strict=False):
        see(learner.evidence, draw, values)
    return learner


def values_of(slopes: Slopes, seed: int, steps: int) -> Iterator[torch.Tensor]:
    """dL/dM a parameter, `[M, E, r]`, of each step: an entry shows as much as it was trained."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        of_module = slopes(generator, step)[:, None, None] * trained()
        yield of_module * (1 + torch.randn(MODULES, 8, 8, generator=generator))


def see(evidence: Evidence, draw: Draw, values: torch.Tensor) -> None:
    row = SPACE.sizes.row[:, None].float()
    of_experts = row * draw.ranks.sum(-1) + evidence.expert_sizes.float()
    evidence.see(draw, values[..., 0] * of_experts, values * row[..., None])


def noise(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(MODULES, generator=generator)


def unequal() -> torch.Tensor:
    return torch.logspace(-1, 1, MODULES)


def outliers(generator: torch.Generator, step: int) -> torch.Tensor:
    return noise(generator) * torch.where(torch.arange(MODULES) == 7 * step % 90, 40.0, 1.0)


def heavy(generator: torch.Generator, step: int) -> torch.Tensor:
    """Student's t with two degrees of freedom: its variance is infinite."""
    return noise(generator) / ((noise(generator) ** 2 + noise(generator) ** 2) / 2).sqrt()


NULL: dict[str, Slopes] = {
    "pure": lambda generator, step: noise(generator),
    "shared": lambda generator, step: noise(generator) + 5 * torch.randn(1, generator=generator),
    "shared unequally": lambda generator, step: (
        0.2 * noise(generator) + unequal() * torch.randn(1, generator=generator)
    ),
    "unequal": lambda generator, step: noise(generator) * unequal(),
    "outliers": outliers,
    "heavy tails": heavy,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", NULL)
def test_noise_becomes_the_even_allocation(kind: str) -> None:
    """In at least 95 of 100 searches, whatever the noise."""
    found = [searched(NULL[kind], seed) for seed in range(100)]
    told_apart = [learner.evidence.worths().told_apart for learner in found]
    assert sum(told_apart) <= 5
    learner = found[told_apart.index(False)]
    allocation = learner.allocation()
    assert allocation == even(SPACE, BUDGET)
    rows = [sum(ranks) for ranks in allocation.ranks.values()]
    assert max(rows) - min(rows) <= 1
    assert max(rows) > 10


@pytest.mark.slow
def test_credible_intervals_cover_as_often_as_they_say() -> None:
    """Effects of modules around their mean; intervals that are to cover 90% of them."""
    truths, levels = [], []
    for seed in range(60):
        true = 0.3 * torch.randn(MODULES, generator=torch.Generator().manual_seed(900 + seed))
        learner = searched(lambda g, step, t=true: noise(g) - t, seed)
        truths.append(true - true.mean())
        levels.append(learner.evidence.worths().levels["modules"])
    true = torch.stack(truths).double()
    # Worths have a unit of their own: that in which estimates are the truth on average.
    estimates = torch.stack([level.by_step.sum(0) for level in levels])
    unit = (estimates * true).sum() / true.square().sum()
    mean = torch.stack([level.mean[:, 0] for level in levels])
    gap = (mean - unit * true) / torch.stack([level.sd[:, 0] for level in levels])
    assert (gap.abs() < 1.645).double().mean().item() == pytest.approx(0.9, abs=0.025)
    assert (gap.abs() < 0.674).double().mean().item() == pytest.approx(0.5, abs=0.04)
    # No trivial intervals: they are narrower than the spread of what they are of.
    assert (torch.stack([level.sd for level in levels]).mean() / unit).item() < 0.5 * 0.3


def test_differences_are_found_and_rank_follows_them() -> None:
    true = torch.linspace(-1, 1, MODULES)
    learner = searched(lambda g, step: noise(g) - true, 0)
    assert learner.evidence.worths().told_apart
    rows = [sum(ranks) for ranks in learner.allocation().ranks.values()]
    assert min(rows[-8:]) > max(rows[:8])


def test_one_step_of_one_module_moves_it_by_little() -> None:
    """It moved a module from a total rank of 8 to 64 when slopes were in units of its own size."""
    true = torch.linspace(-1, 1, MODULES)

    def slopes(factor: float) -> Slopes:
        def of_step(generator: torch.Generator, step: int) -> torch.Tensor:
            found = -true + noise(generator)
            found[4] *= factor if step == 40 else 1.0
            return found

        return of_step

    before, after = (searched(slopes(factor), 0).evidence.worths() for factor in (1.0, 5.0))
    moved = after.levels["modules"].mean - before.levels["modules"].mean
    assert moved.abs().max() < 0.3 * before.levels["modules"].sd.mean()


def test_rank_does_not_follow_noise() -> None:
    """Equal worths under noise that differs a hundredfold."""
    rows = torch.zeros(MODULES)
    for seed in range(20):
        learner = searched(lambda g, step: -1.0 + noise(g) * unequal(), seed)
        rows += torch.tensor([sum(r) for r in learner.allocation().ranks.values()])
    assert (rows[:10].mean() - rows[-10:].mean()).abs() <= 0.02 * rows.mean()


def test_steps_are_the_unit_of_evidence() -> None:
    """What all slopes of a module share in a step is no more evidence for being seen often."""
    module = torch.zeros(MODULES)
    module[3] = 1.0

    def one_loud_step(generator: torch.Generator, step: int) -> torch.Tensor:
        return noise(generator) + (20.0 * module if step == 5 else 0.0)

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

    def late(generator: torch.Generator, step: int) -> torch.Tensor:
        return noise(generator)

    plain = searched(late, 0).evidence
    waited = Evidence(SPACE)
    for draw in draws()[:10]:
        waited.see(draw, torch.zeros(MODULES, 8), torch.zeros(MODULES, 8, 8))
    assert waited.steps == 0
    assert not waited.seen.any()
    waited.draws, waited.on = 0, torch.zeros_like(waited.on)
    for block in range(STEPS):
        waited.sums[block], waited.seen[block] = plain.sums[block], plain.seen[block]
    waited.draws, waited.on, waited.steps = plain.draws, plain.on, plain.steps
    assert torch.equal(waited.worths().expected(), plain.worths().expected())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_slope_that_is_no_number_is_not_seen(value: float) -> None:
    """One of them froze all vectors for the rest of a search."""
    true = torch.linspace(-1, 1, MODULES)
    learner = MarginalWorth(SelectionVectors(SPACE, budget=BUDGET), STEPS)
    values = values_of(lambda g, step: noise(g) - true, 0, STEPS)
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
    learner = searched(lambda g, step: noise(g) - true, 0, steps=BLOCKS * 2 + 10)
    assert learner.evidence.steps == BLOCKS * 2 + 10
    assert learner.evidence.width == 4
    single = searched(lambda g, step: noise(g) - true, 0, steps=4).evidence
    assert torch.equal(learner.evidence.seen[0], single.seen[:4].sum(0))
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
