"""What a worker says of its adapters: how their routers share tokens out, and their memory.

The load of the routers is sampled. In a sampled step each layer keeps the router logits of at most
`STEP_TOKENS` tokens, as many of each adapter in the batch and spread evenly over its tokens; before
the next step they are counted for all layers at once. Between two sampled steps lies at least
`_INTERVAL_S`, and so much more that sampling takes at most `_SHARE` of the time, however slow it
is: what it costs does not depend on the load, the number of adapters or the size of the model.
Time is what the host spends.

On a GPU the kernels count themselves, all tokens of a sampled step (`TokenBlocks.sampled`), as
layers run no Python where CUDA graphs are replayed. The host only says which steps, and reads what
was counted when the front end asks and when an adapter leaves its slot: no step waits.

A version begins from zero, and what was counted goes with its weights. Under tensor parallelism
all processes compute the same logits (row-parallel layers sum them anyway, and the sum is what is
kept), so the first one alone samples. Under pipeline parallelism each stage samples its own layers,
under data parallelism each engine its own tokens.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from guilomo_serve.adapter import AdapterSpec
from guilomo_serve.ops.layer import Batch, LayerWeights, TokenBlocks
from guilomo_serve.ops.load import RouterLoad, router_load
from guilomo_serve.runtime.loading import ModelPlan

STEP_TOKENS = 128
_INTERVAL_S = 1.0
_SHARE = 0.005


def install() -> None:
    """Gives vLLM's workers the method that the front end calls by its name."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, "guilomo_report", _report_of_worker)  # noqa: B010


def _report_of_worker(
    worker: Any, versions: Sequence[int] = (), modules: bool = False
) -> dict[str, Any]:
    """`slots`: the versions that are in slots; `versions`: the load of those that are asked for."""
    manager = getattr(worker.model_runner, "lora_manager", None)
    if manager is None:
        return {"slots": [], "versions": []}
    return {"slots": manager.in_slots(), "versions": manager.report(versions, modules)}


def merge(replies: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What all workers say of the versions: those of an engine may each have some of the layers,
    and engines have each some of the tokens."""
    of_version: dict[int, list[Mapping[str, Any]]] = {}
    for part in itertools.chain.from_iterable(reply["versions"] for reply in replies):
        of_version.setdefault(part["version"], []).append(part)
    return [_together(parts) for parts in of_version.values()]


def _together(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    of_engine: dict[int, int] = {}
    for part in parts:
        of_engine[part["engine"]] = max(part["tokens"], of_engine.get(part["engine"], 0))
    weights = [part["tokens"] * part["routers"] for part in parts]
    found = {
        "version": parts[0]["version"],
        "tokens": sum(of_engine.values()),
        **{
            mean: sum(part[mean] * weight for part, weight in zip(parts, weights, strict=True))
            / max(sum(weights), 1)
            for mean in ("entropy", "imbalance")
        },
    }
    if "modules" in parts[0]:
        of_module: dict[str, list[Mapping[str, Any]]] = {}
        for part in parts:
            for name, of in part["modules"].items():
                of_module.setdefault(name, []).append(of)
        found["modules"] = {name: _mean(of) for name, of in of_module.items()}
    return found


def _mean(of: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of one module, as several engines have sampled it."""
    tokens = sum(each["tokens"] for each in of)
    shares = zip(*(each["share"] for each in of), strict=True)
    weights = [each["tokens"] / tokens for each in of]
    return {
        "tokens": tokens,
        "share": [
            sum(s * w for s, w in zip(of_expert, weights, strict=True)) for of_expert in shares
        ],
        "entropy": sum(each["entropy"] * w for each, w in zip(of, weights, strict=True)),
    }


def nbytes(layers: Mapping[str, LayerWeights]) -> int:
    """Memory of an adapter's weights in this process; where a GPU serves, that of the copy there
    is the same."""
    tensors = [
        tensor
        for weights in layers.values()
        for tensor in (
            *(weights.lora_a, *weights.lora_b, weights.router),
            *(weights.row_scale, weights.expert_of_row),
        )
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class Routers:
    """An adapter's routers.

    Attributes:
        modules: layer of the served model -> the modules with a router that it packs, by the
            names that they have in the adapter, each with its columns of the layer's logits.
        top_k: experts that a token uses.
    """

    modules: Mapping[str, Sequence[tuple[str, slice]]]
    top_k: int

    @classmethod
    def of(cls, spec: AdapterSpec, plan: ModelPlan, layers: Mapping[str, LayerWeights]) -> Routers:
        placed: dict[str, list[tuple[int, str]]] = {}
        for module in spec.experts:
            place = plan.module_at.get(plan.rename(module))
            if place is None:
                continue  # another stage's
            layer, index = place
            placed.setdefault(layer, []).append((index, module))
        modules = {}
        for layer, of_layer in placed.items():
            layout = layers[layer].layout  # in the order of the slices, those left alone missing
            routed = [
                (module, slice(*part.experts))
                for (_, module), part in zip(sorted(of_layer), layout, strict=True)
                if part.experts[1] > part.experts[0]
            ]
            if routed:
                modules[layer] = routed
        return cls(modules, spec.top_k)


@dataclass(frozen=True)
class _Part:
    """The sampled tokens of one adapter: which of the step's, and where in the slot's segment."""

    version: int
    slot: int
    tokens: slice
    places: torch.Tensor


@dataclass
class SampledStep:
    """What layers keep of one step.

    Attributes:
        rows: [n] int64, the sampled tokens by their rows of the batch, those of a slot together.
        parts: one for each sampled adapter.
        logits: version -> layer -> [its sampled tokens, experts of the layer].
        seconds: that keeping them took so far.
    """

    rows: torch.Tensor
    parts: Sequence[_Part]
    began: float
    logits: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    seconds: float = 0.0

    def keep(self, layer: str, x: torch.Tensor, slots: Any) -> None:
        """Keeps the logits of a layer that has its whole input. Args: x: [T, in]; slots: its."""
        began = time.perf_counter()
        inputs = x.index_select(0, self.rows).float()
        for part in self.parts:
            router = slots.router(part.slot)
            if len(router):
                self._keep(layer, part, torch.nn.functional.linear(inputs[part.tokens], router))
        self.seconds += time.perf_counter() - began

    def keep_summed(self, layer: str, logits: Mapping[int, torch.Tensor]) -> None:
        """Keeps logits that the layer has computed. Args: logits: slot -> [its tokens, E]."""
        began = time.perf_counter()
        for part in self.parts:
            of_slot = logits.get(part.slot)
            if of_slot is not None and of_slot.shape[1]:
                self._keep(layer, part, of_slot.index_select(0, part.places))
        self.seconds += time.perf_counter() - began

    def _keep(self, layer: str, part: _Part, logits: torch.Tensor) -> None:
        self.logits.setdefault(part.version, {})[layer] = logits


class ExpertLoad:
    """The load of the routers of all versions that a worker has.

    Attributes:
        clock: the time in seconds by which a step is due to be sampled.
    """

    def __init__(self) -> None:
        self._versions: dict[int, _Counted] = {}
        self._step: SampledStep | None = None
        self.clock: Callable[[], float] = time.monotonic
        self._not_before = 0.0
        self._counting = False

    def add(self, version: int, routers: Routers) -> None:
        """Begins to sample a version."""
        if routers.modules:
            self._versions[version] = _Counted(routers)

    def remove(self, version: int) -> None:
        self._versions.pop(version, None)

    def begin_step(self, batch: Batch, version_of_slot: Sequence[int | None]) -> SampledStep | None:
        """Counts what the last step kept and decides about the next, before its layers run.

        On a CPU; see `begin_counted_step`.

        Returns:
            What they are to fill, None in most steps.
        """
        self._count()
        if not self._versions or self.clock() < self._not_before:
            return None
        began = self.clock()
        present = [
            (version, slot, begin, end)
            for slot, begin, end in batch.segments.tolist()
            if (version := version_of_slot[slot]) is not None and version in self._versions
        ]
        rows: list[np.ndarray] = []
        parts: list[_Part] = []
        taken = 0
        for version, slot, begin, end in present:
            count = min(end - begin, max(STEP_TOKENS // len(present), 1))
            places = np.arange(count) * (end - begin) // count
            rows.append(batch.order[begin + places])
            where = torch.from_numpy(places)
            parts.append(_Part(version, slot, slice(taken, taken + count), where))
            taken += count
        if not parts:
            return None
        order = torch.from_numpy(np.concatenate(rows)).to(torch.int64)
        self._step = SampledStep(order, parts, began)
        return self._step

    def begin_counted_step(
        self, batch: Batch, blocks: TokenBlocks, version_of_slot: Sequence[int | None]
    ) -> None:
        """Decides whether the kernels are to count the next step, whose batch `blocks` has."""
        now = self.clock()
        sampled = now >= self._not_before and any(
            version_of_slot[slot] in self._versions for slot in batch.slots
        )
        if sampled:
            self._not_before = now + _INTERVAL_S
        if sampled or self._counting:  # the word stays as it is where the batch does
            blocks.sampled.fill_(sampled)
        self._counting = sampled

    def of_slot(self, version: int, slots: Any, slot: int) -> RouterLoad | None:
        """What the kernels have counted of a version since it is in a slot.

        Args:
            version: that is in it.
            slots: `AdapterSlots` of the model.
            slot: the version's.

        Returns:
            Its routers' load in the order of `Routers`; None if the version is not sampled.
        """
        counted = self._versions.get(version)
        if counted is None:
            return None
        load: RouterLoad | None = slots.load_of(slot, tuple(counted.routers.modules))
        return load

    def keep(self, version: int, load: RouterLoad | None) -> None:
        """Adds what kernels have counted of a version that leaves its slot."""
        if load is not None and version in self._versions:
            self._versions[version].add_load(load)

    def report(
        self, version: int, modules: bool, counted: RouterLoad | None = None
    ) -> dict[str, Any]:
        """`tokens` sampled of a version, and what `_Counted.report` says of them. Waits for the
        device.

        Args:
            version: that is asked for.
            modules: whether those of each module are.
            counted: `of_slot`, where kernels count.
        """
        self._count()
        of_version = self._versions.get(version)
        return {"tokens": 0} if of_version is None else of_version.report(modules, counted)

    def _count(self) -> None:
        step, self._step = self._step, None
        if step is None:
            return
        began = time.perf_counter()
        for version, by_layer in step.logits.items():
            if version in self._versions:
                self._versions[version].add(by_layer)
        spent = step.seconds + time.perf_counter() - began
        self._not_before = step.began + max(_INTERVAL_S, spent / _SHARE)


class _Counted:
    """What was sampled of one version."""

    def __init__(self, routers: Routers) -> None:
        self.routers = routers
        self._tokens = 0
        self._load: RouterLoad | None = None

    def add(self, by_layer: Mapping[str, torch.Tensor]) -> None:
        """Counts one step. Args: by_layer: layer -> [tokens, experts of its modules]."""
        modules = self.routers.modules
        if by_layer.keys() != modules.keys():
            return  # a step that failed before its end
        logits = [
            by_layer[layer][:, columns]
            for layer, routed in modules.items()
            for _, columns in routed
        ]
        self.add_load(router_load(logits, self.routers.top_k))
        self._tokens += len(logits[0])

    def add_load(self, load: RouterLoad) -> None:
        self._load = load if self._load is None else self._load + load

    def report(self, modules: bool, counted: RouterLoad | None) -> dict[str, Any]:
        """Plain values.

        `tokens`; `routers`, how many had any; means over these, `entropy` (of one router its mean
        over tokens, 0..1) and `imbalance` (of one router its most chosen expert's share times its
        experts); and if they are wanted `modules`: module -> `tokens`, `share` (of the choices,
        each expert's) and `entropy`. A router whose logits were never finite is left out.
        `counted` is added to what is here.
        """
        load = self._load
        if counted is not None:
            load = counted if load is None else load + counted
        if load is None:
            return {"tokens": 0}
        names = [
            (module, columns.stop - columns.start)
            for routed in self.routers.modules.values()
            for module, columns in routed
        ]
        chosen, tokens = load.chosen.double(), load.tokens
        shares = chosen / chosen.sum(1, keepdim=True)
        entropies = (load.entropy / tokens).clamp(0, 1)
        experts = torch.tensor([count for _, count in names], device=chosen.device)
        seen = tokens > 0
        means = [(entropies * seen), (shares.amax(1) * experts * seen)]
        entropy, imbalance = (
            (value.nan_to_num().sum() / seen.sum().clamp(min=1)).item() for value in means
        )
        found: dict[str, Any] = {
            "tokens": self._tokens or int(tokens.max()),
            "routers": int(seen.sum()),
            "entropy": entropy,
            "imbalance": imbalance,
        }
        if modules:
            each = zip(names, tokens.tolist(), shares.tolist(), entropies.tolist(), strict=True)
            found["modules"] = {
                module: {"tokens": t, "share": share[:count], "entropy": e}
                for (module, count), t, share, e in each
                if t
            }
        return found
