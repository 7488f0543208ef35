"""What the slopes of a search say of the worth of each expert and rank row, and how surely.

An entry is a rank row `(e, j)` of a module; the first row of expert e stands for the expert as a
whole, since it comes and goes with it. In each step the entries at the edges of the drawn counts,
the last one on and the first one off, have a slope dL/dM (estimators.py says why those). From these

    worth of entry k of module m, a parameter  =  profile[k] + L[k] u[m] + v[m, j] + w[m, k]
    u[m]  =  kind of m  +  block of m  +  m itself

is inferred: what is common to all modules, then what tells modules apart. First whole modules: by
kind (all q_proj), by block (all of layer 3) and by themselves, since thirty modules of a kind are
known much better than each of them. Then a module's curve over rank rows, and single entries. L is
the share of steps in which an entry was trained, as a row that was trained half as often shows half
as much. Five rules keep it honest:

1. *The unit of evidence is the step.* All slopes of one step share a batch and a state of the
   weights, so they are no independent observations: each level takes one value a step, and its
   standard error from how that value varies between steps. (Long searches add neighbouring steps
   up to blocks, of which there are at most BLOCKS: batch means.)
2. *One unit for the whole model.* A slope is taken for a parameter, and a step's are divided by
   the median of what its modules show. A module's own scale is never divided out: then rank would
   follow noise. Beyond three robust standard deviations of a module's own steps a step counts no
   further.
3. *No credit for what cannot show anything.* A slope that is exactly 0 (the row's B still is 0, or
   no token chose the expert) or not finite is not seen at all.
4. *Estimates are shrunk by their uncertainty.* At each level the effects are normal around 0 with a
   spread tau, of which all values are integrated over (Gelman et al., Bayesian Data Analysis, 5.4):

       E[effect | tau] = tau^2 / (tau^2 + se^2) estimate

5. *A level counts only if chance does not explain it.* If modules do not differ, a step's values
   may as well have the other sign. So the signs of whole steps are flipped at random, which keeps
   whatever the modules of a step have in common: heavy tails, unequal noise, one noise with
   unequal loadings. Where more than a share SURE of the flips (for all levels together) shows as
   much, a level's effects are taken as 0.

Worked example: 210 modules, 75 steps. A module's value varies by 2.1 from step to step, so the
error of its mean is 2.1 / sqrt(75) = 0.24; the means of all modules vary by 0.38. Then tau is
about 0.29, a module whose mean is 0.5 is worth 0.3 +- 0.19 above the average, and flips show such
a spread in none of 5,000: the modules differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from guilomo_train.search.selection import Draw, first_off, last_on
from guilomo_train.search.space import SearchSpace, expert_costs

BLOCKS = 64  # of steps; the memory of a search's evidence is bounded by it
SURE = 0.01  # of searches that have nothing to find, the share that finds something
_FLIPS = 4999
_LIMIT = 3.0  # robust standard deviations beyond which a module's step counts no further
_MAD = 1.4826  # a normal distribution's standard deviation over its median absolute deviation
_QUIETEST = 10.0  # times as quiet as most: a module counts for no more in what all share
_TAUS = 200
_TINY = 1e-30  # instead of dividing by 0


@dataclass(frozen=True)
class Level:
    """Effects of one level.

    Attributes:
        mean, sd: of the posterior, `[M, g]`.
        by_step: `[K, n]`, what each step adds to the n estimates.
    """

    mean: torch.Tensor
    sd: torch.Tensor
    by_step: torch.Tensor

    @cached_property
    def p_value(self) -> float:
        """How likely random signs of steps are to show as much."""
        return flip_test(self.by_step)

    @property
    def sure(self) -> bool:
        return self.p_value <= SURE / len(LEVELS)

    @property
    def kept(self) -> torch.Tensor:
        """What an allocation may rely on."""
        return self.mean if self.sure else torch.zeros_like(self.mean)


OF_MODULES = ("kinds", "blocks", "modules")
LEVELS = (*OF_MODULES, "curves", "entries")


@dataclass(frozen=True)
class Worths:
    """What entries are worth a parameter, in units of a step's median.

    Attributes:
        profile: `[E, r]`, common to all modules.
        common: what an entry that is always trained is worth in all modules, by all entries.
        trained: L, `[E, r]`: the share of steps and modules in which an entry was trained.
        levels: what tells modules apart, by the names in LEVELS.
        steps: how many steps could show something.
    """

    profile: torch.Tensor
    common: float
    trained: torch.Tensor
    levels: dict[str, Level]
    steps: int

    @property
    def told_apart(self) -> bool:
        """Whether the data tell modules apart at all."""
        return any(level.sure for level in self.levels.values())

    def expected(self) -> torch.Tensor:
        """The posterior mean, `[M, E, r]`: what a search draws by."""
        return self._sum({name: level.mean for name, level in self.levels.items()})

    def kept(self) -> torch.Tensor:
        """The same by the levels that chance does not explain: what an allocation goes by."""
        return self._sum({name: level.kept for name, level in self.levels.items()})

    @property
    def curves_told_apart(self) -> bool:
        """Whether they tell how much the rows of a module are worth beside each other."""
        return self.levels["curves"].sure or self.levels["entries"].sure

    def of_modules(self) -> torch.Tensor:
        """What each module is worth a parameter, `[M]`, by what chance does not explain."""
        return (
            self.common + _sum_of_modules({n: level.kept for n, level in self.levels.items()})[:, 0]
        )

    def error(self) -> float:
        """A typical standard error of the worth of one entry."""
        of_modules = _sum_of_modules({n: level.sd.square() for n, level in self.levels.items()})
        variance = self.trained.square() * of_modules[..., None]
        variance = variance + self.levels["curves"].sd.square()[:, None]
        return float(variance.mean().sqrt())

    def _sum(self, effects: dict[str, torch.Tensor]) -> torch.Tensor:
        by_module = self.profile + self.trained * _sum_of_modules(effects)[..., None]
        entries = effects["entries"].view(-1, *self.profile.shape)
        return by_module + effects["curves"][:, None] + entries


def _sum_of_modules(by_level: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([by_level[name] for name in OF_MODULES]).sum(0)


class Evidence:
    """The slopes of a search, added up by blocks of steps."""

    def __init__(self, space: SearchSpace) -> None:
        self.row_sizes = space.sizes.row
        self.expert_sizes = expert_costs(space.sizes, space.max_experts)
        self.groups = {
            "kinds": _groups(map(kind_of, space.linears)),
            "blocks": _groups(map(block_of, space.linears)),
        }
        # A block's, by edge (last on, first off), module and entry: [2, M, E, r].
        self.sums: list[torch.Tensor] = []
        self.seen: list[torch.Tensor] = []
        # How often an entry was on, over steps and modules.
        self.on = torch.zeros(space.max_experts, space.max_rank)
        self.draws = 0
        self.steps = 0  # that could show something
        self.width = 1  # steps of a block

    @torch.no_grad()
    def see(self, draw: Draw, experts: torch.Tensor, ranks: torch.Tensor) -> None:
        """Takes in dL/dM, `experts [M, E]` and `ranks [M, E, r]`, of a draw."""
        self.draws += 1
        self.on += (draw.experts[..., None] * draw.ranks).mean(0)
        rows = draw.ranks.sum(-1)
        slopes = ranks.double() / self.row_sizes[:, None, None]
        slopes[..., 0] = experts.double() / (self.row_sizes[:, None] * rows + self.expert_sizes)
        edges = torch.stack([last_on(draw.ranks), first_off(draw.ranks)]) * draw.experts[..., None]
        edges[..., 0] = torch.stack([last_on(draw.experts), first_off(draw.experts)])
        edges *= slopes.isfinite() & (slopes != 0)
        slopes = torch.where(edges > 0, slopes, 0.0)
        trained = self.trained
        loads = (edges * trained.square()).sum((0, 2, 3))
        if not loads.any():
            return
        of_modules = (slopes * trained).sum((0, 2, 3))[loads > 0] / loads[loads > 0]
        worths = -slopes / of_modules.abs().median().clamp_min(_TINY)
        self._add(worths.float(), edges.short())

    @property
    def trained(self) -> torch.Tensor:
        """L of the head of this file."""
        return (self.on / max(self.draws, 1)).double()

    def _add(self, worths: torch.Tensor, edges: torch.Tensor) -> None:
        """Adds a step to the last block, or begins the next one."""
        if self.steps == BLOCKS * self.width:
            for blocks in (self.sums, self.seen):
                blocks[:] = [a + b for a, b in zip(blocks[0::2], blocks[1::2], strict=True)]
            self.width *= 2
        if self.steps % self.width == 0:
            self.sums.append(worths)
            self.seen.append(edges)
        else:
            self.sums[-1] += worths
            self.seen[-1] += edges
        self.steps += 1

    @torch.no_grad()
    def worths(self) -> Worths:
        """What all steps so far say."""
        if not self.steps:
            return self._nothing()
        sums, seen = torch.stack(self.sums).double(), torch.stack(self.seen).double()
        trained = self.trained
        # A module's value in a step: by least squares, as all its entries show L times the same.
        # The square of L is also how much the step shows.
        loads = (seen * trained.square()).sum((3, 4))

        def of_modules(slopes: torch.Tensor) -> torch.Tensor:
            return (slopes * trained).sum((3, 4)) / loads.clamp_min(_TINY)

        # In units in which each step is as noisy as the others, however many entries it shows.
        even = (sums * trained).sum((1, 3, 4)) / loads.sum(1).sqrt().clamp_min(_TINY)
        bounds = _within_limit(even)
        # Whatever modules have in common is taken from all of them by how quiet each one is: the
        # noise of a loud one would be a constant error of the others.
        even = even * bounds
        noise = (even - even.median(0).values).abs().median(0).values
        quiet = 1 / noise.clamp_min(_TINY)
        quiet = (quiet / quiet.median()).clamp(max=_QUIETEST).square()[:, None, None]
        sums = sums * bounds[:, None, :, None, None]
        n = (seen * quiet).sum((0, 2))  # [2, E, r]
        profile = (sums * quiet).sum((0, 2)) / n.clamp_min(_TINY)
        # An edge that nobody has seen is taken as the other one.
        common = profile.sum(0) / (n > 0).sum(0).clamp_min(1)
        of_entries = n.sum(0) * trained
        of_all = float((of_entries * common).sum() / (of_entries * trained).sum())
        left = sums - seen * profile[:, None]

        by_module = of_modules(left)
        weights = loads * quiet[:, 0, 0]
        by_module = by_module - _mean(by_module, weights, -1)
        levels, rest = {}, by_module
        for name, groups in self.groups.items():
            levels[name], of_groups = _of_groups(rest, weights, groups)
            rest = rest - of_groups
        levels["modules"] = _level(rest[..., None], loads[..., None])

        left = left - seen * (trained * by_module[..., None, None])
        n = seen.sum(-2)
        levels["curves"] = _level(left.sum(-2) / n.clamp_min(1), n)
        left = left - seen * levels["curves"].mean[:, None]
        levels["entries"] = _level((left / seen.clamp_min(1)).flatten(3), seen.flatten(3))
        return Worths(common, of_all, trained, levels, self.steps)

    def _nothing(self) -> Worths:
        """Before a step could show something."""
        (experts, rank), modules = self.on.shape, len(self.row_sizes)
        sizes = {"curves": rank, "entries": experts * rank}
        levels = {name: _no_level(modules, sizes.get(name, 1)) for name in LEVELS}
        return Worths(torch.zeros_like(self.trained), 0.0, self.trained, levels, 0)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def _mean(values: torch.Tensor, weights: torch.Tensor, axis: int) -> torch.Tensor:
    total = weights.sum(axis, keepdim=True)
    return (weights * values).sum(axis, keepdim=True) / total.clamp_min(_TINY)


def _within_limit(values: torch.Tensor) -> torch.Tensor:
    """Factors <= 1 for the values `[K, M]` of modules that are far beyond the others of theirs."""
    middle = values.median(0).values
    spread = (values - middle).abs().median(0).values
    limit = middle.abs() + _LIMIT * _MAD * spread
    return (limit / values.abs().clamp_min(_TINY)).clamp(max=1.0)


def kind_of(module: str) -> str:
    """What a module has in common with those of other blocks: its name without the numbers."""
    return re.sub(r"\d+", "*", module)


def block_of(module: str) -> str:
    """The block that a module is in: its name up to the first number, `model.layers.3`."""
    return re.sub(r"(\d+).*", r"\1", module)


def _groups(names: Iterable[str]) -> torch.Tensor | None:
    """The group of each module, `[M]`; None where there is one group, or each is its own."""
    listed = list(names)
    numbers = {name: i for i, name in enumerate(dict.fromkeys(listed))}
    if not 1 < len(numbers) < len(listed):
        return None
    return torch.tensor([numbers[name] for name in listed])


def _of_groups(
    values: torch.Tensor, weights: torch.Tensor, groups: torch.Tensor | None
) -> tuple[Level, torch.Tensor]:
    """The effects of groups of modules, for each module `[M, 1]`, and what each step says of them.

    Args:
        values, weights: `[K, 2, M]`, as `_level` takes them.
        groups: the group of each module, `[M]`; None for no groups.
    """
    if groups is None:
        return _no_level(values.shape[-1], 1), torch.zeros_like(values)
    of = nn.functional.one_hot(groups).to(values)
    total = weights @ of
    means = (weights * values) @ of / total.clamp_min(_TINY)
    level = _level(means[..., None], total[..., None])
    return Level(level.mean[groups], level.sd[groups], level.by_step), means[..., groups]


def _no_level(modules: int, groups: int) -> Level:
    zeros = torch.zeros(modules, groups, dtype=torch.float64)
    return Level(zeros, zeros, torch.zeros(0, 1, dtype=torch.float64))


def _level(values: torch.Tensor, weights: torch.Tensor) -> Level:
    """The effects of groups of entries, `[M, g]`, from their values in blocks of steps.

    Args:
        values: `[K, 2, M, g]`, by block and edge; of both edges an effect has half.
        weights: the same shape: how much each value shows, 0 for none.
    """
    shares = weights / weights.sum(0).clamp_min(_TINY)
    mean = (shares * values).sum(0)  # [2, M, g]
    concentration = shares.square().sum(0)
    usable = ((weights.sum(0) > 0) & (concentration <= 0.5)).all(0)  # two steps of each edge
    # What each step adds to the error of the mean of both edges, which share its noise. How large
    # that is depends on the module and on the group; both are pooled over the other.
    about = (shares * (values - mean)).sum(1) / 2  # [K, M, g]
    squares = about.square().sum(0) * usable
    free = (shares.square() * (1 - 2 * shares + concentration)).sum((0, 1)) / 4 * usable
    of_group = squares.sum(0) / free.sum(0).clamp_min(_TINY)
    of_module = (squares / of_group.clamp_min(_TINY)).sum(-1) / free.sum(-1).clamp_min(_TINY)
    # An error that is itself from n steps is a little too small for a normal distribution.
    steps = 1 / concentration.mean(0).clamp_min(_TINY) * values.shape[-1]
    error = of_module[:, None] * of_group * concentration.sum(0) / 4
    error = (error * (1 + 2 / (steps - 2).clamp_min(1))).sqrt()
    estimate = mean.mean(0)
    posterior = shrunk(estimate[usable], error[usable])
    result = [torch.zeros_like(estimate), torch.zeros_like(estimate)]
    for whole, part in zip(result, posterior, strict=True):
        whole[usable] = part
    return Level(result[0], result[1], ((shares * values).sum(1) / 2)[:, usable])


def shrunk(estimate: torch.Tensor, error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of effects that are normal around 0, their spread unknown.

    Args:
        estimate, error: `[n]`, of each effect: its estimate and the standard error of that.

    Returns:
        Both `[n]`, under a flat prior of the spread from 0 to three times what is seen.
    """
    if len(estimate) == 0 or not error.any():
        return estimate, error
    most = 3 * (estimate.square().mean() + error.square().mean()).sqrt()
    tau = most * torch.linspace(0, 1, _TAUS, dtype=estimate.dtype)[:, None]
    error = error.clamp_min(1e-6 * error.max())
    variance = error.square() + tau.square()
    logs = -0.5 * (estimate.square() / variance + variance.log()).sum(1)
    weight = (logs - logs.max()).exp()[:, None]
    weight = weight / weight.sum()
    share = tau.square() / variance
    mean = (weight * share).sum(0) * estimate
    square = (weight * (share * error.square() + (share * estimate).square())).sum(0)
    return mean, (square - mean.square()).clamp_min(0).sqrt()


def flip_test(values: torch.Tensor) -> float:
    """How likely random signs of whole steps are to show as much as the signs that were seen.

    Args:
        values: `[K, n]`: what each step adds to each of n sums. Seen is the sum over n of
            (sum over K)^2 / sum over K of squares, which no sign changes.

    Returns:
        The p-value, exact where steps are symmetric around 0, whatever the n of a step share.
    """
    squares = values.square().sum(0)
    values = values[:, squares > 0] / squares[squares > 0].sqrt()
    if values.numel() == 0:
        return 1.0
    gram = values @ values.T
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (_FLIPS, len(gram)), generator=generator).to(gram) * 2 - 1
    flipped = ((signs @ gram) * signs).sum(1)
    return (1 + int((flipped >= gram.sum() * (1 - 1e-9)).sum())) / (1 + _FLIPS)
