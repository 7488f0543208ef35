"""Does the whole path work on a real task? Search, fine-tune, serve, ask over HTTP.

    .venv/bin/python benchmarks/task_accuracy.py --train train.jsonl --test test.jsonl

Both files have a prompt, completion and answer a line. `guilomo-train run` trains on a sample of
the training rows, `guilomo-serve` serves the result, and a sample of the test rows is asked
through the `openai` client, greedily, of the base and of the adapter.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from common import report, task_parser
from openai import AsyncOpenAI
from serving import serving
from tqdm.asyncio import tqdm_asyncio

CONCURRENCY = 16
MAX_TOKENS = 32


def main() -> None:
    parser = task_parser(__doc__, epochs=2.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    lines = args.test.read_text().splitlines()
    rows = [json.loads(line) for line in random.Random(args.seed).sample(lines, args.test_rows)]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        subprocess.run(train_command(args, output), check=True)
        run = json.loads((output / "run.json").read_text())
        adapters = {"adapter": output / "adapter"}
        log = Path(folder) / "server.log"
        with serving(str(args.base), adapters, log, "--max-model-len", "1024") as url:
            scores = {
                name: asyncio.run(exact_match(url, name, rows)) for name in ("base", "adapter")
            }
        allocation = json.loads((output / "allocation.json").read_text())["ranks"]

    answers = [row["answer"] for row in rows]
    result = {
        **scores,
        "majority": max(answers.count(a) for a in set(answers)) / len(answers),
        "experts_total": sum(len(ranks) for ranks in allocation.values()),
        "rank_total": sum(sum(ranks) for ranks in allocation.values()),
        "parameters": run["parameters"],
        "search_s": run["search"]["seconds"],
        "finetune_s": run["finetune_seconds"],
    }
    for key, value in result.items():
        print(f"{key:>14} {value:,.3f}" if isinstance(value, float) else f"{key:>14} {value:,}")
    report(result, args, args.out)


def train_command(args: argparse.Namespace, output: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "guilomo_train.cli", "run"),
        *("--base", str(args.base), "--train", str(args.train), "--output", str(output)),
        *("--train_rows", str(args.train_rows), "--seed", str(args.seed)),
        *("--epochs", str(args.epochs), "--search_epochs", str(args.search_epochs)),
    ]


async def exact_match(url: str, model: str, rows: list[dict[str, str]]) -> float:
    """Share of rows that a served model answers exactly."""
    slots = asyncio.Semaphore(CONCURRENCY)

    async def right(client: AsyncOpenAI, row: dict[str, str]) -> bool:
        async with slots:
            answer = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": row["prompt"]}],
                max_tokens=MAX_TOKENS,
                temperature=0,
            )
        return (answer.choices[0].message.content or "").strip() == row["answer"].strip()

    async with AsyncOpenAI(base_url=url, api_key="none", timeout=600) as client:
        hits = await tqdm_asyncio.gather(*(right(client, r) for r in rows), desc=f"ask {model}")
    return sum(hits) / len(rows)


if __name__ == "__main__":
    main()
