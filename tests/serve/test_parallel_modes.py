"""vLLM's parallel modes with adapters: the answers of one process, and swaps while they serve."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import torch
from safetensors.torch import load_file

from guilomo_serve.adapter import WEIGHTS_FILE
from guilomo_serve.runtime.report import merge
from tests.serve import hf_reference
from tests.serve.expert_load import check_load, expected_load, first_sampled
from tests.serve.helpers import (
    Server,
    ask,
    eventually,
    guilomo_serve,
    random_adapter,
    serving,
)

pytestmark = pytest.mark.slow

PROMPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "A customer writes: my card has not arrived, it has been two weeks now!",
)
TOKENS = 6
LONG = 60  # tokens of an answer that goes on while an adapter is swapped
TOLERANCE = 2e-3  # nats, in float32: the same sums in another order, through a softmax
FLAGS = ("--enforce-eager", "--dtype", "float32", "--served-model-name", "base")
# vLLM gives each process a NUMA node of its own and stops where there are fewer.
UNBOUND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
SECOND_LAYER = {
    "model.layers.1.self_attn.q_proj": (2, 3),
    "model.layers.1.mlp.down_proj": (4,),
}


def check_answers(server: Server, base: Path, adapters: dict[str, Path | None]) -> None:
    """All at once, several times over, compared with transformers."""
    jobs = [(name, prompt) for prompt in PROMPTS for name in adapters] * 2
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(lambda job: ask(server, *job, TOKENS, logprobs=0), jobs))
    models = {name: hf_reference.model_with(base, folder) for name, folder in adapters.items()}
    for (name, prompt), found in zip(jobs, answers, strict=True):
        tokens = found.prompt_token_ids + found.token_ids
        with torch.inference_mode():
            logits = models[name](torch.tensor([tokens])).logits[0, -TOKENS - 1 : -1]
        assert logits.argmax(-1).tolist() == found.token_ids, (name, prompt)
        wanted = hf_reference.logprobs(models[name], tokens)[-TOKENS:]
        given = torch.tensor(found.logprobs.token_logprobs)
        assert (given - wanted).abs().max() < TOLERANCE, (name, prompt)


@contextmanager
def standing_still(server: Server) -> Iterator[None]:
    """The processes that compute, so that what was asked before runs a moment later."""
    found = psutil.Process(server.process.pid).children(recursive=True)
    workers = [process for process in found if not process.children()]
    for worker in workers:
        worker.suspend()
    try:
        yield
    finally:
        for worker in workers:
            worker.resume()


def check_swaps(server: Server, base: Path, old: Path, new: Path) -> None:
    """What runs while a name is swapped ends as it began; what comes after gets the new version."""
    assert server.put("swapped", old).ok
    with ThreadPoolExecutor(5) as pool:
        with standing_still(server):
            running = [pool.submit(ask, server, "swapped", PROMPTS[0], LONG) for _ in range(4)]
            eventually(lambda: server.in_flight("swapped") == len(running), "all have begun")
            swapping = pool.submit(server.put, "swapped", new)
        assert swapping.result().ok
        after = ask(server, "swapped", PROMPTS[0], TOKENS)
        before = [future.result() for future in running]
    for folder, found, length in [(new, after, TOKENS), *((old, one, LONG) for one in before)]:
        model = hf_reference.model_with(base, folder)
        assert hf_reference.greedy(model, found.prompt_token_ids, length) == found.token_ids
    assert server.admin("DELETE", "/swapped").ok


def check_refusal(server: Server, base: Path, folder: Path) -> None:
    """Of what no process has a place for; the server goes on."""
    bad = random_adapter(base, folder, seed=4, targets=("q_proj",))
    config = bad / "adapter_config.json"
    config.write_text(config.read_text().replace("layers.1.", "layers.7."))
    refused = server.load("bad", bad)
    assert refused.status_code == 400
    assert "model.layers.7.self_attn.q_proj" in refused.text


def check_one_refuses(server: Server, folder: Path) -> None:
    """What one engine alone can load is in none, and is loaded once the other one can."""

    def held() -> list[list[int]]:
        """The versions that each engine has."""
        asked = {"json": {"method": "guilomo_report"}, "headers": server.admin_headers}
        answer = requests.post(f"{server.url}/collective_rpc", timeout=60, **asked)
        return [sorted(of_engine["slots"]) for of_engine in answer.json()["results"]]

    before = held()
    assert len(before) == 2
    processes = psutil.Process(server.process.pid).children(recursive=True)
    worker = max(
        (process for process in processes if not process.children()),
        key=lambda process: process.memory_info().rss,
    )
    limits = worker.rlimit(psutil.RLIMIT_NOFILE)
    worker.rlimit(psutil.RLIMIT_NOFILE, (4, limits[1]))  # it has as many, and can open no more
    refused = server.put("one-sided", folder)
    worker.rlimit(psutil.RLIMIT_NOFILE, limits)
    assert refused.status_code == 400
    assert "Too many open files" in refused.text
    eventually(lambda: held() == before, "neither has it")
    assert server.admin("GET", "/one-sided").status_code == 404
    assert server.put("one-sided", folder).ok
    first, second = held()
    assert first == second
    assert len(first) == len(before[0]) + 1
    assert server.admin("DELETE", "/one-sided").ok


def test_a_model_split_by_layers_answers_as_the_whole_one(
    tiny_model: Path, adapters: dict[str, Path], sparse: Path, tmp_path: Path
) -> None:
    """Each stage has one layer; `sparse` has nothing in the second, `half` nothing in the first."""
    half = random_adapter(tiny_model, tmp_path / "half", seed=5, ranks=SECOND_LAYER)
    named = {**adapters, "sparse": sparse, "half": half}
    command = guilomo_serve(tiny_model, named, "-pp", "2", "--check-adapters", *FLAGS)
    with serving(command, tmp_path / "log", UNBOUND, anew=True) as server:
        # Each stage says what its layers' routers did.
        assert server.load("sampled", adapters["first"]).ok
        time.sleep(1.5)  # both stages are due to sample
        prompt, load = first_sampled(server, "sampled", PROMPTS[0])
        check_load(load, expected_load(tiny_model, adapters["first"], prompt), len(prompt))
        check_answers(server, tiny_model, {"base": None, **named})
        check_refusal(server, tiny_model, tmp_path / "bad")
        check_swaps(server, tiny_model, adapters["first"], adapters["second"])


def test_two_engines_answer_as_one(
    tiny_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Requests are spread over both; a load reaches both or none."""
    command = guilomo_serve(tiny_model, adapters, "-dp", "2", "--check-adapters", *FLAGS)
    developing = {**UNBOUND, "VLLM_SERVER_DEV_MODE": "1"}
    with serving(command, tmp_path / "log", developing) as server:
        check_answers(server, tiny_model, {"base": None, **adapters})
        metrics = requests.get(f"{server.url}/metrics", timeout=30).text
        answered = re.findall(
            r'^vllm:request_success_total{engine="(\d)",finished_reason="length".*} ([1-9]\S*)$',
            metrics,
            re.MULTILINE,
        )
        assert {engine for engine, _ in answered} == {"0", "1"}
        held = re.findall(r'^guilomo_resident_bytes{adapter="first"} (\S+)$', metrics, re.MULTILINE)
        of_file = sum(t.numel() * 4 for t in load_file(adapters["first"] / WEIGHTS_FILE).values())
        assert 2 * of_file < float(held[0]) < 4 * of_file  # it is in both
        check_one_refuses(server, adapters["first"])
        check_refusal(server, tiny_model, tmp_path / "bad")
        check_swaps(server, tiny_model, adapters["first"], adapters["second"])


def test_the_load_of_routers_is_that_of_all_stages_and_engines():
    """Two stages have a module each; the second engine has sampled the first one alone."""

    def said(engine: int, tokens: int, entropy: float, module: str, share: float) -> dict[str, Any]:
        about = {"tokens": tokens, "share": [share, 1 - share], "entropy": entropy}
        means = {"entropy": entropy, "imbalance": 2 * share}
        found = {"version": 7, "engine": engine, "tokens": tokens, "routers": 1, **means}
        return {"slots": [7], "versions": [{**found, "modules": {module: about}}]}

    nothing: dict[str, Any] = {"slots": [], "versions": []}
    replies = [
        said(0, 10, 0.5, "a", 0.6),
        said(0, 10, 1.0, "b", 0.5),
        said(1, 30, 0.9, "a", 1.0),
        nothing,
    ]
    (found,) = merge(replies)
    assert (found["version"], found["tokens"]) == (7, 40)
    assert found["entropy"] == pytest.approx((10 * 0.5 + 10 * 1.0 + 30 * 0.9) / 50)
    assert found["imbalance"] == pytest.approx((10 * 1.2 + 10 * 1.0 + 30 * 2.0) / 50)
    assert list(found["modules"]) == ["a", "b"]
    assert found["modules"]["a"]["tokens"] == 40
    assert found["modules"]["a"]["share"] == pytest.approx([0.9, 0.1])
    assert found["modules"]["a"]["entropy"] == pytest.approx((0.5 + 3 * 0.9) / 4)
    assert found["modules"]["b"] == {"tokens": 10, "share": [0.5, 0.5], "entropy": 1.0}
    assert merge([nothing, nothing]) == []
