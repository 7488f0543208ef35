"""Adapters behind HTTP give what they give in transformers, alone, mixed, replaced or refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch

from guilomo_serve.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from guilomo_serve.catalogue import digest_of
from guilomo_serve.runtime import stops
from tests.serve import hf_reference
from tests.serve.helpers import (
    SPARSE,
    Server,
    ask,
    eventually,
    guilomo_serve,
    leased,
    paused,
    random_adapter,
    random_lora,
    serving,
    stream,
    text_of,
    text_of_stream,
)

pytestmark = pytest.mark.slow

PROMPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "A customer writes: my card has not arrived, it has been two weeks now!",
    "def fibonacci(n):\n    return n if n < 2 else",
)
TOKENS = 12
# vLLM would make bfloat16 of it by itself.
TINY = ("--dtype", "float32", "--served-model-name", "base")
FLOAT32_TOLERANCE = 2e-3  # nats; the same sums in another order, through a softmax


@pytest.fixture(scope="module")
def server(tiny_model, adapters, tmp_path_factory):
    """Our server in eager mode with all three adapters, that samples nothing."""
    log = tmp_path_factory.mktemp("log") / "eager.log"
    flags = ("--enforce-eager", "--expert-load", "off", *TINY)
    command = guilomo_serve(tiny_model, adapters, *flags)
    with serving(command, log) as running:
        yield running


def complete(server: Server, model: str, prompt: str) -> tuple[list[int], torch.Tensor]:
    """Tokens of prompt and greedy completion, and the log-probability of all but the first."""
    choice = ask(server, model, prompt, TOKENS, logprobs=0, prompt_logprobs=0)
    scored = choice.prompt_logprobs[1:]
    of_prompt = [
        next(v["logprob"] for k, v in entry.items() if int(k) == token)
        for token, entry in zip(choice.prompt_token_ids[1:], scored, strict=True)
    ]
    tokens = [*choice.prompt_token_ids, *choice.token_ids]
    return tokens, torch.tensor(of_prompt + choice.logprobs.token_logprobs)


def check_against_hf(server, base, adapters, tolerance):
    for name, folder in {"base": None, **adapters}.items():
        model = hf_reference.model_with(base, folder)
        for prompt in PROMPTS:
            tokens, served = complete(server, name, prompt)
            expected = hf_reference.logprobs(model, tokens)
            assert (served - expected).abs().max() < tolerance, (name, prompt)


def test_logprobs_are_those_of_transformers(server, tiny_model, adapters):
    check_against_hf(server, tiny_model, adapters, FLOAT32_TOLERANCE)


def test_adapters_change_the_answer(server, adapters):
    """Or the comparisons of this file would hold for a server that ignores adapters."""
    answers = [text_of(server, name, PROMPTS[0]) for name in ("base", *adapters)]
    assert len(set(answers)) == len(answers)


def check_mixed(server, names):
    jobs = [(name, prompt) for prompt in PROMPTS for name in names]
    alone = [complete(server, *job) for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(lambda job: complete(server, *job), jobs))
    for job, (tokens, scores), (tokens_alone, scores_alone) in zip(
        jobs, together, alone, strict=True
    ):
        assert tokens == tokens_alone, job
        assert (scores - scores_alone).abs().max() < FLOAT32_TOLERANCE, job


def test_mixed_batch_gives_what_each_gives_alone(server, adapters):
    check_mixed(server, ("base", *adapters))


def test_an_adapter_of_few_modules_is_served_exactly_beside_others(
    server, tiny_model, adapters, sparse
):
    """Some of them with one expert and no router, and none in a whole layer of the model."""
    assert server.load("sparse", sparse).ok
    details = server.admin("GET", "/sparse").json()
    assert details["allocation"] == {module: list(ranks) for module, ranks in SPARSE.items()}
    assert (details["modules"], details["experts"], details["rank"]) == (4, 7, 22)
    check_against_hf(server, tiny_model, {"sparse": sparse}, FLOAT32_TOLERANCE)
    answers = {text_of(server, name, PROMPTS[0]) for name in ("base", "first", "sparse")}
    assert len(answers) == 3
    check_mixed(server, ("base", *adapters, "sparse"))
    assert server.unload("sparse").ok


def test_with_expert_load_off_nothing_is_sampled(server):
    for _ in range(4):
        text_of(server, "first", PROMPTS[0])
        time.sleep(0.5)
    answer = server.admin("GET", "/first/load").json()
    assert (answer["tokens"], answer["modules"]) == (0, {})


def test_models_and_streaming_chat(server, adapters):
    listed = {model.id: model for model in server.client.models.list().data}
    assert set(listed) >= {"base", *adapters}
    assert listed["first"].parent == "base"
    messages = [{"role": "user", "content": PROMPTS[1]}]
    settings = {"messages": messages, "max_tokens": 8, "temperature": 0}
    whole = server.client.chat.completions.create(model="first", **settings)
    chunks = list(server.client.chat.completions.create(model="first", stream=True, **settings))
    assert whole.model == "first"
    assert {chunk.model for chunk in chunks} == {"first"}
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert streamed == whole.choices[0].message.content


def test_a_stream_finishes_with_the_version_it_began_with(server, adapters, tmp_path):
    folder = tmp_path / "swapped"
    shutil.copytree(adapters["first"], folder)
    assert server.load("swapped", folder).ok
    prompt, length = 4 * PROMPTS[1], 200  # a prompt of two cache blocks: they could be stale
    old, new = (text_of(server, name, prompt, length) for name in ("first", "second"))

    # The very same folder with other contents: nothing but the version tells them apart.
    shutil.copytree(adapters["second"], folder, dirs_exist_ok=True)
    with ThreadPoolExecutor(1) as pool:
        with paused(server):
            chunks = stream(server, "swapped", prompt, length)
            eventually(lambda: server.in_flight("swapped") == 1, "it runs")
            swap = pool.submit(server.load, "swapped", folder, replace=True)
        assert swap.result().ok
    after = text_of(server, "swapped", prompt, length)
    assert text_of_stream(chunks) == old
    assert after == new
    assert server.unload("swapped").ok
    with pytest.raises(openai.NotFoundError):
        text_of(server, "swapped", PROMPTS[0])


def test_an_adapter_stops_at_its_own_stop_tokens(server, adapters, tmp_path):
    tokens = ask(server, "first", PROMPTS[0], TOKENS).token_ids
    stop = next(token for token in tokens[3:] if token not in tokens[:3])
    shutil.copytree(adapters["first"], tmp_path / "stopping")
    edit_config(tmp_path / "stopping", stop_token_ids=[stop])
    assert server.load("stopping", tmp_path / "stopping").ok
    answer = ask(server, "stopping", PROMPTS[0], TOKENS, ignore_eos=False)
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert answer.token_ids == tokens[: tokens.index(stop) + 1]
    assert ask(server, "stopping", PROMPTS[0], TOKENS, ignore_eos=True).token_ids == tokens
    others = ask(server, "first", PROMPTS[0], TOKENS, ignore_eos=False)
    assert others.token_ids == tokens
    beams = {"extra_body": {"use_beam_search": True}, "max_tokens": 4, "n": 2}
    for create, prompt in (
        (server.client.completions.create, {"prompt": PROMPTS[0]}),
        (server.client.chat.completions.create, {"messages": [{"role": "user", "content": "Hi"}]}),
    ):
        with pytest.raises(
            openai.BadRequestError, match=rf"answers end with the token ids \[{stop}"
        ):
            create(model="stopping", **prompt, **beams)
        assert len(create(model="first", **prompt, **beams).choices) == 2
    beams["extra_body"]["ignore_eos"] = True
    assert len(create(model="stopping", **prompt, **beams).choices) == 2
    edit_config(tmp_path / "stopping", stop_token_ids=[100_000])
    refused = server.load("stopping", tmp_path / "stopping", replace=True)
    assert refused.status_code == 400
    assert "stop_token_ids has 100000, expected less than" in refused.text
    assert server.unload("stopping").ok


def test_a_beam_search_of_vllms_own_class_is_refused_alike(adapters, tmp_path):
    from vllm import LLM
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import BeamSearchParams

    stops.install()
    shutil.copytree(adapters["first"], tmp_path / "stopping")
    edit_config(tmp_path / "stopping", stop_token_ids=[7])
    of_adapters = [None, LoRARequest("stopping", 2**30, str(tmp_path / "stopping"))]
    with pytest.raises(VLLMValidationError, match="answers end with the token ids \\[7\\]"):
        LLM.beam_search(None, ["a", "b"], BeamSearchParams(2, 4), of_adapters)


def test_an_unloaded_version_is_freed(server, adapters):
    assert server.load("passing", adapters["second"]).ok
    assert server.unload("passing").ok
    freed = "Adapter 'passing@"
    eventually(lambda: freed in server.log.read_text(), "the version is freed", 30)


def test_a_taken_name_needs_load_inplace(server, adapters):
    answer = server.load("first", adapters["second"])
    assert answer.status_code == 400
    assert "load_inplace" in answer.text
    assert server.load("base", adapters["second"], replace=True).status_code == 400


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def with_module(old: str, new: str):
    """Renames a module of an adapter."""

    def change(adapter: Adapter) -> Adapter:
        rename = lambda d: {k.replace(old, new): v for k, v in d.items()}  # noqa: E731
        spec = dataclasses.replace(adapter.spec, experts=rename(adapter.spec.experts))
        return Adapter(spec, rename(adapter.weights))

    return change


def unknown_layer(base: Path, folder: Path) -> str:
    random_adapter(base, folder, 4, change=with_module("layers.1.", "layers.7."))
    return "model.layers.7."


def other_base(base: Path, folder: Path) -> str:
    def change(adapter: Adapter) -> Adapter:
        other = dataclasses.replace(adapter.spec.base, vocab_size=9)
        return Adapter(dataclasses.replace(adapter.spec, base=other), adapter.weights)

    random_adapter(base, folder, 4, change=change)
    return "made for another base model"


def bias_of_ours(base: Path, folder: Path) -> str:
    random_adapter(base, folder, 4)
    edit_config(folder, bias="all")
    return "bias is 'all'"


def truncated(base: Path, folder: Path) -> str:
    random_adapter(base, folder, 4)
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-100])
    return "not a complete safetensors file"


def plain_with_bias(base: Path, folder: Path) -> str:
    random_lora(base, folder, 4)
    edit_config(folder, bias="all")
    return "bias is 'all', expected 'none'"


def plain_dora(base: Path, folder: Path) -> str:
    random_lora(base, folder, 4, use_dora=True)
    return "use_dora is True, expected that it is left out"


def plain_head(base: Path, folder: Path) -> str:
    random_lora(base, folder, 4, modules_to_save=["lm_head"])
    return "modules_to_save"


def plain_unknown_layer(base: Path, folder: Path) -> str:
    from safetensors.torch import load_file, save_file

    random_lora(base, folder, 4)
    path = folder / WEIGHTS_FILE
    tensors = {k.replace("layers.1.", "layers.7."): v for k, v in load_file(path).items()}
    save_file(tensors, path)
    return "model.layers.7."


def plain_of_another_width(base: Path, folder: Path) -> str:
    from safetensors.torch import load_file, save_file

    random_lora(base, folder, 4)
    path = folder / WEIGHTS_FILE
    save_file(
        {k: v[:, :-1].contiguous() if "lora_A" in k else v for k, v in load_file(path).items()},
        path,
    )
    return "has shape"


def another_method(base: Path, folder: Path) -> str:
    random_lora(base, folder, 4)
    edit_config(folder, peft_type="ADALORA")
    return "peft_type is 'ADALORA'"


@pytest.mark.parametrize(
    "spoil",
    [
        *(unknown_layer, other_base, bias_of_ours, truncated),
        *(plain_with_bias, plain_dora, plain_head, plain_unknown_layer),
        *(plain_of_another_width, another_method),
    ],
)
def test_what_would_not_be_applied_is_refused_with_the_reason(server, tiny_model, tmp_path, spoil):
    reason = spoil(tiny_model, tmp_path / "bad")
    answer = server.load("bad", tmp_path / "bad")
    assert answer.status_code == 400, answer.text
    assert reason in answer.json()["error"]["message"]
    with pytest.raises(openai.NotFoundError):
        text_of(server, "bad", PROMPTS[0])


def test_a_missing_folder_is_not_found(server, tmp_path):
    assert server.load("bad", tmp_path / "nothing").status_code == 404


def test_plain_vllm_serve_in_compiled_mode(tiny_model, adapters, tmp_path):
    """vLLM's own entry point, torch.compile, and the adapters named by its own flag."""
    modules = [f"{name}={folder}" for name, folder in adapters.items()]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(tiny_model), *TINY),
        *("--enable-lora", "--max-loras", "3", "--lora-modules", *modules),
        *("--max-cpu-loras", "3"),
        *("--max-model-len", "512", "--max-num-seqs", "16"),
    ]
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with serving(command, tmp_path / "compiled.log", environment) as server:
        assert "enforce_eager=False" in server.log.read_text()
        assert "Adapters may take" in server.log.read_text()
        check_against_hf(server, tiny_model, adapters, FLOAT32_TOLERANCE)
        check_mixed(server, ("base", *adapters))

        # An unloaded version goes when its last request has ended: what goes before is read again.
        folder, length = tmp_path / "passing", 200
        shutil.copytree(adapters["first"], folder)
        assert server.load("passing", folder).ok
        old = text_of(server, "passing", PROMPTS[0], length)
        with paused(server):
            chunks = stream(server, "passing", PROMPTS[0], length)
            assert server.unload("passing").ok
            shutil.copytree(adapters["second"], folder, dirs_exist_ok=True)
        assert text_of_stream(chunks) == old

        # A fourth adapter is in memory only while it is in use, and is read again when it is asked
        # for, if it is still what was loaded.
        fourth = shutil.copytree(adapters["second"], tmp_path / "fourth")
        assert server.load("fourth", fourth).ok
        check_mixed(server, (*adapters, "fourth"))
        text = text_of(server, "fourth", PROMPTS[0])
        for name in adapters:
            text_of(server, name, PROMPTS[0])
        listed = {model.id: model.digest for model in server.client.models.list().data}
        assert set(listed) == {"base", *adapters, "fourth"}
        assert listed["fourth"] == listed["second"] == digest_of(fourth)
        shutil.copytree(adapters["first"], fourth, dirs_exist_ok=True)
        with pytest.raises(openai.BadRequestError, match="are not those that were loaded"):
            text_of(server, "fourth", PROMPTS[0])
        shutil.copytree(adapters["second"], fourth, dirs_exist_ok=True)
        assert text_of(server, "fourth", PROMPTS[0]) == text
        assert server.unload("fourth").ok

        # What is slow to read holds up nobody: a file that nobody gets open for a while.
        slow = shutil.copytree(adapters["second"], tmp_path / "slow")
        with ThreadPoolExecutor(1) as pool, leased(slow / WEIGHTS_FILE) as wanted:
            loading = pool.submit(server.load, "slow", slow)
            eventually(wanted.is_set, "the adapter is read")
            assert text_of(server, "plain", PROMPTS[0])  # used last, so it is in memory
            assert not loading.done()
        # It had no digest before it was read, and has one now.
        assert "written while they were read" in loading.result().text

        # What is no file is refused, not waited for.
        pipe = tmp_path / "piped" / CONFIG_FILE
        pipe.parent.mkdir()
        os.mkfifo(pipe)
        refusal = server.load("piped", pipe.parent)
        assert refusal.status_code == 400
        assert "no plain file" in refusal.text


def test_bfloat16_model_is_as_close_to_transformers_as_its_base(small_model, tmp_path):
    """SmolLM2 in bfloat16: an adapter adds no error beyond the base model's own rounding."""
    folder = random_adapter(small_model, tmp_path / "adapter", seed=5, change=_quieter)
    flags = ("--dtype", "bfloat16", "--enforce-eager", "--served-model-name", "base")
    command = guilomo_serve(small_model, {"adapter": folder}, *flags)
    errors = {}
    with serving(command, tmp_path / "log") as server:
        for name, adapter in {"base": None, "adapter": folder}.items():
            model = hf_reference.model_with(small_model, adapter)
            differences = []
            for prompt in PROMPTS:
                tokens, served = complete(server, name, prompt)
                differences.append((served - hf_reference.logprobs(model, tokens)).abs())
            errors[name] = torch.cat(differences).mean().item()
    assert errors["base"] < 0.1
    assert errors["adapter"] < 2 * errors["base"] + 0.02, errors


def _quieter(adapter: Adapter) -> Adapter:
    """A trained adapter's effect: a tenth of the layer's output, not as much as it."""
    weights = {m: dataclasses.replace(w, lora_b=w.lora_b / 10) for m, w in adapter.weights.items()}
    return Adapter(adapter.spec, weights)
