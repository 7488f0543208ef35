"""The command line of `guilomo-serve check`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guilomo_serve.adapter import AdapterError
from guilomo_serve.check import hf
from guilomo_serve.check.compare import compare, difference, table, tolerance_of
from guilomo_serve.check.served import ServedError, engine_flags, record
from guilomo_serve.flags import UsageError

PROMPTS = (
    "My card has not arrived and it has been two weeks. What can I do?",
    "Write one sentence about the sea.",
    "def fibonacci(n):\n    return n if n < 2 else",
    "2 + 2 =",
)
_COLUMNS = (
    "difference of log-probabilities in nats (mean, largest; base: mean without the adapter), "
    "choices of experts, largest error of a product"
)


def main(argv: Sequence[str]) -> int:
    """Compares, and prints a table and a verdict for each adapter.

    Returns:
        0 if vLLM computes what transformers does, 1 if not, 2 if it cannot be found out.
    """
    parser = argparse.ArgumentParser(
        prog="guilomo-serve check",
        description="Compares vLLM with transformers on a base model and its adapters.",
        epilog="All further flags are passed to vLLM.",
        allow_abbrev=False,
    )
    parser.add_argument("base", help="base model: a folder or a name on the Hugging Face hub")
    parser.add_argument("folders", nargs="+", type=Path, metavar="folder", help="of an adapter")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a prompt a line (default: a few built in)"
    )
    args, given = parser.parse_known_args(argv)
    settings = _settings_of_transformers(given)
    try:
        prompts = PROMPTS if args.prompts is None else _read_prompts(args.prompts)
        engine_flags([args.base, *given], args.folders)
        tokens = _tokenize(args.base, prompts, settings)
    except (UsageError, AdapterError) as e:
        print(f"guilomo-serve check: {e}", file=sys.stderr)
        return 2
    length = max(map(len, tokens)) + 1
    # What the user gives comes last, and wins.
    command = [args.base, "--max-model-len", str(length), "--no-enable-prefix-caching", *given]
    return _check(args.base, args.folders, command, tokens, settings)


def _check(
    base: str,
    folders: Sequence[Path],
    command: Sequence[str],
    prompts: Sequence[list[int]],
    settings: dict[str, Any],
) -> int:
    print(f"vLLM on {len(prompts)} prompts ...", file=sys.stderr)
    try:
        served = record(command, folders, prompts)
    except ServedError as e:
        print(f"{e}\nguilomo-serve check: vLLM did not answer; see above", file=sys.stderr)
        return 2
    print("transformers ...", file=sys.stderr)
    tolerance, quantized = tolerance_of(served.dtype), served.quantization is not None
    different = False
    try:
        base_wanted = hf.see(hf.load_base(base, served.dtype, **settings), None, prompts)
        for folder, ours in zip(folders, served.adapters, strict=True):
            model, modules = hf.with_adapter(hf.load_base(base, served.dtype, **settings), folder)
            seen = zip(served.base, ours, base_wanted, hf.see(model, modules, prompts), strict=True)
            rows = [compare(*of_prompt, modules) for of_prompt in seen]
            reason = difference(rows, tolerance, quantized)
            print(f"{folder}: {_COLUMNS}\n{table(rows)}")
            equal = "EQUAL: vLLM computes what transformers does"
            print(f"DIFFERENT: {reason}" if reason else equal, flush=True)
            different |= reason is not None
    except (ImportError, OSError, ValueError) as e:  # a format that transformers does not read, say
        print(f"guilomo-serve check: transformers cannot run it: {e}", file=sys.stderr)
        return 2
    return int(different)


def _settings_of_transformers(flags: Sequence[str]) -> dict[str, Any]:
    """Which files of the base to take, as vLLM is told."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--revision")
    parser.add_argument("--trust-remote-code", action="store_true")
    return vars(parser.parse_known_args(flags)[0])


def _tokenize(base: str, prompts: Sequence[str], settings: dict[str, Any]) -> list[list[int]]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base, **settings)
    except (OSError, ValueError) as e:
        raise UsageError(f"{base}: no tokenizer can be read there: {e}") from None
    tokenized = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for prompt, tokens in zip(prompts, tokenized, strict=True):
        if len(tokens) < 2:
            raise UsageError(f"the prompt {prompt!r} has {len(tokens)} tokens, expected at least 2")
    return tokenized


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path}: no prompts can be read there: {e}") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"{path}: has no prompts, expected one a line")
    return prompts
