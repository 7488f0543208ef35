"""Pre-trains a small base model, for comparisons that need many seeds.

    .venv/bin/python benchmarks/small_base.py --output .cache/small-base

A Llama of 7 million weights with a tokenizer of its own, on English text that Debian packages
ship: dictionaries, manuals, sayings. They are fetched by `apt-get download` and unpacked into a
temporary folder; nothing is installed. `--text FOLDER` takes the .txt files of a folder instead.

Text is cut into pieces of some paragraphs, which are dealt out as the turns of a chat, so that the
model learns the template that fine-tuning uses. One piece in a hundred is held out, and the last
line has the loss on those. `--minutes` sets the number of steps by the time of the first ones;
`--steps` with the number that was printed gives the same weights again.
"""

from __future__ import annotations

import argparse
import gzip
import html
import json
import math
import random
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from common import report
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Debian package -> where its text lies.
PACKAGES = {
    "dict-devil": "usr/share/dictd/*.dict.dz",
    "dict-foldoc": "usr/share/dictd/*.dict.dz",
    "dict-gcide": "usr/share/dictd/*.dict.dz",
    "dict-jargon": "usr/share/dictd/*.dict.dz",
    "debian-handbook": "usr/share/doc/debian-handbook/html/en-US/*.html",
    "fortunes": "usr/share/games/fortunes/*.u8",
    "fortunes-min": "usr/share/games/fortunes/*.u8",
    "perl-doc": "**/*.pod",
    "python3.11-doc": "**/_sources/**/*.txt",
}
MOST = 8_000_000  # characters of a package, so that none makes up the half of all text
PIECE = 600  # characters, about
HELD_OUT = 100  # one piece in so many

VOCABULARY = 4096
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROWS, LENGTH = 8, 512  # of a step, in tokens
MATRIX_RATE, OTHER_RATE = 0.02, 3e-3  # Muon's for matrices, AdamW's for embeddings and norms
TIMED = 20  # steps that are timed, and over which the rates rise
SAVE_EVERY = 200  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="a folder of .txt files, instead of packages")
    parser.add_argument("--minutes", type=float, default=30, help="to train, about")
    parser.add_argument("--steps", type=int, help="to train, instead of --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    texts = list(from_folder(args.text) if args.text else from_packages(tuple(PACKAGES)))
    pieces = [piece for text in texts for piece in cut(text)]
    random.Random(args.seed).shuffle(pieces)
    held_out, trained = pieces[: len(pieces) // HELD_OUT], pieces[len(pieces) // HELD_OUT :]
    tokenizer = make_tokenizer(trained)
    tokenizer.save_pretrained(args.output)
    print(f"{len(texts)} texts, {sum(map(len, pieces)):,} characters", flush=True)

    torch.manual_seed(args.seed)
    model = make_model()
    stream, test = (tokens(tokenizer, of) for of in (trained, held_out))
    print(f"{len(stream):,} tokens, {model.num_parameters():,} weights", flush=True)
    started = time.monotonic()
    steps = pre_train(model, stream, args.minutes, args.steps, args.output)
    result = {
        "loss": round(held_out_loss(model, test), 4),
        "steps": steps,
        "tokens_seen": steps * ROWS * LENGTH,
        "parameters": model.num_parameters(),
        "seconds": round(time.monotonic() - started),
    }
    model.save_pretrained(args.output)
    (args.output / "pretraining.json").write_text(json.dumps(result) + "\n")
    report(result, args, args.out)


def from_folder(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.txt")):
        yield path.read_text(encoding="utf-8", errors="ignore")


def from_packages(names: tuple[str, ...]) -> Iterator[str]:
    """The texts of Debian packages, in the order of their names."""
    with tempfile.TemporaryDirectory() as folder:
        # apt's own user has no way into the folder, so apt fetches as the caller and says so.
        fetch = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", *names]
        subprocess.run(fetch, cwd=folder, check=True)
        for name in names:
            (package,) = Path(folder).glob(f"{name}_*.deb")
            unpacked = Path(folder) / name
            subprocess.run(["dpkg-deb", "-x", str(package), str(unpacked)], check=True)
            left = MOST
            for path in sorted(unpacked.glob(PACKAGES[name])):
                text = read(path)[:left]
                left -= len(text)
                yield text


def read(path: Path) -> str:
    """A file's text without markup."""
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".dz" else raw).decode("utf-8", "ignore")
    if path.suffix == ".html":
        text = re.sub(r"(?s)<(script|style|head)\b.*?</\1>", "", text)
        text = html.unescape(re.sub(r"<[^>]*>", "", text))
    return text


def cut(text: str) -> Iterator[str]:
    """Pieces of whole paragraphs, of about PIECE characters; a long paragraph is cut inside."""
    piece = ""
    for paragraph in re.split(r"\n\s*\n|\n%\n", text):  # fortunes are parted by %
        paragraph = re.sub(r"\s+", " ", paragraph).strip()
        for start in range(0, len(paragraph), PIECE):
            piece = f"{piece}\n{paragraph[start : start + PIECE]}".strip()
            if len(piece) >= PIECE:
                yield piece
                piece = ""
    if piece:
        yield piece


def make_tokenizer(pieces: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE that takes numbers digit by digit, with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    bpe.train_from_iterator(pieces, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        chat_template=CHAT_TEMPLATE,
    )


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def tokens(tokenizer: PreTrainedTokenizerFast, pieces: list[str]) -> torch.Tensor:
    """Pieces, two by two, as chats of user and assistant, one after another."""
    chats = [
        tokenizer.apply_chat_template(
            [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": answered},
            ],
            tokenize=False,
        )
        for asked, answered in zip(pieces[::2], pieces[1::2], strict=False)
    ]
    encoded = tokenizer(chats, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in ids])


def pre_train(
    model: LlamaForCausalLM,
    stream: torch.Tensor,
    minutes: float,
    steps: int | None,
    output: Path,
) -> int:
    """Trains for `steps` steps, or as many as `minutes` have, and says how many they were."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = (
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.01),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    )
    windows = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    order = torch.randperm(len(windows))
    started, step = time.monotonic(), 0
    while steps is None or step < steps:
        if step == TIMED and steps is None:
            steps = math.ceil(60 * minutes / (time.monotonic() - started) * TIMED)
            print(f"{steps} steps in {minutes:g} minutes", flush=True)
        share = share_of_rate(step, steps)
        for optimizer, rate in zip(optimizers, (MATRIX_RATE, OTHER_RATE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * share
        rows = windows[order[torch.arange(step * ROWS, (step + 1) * ROWS) % len(order)]]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % SAVE_EVERY == 0:
            model.save_pretrained(output)
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    return step


def share_of_rate(step: int, steps: int | None) -> float:
    """Up over the first TIMED steps, for which `steps` is not known yet, and down to 0 over the
    second half of all."""
    if step < TIMED or steps is None:
        return min(1.0, (step + 1) / TIMED)
    return min(1.0, 2 * (1 - step / steps))


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    """Nats a token, in float32."""
    windows = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    losses = [model(input_ids=w[None], labels=w[None]).loss.item() for w in windows]
    return sum(losses) / len(losses)


if __name__ == "__main__":
    main()
