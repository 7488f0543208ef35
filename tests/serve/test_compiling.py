"""After the start no request waits for a compiler: torch says in the log what it compiles."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.helpers import Server

pytestmark = pytest.mark.slow

PROMPT = "My card has not arrived."
ASKED: tuple[dict[str, Any], ...] = (
    {"logprobs": 3},
    {"prompt_logprobs": 2},
    {"logprobs": 1, "echo": True},
    {"temperature": 1, "top_k": 5, "top_p": 0.9, "seed": 1},
    {"temperature": 1, "top_p": 0.5, "logprobs": 2},
    {"temperature": 1, "n": 3},
    {"presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 1.2},
    {"bad_words": ["a"], "stop": ["z"]},
    {"use_beam_search": True, "n": 2},
    {"structured_outputs": {"regex": "[a-c]{3}"}},
    {"structured_outputs": {"grammar": 'root ::= "yes" | "no"'}},
)
# vLLM takes these without drafts alone.
WITHOUT_DRAFTS: tuple[dict[str, Any], ...] = (
    {"temperature": 1, "min_p": 0.1},
    {"logit_bias": {"65": 5}},
    {"min_tokens": 3},
)


def check(server: Server, asked: tuple[dict[str, Any], ...]) -> None:
    for name in ("base", "first"):
        for settings in asked:
            body = {"model": name, "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
            answer = server.post("/v1/completions", **{**body, **settings})
            assert answer.status_code == 200, (settings, answer.text)
    started, _, later = server.log.read_text().partition("Application startup complete")
    assert "TRACED GRAPH" in started
    assert "sample/ops/logprobs.py" in started  # what the first logprobs would wait for
    assert "TRACED GRAPH" not in later


def test_with_the_model_compiled_and_drafts(server_with_everything):
    check(server_with_everything, ASKED)


def test_in_eager_mode(opened):
    check(opened, (*ASKED, *WITHOUT_DRAFTS))
