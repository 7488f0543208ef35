"""Slopes of modules that do not differ, and of modules whose worths are known.

Thirty modules of one shape, 75 steps, a third of the space as budget. A step has a value for each
module; each of the module's entries shows it with as much noise of its own, in proportion to how
often the entry was trained. `noise` has what no search may take for a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle

import torch

from guilomo_train.search.estimators import MarginalWorth
from guilomo_train.search.evidence import Evidence
from guilomo_train.search.selection import Draw, SelectionVectors
from guilomo_train.search.space import SearchSpace

MODULES, STEPS = 30, 75
SPACE = SearchSpace({f"m{i}": (64, 64) for i in range(MODULES)})
# The same, in five blocks of six kinds.
IN_BLOCKS = SearchSpace({f"layers.{i // 6}.{'abcdef'[i % 6]}": (64, 64) for i in range(MODULES)})
BUDGET = SPACE.cost(8, 8) / 3
Slopes = Callable[[torch.Generator, int], torch.Tensor]  # of a step: a value a module, [M]


def normal(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(MODULES, generator=generator)


def sizes() -> torch.Tensor:
    """A hundredfold between the first module and the last."""
    return torch.logspace(-1, 1, MODULES)


def _outliers(generator: torch.Generator, step: int) -> torch.Tensor:
    return normal(generator) * torch.where(torch.arange(MODULES) == 7 * step % 90, 40.0, 1.0)


def _heavy(generator: torch.Generator, step: int) -> torch.Tensor:
    """Student's t with two degrees of freedom: its variance is infinite."""
    squares = normal(generator).square() + normal(generator).square()
    return normal(generator) / (squares / 2).sqrt()


NULL: dict[str, Slopes] = {
    "pure": lambda generator, step: normal(generator),
    "shared": lambda generator, step: normal(generator) + 5 * torch.randn(1, generator=generator),
    "shared unequally": lambda generator, step: (
        0.2 * normal(generator) + sizes() * torch.randn(1, generator=generator)
    ),
    "unequal": lambda generator, step: normal(generator) * sizes(),
    "outliers": _outliers,
    "heavy tails": _heavy,
}


@cache
def draws() -> list[Draw]:
    selection = SelectionVectors(SPACE, budget=BUDGET)
    generator = torch.Generator().manual_seed(0)
    return [selection.draw(generator) for _ in range(STEPS)]


@cache
def trained() -> torch.Tensor:
    """The share of steps in which an entry is trained, `[E, r]`."""
    return torch.stack([(d.experts[..., None] * d.ranks).mean(0) for d in draws()]).mean(0)


def searched(
    slopes: Slopes, seed: int, steps: int = STEPS, space: SearchSpace = SPACE
) -> MarginalWorth:
    """What a search has learned from such slopes."""
    learner = MarginalWorth(SelectionVectors(space, budget=BUDGET), 10**9)
    for draw, values in zip(cycle(draws()), values_of(slopes, seed, steps), strict=False):
        see(learner.evidence, draw, values)
    return learner


def values_of(slopes: Slopes, seed: int, steps: int) -> Iterator[torch.Tensor]:
    """dL/dM a parameter, `[M, E, r]`, of each step."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        of_module = slopes(generator, step)[:, None, None] * trained()
        yield of_module * (1 + torch.randn(MODULES, 8, 8, generator=generator))


def see(evidence: Evidence, draw: Draw, values: torch.Tensor) -> None:
    row = SPACE.sizes.row[:, None].float()
    of_experts = row * draw.ranks.sum(-1) + evidence.expert_sizes.float()
    evidence.see(draw, values[..., 0] * of_experts, values * row[..., None])


def is_even(kind: str, seed: int, space: SearchSpace = SPACE) -> bool:
    """Whether a search under such noise gives all modules as many rows, or one more."""
    found = searched(NULL[kind], seed, space=space).allocation()
    rows = [sum(ranks) for ranks in found.ranks.values()]
    return max(rows) - min(rows) <= 1


def coverage(seeds: range) -> dict[str, float]:
    """How often credible intervals of modules' worths have the truth in them.

    Returns:
        The share for the level of 50% and of 90%, and `width`: the posterior's standard deviation
        over that of the truth, which shows that the intervals are not merely wide.
    """
    spread = 0.3
    truths, levels = [], []
    for seed in seeds:
        true = spread * torch.randn(MODULES, generator=torch.Generator().manual_seed(900 + seed))
        learner = searched(lambda g, step, t=true: normal(g) - t, seed)  # type: ignore[misc]
        truths.append(true - true.mean())
        levels.append(learner.evidence.worths().levels["modules"])
    true = torch.stack(truths).double()
    # Worths have a unit of their own: that in which estimates are the truth on average.
    estimates = torch.stack([level.by_step.sum(0) for level in levels])
    unit = float((estimates * true).sum() / true.square().sum())
    sd = torch.stack([level.sd[:, 0] for level in levels])
    gap = (torch.stack([level.mean[:, 0] for level in levels]) - unit * true) / sd
    return {
        "50": round(float((gap.abs() < 0.6745).double().mean()), 3),
        "90": round(float((gap.abs() < 1.6449).double().mean()), 3),
        "width": round(float(sd.mean()) / unit / spread, 3),
    }
