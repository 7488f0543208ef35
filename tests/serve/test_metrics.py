"""/metrics and /v1/adapters/{name}/load: what they say of known requests is exact."""

from __future__ import annotations

import re
import shutil
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file

from guilomo_serve.adapter import CONFIG_FILE, WEIGHTS_FILE
from guilomo_serve.server.prometheus import BASE, MOST, Series
from tests.serve.expert_load import check_load, expected_load, first_sampled, load_of
from tests.serve.helpers import Server, eventually, paused, text_of

pytestmark = pytest.mark.slow

# 43 tokens, so that all are sampled, beside another adapter's too.
PROMPT = "A customer writes: my card has not arrived."
SAMPLED = 128  # tokens of a step, at most
DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana.json"
ALERTS = DASHBOARD.with_name("prometheus_rules.yaml")


class Scrape:
    """The samples of one scrape."""

    def __init__(self, server: Server) -> None:
        self.text = requests.get(f"{server.url}/metrics", timeout=30).text
        self.samples = [s for f in text_string_to_metric_families(self.text) for s in f.samples]

    def __call__(self, name: str, **labels: str) -> float | None:
        """A sample by its name and all of its labels; None if there is none."""
        found = [
            s.value for s in self.samples if s.name == f"guilomo_{name}" and s.labels == labels
        ]
        assert len(found) < 2
        return found[0] if found else None

    def of(self, adapter: str) -> dict[str, float]:
        """All that requests of an adapter move: sample, with its outcome if it has one -> value."""
        names = (
            *("requests_total", "engine_requests_total"),
            *("prompt_tokens_total", "generated_tokens_total"),
            *("time_to_first_token_seconds_count", "request_seconds_count"),
        )
        return {
            f"{s.name} {s.labels.get('outcome', '')}".strip().removeprefix("guilomo_"): s.value
            for s in self.samples
            if s.labels.get("adapter") == adapter and s.name.removeprefix("guilomo_") in names
        }


def moved(server: Server, adapter: str, before: dict[str, float]) -> dict[str, float]:
    """What has changed since, and by how much."""
    after = Scrape(server).of(adapter)
    return {name: value - before[name] for name, value in after.items() if value != before[name]}


@pytest.fixture
def adapter(opened, root, request) -> str:
    """The name of a fresh adapter, the first of these tests' two."""
    name = re.sub(r"\W|_", "-", request.node.name).strip("-")
    answer = opened.put(name, root / "first")
    assert answer.status_code == 200, answer.text
    return name


def requests_of_every_kind(server: Server, model: str) -> tuple[int, int, int, int]:
    """Asks in the ways that count differently; how many requests that is, of ours and of the
    engine's, and how many tokens by usage."""
    whole = {"model": model, "temperature": 0.7, "seed": 0, "extra_body": {"ignore_eos": True}}
    completions = server.client.completions
    answers = [
        completions.create(prompt=PROMPT, max_tokens=5, **whole),
        completions.create(prompt=PROMPT, max_tokens=4, n=3, **whole),
        completions.create(prompt=[PROMPT, "Why?"], max_tokens=2, **whole),
    ]
    # A text that the answer has is where it stops.
    text = completions.create(prompt=PROMPT, max_tokens=12, **whole).choices[0].text
    stopped = completions.create(prompt=PROMPT, max_tokens=12, stop=[text[4:6]], **whole)
    assert stopped.choices[0].finish_reason == "stop"
    usage = [answer.usage for answer in (*answers, stopped)]
    stream = server.client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=7,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    usage += [chunk.usage for chunk in stream if chunk.usage is not None]
    prompts, generated = len(PROMPT), 12  # those of `text`
    prompts += sum(of.prompt_tokens for of in usage)
    generated += sum(of.completion_tokens for of in usage)
    return 6, 7, prompts, generated


@pytest.mark.parametrize("name", ["base", "adapter"])
def test_requests_and_tokens_are_counted_as_in_their_usage(opened, adapter, name):
    asked, other = ("base", adapter) if name == "base" else (adapter, "base")
    before = Scrape(opened)
    count, of_engine, prompts, generated = requests_of_every_kind(opened, asked)
    assert moved(opened, asked, before.of(asked)) == {
        "requests_total finished": count,
        "engine_requests_total finished": of_engine,
        "prompt_tokens_total": prompts,
        "generated_tokens_total": generated,
        "time_to_first_token_seconds_count": count,
        "request_seconds_count": count,
    }
    assert moved(opened, other, before.of(other)) == {}
    after = Scrape(opened)
    first, whole = (
        after(f"{of}_seconds_sum", adapter=asked) for of in ("time_to_first_token", "request")
    )
    assert 0 < first < whole
    assert "vllm:request_success_total" in after.text
    assert "vllm:lora_requests_info" in after.text


def test_a_beam_search_is_one_request_of_many_of_the_engine(opened, adapter):
    before = Scrape(opened).of(adapter)
    settings = {"max_tokens": 4, "n": 2, "extra_body": {"use_beam_search": True}}
    opened.client.completions.create(model=adapter, prompt=PROMPT, **settings)
    found = moved(opened, adapter, before)
    assert found["requests_total finished"] == found["request_seconds_count"] == 1
    assert found["time_to_first_token_seconds_count"] == 1
    assert found["engine_requests_total finished"] > 4


def test_a_client_that_goes_away_is_an_aborted_request(opened, adapter):
    """One request each, however many answers it asks for; no token of theirs has come."""
    before = Scrape(opened).of(adapter)
    settings = {"model": adapter, "prompt": PROMPT, "max_tokens": 400, "stream": True}
    with paused(opened):
        streams = [opened.client.completions.create(**settings, n=n) for n in (1, 2)]
        eventually(lambda: opened.in_flight(adapter) == 2, "they run")
        for stream in streams:
            stream.close()
        eventually(lambda: opened.in_flight(adapter) == 0, "they are aborted")
    assert moved(opened, adapter, before) == {
        "requests_total aborted": 2,
        "engine_requests_total aborted": 2,
    }


def test_an_aborted_request_has_read_its_prompt_once_there_is_a_token(opened, adapter):
    """An engine that has ended the answers before they could be stopped is asked again."""
    answers, length = 8, 400

    def abort() -> dict[str, float] | None:
        before = Scrape(opened).of(adapter)
        stream = opened.client.completions.create(
            model=adapter,
            prompt=PROMPT,
            max_tokens=length,
            n=answers,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(stream)
        with paused(opened):
            time.sleep(0.5)  # for what the worker had sent
            stream.close()
            eventually(lambda: opened.in_flight(adapter) == 0, "it is aborted")
        found = moved(opened, adapter, before)
        return found if "engine_requests_total aborted" in found else None

    found = eventually(abort, "the engine is stopped")
    assert 0 < found.pop("generated_tokens_total") < answers * length
    assert found == {
        "requests_total aborted": 1,
        "engine_requests_total aborted": 1,
        "prompt_tokens_total": len(PROMPT),
        "time_to_first_token_seconds_count": 1,
    }


def test_what_is_refused_before_the_engine_counts_for_known_adapters(opened, adapter):
    before = Scrape(opened).of(adapter)
    for prompt, settings in (("x" * 600, {}), (PROMPT, {"logprobs": 10**6})):
        with pytest.raises(openai.BadRequestError):
            opened.client.completions.create(model=adapter, prompt=prompt, max_tokens=1, **settings)
    assert moved(opened, adapter, before) == {"requests_total refused": 2}
    with pytest.raises(openai.NotFoundError):
        text_of(opened, "an-unknown-name", PROMPT)
    assert opened.put(adapter, "/no/such/folder").status_code in (403, 404)  # no request of a model
    assert moved(opened, adapter, before) == {"requests_total refused": 2}
    assert "an-unknown-name" not in Scrape(opened).text


def bytes_of(folder: Path) -> int:
    """The file's tensors in float32, as the model's, and two numbers for each rank row."""
    tensors = load_file(folder / WEIGHTS_FILE)
    rows = sum(len(t) for name, t in tensors.items() if "lora_A" in name)
    return sum(t.numel() * 4 for t in tensors.values()) + 8 * rows


def test_swaps_loads_and_resident_bytes(opened, adapter, root):
    eventually(
        lambda: Scrape(opened)("resident_bytes", adapter=adapter) == bytes_of(root / "first"),
        "the weights have their size",
        40,
    )
    before = scrape = Scrape(opened)
    assert scrape("loads_total", adapter=adapter) == 1
    assert scrape("swaps_total", adapter=adapter) == 0

    assert opened.put(adapter, root / "second", dry_run=True).status_code == 200
    bad = shutil.copytree(root / "second", root / f"bad-{adapter}")
    (bad / CONFIG_FILE).write_text("{}")
    assert opened.put(adapter, bad).status_code == 400
    assert Scrape(opened)("swaps_total", adapter=adapter) == 0
    assert opened.put(adapter, root / "second").status_code == 200
    assert opened.admin("POST", f"/{adapter}/rollback").status_code == 200
    assert opened.put(adapter, root / "second").status_code == 200
    scrape = Scrape(opened)
    assert scrape("loads_total", adapter=adapter) == 4
    assert scrape("swaps_total", adapter=adapter) == 3
    assert scrape("swap_seconds_count") - before("swap_seconds_count") == 3
    assert scrape("swap_seconds_sum") > before("swap_seconds_sum")
    eventually(
        lambda: Scrape(opened)("resident_bytes", adapter=adapter) == bytes_of(root / "second"),
        "old versions are freed",
        40,
    )


def loaded(server: Server, name: str) -> dict[str, str] | None:
    """What routers read of an adapter; None if it is not in memory."""
    found = [
        s.labels
        for s in Scrape(server).samples
        if s.name == "vllm:lora_adapter_loaded" and s.labels["adapter_name"] == name
    ]
    assert len(found) < 2
    return found[0] if found else None


def test_routers_see_what_is_in_memory(opened, adapter, root):
    """As llm-d's router reads it: also of an adapter that nobody has asked for yet."""
    rank = max(map(sum, opened.admin("GET", f"/{adapter}").json()["allocation"].values()))
    about = {"adapter_name": adapter, "level": "gpu", "pinned": "false", "rank": str(rank)}
    eventually(lambda: loaded(opened, adapter) == about, "it is in a slot")
    assert opened.admin("POST", f"/{adapter}/pin").status_code == 200
    assert loaded(opened, adapter) == {**about, "pinned": "true"}
    # Each that is loaded gets a slot, and keeps it; sixteen may be in a batch.
    names = [f"{adapter}-{i}" for i in range(16)]
    for name in names:
        assert opened.put(name, root / "first").status_code == 200
    for name in names:
        eventually(lambda name=name: loaded(opened, name) == about | {"adapter_name": name}, name)
    assert loaded(opened, adapter) == {**about, "pinned": "true"}
    for name in (*names, adapter):
        assert opened.admin("DELETE", f"/{name}").status_code == 200
    assert loaded(opened, adapter) is None


def test_the_series_of_a_deleted_adapter_go_for_good(opened, adapter):
    text_of(opened, adapter, PROMPT)
    assert f'adapter="{adapter}"' in Scrape(opened).text
    stream = opened.client.completions.create(
        model=adapter,
        prompt=PROMPT,
        max_tokens=450,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(stream)
    assert opened.admin("DELETE", f"/{adapter}").status_code == 200
    assert f'adapter="{adapter}"' not in Scrape(opened).text
    assert len(list(stream)) > 200  # it finishes, and nothing of it comes back
    after = Scrape(opened)
    assert not [s for s in after.samples if s.labels.get("adapter") == adapter]


def test_no_adapter_is_called_as_the_base_model_is_in_metrics(opened, root):
    answer = opened.put("base", root / "first")
    assert answer.status_code == 400


def test_the_load_of_experts_is_what_routers_do_in_transformers(opened, adapter, root, tiny_model):
    """One prompt again and again, in batches with the base and another adapter."""
    version = opened.admin("GET", f"/{adapter}").json()["version"]
    nothing = {"name": adapter, "version": version, "tokens": 0, "modules": {}}
    assert load_of(opened, adapter) == nothing
    opened.put("other", root / "second")

    def ask(model: str) -> None:
        prompt = PROMPT if model == adapter else "Something else, for all others that ask."
        text_of(opened, model, prompt, 1)

    def sampled() -> dict | None:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(ask, ("base", adapter, "other")))
        found = load_of(opened, adapter)
        return found if found["tokens"] > len(PROMPT) else None

    found = eventually(sampled, "something is sampled", 40)
    expected = expected_load(tiny_model, root / "first", PROMPT)
    assert len(expected) > 5
    assert found["tokens"] % len(PROMPT) == 0
    assert (found["name"], found["version"]) == (adapter, version)
    check_load(found, expected, found["tokens"])
    assert set(found["modules"]) <= set(opened.admin("GET", f"/{adapter}").json()["allocation"])

    time.sleep(1.1)  # /metrics does not ask the engine more often than each second
    scrape = Scrape(opened)
    modules = found["modules"].values()
    entropy = statistics.mean(of_module["entropy"] for of_module in modules)
    assert scrape("routing_entropy", adapter=adapter) == pytest.approx(entropy)
    imbalance = statistics.mean(max(m["share"]) * len(m["share"]) for m in modules)
    assert scrape("routing_imbalance", adapter=adapter) == pytest.approx(imbalance)
    assert "guilomo_expert_load{" not in scrape.text

    # A new version begins from zero; an adapter without routers has no load.
    version = opened.put(adapter, root / "second").json()["version"]
    assert load_of(opened, adapter) == {**nothing, "version": version}
    ask("given")
    assert load_of(opened, "given")["modules"] == {}
    assert opened.admin("GET", "/nobody/load").status_code == 404


def test_of_a_long_prompt_some_tokens_are_sampled_all_over_it(opened, adapter, root, tiny_model):
    prompt, found = first_sampled(opened, adapter, 5 * PROMPT)
    places = [i * len(prompt) // SAMPLED for i in range(SAMPLED)]
    expected = expected_load(tiny_model, root / "first", prompt, places)
    check_load(found, expected, SAMPLED)


def test_each_expert_is_in_metrics_if_that_is_wanted(server_with_everything):
    _, found = first_sampled(server_with_everything, "first", PROMPT)
    time.sleep(1.1)
    scrape = Scrape(server_with_everything)
    for module, of_module in found["modules"].items():
        for expert, share in enumerate(of_module["share"]):
            labels = {"adapter": "first", "module": module, "expert": str(expert)}
            assert scrape("expert_load", **labels) == pytest.approx(share)


def test_only_the_adapters_used_last_have_series():
    series, names = Series(), [f"a{i}" for i in range(MOST + 50)]
    series.exists = names.__contains__
    series.of(BASE).loads += 1
    for name in names:
        series.of(name).loads += 1
        series.of(names[0]).loads += 1
    series.of("made-up").loads += 1
    kept = dict(series.all())
    assert kept.keys() == {BASE, names[0], *names[-(MOST - 2) :]}
    assert kept[names[0]].loads == 1 + len(names)
    assert series.others.loads == len(names) - (MOST - 1)
    series.forget(names[-1])
    assert series.others.loads == len(names) - (MOST - 1) + 1
    series.exists = lambda name: False
    series.of(names[-1]).loads += 1
    assert names[-1] not in dict(series.all())


@pytest.mark.parametrize("file", [DASHBOARD, ALERTS], ids=("dashboard", "alerts"))
def test_what_is_asked_of_prometheus_is_there(opened, adapter, file):
    first_sampled(opened, adapter, PROMPT)
    time.sleep(1.1)
    names = {sample.name for sample in Scrape(opened).samples}
    asked = set(re.findall(r"\b(?:guilomo_|vllm:)\w+", file.read_text()))
    assert len(asked) > 6
    assert asked <= names | {"guilomo_expert_load"}  # of --expert-load modules


def test_an_eviction_is_counted(restarted):
    eventually(
        lambda: Scrape(restarted)("evictions_total", adapter="given"),
        "an idle adapter is evicted",
        40,
    )
