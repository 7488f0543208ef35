"""A soak: requests at random over names that are loaded, replaced and unloaded at random.

Every greedy answer is compared with what the adapter gives alone in transformers, as the name was
understood while the request ran. GUILOMO_SOAK_SECONDS sets how long it goes on (default 15).
"""

from __future__ import annotations

import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import openai
import pytest

from tests.serve import hf_reference
from tests.serve.helpers import Server, random_adapter, random_lora

SECONDS = float(os.environ.get("GUILOMO_SOAK_SECONDS", "15"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(SECONDS + 300)]

ASKING = 6  # threads
NAMES = ("red", "green", "blue", "white")
LENGTH = 10
PROMPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "2 + 2 =",
    2 * "A customer writes: my card has not arrived, it has been two weeks now! ",
)


@dataclass
class Meanings:
    """Which adapter each name has stood for, by time; None is none."""

    log: dict[str, list[tuple[float, frozenset[str | None]]]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def set(self, name: str, *adapters: str | None) -> None:
        """From now on `name` stands for one of these."""
        with self.lock:
            self.log.setdefault(name, []).append((time.monotonic(), frozenset(adapters)))

    def now(self, name: str) -> str | None:
        with self.lock:
            (adapter,) = self.log[name][-1][1]
        return adapter

    def between(self, name: str, begin: float, end: float) -> set[str | None]:
        """All that it may have stood for in this time."""
        with self.lock:
            log = self.log[name]
            first = max(i for i, (since, _) in enumerate(log) if since <= begin)
            return {a for since, meant in log[first:] if since <= end for a in meant}


def test_every_answer_is_that_of_the_adapter_alone(
    server_with_everything: Server, tiny_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    server = server_with_everything
    folders = {
        **{f"moe{i}": random_adapter(tiny_model, tmp_path / f"moe{i}", 10 + i) for i in range(4)},
        "narrow": random_adapter(tiny_model, tmp_path / "narrow", 20, targets=("o_proj",)),
        "lora": random_lora(tiny_model, tmp_path / "lora", 21, r=16),
    }
    expected = expected_answers(server, tiny_model, {"base": None, **adapters, **folders})
    meanings = Meanings()
    for name in ("base", *adapters):
        meanings.set(name, name)
    for name in NAMES:
        meanings.set(name, None)

    until = time.monotonic() + SECONDS
    with ThreadPoolExecutor(ASKING + 1) as pool:
        changing = pool.submit(change, server, folders, meanings, until)
        asking = [
            pool.submit(keep_asking, server, seed, expected, meanings, until)
            for seed in range(ASKING)
        ]
        answered = sum(task.result() for task in asking)
        changes = changing.result()
    for name in NAMES:
        if meanings.now(name) is not None:
            assert server.post("/v1/unload_lora_adapter", lora_name=name).ok
    print(f"{answered} answers compared over {changes} changes in {SECONDS:.0f} s")
    assert answered > SECONDS
    assert changes > SECONDS / 5


def expected_answers(
    server: Server, base: Path, folders: dict[str, Path | None]
) -> dict[tuple[str, str], list[int]]:
    """(adapter, prompt) -> the greedy tokens of transformers."""
    tokens = {
        prompt: server.post("/tokenize", model="base", prompt=prompt).json()["tokens"]
        for prompt in PROMPTS
    }
    answers = {}
    for adapter, folder in folders.items():
        model = hf_reference.model_with(base, folder)
        for prompt in PROMPTS:
            answers[adapter, prompt] = hf_reference.greedy(model, tokens[prompt], LENGTH)
    return answers


def change(server: Server, folders: dict[str, Path], meanings: Meanings, until: float) -> int:
    """Loads, replaces and unloads at random; returns how often."""
    choose = random.Random(0)
    changes = 0
    while time.monotonic() < until:
        name = choose.choice(NAMES)
        old = meanings.now(name)
        if old is not None and choose.random() < 0.3:
            new = None
            meanings.set(name, old, new)
            reply = server.post("/v1/unload_lora_adapter", lora_name=name)
        else:
            new = choose.choice(list(folders))
            meanings.set(name, old, new)
            reply = server.load(name, folders[new], replace=True)
        assert reply.ok, (name, old, new, reply.text)
        meanings.set(name, new)
        changes += 1
        time.sleep(choose.random())
    return changes


def keep_asking(
    server: Server,
    seed: int,
    expected: dict[tuple[str, str], list[int]],
    meanings: Meanings,
    until: float,
) -> int:
    """Asks and compares; returns the number of answers."""
    choose = random.Random(seed)
    client = server.client
    answers = 0
    while time.monotonic() < until:
        name, prompt = choose.choice(list(meanings.log)), choose.choice(PROMPTS)
        begin = time.monotonic()
        try:
            answer = client.completions.create(
                model=name,
                prompt=prompt,
                max_tokens=LENGTH,
                temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
        except openai.NotFoundError:
            assert None in meanings.between(name, begin, time.monotonic()), name
            continue
        meant = meanings.between(name, begin, time.monotonic()) - {None}
        given = answer.choices[0].token_ids
        assert any(given == expected[a, prompt] for a in meant), (name, prompt, meant, given)
        answers += 1
    return answers
