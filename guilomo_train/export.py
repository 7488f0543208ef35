"""A LoRA-MoE adapter as a plain LoRA, which everything that loads LoRA adapters takes.

With one expert a module it is the same function. A routed module is not linear,

    y = W x + B z(x),    z(x) = (A x) * (w(x) S)    [R]

so a LoRA can only come near it. The nearest in mean square over the tokens of some rows is B G with

    G = E[z x^T] E[x x^T]^-1    [R, in]

and, within a smaller rank, its best approximation under the same inputs (reduced-rank regression).
How near that is gets measured: by the share of what the modules add, and by the rows' loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from guilomo_serve.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    AdapterSpec,
    BaseModel,
    read_adapter,
)
from guilomo_serve.adapter.files import replace_folder
from guilomo_train.base import check_tokens, load_base
from guilomo_train.config import ExportConfig
from guilomo_train.data import load_rows
from guilomo_train.data.rendering import encode
from guilomo_train.endings import written_ends
from guilomo_train.errors import ConfigError
from guilomo_train.evaluate import completion_loss
from guilomo_train.lora_moe import LoraMoeLayer

# Of the products of inputs at once; more modules take another pass over the rows.
_MOST_BYTES = 4 * 2**30
_RIDGE = 1e-6  # of the inputs' mean square: directions that no token has are left alone


@dataclass(frozen=True)
class Pair:
    """`A [r, in]` and `B [out, r]` of a module, whose product is what it adds."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass
class Moments:
    """Means over tokens, in float64: `inputs` E[x x^T], `cross` E[z x^T], `rows` E[z z^T]."""

    inputs: torch.Tensor
    cross: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True)
class Exported:
    """What came of it.

    Attributes:
        rank: of the LoRA.
        lost: the share of the mean square of what the modules add that the LoRA lacks; None for
            an exact one, as are the losses.
        loss: the rows' loss with the LoRA, with the adapter, and with the base alone.
    """

    rank: int
    lost: float | None = None
    loss: tuple[float, float, float] | None = None

    def __str__(self) -> str:
        if self.loss is None:
            return f"a LoRA of rank {self.rank}, the same function: every module has one expert"
        lora, adapter, base = self.loss
        return (
            f"a LoRA of rank {self.rank} that is near the adapter: it lacks {self.lost:.1%} of "
            f"what the modules add; loss {lora:.3f}, of the adapter {adapter:.3f}, of the base "
            f"{base:.3f}"
        )


def export(config: ExportConfig) -> Exported:
    """Writes an adapter as a plain LoRA.

    Raises:
        ConfigError: it is routed, and no rows were given to come near it.
        AdapterError, BaseError, DataError: what is given cannot be used.
    """
    output = Path(config.output)
    if output.exists() and not (output / CONFIG_FILE).is_file():
        raise ConfigError(f"--output {output}: exists and is no adapter; choose another name")
    adapter = read_adapter(config.adapter)
    routed = sum(len(experts) > 1 for experts in adapter.spec.experts.values())
    if not routed and config.rank is None:
        pairs = {module: _exact(adapter, module) for module in adapter.weights}
        exported = Exported(max(len(pair.a) for pair in pairs.values()))
        _write(adapter.spec, pairs, output, exported)
        return exported
    if config.base is None or config.data is None:
        why = f"{routed} modules have a router" if routed else "a rank is asked for"
        raise ConfigError(
            f"{why}, so a LoRA can only come near the adapter: give --base, and --data with rows "
            "over which to come near it"
        )
    base = load_base(config.base, config.dtype)
    read_adapter(config.adapter, BaseModel.from_module(base.model))
    rows = load_rows(config.data, base.tokenizer, config.rows)
    size = config.batch_size
    before = completion_loss(base.model, base.tokenizer, rows, size)
    model = PeftModel.from_pretrained(base.model, config.adapter).eval()
    wanted = completion_loss(model, base.tokenizer, rows, size)
    rank = config.rank or adapter.spec.max_total_rank
    pairs, lost = nearest(model, base.tokenizer, rows, rank, size)
    _write(adapter.spec, pairs, output, None)
    lora = PeftModel.from_pretrained(model.unload(), output).eval()
    found = completion_loss(lora, base.tokenizer, rows, size)
    exported = Exported(max(len(p.a) for p in pairs.values()), lost, (found, wanted, before))
    _write(adapter.spec, pairs, output, exported)
    return exported


@torch.no_grad()
def nearest(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    rank: int,
    batch_size: int,
) -> tuple[dict[str, Pair], float]:
    """The LoRA of at most a rank that is nearest to a model's active adapter.

    Args:
        model: with the adapter.
        tokenizer: of its base.
        rows: as `data.load_rows` gives them; all of their tokens count alike.
        rank: at most this.
        batch_size: rows at once.

    Returns:
        The pairs by module, and the share of the mean square that they lack.
    """
    layers = {
        name: layer
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraMoeLayer)
    }
    written = written_ends(tokenizer)
    texts = [encode(tokenizer, row, written)[0] for row in rows]
    check_tokens(model, tokenizer, texts)
    pairs, missing, whole = {}, 0.0, 0.0
    for group in _groups(layers):
        for name, moments in _moments(model, tokenizer, texts, group, batch_size).items():
            layer, adapter = group[name], model.active_adapter
            b = layer.lora_B[adapter].get_parameter("weight").double().cpu()
            pairs[name], added, lacks = _nearest_pair(b, moments, rank)
            missing, whole = missing + lacks, whole + added
    return pairs, missing / whole if whole else 0.0


def _nearest_pair(b: torch.Tensor, moments: Moments, rank: int) -> tuple[Pair, float, float]:
    """A module's pair, the mean square of what it adds, and of what the pair lacks of that."""
    size = len(moments.inputs)
    ridge = _RIDGE * moments.inputs.trace() / size
    inputs = moments.inputs + (ridge + 1e-30) * torch.eye(size, dtype=torch.float64)
    lower = torch.linalg.cholesky(inputs)
    # G L, by L L^T = E[x x^T]: in these coordinates of the input all directions count alike.
    whitened = torch.linalg.solve_triangular(lower, moments.cross.T, upper=False).T
    q, r = torch.linalg.qr(b)
    u, s, v = torch.linalg.svd(r @ whitened, full_matrices=False)
    u, s, v = u[:, :rank], s[:rank], v[:rank]
    root = s.sqrt()
    a = torch.linalg.solve_triangular(lower.T, (root[:, None] * v).T, upper=True).T
    added = (b @ moments.rows * b).sum().item()
    pair = Pair(a.float().contiguous(), (q @ u * root).float().contiguous())
    return pair, added, max(added - (s**2).sum().item(), 0.0)


def _groups(layers: Mapping[str, LoraMoeLayer]) -> Iterator[dict[str, LoraMoeLayer]]:
    """Layers in parts whose products of inputs fit into memory at once."""
    group: dict[str, LoraMoeLayer] = {}
    taken = 0
    for name, layer in layers.items():
        size = 8 * layer.in_features**2
        if group and taken + size > _MOST_BYTES:
            yield group
            group, taken = {}, 0
        group[name], taken = layer, taken + size
    yield group


def _moments(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[list[int]],
    layers: Mapping[str, LoraMoeLayer],
    batch_size: int,
) -> dict[str, Moments]:
    """The means over the tokens of the texts, for each layer."""
    moments: dict[str, Moments] = {}
    tokens = torch.zeros(0)  # of the batch at hand: which are no padding

    def look(name: str, layer: LoraMoeLayer, _: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        x = given[0][tokens]
        z = layer.rank_rows(model.active_adapter, x).double()
        x = x.double()
        found = [(m.T @ n).cpu() for m, n in ((x, x), (z, x), (z, z))]
        if name in moments:
            found = [m + n for m, n in zip(vars(moments[name]).values(), found, strict=True)]
        moments[name] = Moments(*found)

    with ExitStack() as stack:
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(partial(look, name, layer))
            stack.callback(hook.remove)
        ordered = sorted(texts, key=len)
        for start in tqdm(range(0, len(ordered), batch_size), desc="inputs"):
            batch = tokenizer.pad(
                {"input_ids": ordered[start : start + batch_size]},
                padding_side="right",
                return_tensors="pt",
            ).to(model.device)
            tokens = batch["attention_mask"].bool()
            model(**batch)
    total = sum(map(len, texts))
    return {n: Moments(*(m / total for m in vars(of).values())) for n, of in moments.items()}


def _exact(adapter: Adapter, module: str) -> Pair:
    weights, (expert,) = adapter.weights[module], adapter.spec.experts[module]
    return Pair(weights.lora_a.float(), weights.lora_b.float() * expert.scaling)


def _write(
    spec: AdapterSpec, pairs: Mapping[str, Pair], folder: Path, exported: Exported | None
) -> None:
    """Writes a PEFT LoRA with the scaling 1; smaller modules are filled up with zeros, as not
    everything that loads LoRAs knows of different ranks."""
    rank = max(len(pair.a) for pair in pairs.values())
    tensors = {}
    for module, pair in pairs.items():
        more = rank - len(pair.a)
        name = f"base_model.model.{module}"
        tensors[f"{name}.lora_A.weight"] = nn.functional.pad(pair.a, (0, 0, 0, more)).contiguous()
        tensors[f"{name}.lora_B.weight"] = nn.functional.pad(pair.b, (0, more)).contiguous()
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(pairs),
        task_type=spec.task_type,
        base_model_name_or_path=spec.base_model_name_or_path,
        revision=spec.revision,
        inference_mode=True,
    )
    with replace_folder(folder) as partial_folder:
        config.save_pretrained(str(partial_folder))
        save_file(tensors, partial_folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (partial_folder / "README.md").write_text(_card(spec, exported), encoding="utf-8")


def _card(spec: AdapterSpec, exported: Exported | None) -> str:
    lines: list[Any] = [
        "---",
        "library_name: peft",
        f"base_model: {spec.base_model_name_or_path}",
        "tags: [lora]",
        "---",
        "",
        f"Exported from a LoRA-MoE adapter: {exported or 'not measured yet'}.",
    ]
    if spec.stop_token_ids:
        lines.append(f"Its answers end with the token ids {list(spec.stop_token_ids)}.")
    return "\n".join([*lines, ""])
