"""With vLLM's other features on, an adapter answers as it does in transformers.

One server has them all: prefix caching over small blocks, prompts prefilled in chunks, drafts from
n-grams, structured output, log-probabilities and several answers to a prompt.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
import torch

from tests.serve import hf_reference
from tests.serve.expert_load import check_load, expected_load, first_sampled
from tests.serve.helpers import Server, ask, text_of

pytestmark = pytest.mark.slow

TOLERANCE = 2e-3  # nats, in float32: the same sums in another order, through a softmax
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


def test_cached_chunked_and_drafted_answers_are_those_of_transformers(server, models):
    jobs = [(name, prompt) for prompt in PROMPTS for name in models]
    for _ in range(2):  # the second time from the cache
        with ThreadPoolExecutor(len(jobs)) as pool:
            answers = list(pool.map(lambda job: ask(server, *job, LENGTH), jobs))
        for (name, prompt), answer in zip(jobs, answers, strict=True):
            expected = hf_reference.greedy(models[name], answer.prompt_token_ids, LENGTH)
            assert answer.token_ids == expected, (name, prompt)
    assert count(server, "prefix_cache_hits") >= len(jobs) * (len(PREFIX) // BLOCK) * BLOCK
    assert count(server, "spec_decode_num_draft_tokens") > 0
    assert count(server, "spec_decode_num_accepted_tokens") > 0


def test_logprobs_of_drafted_and_of_sampled_tokens_are_those_of_transformers(server, models):
    for name, model in models.items():
        greedy = ask(server, name, PROMPTS[2], LENGTH, logprobs=0)
        sampled = server.client.completions.create(
            model=name,
            prompt=PROMPTS[2],
            max_tokens=LENGTH,
            temperature=1,
            n=3,
            logprobs=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        ).choices
        assert len({tuple(choice.token_ids) for choice in sampled}) > 1
        for choice in (greedy, *sampled):
            tokens = greedy.prompt_token_ids + choice.token_ids
            expected = hf_reference.logprobs(model, tokens)[-LENGTH:]
            given = torch.tensor(choice.logprobs.token_logprobs)
            assert (given - expected).abs().max() < TOLERANCE, name


def test_sampled_answers_keep_to_their_distribution(server, models):
    """With drafts too, which are kept or replaced by a rule that knows the request's settings."""
    for name, model in models.items():
        greedy = ask(server, name, PROMPTS[2], LENGTH)
        assert ask(server, name, PROMPTS[2], LENGTH, temperature=1, top_k=1) == greedy
        total = variance = 0.0
        for seed in range(20):
            sampled = ask(server, name, PROMPTS[2], LENGTH, temperature=1, seed=seed)
            tokens = sampled.prompt_token_ids + sampled.token_ids
            surprise, deviation = hf_reference.surprise(model, tokens, LENGTH)
            total, variance = total + surprise, variance + deviation**2
        assert abs(total) < 4 * variance**0.5, name


def test_a_seed_gives_the_same_answer_however_the_prompt_is_prefilled(server):
    """In parts, or as one part where the rest is cached."""

    def sample(name: str, prompt: str, seed: int) -> list[int]:
        return ask(server, name, prompt, LENGTH, temperature=1, seed=seed).token_ids

    for seed in range(5):
        prompt = f"{seed} is the seed. {PROMPTS[0]}"
        before = count(server, "prefix_cache_hits")
        first = sample("first", prompt, seed)
        assert count(server, "prefix_cache_hits") == before
        assert sample("first", prompt, seed) == first
        assert count(server, "prefix_cache_hits") > before
        assert sample("second", prompt, seed) != first
        assert sample("first", prompt, seed + 1) != first


def test_structured_output_is_the_adapters_own(server, models):
    """Of words with different first letters the likeliest first letter decides."""
    words = [letter + "_word" for letter in "abcdefghijklmnopqrst"]
    schema = {
        "type": "object",
        "properties": {"word": {"enum": words}, "sure": {"type": "boolean"}},
        "required": ["word", "sure"],
        "additionalProperties": False,
    }
    letters = [
        server.post("/tokenize", model="base", prompt=word[0]).json()["tokens"][0] for word in words
    ]

    def choose(name: str) -> str:
        choice = {"structured_outputs": {"choice": words}, "ignore_eos": False}
        return ask(server, name, PROMPTS[0], LENGTH, **choice).text

    def fill_in(name: str) -> str:
        reply = server.client.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": PROMPTS[1]}],
            max_tokens=100,
            temperature=0,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "word", "schema": schema, "strict": True},
            },
        )
        return reply.choices[0].message.content

    alone = {name: (choose(name), fill_in(name)) for name in models}
    with ThreadPoolExecutor(2 * len(models)) as pool:
        chosen, filled_in = pool.map(choose, models), pool.map(fill_in, models)
        assert list(zip(chosen, filled_in, strict=True)) == list(alone.values())
    prompt = ask(server, "base", PROMPTS[0], 1).prompt_token_ids
    for name, (word, text) in alone.items():
        with torch.inference_mode():
            logits = models[name](torch.tensor([prompt])).logits[0, -1, letters]
        assert word == words[int(logits.argmax())], name
        value = json.loads(text)
        assert value.keys() == {"word", "sure"}
        assert value["word"] in words
        assert isinstance(value["sure"], bool)
    assert len({word for word, _ in alone.values()}) > 1
    assert len({text for _, text in alone.values()}) > 1


def test_blocks_belong_to_weights_whatever_these_are_called(server, adapters):
    """And /metrics have the names that clients use."""
    prompt = "Once more. " + PREFIX

    def hits(name: str) -> float:
        before = count(server, "prefix_cache_hits")
        ask(server, name, prompt, LENGTH)
        return count(server, "prefix_cache_hits") - before

    assert server.put("turning", adapters["second"]).ok
    assert [hits("turning") > 0 for _ in range(2)] == [False, True]
    assert server.put("turning", adapters["first"]).ok
    assert [hits("turning") > 0 for _ in range(2)] == [False, True]
    assert server.admin("POST", "/turning/rollback").ok
    assert hits("turning") > 0
    assert server.put("turning", adapters["second"]).ok  # what is served already
    assert server.put("team/other", adapters["second"]).ok
    assert hits("team/other") > 0
    assert text_of(server, "turning", prompt) == text_of(server, "second", prompt)
    metrics = requests.get(f"{server.url}/metrics", timeout=30).text
    running = set(re.findall(r'vllm:lora_requests_info{.*running_lora_adapters="(.*?)"', metrics))
    assert {"turning", "team/other"} <= running
    assert "@" not in "".join(running)
    for name in ("turning", "team/other"):
        assert server.admin("DELETE", f"/{name}").ok


def test_the_load_of_experts_is_sampled_in_compiled_mode(server, tiny_model, adapters):
    assert server.load("sampled", adapters["first"]).ok
    prompt, found = first_sampled(server, "sampled", PREFIX[:60])  # one chunk
    check_load(found, expected_load(tiny_model, adapters["first"], prompt), len(prompt))
