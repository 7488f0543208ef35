"""Adapter folders: what is written is read back, and what is wrong is refused with one message."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from guilomo_serve.adapter import (
    CONFIG_FILE,
    Adapter,
    AdapterError,
    AdapterSpec,
    BaseFingerprint,
    BaseModel,
    Expert,
    ModuleWeights,
    files,
    is_finite,
    is_guilomo_adapter,
    read_adapter,
    read_config,
    read_spec,
    write_adapter,
)
from guilomo_serve.catalogue.store import Store, digest_of

FINGERPRINT = BaseFingerprint("LlamaForCausalLM", 16, 1, 100)
BASE = BaseModel(
    FINGERPRINT,
    {"model.layers.0.self_attn.q_proj": (24, 16), "model.layers.0.mlp.down_proj": (16, 40)},
)
ROUTED, SINGLE = BASE.linears  # a module with three experts and one with a single expert
EXPERTS = {ROUTED: (Expert(2, 2.0), Expert(1, 4.0), Expert(3, 0.5)), SINGLE: (Expert(4, 1.0),)}
TENSOR = f"base_model.model.{ROUTED}"


def make_adapter(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weights = {}
    for module, experts in EXPERTS.items():
        out_features, in_features = BASE.linears[module]
        rank = sum(e.rank for e in experts)
        weights[module] = ModuleWeights(
            lora_a=draw(rank, in_features).to(dtype),
            lora_b=draw(out_features, rank).to(dtype),
            router=draw(len(experts), in_features) if len(experts) > 1 else None,
        )
    spec = AdapterSpec(
        base_model_name_or_path="some/base",
        target_modules=("q_proj", "down_proj"),
        top_k=2,
        lora_alpha=16.0,
        experts=EXPERTS,
        base=FINGERPRINT,
        search={"seed": seed},
    )
    return Adapter(spec, weights)


def assert_same(found: Adapter, expected: Adapter) -> None:
    assert found.spec == expected.spec
    assert found.spec.search == expected.spec.search
    assert found.weights.keys() == expected.weights.keys()
    for module, weights in expected.weights.items():
        torch.testing.assert_close(found.weights[module].lora_a, weights.lora_a, rtol=0, atol=0)
        torch.testing.assert_close(found.weights[module].lora_b, weights.lora_b, rtol=0, atol=0)
        if weights.router is None:
            assert found.weights[module].router is None
        else:
            torch.testing.assert_close(found.weights[module].router, weights.router, rtol=0, atol=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter on disk."""
    write_adapter(make_adapter(), tmp_path / "adapter", "# Card\n")
    return tmp_path / "adapter"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_written_is_read_back(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = make_adapter(dtype=dtype)
    write_adapter(adapter, tmp_path / "a", "# Card\n")
    assert_same(read_adapter(tmp_path / "a", BASE), adapter)
    assert_same(read_adapter(tmp_path / "a"), adapter)
    assert read_spec(tmp_path / "a") == adapter.spec
    assert is_guilomo_adapter(tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize(
    ("umask", "folder", "file"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)]
)
def test_others_may_read_what_the_umask_lets_them(
    tmp_path: Path, umask: int, folder: int, file: int
) -> None:
    before = os.umask(umask)
    try:
        write_adapter(make_adapter(), tmp_path / "a", card="card")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == folder
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()}
    assert modes == dict.fromkeys(("adapter_config.json", files.WEIGHTS_FILE, "README.md"), file)


def test_slices_of_one_parameter_are_written(tmp_path: Path) -> None:
    adapter = make_adapter(dtype=torch.float32)
    weights = dict(adapter.weights)
    fused = torch.cat([weights[ROUTED].lora_a, weights[ROUTED].router])
    weights[ROUTED] = ModuleWeights(fused[:6], weights[ROUTED].lora_b.T.contiguous().T, fused[6:])
    write_adapter(Adapter(adapter.spec, weights), tmp_path / "a", "")
    assert_same(read_adapter(tmp_path / "a", BASE), adapter)


def snapshot(cache: Path, target: Callable[[Path], Path]) -> Path:
    """An adapter as the Hub's cache has it; `target` says where a blob's link leads in fact."""
    repository = cache / "models--some--adapters"
    folder = repository / "snapshots" / "0123abc" / "support"
    write_adapter(make_adapter(), folder, "card")
    (repository / "blobs").mkdir()
    for path in list(folder.iterdir()):
        path.rename(repository / "blobs" / path.name)
        target(repository / "blobs" / path.name)
        path.symlink_to(Path("../../../blobs") / path.name)
    return folder


def test_a_snapshot_of_the_hubs_cache_is_an_adapter_folder(tmp_path: Path) -> None:
    """As others are: read, and copied by a server's store, which has rules of its own."""
    folder = snapshot(tmp_path / "cache", lambda blob: blob)
    assert_same(read_adapter(folder, BASE), make_adapter())
    assert is_guilomo_adapter(folder)
    stored, read = Store(tmp_path / "store").add(folder, read_adapter)
    assert_same(read, make_adapter())
    assert stored.digest == digest_of(folder)


def test_a_snapshot_whose_blobs_lie_elsewhere_is_refused(tmp_path: Path) -> None:
    def moved(blob: Path) -> Path:
        other = tmp_path / "cache" / "models--some--secrets" / blob.name
        other.parent.mkdir(parents=True, exist_ok=True)
        blob.rename(other)
        blob.symlink_to(other)
        return other

    folder = snapshot(tmp_path / "cache", moved)
    for read in (read_adapter, lambda f: Store(tmp_path / "store").add(f, read_adapter)):
        with pytest.raises(AdapterError, match="leads out of the adapter folder"):
            read(folder)


def test_names_on_disk_are_those_of_peft(folder: Path) -> None:
    assert sorted(load_file(folder / "adapter_model.safetensors")) == [
        "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight",
        "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_router.weight",
    ]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("GUILOMO", 6)


def test_a_folder_of_format_1_is_read_and_written_in_format_2(folder: Path) -> None:
    """It has "router" where format 2 has "lora_router"."""
    adapter = read_adapter(folder, BASE)
    weights, config = folder / files.WEIGHTS_FILE, folder / files.CONFIG_FILE
    old = {name.replace("lora_router", "router"): t for name, t in load_file(weights).items()}
    assert len(old.keys() - load_file(weights).keys()) == 1
    save_file(old, weights)
    config.write_text(json.dumps({**json.loads(config.read_text()), "format_version": 1}))
    found = read_adapter(folder, BASE)
    assert_same(found, adapter)
    write_adapter(found, folder.parent / "new", "card")
    assert (
        json.loads((folder.parent / "new" / files.CONFIG_FILE).read_text())["format_version"] == 2
    )
    assert_same(read_adapter(folder.parent / "new", BASE), adapter)


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", '{"peft_type": "LORA"}', b"\xff\xfe"], ids=repr
)
def test_another_folder_is_no_guilomo_adapter(tmp_path: Path, content: str | bytes | None) -> None:
    if isinstance(content, bytes):
        (tmp_path / "adapter_config.json").write_bytes(content)
    elif content is not None:
        (tmp_path / "adapter_config.json").write_text(content)
    assert not is_guilomo_adapter(tmp_path)


# Each entry spoils a good folder in one way and says what the message must hold.

Spoil = Callable[[Path], None]


def config(**changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def without_key(key: str) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "adapter_config.json"
        value = json.loads(path.read_text())
        del value[key]
        path.write_text(json.dumps(value))

    return spoil


def experts(first: Any) -> Spoil:
    """The config with another list of experts for the routed module."""
    listed = [{"rank": 4, "scaling": 1.0}]
    return config(experts={ROUTED: first, SINGLE: listed})


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        values = load_file(path)
        change(values)
        save_file({name: t.contiguous() for name, t in values.items()}, path)

    return spoil


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return tensors(lambda values: values.update({name: change(values[name])}))


def poisoned(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def poison(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return poison


def file(name: str, content: str | bytes) -> Spoil:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data) and None


def truncated(share: float) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        os.truncate(path, int(path.stat().st_size * share))

    return spoil


def instead_of_weights(name: str, **options: Any) -> Spoil:
    """The same tensors as torch.save writes them."""

    def spoil(folder: Path) -> None:
        values = load_file(folder / "adapter_model.safetensors")
        (folder / "adapter_model.safetensors").unlink()
        torch.save(values, folder / name, **options)

    return spoil


def moved_out(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        outside = folder.parent / "outside"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return spoil


GOOD = [{"rank": 2, "scaling": 2.0}, {"rank": 1, "scaling": 4.0}, {"rank": 3, "scaling": 0.5}]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ERRORS: dict[str, tuple[Spoil, str]] = {
    # the files
    "no folder": (lambda f: f.rename(f.parent / "b") and None, "no such adapter folder"),
    "no config": (lambda f: (f / CONFIG).unlink(), f"{CONFIG}: the file is missing"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS}: the file is missing"),
    "pickle": (
        instead_of_weights("adapter_model.bin"),
        "adapter_model.bin: a pickle file can run code when it is read; save the adapter as "
        "adapter_model.safetensors",
    ),
    "renamed pickle": (instead_of_weights(WEIGHTS), f"{WEIGHTS}: a pickle file can run code"),
    "renamed old pickle": (
        instead_of_weights(WEIGHTS, _use_new_zipfile_serialization=False),
        f"{WEIGHTS}: a pickle file can run code",
    ),
    "config elsewhere": (moved_out(CONFIG), f"{CONFIG}: leads out of the adapter folder"),
    "weights elsewhere": (moved_out(WEIGHTS), f"{WEIGHTS}: leads out of the adapter folder"),
    "half of the weights": (truncated(0.5), "not a complete safetensors file"),
    "half of the header": (truncated(0.1), "not a complete safetensors file"),
    "no bytes": (truncated(0), "not a complete safetensors file"),
    "text as weights": (
        file(WEIGHTS, "<html>404 Not Found</html>"),
        "not a complete safetensors file",
    ),
    # the config as a whole
    "not JSON": (file(CONFIG, '{"peft_type": "GUILOMO",'), f"{CONFIG}: not a JSON file"),
    "not UTF-8": (file(CONFIG, b'{"a": "\xff"}'), f"{CONFIG}: not a JSON file"),
    "not an object": (file(CONFIG, "[]"), "the file is 'list', expected a JSON object"),
    "another method": (config(peft_type="LORA"), "peft_type is 'LORA', expected 'GUILOMO'"),
    "stop token by name": (
        config(stop_token_ids=["</s>"]),
        "stop_token_ids is ['</s>'], expected a list of token ids",
    ),
    "stop token beyond the base": (
        config(stop_token_ids=[10_000]),
        "stop_token_ids has 10000, expected less than",
    ),
    "future format": (config(format_version=3), "format_version is 3, this guilomo reads up to 2"),
    "format 0": (config(format_version=0), "format_version is 0, expected 1 to 2"),
    "names of format 2": (
        config(format_version=1),
        "the tensor base_model.model.model.layers.0.self_attn.q_proj.router.",
    ),
    "format by words": (config(format_version="1"), "format_version is '1', expected an integer"),
    "no format": (without_key("format_version"), "the key 'format_version' is missing"),
    "no experts": (without_key("experts"), "the key 'experts' is missing"),
    "unknown key": (config(use_dora=True), "unknown key 'use_dora'"),
    "trained bias": (config(bias="all"), "bias is 'all', which a LoRA-MoE adapter cannot apply"),
    "full modules": (config(modules_to_save=["lm_head"]), "modules_to_save is ['lm_head'], which"),
    # single keys of the config
    "base by number": (config(base_model_name_or_path=3), "base_model_name_or_path is 3, expected"),
    "no targets": (config(target_modules=[]), "target_modules is [], expected a list of module"),
    "top_k 0": (config(top_k=0), "top_k is 0, expected an integer >= 1"),
    "top_k true": (config(top_k=True), "top_k is True, expected an integer >= 1"),
    "negative alpha": (config(lora_alpha=-1), "lora_alpha is -1, expected a number > 0"),
    "task by number": (config(task_type=1), "task_type is 1, expected a string"),
    "search by name": (config(search="darts"), "search is 'darts', expected an object"),
    "wrong r": (config(r=8), "r is 8, expected 6, the largest total rank of a module"),
    "other target": (
        config(target_modules=["q_proj"]),
        f"experts has '{SINGLE}', which no entry of target_modules ['q_proj'] names",
    ),
    "fingerprint": (
        config(base_fingerprint={"a": 1}),
        "base_fingerprint: found {'a': 1}, expected",
    ),
    # its experts
    "experts as list": (config(experts=[]), "experts is [], expected an object"),
    "path as module": (
        config(experts={"../q_proj": GOOD}, target_modules=["../q_proj"]),
        "experts has '../q_proj', which is no module's name",
    ),
    "module without experts": (experts([]), f"experts['{ROUTED}'] is [], expected a non-empty"),
    "expert of rank 0": (
        experts([{"rank": 0, "scaling": 1.0}]),
        f"experts['{ROUTED}'][0].rank is 0, expected an integer >= 1",
    ),
    "expert of a fraction": (
        experts([{"rank": 1.5, "scaling": 1.0}]),
        f"experts['{ROUTED}'][0].rank is 1.5, expected an integer >= 1",
    ),
    "scaling NaN": (
        experts([{"rank": 1, "scaling": float("nan")}]),
        f"experts['{ROUTED}'][0].scaling is nan, expected a finite number",
    ),
    "scaling too large": (
        experts([{"rank": 1, "scaling": 10**400}]),
        f"experts['{ROUTED}'][0].scaling is 1000",
    ),
    "expert with more": (
        experts([{"rank": 1, "scaling": 1.0, "bias": 1}]),
        f"experts['{ROUTED}'][0] is {{'rank': 1",
    ),
    # the base
    "other base": (
        config(base_fingerprint=FINGERPRINT.to_json() | {"vocab_size": 101}),
        "made for another base model",
    ),
    "unknown module": (
        config(experts={ROUTED + "2": GOOD}, target_modules=["q_proj2"]),
        f"experts has '{ROUTED}2', no linear layer of the base",
    ),
    # the tensors
    "missing A": (
        tensors(lambda t: t.pop(f"{TENSOR}.lora_A.weight")),
        f"the tensor {TENSOR}.lora_A.weight is missing",
    ),
    "missing router": (
        tensors(lambda t: t.pop(f"{TENSOR}.lora_router.weight")),
        f"the tensor {TENSOR}.lora_router.weight is missing",
    ),
    "extra tensor": (
        tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(1)})),
        "the tensor base_model.model.lm_head.weight belongs to no module",
    ),
    "router of a single expert": (
        tensors(
            lambda t: t.update({f"base_model.model.{SINGLE}.lora_router.weight": torch.ones(1)})
        ),
        f"the tensor base_model.model.{SINGLE}.lora_router.weight belongs to no module",
    ),
    "rank too small": (
        tensor(f"{TENSOR}.lora_A.weight", lambda t: t[:5]),
        f"{TENSOR}.lora_A.weight has shape [5, 16], expected [6, 16]",
    ),
    "B of another layer": (
        tensor(f"{TENSOR}.lora_B.weight", lambda t: t[:16]),
        f"{TENSOR}.lora_B.weight has shape [16, 6], expected [24, 6]",
    ),
    "router too wide": (
        tensor(f"{TENSOR}.lora_router.weight", lambda t: t.repeat(2, 1)),
        f"{TENSOR}.lora_router.weight has shape [6, 16], expected [3, 16]",
    ),
    "flat A": (
        tensor(f"{TENSOR}.lora_A.weight", lambda t: t.flatten()),
        f"{TENSOR}.lora_A.weight has shape [96], expected two dimensions",
    ),
    "number for B": (
        tensor(f"{TENSOR}.lora_B.weight", lambda t: t[0, 0]),
        f"{TENSOR}.lora_B.weight has shape [], expected two dimensions",
    ),
    "router in bfloat16": (
        tensor(f"{TENSOR}.lora_router.weight", lambda t: t.bfloat16()),
        f"{TENSOR}.lora_router.weight is BF16, expected F32",
    ),
    "A in float64": (
        tensor(f"{TENSOR}.lora_A.weight", lambda t: t.double()),
        f"{TENSOR}.lora_A.weight is F64, expected F32 or F16 or BF16",
    ),
    "NaN in A": (
        tensor(f"{TENSOR}.lora_A.weight", poisoned(float("nan"))),
        f"{TENSOR}.lora_A.weight has values that are not finite",
    ),
    "infinite router": (
        tensor(f"{TENSOR}.lora_router.weight", poisoned(float("-inf"))),
        f"{TENSOR}.lora_router.weight has values that are not finite",
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_one_value_that_is_not_finite_is_seen_wherever_it_is(dtype: torch.dtype) -> None:
    assert is_finite(torch.empty(0, 4, dtype=dtype))
    for size in (1, 3, 16, 33, 1001):
        tensor = torch.linspace(-1, 1, size).to(dtype)
        assert is_finite(tensor)
        for value in (float("nan"), float("inf"), float("-inf")):
            for place in {0, size // 2, size - 1}:
                spoilt = tensor.clone()
                spoilt[place] = value
                assert not is_finite(spoilt), (size, place, value)


@pytest.mark.parametrize(("spoil", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_a_bad_adapter_is_refused_by_name(folder: Path, spoil: Spoil, message: str) -> None:
    spoil(folder)
    with pytest.raises(AdapterError, match=re.escape(message)) as error:
        read_adapter(folder, BASE)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["number for B", "flat A", "rank too small", "router too wide"])
def test_shapes_are_checked_without_a_base_too(folder: Path, name: str) -> None:
    spoil, message = ERRORS[name]
    spoil(folder)
    with pytest.raises(AdapterError, match=re.escape(message)):
        read_adapter(folder)


@pytest.mark.parametrize("key", ["auto_mapping", "inference_mode", "peft_version", "lora_dropout"])
def test_what_peft_adds_to_the_config_is_accepted(folder: Path, key: str) -> None:
    config(**{key: None})(folder)
    assert_same(read_adapter(folder, BASE), make_adapter())


def test_a_link_to_the_folder_and_links_inside_it_are_fine(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "v1.safetensors")
    (folder / WEIGHTS).symlink_to("v1.safetensors")
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert_same(read_adapter(link, BASE), make_adapter())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: replace(w, lora_a=w.lora_a[:5]), "lora_A.weight has shape [5, 16]"),
        (lambda w: replace(w, lora_b=w.lora_b.T), "lora_B.weight has shape [6, 24]"),
        (lambda w: replace(w, router=None), "lora_router.weight is missing"),
        (lambda w: replace(w, router=w.router.half()), "lora_router.weight is F16, expected F32"),
        (lambda w: replace(w, lora_a=w.lora_a.double()), "lora_A.weight is torch.float64"),
        (lambda w: replace(w, lora_a=w.lora_a * float("nan")), "that are not finite"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(
    tmp_path: Path, change: Callable[[ModuleWeights], ModuleWeights], message: str
) -> None:
    adapter = make_adapter()
    weights = dict(adapter.weights) | {ROUTED: change(adapter.weights[ROUTED])}
    with pytest.raises(AdapterError, match=re.escape(message)):
        write_adapter(Adapter(adapter.spec, weights), tmp_path / "a", "")
    assert not list(tmp_path.iterdir())


def test_a_spec_that_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    adapter = make_adapter()
    spec = replace(adapter.spec, experts=EXPERTS | {SINGLE: (Expert(4, float("inf")),)})
    with pytest.raises(AdapterError, match=r"scaling is inf, expected a finite number"):
        write_adapter(Adapter(spec, adapter.weights), tmp_path / "a", "")
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_replaced_as_a_whole(folder: Path) -> None:
    (folder / "training.log").write_text("of the old version")
    write_adapter(make_adapter(seed=1), folder, "# New\n")
    assert_same(read_adapter(folder, BASE), make_adapter(seed=1))
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    assert list(folder.parent.iterdir()) == [folder]


def test_an_adapter_is_replaced_through_a_link(folder: Path) -> None:
    link = folder.parent / "current"
    link.symlink_to(folder)
    write_adapter(make_adapter(seed=1), link, "")
    assert link.is_symlink()
    assert_same(read_adapter(folder, BASE), make_adapter(seed=1))


def test_a_failed_write_leaves_the_old_adapter_and_no_trace(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", disk_full)
    with pytest.raises(
        AdapterError, match=r"adapter_model\.safetensors: cannot be written .*No space"
    ):
        write_adapter(make_adapter(seed=1), folder, "")
    assert_same(read_adapter(folder, BASE), make_adapter())
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_failed_swap_of_names_leaves_the_old_adapter(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    calls, rename = 0, os.replace

    def fail_once(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(AdapterError, match=r"cannot be written .*Input/output error"):
        write_adapter(make_adapter(seed=1), folder, "")
    assert_same(read_adapter(folder, BASE), make_adapter())
    assert list(folder.parent.iterdir()) == [folder]


def test_another_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.md").write_text("years of work")
    with pytest.raises(AdapterError, match="exists and is not an adapter folder"):
        write_adapter(make_adapter(), tmp_path / "thesis", "")
    with pytest.raises(AdapterError, match="exists and is not an adapter folder"):
        write_adapter(make_adapter(), tmp_path / "thesis" / "chapter.md", "")
    assert (tmp_path / "thesis" / "chapter.md").read_text() == "years of work"


def test_the_base_is_described_from_its_config_alone(small_model: Path) -> None:
    from transformers import AutoConfig

    base = BaseModel.from_config(AutoConfig.from_pretrained(small_model))
    assert base.fingerprint == BaseFingerprint("LlamaForCausalLM", 576, 30, 49152)
    assert base.linears["model.layers.29.mlp.down_proj"] == (576, 1536)
    assert len(base.linears) == 7 * 30 + 1
    assert BaseFingerprint.from_json(base.fingerprint.to_json()) == base.fingerprint


def test_a_config_that_is_no_file_is_not_waited_for(tmp_path):
    path = tmp_path / CONFIG_FILE
    os.mkfifo(path)
    with pytest.raises(AdapterError, match="no plain file"):
        read_config(path)
