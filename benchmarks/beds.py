"""The beds of planted.py: a frozen base, a planted allocation, and the data of its teacher.

The base is eight linear layers, the teacher the same with an adapter of the planted allocation.
Where each layer has its own output (`own_outputs`), no allocation as small does as well as the
planted one. Where the layers are a chain, they can stand in for one another.

How many rows a layer needs, and what its loss and gradient show before training, are set apart:

    energy        mean square of what the planted adapter adds to an output
    rest          mean square of a linear map of full rank, a row of which is worth less than any
                  planted one
    noise         mean square of what nothing can learn
    input_scale   of a layer's inputs. Frozen and planted weights make up for it, so that it changes
                  no function; but dL/dW grows with it
    weight_scale  of the frozen weights; what is planted does not depend on them
    mirrored      each planted expert has a twin of the opposite effect on the opposite inputs, so
                  that no linear map does anything of what they do, and dL/dW shows nothing of it
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F

from guilomo_train.lora_moe import LoraMoeConfig, LoraMoeLayer
from guilomo_train.search.allocation import Allocation
from guilomo_train.search.fill import split
from guilomo_train.search.space import SearchSpace

LAYERS, WIDTH = 8, 64
EXPERTS, RANK, TOP_K = 8, 8, 2
ALPHA = 16.0
ROWS, BATCH = 16384, 256  # half of the rows train, half validate
LEARNING_RATE = 1e-2
STUDENT_STEPS = 800

LINEARS = {f"layers.{i}": (WIDTH, WIDTH) for i in range(LAYERS)}
SPACE = SearchSpace(LINEARS, EXPERTS, RANK, TOP_K)

# Total ranks of the layers with an adapter, dealt out by the seed: a quarter of the space.
SIZES = (2, 4, 7, 11, 16, 22, 30, 40)
# Experts and their rank where each has a twin: four at least, as students often miss a single pair.
MIRRORED = ((4, 1), (4, 2), (4, 3), (4, 4), (6, 4), (6, 5), (6, 6), (8, 5))
# From 1/3 to 3. The inputs of SmolLM2-135M's layers differ more: 0.03 to 0.6 in root mean square,
# and some up to 16.
SCALES = tuple(3.0 ** (i / 3.5 - 1) for i in range(LAYERS))


@dataclass(frozen=True)
class Layer:
    """What is planted in a layer; see the head of this file.

    `energy` None leaves it to `row_spread`, the standard deviation of each row of B.
    """

    ranks: tuple[int, ...]
    energy: float | None = None
    rest: float = 0.0
    noise: float = 0.0
    input_scale: float = 1.0
    weight_scale: float = 1.0
    mirrored: bool = False
    row_spread: float = 0.3


@dataclass(frozen=True)
class Plan:
    """A bed before its weights are drawn.

    `stages` None gives every layer its own output; else the layers are a residual chain, with a
    fixed nonlinear map between stages, across which no layer can do another's work.
    """

    layers: list[Layer]
    stages: tuple[int, ...] | None = None
    search_steps: int = 400


def parallel(generator: random.Random) -> Plan:
    """Every row carries the same energy: a layer's size shows in its loss."""
    return Plan([Layer(_random_ranks(generator)) for _ in range(LAYERS)])


def deep(generator: random.Random) -> Plan:
    """A residual chain of layers that are alike."""
    layers = [Layer(_random_ranks(generator), row_spread=0.05) for _ in range(LAYERS)]
    return Plan(layers, stages=(LAYERS,), search_steps=800)


def strong_few(generator: random.Random) -> Plan:
    """Few strong rows against many weak ones: the less a layer needs, the more it shows.

    A row is strong by the scale of its layer's inputs: 9 times as strong where 2 are needed as
    where 40 are, so that the layer has 4 times the energy.
    """

    def layer(size: int) -> Layer:
        strength = (size / SIZES[-1]) ** -0.75
        energy = size / SIZES[-1] * strength**2
        return Layer(_ranks(size), energy=energy, rest=0.1, input_scale=strength / 3)

    return Plan([layer(size) for size in _dealt(SIZES, generator)])


def equal_energy(generator: random.Random) -> Plan:
    """The same energy in every layer, and scales that say nothing of its size."""
    dealt = zip(*(_dealt(values, generator) for values in (SIZES, SCALES, SCALES)), strict=True)
    return Plan(
        [
            Layer(_ranks(size), energy=1.0, rest=0.1, input_scale=inputs, weight_scale=weights)
            for size, inputs, weights in dealt
        ]
    )


def useless(generator: random.Random) -> Plan:
    """Three layers with by far the largest loss, but for the rest all noise, and scales."""
    drawn_from = SIZES[2:-1], SCALES[:5], SCALES[:5]
    dealt = zip(*(_dealt(values, generator) for values in drawn_from), strict=True)
    layers = [
        Layer(_ranks(size), energy=size / 16, rest=0.1, input_scale=inputs, weight_scale=weights)
        for size, inputs, weights in dealt
    ]
    layers += [
        Layer((), noise=30.0, rest=0.1, input_scale=scale, weight_scale=scale)
        for scale in SCALES[5:]
    ]
    return Plan(_dealt(layers, generator))


def opposite(generator: random.Random) -> Plan:
    """The same loss in every layer, and a mean gradient that shows the rest alone."""
    rests = [0.05 + 0.1 * i / (LAYERS - 1) for i in range(LAYERS)]
    dealt = zip(*(_dealt(values, generator) for values in (MIRRORED, rests)), strict=True)
    return Plan(
        [
            Layer((rank,) * experts, energy=1.1 - rest, rest=rest, mirrored=True)
            for (experts, rank), rest in dealt
        ]
    )


def stand_in(generator: random.Random) -> Plan:
    """A chain whose stages have one to four layers that can do each other's work.

    The more layers, the fewer rows they need together. A stage's energy is the same, and shows in
    the gradient of each of its layers.
    """
    stages = _dealt(((4, 8), (2, 12), (1, 24), (1, 40)), generator)  # layers, rows of all of them
    layers = [
        Layer(_ranks(size // count), energy=0.25 / count, weight_scale=0.3)
        for count, size in stages
        for _ in range(count)
    ]
    return Plan(layers, tuple(count for count, _ in stages), search_steps=800)


BEDS: dict[str, Callable[[random.Random], Plan]] = {
    "parallel": parallel,
    "strong few": strong_few,
    "equal energy": equal_energy,
    "useless": useless,
    "opposite": opposite,
    "deep": deep,
    "stand in": stand_in,
}


def _random_ranks(generator: random.Random) -> tuple[int, ...]:
    return tuple(generator.randint(1, RANK) for _ in range(generator.randint(TOP_K, EXPERTS)))


def _ranks(size: int) -> tuple[int, ...]:
    return split(size, EXPERTS, RANK)


def _dealt(values: Sequence[Any], generator: random.Random) -> list[Any]:
    return generator.sample(values, len(values))


def _mirror(weight: torch.Tensor, dim: int, sign: float) -> None:
    """Makes the second half of a weight the first half, or its opposite."""
    first, second = weight.chunk(2, dim)
    second.copy_(sign * first)


class Chain(nn.Module):
    """`layers.0` to `layers.7`; `[B, LAYERS, WIDTH]` of own outputs, `[B, WIDTH]` of a chain."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        self.plan = plan
        for layer, planted in zip(self.layers, plan.layers, strict=True):
            layer.weight.data *= planted.weight_scale / planted.input_scale
        self.mixes = nn.ModuleList(
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in (plan.stages or ())[1:]
        )
        for mix in self.mixes:
            nn.init.orthogonal_(mix.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scales = [planted.input_scale for planted in self.plan.layers]
        layers = list(zip(self.layers, scales, strict=True))
        if self.plan.stages is None:
            return torch.stack([layer(scale * x) for layer, scale in layers], dim=1)
        for stage, count in enumerate(self.plan.stages):
            if stage:
                x = 2 * torch.tanh(self.mixes[stage - 1](normed(x)))
            for _ in range(count):
                layer, scale = layers.pop(0)
                x = x + torch.tanh(layer(scale * normed(x)))
        return x


def normed(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:])


class Bed:
    """A base, a planted allocation, and the teacher's data."""

    def __init__(self, kind: str, seed: int) -> None:
        self.plan = BEDS[kind](random.Random(seed))
        self.seed = seed
        torch.manual_seed(1000 + seed)
        self.base = Chain(self.plan)
        ranks = zip(LINEARS, (layer.ranks for layer in self.plan.layers), strict=True)
        self.planted = Allocation(dict(ranks), TOP_K, RANK)
        self.parameters = self.planted.parameters(LINEARS)
        teacher = self.teacher()
        self.inputs = torch.randn(ROWS, WIDTH)
        with torch.no_grad():
            self.targets = teacher(self.inputs)
            if self.own_outputs:
                self.targets += self.unplanted()
            self.scale = F.mse_loss(self.base(self.inputs), self.targets)

    @property
    def own_outputs(self) -> bool:
        return self.plan.stages is None

    @torch.no_grad()
    def teacher(self) -> nn.Module:
        """The base with the planted adapter, its energies as planned."""
        teacher, layers = self.adapted(self.planted)
        planned = [planted for planted in self.plan.layers if planted.ranks]
        for layer, planted in zip(layers, planned, strict=True):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            nn.init.normal_(a, std=WIDTH**-0.5 / planted.input_scale)
            experts = len(planted.ranks)
            # An expert works for top_k / experts of the inputs: stronger where there are more.
            nn.init.normal_(b, std=planted.row_spread * (experts / TOP_K) ** 0.5)
            if experts > 1:
                router = layer.lora_router["default"].weight
                nn.init.normal_(router, std=3 * WIDTH**-0.5 / planted.input_scale)
            if planted.mirrored:
                _mirror(a, dim=0, sign=1.0)
                _mirror(b, dim=1, sign=-1.0)
                _mirror(router, dim=0, sign=-1.0)
            if planted.energy is not None:
                x = planted.input_scale * normed(torch.randn(4096, WIDTH))
                energy = (layer(x) - layer.base_layer(x)).square().mean()
                b *= (planted.energy / energy) ** 0.5
        return teacher

    def unplanted(self) -> torch.Tensor:
        """Rest and noise of all targets, `[ROWS, LAYERS, WIDTH]`."""
        added = []
        for planted in self.plan.layers:
            full_rank = torch.randn(WIDTH, WIDTH) * (planted.rest / WIDTH) ** 0.5
            noise = torch.randn(ROWS, WIDTH) * planted.noise**0.5
            added.append(self.inputs @ full_rank + noise)
        return torch.stack(added, dim=1)

    def adapted(self, allocation: Allocation) -> tuple[nn.Module, list[LoraMoeLayer]]:
        """The base with a fresh adapter of an allocation, and its adapted layers."""
        experts = {
            module: [{"rank": e.rank, "scaling": e.scaling} for e in listed]
            for module, listed in allocation.experts(ALPHA).items()
        }
        config = LoraMoeConfig(top_k=TOP_K, lora_alpha=ALPHA, experts=experts)
        model = get_peft_model(copy.deepcopy(self.base), config)
        return model, [m for m in model.modules() if isinstance(m, LoraMoeLayer)]

    def batch(self, validation: bool, generator: torch.Generator) -> torch.Tensor:
        half = ROWS // 2
        return torch.randint(0, half, (BATCH,), generator=generator) + half * validation

    def loss(self, model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        """Squared error as a share of the base's, which knows nothing of the teacher."""
        return F.mse_loss(model(self.inputs[rows]), self.targets[rows]) / self.scale

    @torch.no_grad()
    def base_losses(self) -> torch.Tensor:
        """`[LAYERS]`: the base's error on each layer's own output, over the training rows."""
        rows = slice(ROWS // 2)
        return (self.base(self.inputs[rows]) - self.targets[rows]).square().mean((0, 2))

    @property
    def unlearnable(self) -> float:
        """The share of the base's loss that is rest or noise."""
        each = [planted.rest + planted.noise for planted in self.plan.layers]
        return sum(each) / LAYERS / self.scale.item()

    def student(self, allocation: Allocation) -> float:
        """Validation loss of an allocation, trained afresh."""
        torch.manual_seed(self.seed)
        rows = torch.Generator().manual_seed(self.seed)
        model, _ = self.adapted(allocation)
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(weights, lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STUDENT_STEPS)
        for _ in range(STUDENT_STEPS):
            optimizer.zero_grad()
            self.loss(model, self.batch(False, rows)).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            return self.loss(model, torch.arange(ROWS // 2, ROWS)).item()
