"""With vLLM's other features on, an adapter answers as it does in transformers.

One server has them all: prefix caching over small blocks, prompts prefilled in chunks, and drafts
from n-grams.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests.serve import hf_reference
from tests.serve.expert_load import check_load, expected_load, first_sampled
from tests.serve.helpers import Server

pytestmark = pytest.mark.slow

BLOCK = 32  # tokens, as the server's fixture sets it
PREFIX = 3 * "A customer writes: my card has not arrived, it has been two weeks now! "
PROMPTS = tuple(PREFIX + end for end in ("What do we answer?", "Why?", "one two one two one two"))
LENGTH = 24


@pytest.fixture
def server(server_with_everything: Server) -> Server:
    return server_with_everything


@pytest.fixture(scope="module")
def models(tiny_model, adapters):
    """In transformers: the base and the base with each adapter."""
    return {
        name: hf_reference.model_with(tiny_model, folder)
        for name, folder in {"base": None, **adapters}.items()
    }


def count(server: Server, metric: str) -> float:
    """A counter of vLLM's."""
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    return sum(float(v) for v in re.findall(rf"^vllm:{metric}_total{{.*}} (\S+)$", text, re.M))


def ask(server: Server, model: str, prompt: str, tokens: int = LENGTH, **body: object):
    return server.client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True, **body},
    ).choices[0]


def test_cached_chunked_and_drafted_answers_are_those_of_transformers(server, models):
    jobs = [(name, prompt) for prompt in PROMPTS for name in models]
    for _ in range(2):  # the second time from the cache
        with ThreadPoolExecutor(len(jobs)) as pool:
            answers = list(pool.map(lambda job: ask(server, *job), jobs))
        for (name, prompt), answer in zip(jobs, answers, strict=True):
            expected = hf_reference.greedy(models[name], answer.prompt_token_ids, LENGTH)
            assert answer.token_ids == expected, (name, prompt)
    assert count(server, "prefix_cache_hits") >= len(jobs) * (len(PREFIX) // BLOCK) * BLOCK
    assert count(server, "spec_decode_num_draft_tokens") > 0
    assert count(server, "spec_decode_num_accepted_tokens") > 0


def test_the_load_of_experts_is_sampled_in_compiled_mode(server, tiny_model, adapters):
    assert server.load("sampled", adapters["first"]).ok
    prompt, found = first_sampled(server, "sampled", PREFIX[:60])  # one chunk
    check_load(found, expected_load(tiny_model, adapters["first"], prompt), len(prompt))
