"""/openapi.json says what our routes answer: tried with requests that it allows, and others."""

from __future__ import annotations

from collections import Counter

import hypothesis
import pytest
import requests
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

pytestmark = pytest.mark.slow

CHECKS = [
    *(not_a_server_error, status_code_conformance, content_type_conformance),
    *(response_schema_conformance, negative_data_rejection),
]
NAMES, SOURCES = ("described-a", "described-b"), ("first", "plain", "nothing-there")
SETTINGS = hypothesis.settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


@pytest.fixture
def described(restarted):
    return describe(restarted)


def describe(restarted, only_known: bool = True):
    """Our routes, as the server describes them; `only_known`: with names and folders there are."""
    document = requests.get(f"{restarted.url}/openapi.json", timeout=30).json()
    ours = {
        path: operations
        for path, operations in document["paths"].items()
        if path.startswith(("/v1/adapters", "/ready"))
    }
    assert len(ours) == 7
    for operations in ours.values():
        for operation in operations.values():
            assert "422" not in operation["responses"]  # FastAPI's, which vLLM makes a 400 of
            for parameter in operation.get("parameters", ()) if only_known else ():
                parameter["schema"]["enum"] = [*NAMES, "nobody"]
    document["paths"] = ours
    if only_known:
        document["components"]["schemas"]["PutBody"]["properties"]["source"]["enum"] = [*SOURCES]
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=restarted.url)
    return schema


@pytest.fixture
def key(restarted):
    return {"Authorization": f"Bearer {restarted.admin_key}"}


def test_good_answers_are_as_described(described, key):
    one = "/v1/adapters/{name}"
    for path, method, body, status in (
        (one, "PUT", {"source": "first", "dry_run": True}, 200),
        (one, "PUT", {"source": "first"}, 200),
        (one, "PUT", {"source": "plain", "dry_run": False}, 200),
        (one, "GET", None, 200),
        ("/v1/adapters", "GET", None, 200),
        (f"{one}/rollback", "POST", None, 200),
        (f"{one}/pin", "POST", None, 200),
        (f"{one}/unpin", "POST", None, 200),
        (one, "DELETE", None, 200),
        (one, "GET", None, 404),
        ("/ready", "GET", None, 200),
    ):
        case = described[path][method].Case(
            path_parameters={"name": NAMES[0]} if "{" in path else None,
            body=schemathesis.core.NOT_SET if body is None else body,
            media_type=None if body is None else "application/json",
        )
        answer = case.call_and_validate(headers=key, checks=CHECKS)
        assert answer.status_code == status, (path, method, answer.text)


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_answers_are_as_described(restarted, key, mode):
    # What is negative must be so to the server: another name than those is none of its errors.
    described = describe(restarted, only_known=mode is GenerationMode.POSITIVE)
    statuses: Counter[tuple[str, int]] = Counter()

    def ask(case: schemathesis.Case) -> None:
        answer = case.call_and_validate(headers=key, checks=CHECKS)
        statuses[case.operation.label, answer.status_code] += 1

    for found in described.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not operation.path_parameters:
            continue  # it has nothing that could be wrong
        SETTINGS(hypothesis.given(operation.as_strategy(generation_mode=mode))(ask))()
    put = "PUT /v1/adapters/{name}"
    assert statuses[put, 200 if mode is GenerationMode.POSITIVE else 400] > 0, statuses


def test_unknown_paths_and_methods_are_errors_of_the_same_form(restarted, key):
    for method, path, status in (
        ("PATCH", "/v1/adapters", 405),
        ("POST", "/v1/adapters/target", 405),
        ("GET", "/v1/adapters/target/nothing", 404),
        ("PUT", "/ready", 405),
    ):
        answer = requests.request(method, f"{restarted.url}{path}", headers=key, timeout=30)
        assert answer.status_code == status, (method, path, answer.text)
        assert answer.json()["error"]["code"] == status
        assert ("Allow" in answer.headers) == (status == 405)
    answer = requests.put(f"{restarted.url}/v1/adapters/target", data="{", headers=key, timeout=30)
    assert answer.json()["error"]["code"] == answer.status_code == 400
    assert requests.get(f"{restarted.url}/v1/adapters", timeout=30).json()["error"]["code"] == 401
    assert requests.get(f"{restarted.url}/unknown", timeout=30).json() == {"detail": "Not Found"}
