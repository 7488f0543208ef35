"""Does every answer come from its adapter, whatever is loaded, swapped and unloaded meanwhile?

Clients ask at random for names whose adapters are put, replaced and deleted at random. Each greedy
answer must be what the adapter gives alone that the name stood for while it was asked. What an
adapter gives alone is asked first, under a name that nothing else touches.

    requests   those that were answered as they should be or not: also an unknown name's refusal
    wrong      answers of no adapter that the name stood for
    failed     requests and changes that ended in an error that nothing explains
    loads      adapters put under a name

Without --url a server is started on random adapters in float32, where an answer does not depend on
what else is in the batch but at near ties; answers are compared up to the first one.
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import openai
import requests
from common import report
from serving import admin_headers, serving

REPOSITORY = Path(__file__).parent.parent
FLAGS = ("--dtype", "float32", "--enable-prefix-caching", "--enforce-eager")
CLIENTS = 6
NAMES = tuple(f"soak-{colour}" for colour in ("red", "green", "blue", "white", "black", "grey"))
LONG = 2 * "A customer writes: my card has not arrived, it has been two weeks now! "
PROMPTS = (
    *(LONG + end for end in ("What do we answer?", "Why?", "Who calls him?", "Is he right?")),
    *("The quick brown fox jumps over the lazy dog.", "2 + 2 =", "Dear sir,", "one two one two"),
)
TOKENS = 16  # at most, of an answer
NEAR_TIE = 0.01  # nats between the two likeliest tokens
STREAMED, CLOSED_EARLY, UNLOADED = 0.4, 0.1, 0.25  # shares of requests, and of changes
REQUESTS_A_CHANGE = 10  # at most

Meant = str | None  # a folder, or that a name stands for none


@dataclass
class Meanings:
    """Which adapter each name has stood for, by time."""

    log: dict[str, list[tuple[float, frozenset[Meant]]]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def set(self, name: str, *adapters: Meant) -> None:
        """From now on `name` stands for one of these."""
        with self.lock:
            self.log.setdefault(name, []).append((time.monotonic(), frozenset(adapters)))

    def since(self, name: str, begin: float) -> frozenset[Meant]:
        """All that it may have stood for since then."""
        with self.lock:
            log = self.log[name]
            first = max(i for i, (time_, _) in enumerate(log) if time_ <= begin)
            return frozenset().union(*(meant for _, meant in log[first:]))


@dataclass
class Count:
    """What happened; `first` are the first things that should not have."""

    answered: int = 0
    streamed: int = 0
    closed_early: int = 0
    refused: int = 0
    wrong: int = 0
    failed: int = 0
    loads: int = 0
    unloads: int = 0
    first: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def requests(self) -> int:
        return self.answered + self.streamed + self.closed_early + self.refused

    def add(self, *what: str, said: str = "") -> None:
        with self.lock:
            for one in what:
                setattr(self, one, getattr(self, one) + 1)
            if said and len(self.first) < 5:
                self.first.append(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = REPOSITORY / ".cache" / "smollm2-135m-instruct"
    parser.add_argument("model", nargs="?", type=Path, default=default, help="the base model")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="of a running guilomo-serve with one base model")
    parser.add_argument(
        "--adapters", nargs="+", type=Path, default=[], help="with --url: folders that it may read"
    )
    parser.add_argument("--out", type=Path, help="write the result with machine and versions here")
    args = parser.parse_args()
    if bool(args.url) != bool(args.adapters):
        parser.error("--url and --adapters go together")

    if args.url:
        result = soak(args.url, args.adapters, args.requests, args.seed)
    else:
        # Not needed otherwise, and slow to import.
        from serve_throughput import LOUD, write_searched

        with tempfile.TemporaryDirectory() as scratch:
            print(f"writing adapters for {args.model}", flush=True)
            folders, _ = write_searched(args.model, Path(scratch), LOUD)
            print("starting the server", flush=True)
            with serving(str(args.model), {}, Path(scratch) / "log", *FLAGS) as url:
                result = soak(url.removesuffix("/v1"), folders, args.requests, args.seed)
    report(result, args, args.out)


def soak(url: str, folders: list[Path], count: int, seed: int) -> dict[str, int]:
    """Asks `count` times while adapters change; nothing of it is left on the server."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
    expected = {str(folder): alone(url, client, str(folder)) for folder in folders}
    for one, other in itertools.combinations(expected, 2):
        if all(agree(expected[one][p], expected[other][p]) for p in PROMPTS):
            raise SystemExit(f"{one} and {other} give the same answers: nothing tells them apart")
    compared = [len(tokens) for answers in expected.values() for tokens in answers.values()]
    share = sum(compared) / len(compared) / TOKENS
    print(
        f"{len(folders)} adapters; {share:.0%} of their tokens come before a near tie", flush=True
    )

    meanings, counts, stop = Meanings(), Count(), threading.Event()
    for name, folder in zip(NAMES, itertools.cycle(expected), strict=False):
        administer(url, "PUT", name, folder)
        meanings.set(name, folder)
        counts.add("loads")
    start = time.monotonic()
    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        changing = pool.submit(change, url, list(expected), meanings, counts, stop, seed)
        asking = [
            pool.submit(
                ask_often,
                *(client, expected, meanings, counts),
                *(count // CLIENTS + (n < count % CLIENTS), random.Random(f"{seed} {n}")),
            )
            for n in range(CLIENTS)
        ]
        while not all(task.done() for task in asking):
            time.sleep(1)
            if int(time.monotonic() - start) % 20 == 0:
                print(f"{counts.requests}/{count} requests, {counts.loads} loads", flush=True)
        stop.set()
        for task in (changing, *asking):
            task.result()
    for name in NAMES:
        requests.delete(  # 404: it stands for none
            f"{url}/v1/adapters/{name}", headers=admin_headers(url), timeout=300
        )
    print(f"\n{'':>22}count")
    for what in ("answered", "streamed", "closed_early", "refused", "loads", "unloads"):
        print(f"{what.replace('_', ' '):>20}{getattr(counts, what):>7}")
    print(f"in {time.monotonic() - start:.0f} s", *counts.first, sep="\n", flush=True)
    names = ("requests", "wrong", "failed", "loads")
    return {name: getattr(counts, name) for name in names}


def alone(url: str, client: openai.OpenAI, folder: str) -> dict[str, tuple[int, ...]]:
    """Prompt -> an adapter's tokens, up to the first near tie."""
    answers = {}
    administer(url, "PUT", "soak-alone", folder)
    for prompt in PROMPTS:
        (choice,) = client.completions.create(
            **asked("soak-alone", prompt, TOKENS), logprobs=2
        ).choices
        ranked = [sorted(top.values())[-2:] for top in choice.logprobs.top_logprobs]
        clear = itertools.takewhile(lambda two: two[1] - two[0] > NEAR_TIE, ranked)
        answers[prompt] = tuple(choice.token_ids[: len(list(clear))])
    administer(url, "DELETE", "soak-alone")
    return answers


def agree(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether one begins as the other does."""
    return all(a == b for a, b in zip(one, other, strict=False))


def change(
    url: str,
    folders: list[str],
    meanings: Meanings,
    counts: Count,
    stop: threading.Event,
    seed: int,
) -> None:
    """Loads, replaces and unloads at random until `stop`."""
    choose = random.Random(seed)
    current: dict[str, Meant] = dict(zip(NAMES, itertools.cycle(folders), strict=False))
    due = 0
    while not stop.wait(0.02):
        if counts.requests < due:
            continue
        due = counts.requests + choose.randint(1, REQUESTS_A_CHANGE)
        name = choose.choice(NAMES)
        old = current[name]
        unload = old is not None and choose.random() < UNLOADED
        new = None if unload else choose.choice(folders)
        # Where a change failed before, it may stand for more than `old`.
        meanings.set(name, *meanings.since(name, time.monotonic()), new)
        try:
            administer(url, "DELETE" if unload else "PUT", name, new)
        except requests.RequestException as e:
            counts.add("failed", said=f"{name} from {old} to {new}: {e}")
            continue
        meanings.set(name, new)
        current[name] = new
        counts.add("unloads" if unload else "loads")


def ask_often(
    client: openai.OpenAI,
    expected: dict[str, dict[str, tuple[int, ...]]],
    meanings: Meanings,
    counts: Count,
    times: int,
    choose: random.Random,
) -> None:
    """Asks and compares; answers are as long, streamed or closed early as chance will have it."""
    for _ in range(times):
        name, prompt = choose.choice(NAMES), choose.choice(PROMPTS)
        length = choose.randint(1, TOKENS)
        streamed, closed = choose.random() < STREAMED, choose.random() < CLOSED_EARLY
        begin = time.monotonic()
        try:
            answer = client.completions.create(**asked(name, prompt, length), stream=streamed)
            if not streamed:
                tokens = answer.choices[0].token_ids
            else:
                tokens = []
                for chunk in answer:
                    tokens += [t for choice in chunk.choices for t in choice.token_ids or ()]
                    if closed and tokens:
                        answer.close()
                        break
        except openai.NotFoundError as e:
            meant = meanings.since(name, begin)
            explained = None in meant
            said = "" if explained else f"{name} was not found, and stood for {sorted(meant)}: {e}"
            counts.add("refused", *([] if explained else ["failed"]), said=said)
            continue
        except openai.OpenAIError as e:
            counts.add("answered", "failed", said=f"{name}: {e}")
            continue
        kind = "closed_early" if streamed and closed else "streamed" if streamed else "answered"
        meant = meanings.since(name, begin) - {None}
        right = [expected[adapter][prompt][: len(tokens)] for adapter in meant]
        complete = len(tokens) == length or kind == "closed_early"
        if complete and any(agree(tokens, answer) for answer in right):
            counts.add(kind)
        else:
            counts.add(kind, "wrong", said=f"{name}, {prompt!r}: {tokens}, expected one of {right}")


def asked(name: str, prompt: str, length: int) -> dict:
    # Tokens by their numbers in log-probabilities too: two of them may have one text.
    extra = {"ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True}
    settings = {"max_tokens": length, "temperature": 0, "extra_body": extra}
    return {"model": name, "prompt": prompt, **settings}


def administer(url: str, method: str, name: str, folder: str | None = None) -> None:
    """PUT or DELETE /v1/adapters/{name}; raises requests.RequestException if it is refused."""
    body = {"source": folder} if method == "PUT" else None
    answer = requests.request(
        method, f"{url}/v1/adapters/{name}", json=body, headers=admin_headers(url), timeout=300
    )
    if not answer.ok:
        raise requests.HTTPError(f"{answer.status_code} {answer.text}")


if __name__ == "__main__":
    main()
