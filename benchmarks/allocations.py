"""Is a searched allocation better than hand-made ones of its size? On a real task.

    .venv/bin/python benchmarks/allocations.py --train train.jsonl --test test.jsonl

Both files have a prompt, completion and answer a line. For each seed: `guilomo-train search`
finds an allocation, `guilomo-train baseline` makes controls with as many parameters, and each of
them is fine-tuned from fresh weights with the same rows and seed, then scored on the test rows by
generated answers. `run` is the searched allocation fine-tuned from the weights of its search, as
`guilomo-train run` does; `--fresh-epochs` gives those that start afresh the passes over the rows
that the search took. A seed draws the rows too, so differences are taken by seed, and what the
allocations of two seeds have in common is the task's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

from common import report, task_parser

from guilomo_train.compare import Comparison, spearman

CONTROLS: dict[str, list[str]] = {
    "lora": [],
    "uniform": ["--experts", "5"],
    "mola-2468": [],
    "mola-8642": [],
    "mola-5555": [],
    "random": [],
}


def main() -> None:
    parser = task_parser(__doc__, epochs=1.0)
    parser.add_argument("--budget", help="as of guilomo-train search")
    parser.add_argument("--order", default="auto", help="as of guilomo-train search")
    parser.add_argument("--controls", nargs="+", choices=CONTROLS, default=list(CONTROLS))
    parser.add_argument("--fresh-epochs", type=float, help="instead of --epochs, but for `run`")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()

    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            work = Path(folder) / str(seed)
            for name, (allocation, *more) in allocations(args, seed, work).items():
                run = fine_tuned(args, seed, allocation, work / f"{name}-run", *more)
                runs.setdefault(name, []).append(run)
                print(
                    f"seed {seed} {name:>10}: loss {run['scores']['loss']:.4f}, "
                    f"accuracy {run['scores']['accuracy']:.3f}, {run['parameters']:,} parameters",
                    flush=True,
                )
            searched = json.loads((work / "search" / "run.json").read_text())["search"]
            runs["searched"][-1]["search_s"] = searched["seconds"]
            # After each seed, so that a run that is stopped keeps the seeds it has.
            result = compared(runs)
            found = sorted(Path(folder).glob("*/search/allocation.json"))
            result["rank_correlation_of_seeds"] = agreement(found)
            print_table(result, list(runs))
            report(result, args, args.out)


def compared(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The benchmark's result from the run.json of each allocation's seeds."""
    result: dict[str, Any] = {name: summary(of_name) for name, of_name in runs.items()}
    for name in runs.keys() - {"searched"}:
        result[name] |= behind(runs["searched"], runs[name], "loss")
        result[name] |= behind(runs["searched"], runs[name], "accuracy")
    result["seeds"] = len(runs["searched"])
    result["majority"] = runs["searched"][0]["scores"]["majority"]
    result["search_s"] = round(statistics.mean(r["search_s"] for r in runs["searched"]), 1)
    for name, of_name in runs.items():
        result[name]["finetune_s"] = round(
            statistics.mean(r["finetune_seconds"] for r in of_name), 1
        )
    return result


def agreement(allocations: list[Path]) -> float | None:
    """Rank correlation of two allocations' total ranks over layers, mean of all pairs."""
    pairs = [Comparison.read(*pair).total_ranks for pair in combinations(allocations, 2)]
    return round(statistics.mean(spearman(*pair) for pair in pairs), 3) if pairs else None


def print_table(result: dict[str, Any], names: list[str]) -> None:
    print(f"\n{'':>10} {'loss':>8} {'accuracy':>9} {'parameters':>12}   less the searched one's")
    for name in names:
        row = result[name]
        line = f"{name:>10} {row['loss']:>8.4f} {row['accuracy']:>9.3f} {row['parameters']:>12,}  "
        for key in ("loss", "accuracy"):
            if f"{key}_less_searched" in row:
                line += f" {key} {row[f'{key}_less_searched']:+.4f}"
            if f"{key}_less_searched_error" in row:
                line += f" ± {row[f'{key}_less_searched_error']:.4f}"
        print(line)


def allocations(args: argparse.Namespace, seed: int, work: Path) -> dict[str, list[object]]:
    """What is fine-tuned of a seed: an allocation's file, and further arguments."""
    found = work / "search" / "allocation.json"
    guilomo_train(
        *("search", *data(args, seed), "--output", found.parent),
        *("--search_epochs", args.search_epochs, "--order", args.order),
        *(("--budget", args.budget) if args.budget is not None else ()),
    )
    fresh = ["--epochs", args.epochs if args.fresh_epochs is None else args.fresh_epochs]
    tuned: dict[str, list[object]] = {
        "searched": [found, *fresh],
        "run": [found, "--epochs", args.epochs, "--start", found.with_name("start")],
    }
    for name in args.controls:
        file = work / f"{name}.json"
        guilomo_train(
            *("baseline", "--base", args.base, "--kind", name, "--like", found),
            *("--seed", seed, "--output", file, *CONTROLS[name]),
        )
        tuned[name] = [file, *fresh]
    return tuned


def fine_tuned(
    args: argparse.Namespace, seed: int, allocation: object, output: Path, *more: object
) -> dict[str, Any]:
    """run.json of an allocation's fine-tuning."""
    guilomo_train(
        *("finetune", *data(args, seed), "--allocation", allocation, "--output", output),
        *("--eval", args.test, "--eval_rows", args.test_rows, "--max_new_tokens", 24, *more),
    )
    run: dict[str, Any] = json.loads((output / "run.json").read_text())
    return run


def data(args: argparse.Namespace, seed: int) -> list[object]:
    return [
        *("--base", args.base, "--train", args.train),
        *("--train_rows", args.train_rows, "--seed", seed),
    ]


def guilomo_train(*arguments: object) -> None:
    command = [sys.executable, "-m", "guilomo_train.cli", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{done.stderr[-2000:]}\nfailed: {' '.join(command)}")


def behind(
    searched: list[dict[str, Any]], control: list[dict[str, Any]], key: str
) -> dict[str, float]:
    """A control's score less that of the search: the mean over seeds, and its standard error.

    Both train on the rows that a seed draws, so what a seed makes easy or hard falls out of the
    difference. One seed has no error.
    """
    pairs = zip(searched, control, strict=True)
    less = [theirs["scores"][key] - ours["scores"][key] for ours, theirs in pairs]
    found = {f"{key}_less_searched": round(statistics.mean(less), 4)}
    if len(less) > 1:
        found[f"{key}_less_searched_error"] = round(statistics.stdev(less) / len(less) ** 0.5, 4)
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    losses, accuracy = ([run["scores"][key] for run in runs] for key in ("loss", "accuracy"))
    return {
        "loss": round(statistics.mean(losses), 4),
        "accuracy": round(statistics.mean(accuracy), 4),
        "parameters": round(statistics.mean(run["parameters"] for run in runs)),
    }


if __name__ == "__main__":
    main()
