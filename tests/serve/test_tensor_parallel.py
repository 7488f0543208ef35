"""A model split over two processes answers as the whole one does."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import torch
from safetensors.torch import load_file

from guilomo_serve.adapter import WEIGHTS_FILE
from tests.serve import hf_reference
from tests.serve.expert_load import check_load, expected_load, first_sampled
from tests.serve.helpers import Server, ask, guilomo_serve, random_adapter, serving

pytestmark = pytest.mark.slow

PROMPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "A customer writes: my card has not arrived, it has been two weeks now!",
)
TOKENS = 6
TOLERANCE = 2e-3  # nats, in float32: the same sums in another order, through a softmax
# vLLM gives each process a NUMA node of its own and stops where there are fewer.
UNBOUND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


def answer(server: Server, model: str, prompt: str) -> tuple[list[int], list[int], torch.Tensor]:
    """Tokens of the prompt and of the greedy answer, and the answer's log-probabilities."""
    choice = ask(server, model, prompt, TOKENS, logprobs=0)
    return choice.prompt_token_ids, choice.token_ids, torch.tensor(choice.logprobs.token_logprobs)


def test_two_processes_answer_as_one(
    tiny_model: Path, adapters: dict[str, Path], sparse: Path, tmp_path: Path
) -> None:
    adapters = {**adapters, "sparse": sparse}
    # vLLM's CPU build turns asynchronous scheduling off (vllm/platforms/cpu.py), whatever is asked.
    flags = ("-tp", "2", "--enforce-eager", "--dtype", "float32", "--served-model-name", "base")
    command = guilomo_serve(tiny_model, adapters, *flags)
    jobs = [(name, prompt) for prompt in PROMPTS for name in ("base", *adapters)]
    with (
        serving(command, tmp_path / "log", UNBOUND) as server,
        ThreadPoolExecutor(len(jobs)) as pool,
    ):
        answers = list(pool.map(lambda job: answer(server, *job), jobs))
        # An adapter is checked against the whole model, by every process.
        bad = random_adapter(tiny_model, tmp_path / "bad", seed=4, targets=("q_proj",))
        config = bad / "adapter_config.json"
        config.write_text(config.read_text().replace("layers.1.", "layers.7."))
        refused = server.load("bad", bad)
        assert refused.status_code == 400
        assert server.load("later", adapters["second"]).ok
        later = answer(server, "later", PROMPTS[0])
        # Row-parallel layers sum their logits; one process samples, and both have weights.
        assert server.load("sampled", adapters["first"]).ok
        prompt, load = first_sampled(server, "sampled", PROMPTS[0])
        check_load(load, expected_load(tiny_model, adapters["first"], prompt), len(prompt))
        metrics = requests.get(f"{server.url}/metrics", timeout=30).text
        (resident,) = re.findall(
            r'^guilomo_resident_bytes{adapter="sampled"} (\S+)$', metrics, re.MULTILINE
        )
        of_file = sum(t.numel() * 4 for t in load_file(adapters["first"] / WEIGHTS_FILE).values())
        assert of_file < float(resident) < 2 * of_file
    assert later[1] == answers[jobs.index(("second", PROMPTS[0]))][1]

    models = {
        name: hf_reference.model_with(tiny_model, folder)
        for name, folder in {"base": None, **adapters}.items()
    }
    for (name, prompt), (asked, tokens, scores) in zip(jobs, answers, strict=True):
        with torch.inference_mode():
            logits = models[name](torch.tensor([asked + tokens])).logits[0, len(asked) - 1 : -1]
        assert logits.argmax(-1).tolist() == tokens, (name, prompt)
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (scores - expected).abs().max() < TOLERANCE, (name, prompt)
