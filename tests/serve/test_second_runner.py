"""vLLM's second model runner, the one of GPUs, on a CPU: adapters answer as in transformers.

The runner's own kernels are interpreted. In the server the adapters' product is the one of CPUs; in
the program of graphs.py it is that of GPUs, interpreted too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import transformers

from guilomo_serve.adapter import BaseModel
from guilomo_serve.runtime.model_manager import SLOTS
from tests.serve import hf_reference
from tests.serve.expert_load import check_load, expected_load, first_sampled
from tests.serve.helpers import ask, guilomo_serve, random_adapter, serving
from tests.serve.triton_for_cpu import installed

pytestmark = pytest.mark.slow

PROMPTS = ("A card has not arrived.", "hello")
TOKENS = 6
ADAPTED_BY_SECOND = ("self_attn.qkv_proj", "mlp.gate_up_proj")
UNBOUND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


def test_a_server_of_two_processes_answers(
    tiny_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    flags = (
        *("-tp", "2", "--enforce-eager", "--dtype", "float32", "--served-model-name", "base"),
        *("--kv-cache-memory-bytes", str(8 << 20), "--check-adapters"),
    )
    environment = {**UNBOUND, **installed(tmp_path)}
    log = tmp_path / "log"
    jobs = [(name, prompt) for prompt in PROMPTS for name in ("base", *adapters)]
    command = guilomo_serve(tiny_model, adapters, *flags)
    with serving(command, log, environment, anew=True) as server:
        alone = [ask(server, *job, TOKENS) for job in jobs[: len(adapters) + 1]]
        with ThreadPoolExecutor(len(jobs)) as pool:  # mixed
            answers = list(pool.map(lambda job: ask(server, *job, TOKENS, logprobs=1), jobs))
        assert server.load("sampled", adapters["first"]).ok
        prompt, load = first_sampled(server, "sampled", PROMPTS[0])
        check_load(load, expected_load(tiny_model, adapters["first"], prompt), len(prompt))
    assert "V2 Model Runner" in log.read_text()
    assert [a.token_ids for a in alone] == [a.token_ids for a in answers[: len(alone)]]
    for name, folder in {"base": None, **adapters}.items():
        model = hf_reference.model_with(tiny_model, folder)
        for job, answer in zip(jobs, answers, strict=True):
            if job[0] == name:
                expected = hf_reference.greedy(model, answer.prompt_token_ids, TOKENS)
                assert answer.token_ids == expected, job


@pytest.mark.timeout(600)  # two minutes where nothing else runs
def test_kernels_answer_eager_and_replayed_as_cuda_graphs_are(
    tiny_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """In two processes: mixed batches, a swap between them; what kernels count of the routers."""
    environment = {
        **{**os.environ, **UNBOUND, **installed(tmp_path)},
        **{"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"},
    }
    modules = BaseModel.from_config(transformers.AutoConfig.from_pretrained(tiny_model)).linears
    ranks = dict.fromkeys(modules, (8,) * 8)
    large = random_adapter(tiny_model, tmp_path / "large", seed=4, ranks=ranks)
    folders = {name: str(folder) for name, folder in {**adapters, "large": large}.items()}
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "tests.serve.graphs", str(tiny_model), json.dumps(folders), str(tmp_path)),
    ]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            status = process.wait(timeout=560)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert status == 0, log.read_text()[-4000:]
    found, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for of_all in ("check", "eager", "replayed"):
        assert found[of_all] == other[of_all]
    assert found["runner"] == "vllm.v1.worker.gpu.model_runner"
    assert found["replays"] > 0
    # A token is at the same place of a batch in both, for the sum of logits, whatever its slot.
    assert found["orders"] == other["orders"]
    assert found["in slots"] != other["in slots"]
    # What is in a slot stays there while there is memory, and is not copied again.
    for of_rank in (found, other):
        assert of_rank["brought"][0] == [[], ["second"]]
        assert of_rank["brought"][1][1] == ["second"]
        assert of_rank["slots"] == [SLOTS, 2]
    assert re.fullmatch(
        r"CUDA graphs: adapters are not computed by kernels in model\.layers\.0\.\S+ "
        r"\(torch.float32 on cpu\); add --enforce-eager",
        found["check"]["refused"],
    )
    # Layers that the batch's adapter leaves alone launch nothing.
    adapted = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ADAPTED_BY_SECOND]
    assert found["check"]["launching"] == adapted
    # What is pinned would leave no room for others of a step.
    assert found["check"]["pinned"].startswith("adapters that a batch may have take ")
    for full in found["full"]:  # however it is read
        assert full["is_full"]
        assert re.match("adapters that a batch may have take .* [(]--adapter-m", full["refused"])
    # What the check at start says of no graphs, of such as leave adapters out, and of right ones.
    assert found["check"]["none"] is None
    assert "differ from an eager step's by" in found["check"]["wrong"]
    assert found["check"]["right"] is None
    # Both processes say the same, and neither waits for the other.
    assert "differ from an eager step's by" in found["check"]["wrong in one"]
    assert found["check"]["of one"] == "a reason"
    assert "this server's product differs from the formula by 100" in found["check"]["products"]
    models = {
        name: hf_reference.model_with(tiny_model, folder)
        for name, folder in {"base": None, **adapters}.items()
    }
    expected = [
        [
            hf_reference.greedy(models[name], prompt, len(answer))
            for name, prompt, answer in zip(job, found["prompts"], answers, strict=False)
        ]
        for job, answers in zip(found["jobs"], found["eager"], strict=True)
    ]
    assert found["eager"] == expected
    assert found["replayed"] == expected
    # Of each request its prompt and all that it got but the last token, which nobody computed on.
    seen = sum(
        len(prompt) + len(answer) - 1
        for job, answers in zip(found["jobs"], found["eager"], strict=True)
        for name, prompt, answer in zip(job, found["prompts"], answers, strict=False)
        if name == "first"
    )
    for (load,) in (found["report"], other["report"]):
        assert load["tokens"] == seen
        assert {module["tokens"] for module in load["modules"].values()} == {seen}
