"""A request's `model` in all routes that take one, and which names adapters can have."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from typing import Any

import openai
import pytest
import requests

from guilomo_serve.adapter import AdapterError
from guilomo_serve.catalogue import check_name, command
from guilomo_serve.server.managed import Refused
from tests.serve.helpers import Server, text_of

slow = pytest.mark.slow

PROMPT = "My card has not arrived."
TOKENS = list(PROMPT.encode())
MESSAGES = [{"role": "user", "content": PROMPT}]
GREEDY = {"max_tokens": 12, "temperature": 0}
GENERATED = {"request_id": "r", "choices": [{"index": 0, "token_ids": TOKENS}]}
# Route -> a body, without the model. Those of the first kind compute with it; the others only have
# to know its name.
COMPUTING: Mapping[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": PROMPT, **GREEDY},
    "/v1/chat/completions": {"messages": MESSAGES, **GREEDY},
    "/v1/chat/completions/batch": {"messages": [MESSAGES, MESSAGES], **GREEDY},
    "/v1/messages": {"messages": MESSAGES, **GREEDY},
    "/v1/responses": {"input": PROMPT, "max_output_tokens": 12, "temperature": 0},
    "/generative_scoring": {"query": PROMPT, "items": ["a", "b"], "label_token_ids": [65, 66]},
    "/inference/v1/generate": {"token_ids": TOKENS, "sampling_params": GREEDY},
    "/invocations": {"prompt": PROMPT, **GREEDY},
}
NAMING: Mapping[str, dict[str, Any]] = {
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/tokenize": {"prompt": PROMPT},
    "/detokenize": {"tokens": TOKENS},
    "/v1/completions/render": {"prompt": PROMPT, **GREEDY},
    "/v1/chat/completions/render": {"messages": MESSAGES, **GREEDY},
    "/v1/messages/render": {"messages": MESSAGES, **GREEDY},
    "/v1/responses/render": {"input": PROMPT},
    "/v1/completions/derender": {"generate_responses": [GENERATED]},
    "/v1/chat/completions/derender": {"generate_response": GENERATED},
}
# For other kinds of models; this one answers 501 whatever it is asked.
OTHERS = {"/v1/systemone"}
# What differs from one answer to the next.
PASSING = re.compile(r'"(?:id|created|created_at|completed_at|request_id|model)":\s*[^,}]+')


def ask(server: Server, path: str, model: str, **headers: str) -> requests.Response:
    body = {**COMPUTING, **NAMING}[path]
    return requests.post(
        f"{server.url}{path}", json={**body, "model": model}, headers=headers, timeout=120
    )


@slow
def test_every_route_that_takes_a_model_applies_it_or_refuses_it(opened):
    schema = requests.get(f"{opened.url}/openapi.json", timeout=30).json()
    components = schema["components"]["schemas"]

    def takes_a_model(content: Any) -> bool:
        if isinstance(content, dict):
            reference = content.get("$ref", "").rpartition("/")[2]
            if "model" in content.get("properties", {}):
                return True
            parts = [components[reference]] if reference else []
            return any(map(takes_a_model, [*parts, *content.get("anyOf", [])]))
        return False

    taking = {
        path
        for path, operations in schema["paths"].items()
        for operation in operations.values()
        for content in operation.get("requestBody", {}).get("content", {}).values()
        if takes_a_model(content["schema"])
    }
    # It reads its body by itself.
    assert taking | {"/invocations"} == {*COMPUTING, *NAMING, *OTHERS}

    assert text_of(opened, "first", PROMPT) != text_of(opened, "base", PROMPT)
    for path in (*COMPUTING, *NAMING):
        unknown = ask(opened, path, "nobody-has-this")
        assert unknown.status_code == 404, (path, unknown.text)
        assert "nobody-has-this" in unknown.text, path
        answers = []
        for model in ("base", "first", "second"):
            answer = ask(opened, path, model)
            assert answer.status_code == 200, (path, model, answer.text)
            answers.append(PASSING.sub("", answer.text))
        if path in COMPUTING:
            assert len(set(answers)) == 3, (path, answers)


@slow
def test_invocations_takes_the_name_of_the_header_too(opened):
    """By which its cloud names an adapter; the body may name the base, or no model at all."""
    header = {"X-Amzn-SageMaker-Adapter-Identifier": "first"}
    url, body = f"{opened.url}/invocations", COMPUTING["/invocations"]
    wanted = text_of(opened, "first", PROMPT)
    for model in ({}, {"model": "base"}, {"model": "first"}):
        answer = requests.post(url, json={**body, **model}, headers=header, timeout=60)
        assert answer.json()["choices"][0]["text"] == wanted, model
    refused = requests.post(url, json={**body, "model": "second"}, headers=header, timeout=60)
    assert refused.status_code == 400
    assert "name one" in refused.text
    for bad in (b"{", b"[]", b'"model"'):
        answer = requests.post(
            url, data=bad, headers={"Content-Type": "application/json", **header}, timeout=60
        )
        assert answer.status_code == 400, (bad, answer.text)


@slow
def test_an_unknown_name_is_answered_with_those_like_it(opened):
    text_of(opened, "second", PROMPT)
    with pytest.raises(openai.NotFoundError) as refused:
        text_of(opened, "secand", PROMPT)
    assert "The model `secand` does not exist. Did you mean `second`?" in str(refused.value)
    assert refused.value.param == "model"
    with pytest.raises(openai.NotFoundError) as refused:
        text_of(opened, "0123456789", PROMPT)
    assert "Did you mean" not in str(refused.value)


@slow
def test_a_name_in_use_is_refused_in_vllms_words(opened, root):
    text_of(opened, "second", PROMPT)
    refused = opened.load("second", root / "first")
    assert refused.status_code == 400
    assert "has already been loaded" in refused.json()["error"]["message"]


@slow
def test_a_name_may_have_slashes(opened, root, capsys):
    """As names on the Hub have; put, asked for, rolled back and taken away, and in a root."""
    text = text_of(opened, "first", PROMPT)
    assert command.main(["put", "team/support", str(root / "first"), "--url", opened.url]) == 0
    assert text_of(opened, "team/support", PROMPT) == text
    assert opened.put("team%2Fsupport", root / "second").json()["name"] == "team/support"
    for action in ("rollback", "pin", "unpin"):
        assert opened.admin("POST", f"/team/support/{action}").json()["name"] == "team/support"
    assert opened.admin("GET", "/team/support/load").json()["name"] == "team/support"
    assert text_of(opened, "team/support", PROMPT) == text
    assert opened.unload("team/support").ok
    shutil.copytree(root / "first", root / "group" / "inner")
    assert text_of(opened, "group/inner", PROMPT) == text
    assert opened.admin("DELETE", "/group/inner").json() == {"name": "group/inner", "deleted": True}
    for name in ("group/../first", "group//inner", "/group/inner", "group/inner/", "group/./inner"):
        with pytest.raises(openai.APIStatusError) as refused:
            text_of(opened, name, PROMPT)
        assert refused.value.status_code in (400, 404), name


def test_names_are_checked():
    for name in ("a", "a.b:c-d_1", "org/name", "a/b/c", "load", "pin", 128 * "a"):
        check_name(name)
    for name in ("", "/", "a/", "/a", "a//b", "..", "a/..", "a/.b", ".a", "a@1", "a b", "ä", "a\n"):
        with pytest.raises(AdapterError, match="cannot be served: expected"):
            check_name(name)
    for name in ("a/load", "a/b/pin"):
        with pytest.raises(AdapterError, match="its last part is a route's"):
            check_name(name)


def test_names_that_were_refused_are_few_in_memory():
    refused = Refused()
    for n in range(3000):
        refused.note(f"name-{n}", AdapterError(str(n)))
    assert len(refused) <= 1000
    refused.check("name-0")
    with pytest.raises(AdapterError, match="2999"):
        refused.check("name-2999")
