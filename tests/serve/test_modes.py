"""With vLLM's other features on, an adapter answers as it does in transformers.

One server has them all: prefix caching over small blocks, prompts prefilled in chunks, drafts
from n-grams, structured output and log-probabilities. The soak test asks the same server.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import requests
import torch

from tests.serve import hf_reference
from tests.serve.helpers import Server, guilomo_serve, random_adapter, random_lora, serving

pytestmark = pytest.mark.slow

TOLERANCE = 2e-3  # nats, in float32: the same sums in another order, through a softmax
BLOCK = 32
CHUNK = 64
PREFIX = 3 * "A customer writes: my card has not arrived, it has been two weeks now! "
PROMPTS = tuple(PREFIX + end for end in ("What do we answer?", "Why?", "one two one two one two"))
LENGTH = 24
FLAGS = (
    *("--dtype", "float32", "--served-model-name", "base", "--max-model-len", "512"),
    *("--enable-prefix-caching", "--block-size", str(BLOCK)),
    *("--enable-chunked-prefill", "--max-num-batched-tokens", str(CHUNK)),
    "--speculative-config",
    json.dumps(
        {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 3,
        }
    ),
)


@pytest.fixture(scope="module")
def server(tiny_model, adapters, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "modes.log"
    with serving(guilomo_serve(tiny_model, adapters, *FLAGS), log) as running:
        yield running


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
    expected = {
        (name, prompt): hf_reference.greedy(models[name], list(prompt.encode()), LENGTH)
        for name, prompt in jobs
    }
    for _ in range(2):  # the second time from the cache
        with ThreadPoolExecutor(len(jobs)) as pool:
            answers = list(pool.map(lambda job: ask(server, *job), jobs))
        for job, answer in zip(jobs, answers, strict=True):
            ids = hf_ids(models, answer.prompt_token_ids, expected, job)
            assert answer.token_ids == ids, job
    assert count(server, "prefix_cache_hits") >= len(jobs) * (len(PREFIX) // BLOCK) * BLOCK
    assert count(server, "spec_decode_num_draft_tokens") > 0
    assert count(server, "spec_decode_num_accepted_tokens") > 0
