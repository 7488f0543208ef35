"""Whatever stands in an adapter folder, reading it gives an adapter or an error that says where."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guilomo_serve.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterError,
    is_guilomo_adapter,
    read_adapter,
    write_adapter,
)
from guilomo_serve.adapter.plain import GENERATING, check_plain_config
from tests.adapter.test_files import BASE, make_adapter

CONFIG = make_adapter().spec.to_json()
PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"],
         "task_type": "CAUSAL_LM", "rank_pattern": {"a": 4}, "use_dora": False}  # fmt: skip
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 10**400, 2**63])
TEXTS = st.text() | st.text(
    st.characters(categories=["Cs", "Cc", "Lu"])
)  # halves of characters too
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a JSON value, by the keys that lead there."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from places(inner, (*path, i))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(copy[path[0]], path[1:], new)
    return copy


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "good"
    write_adapter(make_adapter(), folder, "card")
    return folder


def refusal(read: Callable[[], Any]) -> str | None:
    """What an adapter is refused with; anything but an AdapterError fails the test."""
    try:
        read()
    except AdapterError as e:
        return str(e)
    return None


def read(folder: Path) -> None:
    """Reads a folder in both ways, and is content with an error that names it."""
    is_guilomo_adapter(folder)
    for base in (None, BASE):
        said = refusal(partial(read_adapter, folder, base))
        assert said is None or str(folder) in said
        (said or "").encode()  # it can be printed


@given(st.sampled_from(list(places(CONFIG))), VALUES)
@FUZZ
def test_any_value_at_any_place_of_the_config(good: Path, path: tuple[Any, ...], new: Any) -> None:
    (good / CONFIG_FILE).write_text(json.dumps(changed(CONFIG, path, new)))
    read(good)


@given(st.dictionaries(TEXTS | st.sampled_from(sorted(CONFIG)), VALUES, max_size=8))
@FUZZ
def test_any_keys_beside_those_of_the_config(good: Path, more: dict[str, Any]) -> None:
    (good / CONFIG_FILE).write_text(json.dumps({**CONFIG, **more}))
    read(good)


@given(st.data(), st.sampled_from([CONFIG_FILE, WEIGHTS_FILE]))
@FUZZ
def test_any_bytes_in_any_file(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str
) -> None:
    folder = tmp_path_factory.mktemp("bytes") / "adapter"
    write_adapter(make_adapter(), folder, "card")
    whole = (folder / name).read_bytes()
    # Mostly within the header of a weights file, where bytes mean something.
    begin = data.draw(st.integers(0, min(len(whole), 800)))
    end = data.draw(st.integers(begin, min(len(whole), begin + 12)) | st.just(len(whole)))
    (folder / name).write_bytes(whole[:begin] + data.draw(st.binary(max_size=12)) + whole[end:])
    read(folder)
    shutil.rmtree(folder)


@given(st.sampled_from(list(places(PLAIN))), VALUES)
@FUZZ
def test_any_value_at_any_place_of_a_plain_loras_config(path: tuple[Any, ...], new: Any) -> None:
    value = json.loads(json.dumps(changed(PLAIN, path, new)))
    said = refusal(partial(check_plain_config, value, "adapter_config.json", GENERATING))
    assert said is None or said.startswith("adapter_config.json: ")
    (said or "").encode()


@pytest.mark.parametrize("depth", [100, 900, 100_000])
@pytest.mark.parametrize("key", ["search", "experts", "target_modules", "base_fingerprint", "new"])
def test_values_nested_deeply(good: Path, key: str, depth: int) -> None:
    config = json.dumps({**CONFIG, key: 0}).replace(
        f'"{key}": 0', f'"{key}": {"[" * depth}{"]" * depth}'
    )
    (good / CONFIG_FILE).write_text(config)
    read(good)
