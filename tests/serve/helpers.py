"""Servers in processes of their own, random adapters and a tokenizer for the tests of serving."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import requests
import torch
import transformers
from peft import LoraConfig, get_peft_model

from guilomo_serve.adapter import (
    Adapter,
    AdapterSpec,
    BaseModel,
    Expert,
    ModuleWeights,
    write_adapter,
)
from guilomo_serve.catalogue import keys
from tests.forked import Forked

START_TIMEOUT_S = 240
_OURS = [sys.executable, "-m", "guilomo_serve.cli"]
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Of the tiny model: most modules have no adapter, among them all of layer 1 and, in layer 0, parts
# of what vLLM packs and a row-parallel layer. The others have several experts or one.
SPARSE = {
    "model.layers.0.self_attn.k_proj": (3, 1, 4),
    "model.layers.0.self_attn.v_proj": (5,),
    "model.layers.0.mlp.gate_proj": (2,),
    "model.layers.0.mlp.down_proj": (1, 6),
}


@dataclass
class Server:
    """A server in a process of its own; `key` is for inference, `admin_key` for adapters."""

    port: int
    log: Path
    process: subprocess.Popen[bytes] | Forked
    key: str = "none"
    admin_key: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0)

    @property
    def engine(self) -> psutil.Process:
        """The process of the engine, whose child is the worker that computes."""
        children = psutil.Process(self.process.pid).children()
        return max(children, key=lambda child: child.memory_info().rss)

    def in_flight(self, name: str) -> int:
        """Requests of an adapter, from when its name is found until the last byte of the answer."""
        return int(self.admin("GET", f"/{name}").json()["in_flight"])

    def post(self, path: str, **body: object) -> requests.Response:
        return requests.post(f"{self.url}{path}", json=body, timeout=120)

    def admin(self, method: str, path: str = "", **body: object) -> requests.Response:
        """Asks /v1/adapters and what lies below it."""
        return requests.request(
            method,
            f"{self.url}/v1/adapters{path}",
            json=body if method == "PUT" else None,
            headers=self.admin_headers,
            timeout=120,
        )

    @property
    def admin_headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.admin_key}"} if self.admin_key else {}

    def put(self, name: str, source: Path | str, **settings: object) -> requests.Response:
        return self.admin("PUT", f"/{name}", source=str(source), **settings)

    def load(self, name: str, folder: Path, replace: bool = False) -> requests.Response:
        body = {"lora_name": name, "lora_path": str(folder), "load_inplace": replace}
        return self._lora("load", body)

    def unload(self, name: str) -> requests.Response:
        return self._lora("unload", {"lora_name": name})

    def _lora(self, verb: str, body: dict[str, object]) -> requests.Response:
        url, key = f"{self.url}/v1/{verb}_lora_adapter", self.admin_headers
        return requests.post(url, json=body, headers=key, timeout=120)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def started(
    command: list[str], log: Path, environment: dict[str, str], anew: bool
) -> subprocess.Popen[bytes] | Forked:
    """A server's process, in a session of its own.

    Ours is forked from one that has imported vLLM (tests/forked.py) unless it has to be `anew`.
    """
    if command[: len(_OURS)] == _OURS and not anew:
        return Forked(command[len(_OURS) :], log, environment)
    with log.open("w") as output:
        return subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


@contextmanager
def serving(
    command: Sequence[str],
    log: Path,
    environment: dict[str, str] | None = None,
    host: str = "127.0.0.1",
    anew: bool = False,
) -> Iterator[Server]:
    """Runs a server's command (without a port) and waits until it answers; see `started`."""
    port = free_port()
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "INFO",  # TRL, imported by other tests, lowers it for its children
        **(environment or {}),
    }
    process = started([*command, "--host", host, "--port", str(port)], log, environment, anew)
    server = Server(port, log, process)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                if requests.get(f"{server.url}/health", timeout=5).ok:
                    break
            except requests.ConnectionError:
                pass
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start:\n{log.read_text()[-6000:]}")
            time.sleep(0.5)
        server.admin_key = keys.find(server.url)
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def paused(server: Server) -> Iterator[None]:
    """The engine's worker stands still, so that what runs still runs a moment later.

    A tiny model may end a long answer before its client has read the first token of it.
    """
    (worker,) = server.engine.children()
    worker.suspend()
    try:
        yield
    finally:
        if worker.is_running():
            worker.resume()


def guilomo_serve(base: Path, adapters: dict[str, Path], *flags: str) -> list[str]:
    """The command of our server on a model of these tests."""
    named = [
        part for name, folder in adapters.items() for part in ("--adapter", f"{name}={folder}")
    ]
    return [
        *(*_OURS, str(base), *named),
        *("--max-model-len", "512", "--max-num-seqs", "16", *flags),
    ]


def ask(server: Server, model: str, prompt: str, tokens: int, **body: object) -> Any:
    """The choice of a completion, greedy unless `body` says otherwise, with its `token_ids`."""
    answer = server.client.completions.create(**_asked(model, prompt, tokens, body))
    assert answer.model == model
    return answer.choices[0]


def stream(server: Server, model: str, prompt: str, tokens: int) -> openai.Stream[Any]:
    """The same in chunks."""
    return server.client.completions.create(**_asked(model, prompt, tokens, {}), stream=True)


def eventually(condition: Callable[[], Any], what: str, within_s: float = 60.0) -> Any:
    """Waits for something to become true and returns it; fails with `what` if it never does."""
    deadline = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.1)
    return found


def text_of(server: Server, model: str, prompt: str, tokens: int = 12) -> str:
    """The text of a greedy completion."""
    return ask(server, model, prompt, tokens).text


def text_of_stream(chunks: Iterable[Any]) -> str:
    return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)


def _asked(model: str, prompt: str, tokens: int, body: dict[str, object]) -> dict[str, Any]:
    extra = {"temperature": 0, "ignore_eos": True, "return_token_ids": True, **body}
    return {"model": model, "prompt": prompt, "max_tokens": tokens, "extra_body": extra}


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return fast


def tiny_llama(folder: Path) -> Path:
    """Writes a random Llama of two layers in float32."""
    tokenizer = byte_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_adapter(
    base: Path,
    folder: Path,
    seed: int,
    targets: Sequence[str] = ALL_LINEAR,
    change: Callable[[Adapter], Adapter] | None = None,
    ranks: Mapping[str, Sequence[int]] | None = None,
    described: BaseModel | None = None,
) -> Path:
    """Writes a LoRA-MoE adapter with a random allocation: 1 to 8 experts of rank 1 to 8.

    With `ranks` it has those, and the modules that these leave out have no adapter. Its effect on a
    layer's output is about as large as the output. `change` may spoil it. `described` is the base
    where it is no plain causal LM.
    """
    if described is None:
        described = BaseModel.from_config(transformers.AutoConfig.from_pretrained(base))
    generator = torch.Generator().manual_seed(seed)

    def integer(high: int) -> int:
        return int(torch.randint(1, high + 1, (), generator=generator))

    experts, weights = {}, {}
    for module, (out_features, in_features) in described.linears.items():
        if module.rsplit(".", 1)[-1] not in targets or (ranks is not None and module not in ranks):
            continue
        drawn = [integer(8) for _ in range(integer(8))] if ranks is None else ranks[module]
        experts[module] = tuple(Expert(rank, 0.5 + 0.25 * (rank % 3)) for rank in drawn)
        rows = sum(drawn)
        size = (0.02 if in_features > 256 else 0.2) * (in_features**0.5)  # as the base's weights
        weights[module] = ModuleWeights(
            torch.randn(rows, in_features, generator=generator) / in_features**0.5,
            torch.randn(out_features, rows, generator=generator) * size / 8,
            torch.randn(len(drawn), in_features, generator=generator) / in_features**0.5
            if len(drawn) > 1
            else None,
        )
    spec = AdapterSpec(
        base_model_name_or_path=str(base),
        target_modules=tuple(targets),
        top_k=2,
        lora_alpha=16.0,
        experts=experts,
        base=described.fingerprint,
    )
    adapter = Adapter(spec, weights)
    write_adapter(change(adapter) if change else adapter, folder, card="A random adapter.")
    return folder


def random_lora(base: Path, folder: Path, seed: int, std: float = 0.05, **settings: object) -> Path:
    """Writes a plain LoRA with PEFT, its B random too, of the standard deviation given."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(
        **{"r": 8, "lora_alpha": 16, "target_modules": list(ALL_LINEAR), **settings},
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    peft_model.save_pretrained(folder)
    return folder


def in_hub_cache(folder: Path, cache: Path) -> Path:
    """A copy of an adapter folder as the Hub's cache has it: of links to files beside it."""
    repository = cache / "models--some--adapter"
    snapshot, blobs = repository / "snapshots" / f"{7:040x}", repository / "blobs"
    shutil.copytree(folder, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    return snapshot


@contextmanager
def leased(path: Path) -> Iterator[threading.Event]:
    """Whoever opens the file waits until the block ends; the event says that somebody does."""
    wanted = threading.Event()
    before = signal.signal(signal.SIGIO, lambda *_: wanted.set())
    try:
        with path.open("r+b") as file:  # which gives the lease up when it is closed
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            yield wanted
    finally:
        signal.signal(signal.SIGIO, before)
