"""The tiny model of the tests of serving and its adapters.

It is a random Llama in float32 with a byte tokenizer: what vLLM and transformers compute with it
can be compared to four digits.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.helpers import (
    SPARSE,
    Server,
    guilomo_serve,
    random_adapter,
    random_lora,
    serving,
    tiny_llama,
)

TELLING = {"TORCH_LOGS": "graph_code"}  # in a server's log, of each graph that torch compiles


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What asks `opened` comes before what kills it, whatever the names of the files."""
    places = [i for i, item in enumerate(items) if item.path.parent == Path(__file__).parent]
    ordered = sorted((items[i] for i in places), key=_kills_the_server)
    for place, item in zip(places, ordered, strict=True):
        items[place] = item


def _kills_the_server(item: pytest.Item) -> int:
    if item.name.startswith("test_a_killed"):
        return 1
    return 2 if "restarted" in getattr(item, "fixturenames", ()) else 0


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama of two layers in float32."""
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two LoRA-MoE adapters of different shape and one plain LoRA for the tiny model."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "first": random_adapter(tiny_model, folder / "first", seed=1),
        "second": random_adapter(
            tiny_model, folder / "second", seed=2, targets=("q_proj", "v_proj", "up_proj")
        ),
        "plain": random_lora(tiny_model, folder / "plain", seed=3),
    }


@pytest.fixture(scope="session")
def sparse(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that leaves most of the tiny model alone."""
    folder = tmp_path_factory.mktemp("sparse") / "sparse"
    return random_adapter(tiny_model, folder, seed=6, ranks=SPARSE)


@pytest.fixture(scope="package")
def root(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter root of `opened` and `restarted`, with the adapters of these tests."""
    folder = tmp_path_factory.mktemp("root")
    for name, adapter in adapters.items():
        shutil.copytree(adapter, folder / name)
    return folder


@pytest.fixture(scope="package")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="package")
def rollout(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the command line whose contents change between `opened` and `restarted`."""
    return Path(shutil.copytree(adapters["first"], tmp_path_factory.mktemp("given") / "rollout"))


def _command(
    tiny_model: Path, adapters: dict[str, Path], rollout: Path, root: Path, state: Path
) -> list[str]:
    return guilomo_serve(
        tiny_model,
        {"given": adapters["plain"], "rollout": rollout},
        *("--adapter-root", str(root), "--state", str(state), "--check-adapters"),
        *("--enforce-eager", "--enable-prefix-caching"),
        *("--dtype", "float32", "--served-model-name", "base"),
    )


@pytest.fixture(scope="package")
def opened(tiny_model, adapters, rollout, root, state, tmp_path_factory) -> Iterator[Server]:
    """A server with a root, a state and no keys of ours, and with vLLM's routes for developers."""
    log = tmp_path_factory.mktemp("log") / "opened.log"
    developing = {"VLLM_SERVER_DEV_MODE": "1", **TELLING}
    command = [*_command(tiny_model, adapters, rollout, root, state), "--enable-scale-out"]
    with serving(command, log, developing, anew=True) as server:
        yield server


@pytest.fixture(scope="package")
def restarted(
    opened, tiny_model, adapters, rollout, root, state, tmp_path_factory
) -> Iterator[Server]:
    """`opened`, killed and started again on its state, restored from a backup: with keys, and
    evicting what is idle."""
    os.killpg(opened.process.pid, signal.SIGKILL)
    opened.process.wait()
    backup = shutil.copytree(state, tmp_path_factory.mktemp("backup") / "state")
    shutil.rmtree(state)
    shutil.copytree(backup, state)
    log = tmp_path_factory.mktemp("log") / "restarted.log"
    command = [
        *_command(tiny_model, adapters, rollout, root, state),
        *("--api-key", "the-key-for-inference", "--evict-idle", "4"),
    ]
    environment = {"GUILOMO_ADMIN_KEY": "the-key-for-administration"}
    with serving(command, log, environment) as server:
        server.key, server.admin_key = "the-key-for-inference", "the-key-for-administration"
        yield server


@pytest.fixture(scope="session")
def server_with_everything(
    tiny_model: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Our server with the features that people switch on, and small enough that they act.

    Cache blocks of 32 tokens, prompts prefilled in chunks of 64, drafts from n-grams of one token.
    """
    drafts = {
        **{"method": "ngram", "num_speculative_tokens": 3},
        **{"prompt_lookup_min": 1, "prompt_lookup_max": 3},
    }
    flags = (
        *("--dtype", "float32", "--served-model-name", "base"),
        *("--enable-prefix-caching", "--block-size", "32"),
        *("--enable-chunked-prefill", "--max-num-batched-tokens", "64"),
        *("--speculative-config", json.dumps(drafts)),
        # A random model would fill its answer with the spaces that JSON allows anywhere.
        *("--structured-outputs-config.backend", "xgrammar"),
        *("--structured-outputs-config.disable_any_whitespace=true", "--expert-load", "modules"),
    )
    log = tmp_path_factory.mktemp("log") / "everything.log"
    command = guilomo_serve(tiny_model, adapters, *flags)
    with serving(command, log, TELLING, anew=True) as server:
        yield server
