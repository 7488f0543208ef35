"""Is a searched allocation better than what costs less to find? The runs of docs/protocol.md.

    .venv/bin/python benchmarks/proof.py --base .cache/small-base --data DATA --out runs/proof

DATA has `banking77.train.jsonl` and `banking77.test.jsonl`, with prompt and completion a line. Each
finished run is one JSON file in --out, written whole or not at all, so this may be killed at any
time; with --resume it goes on with what is missing. Several processes that are started so share the
work: a lock tells each what another has under way.

    .venv/bin/python benchmarks/proof.py --out runs/proof --summary --picture docs/proof.png

With --base and --prices, a result of benchmarks/serving_prices.py, the summary has what adapters
cost in serving, and its picture is over that.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fcntl
import gc
import io
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import transformers
from common import report
from datasets import Dataset
from peft import PeftModel
from proof_arms import ARMS, SHAPES, SPECTRA, Setting, search_of, uniform_allocation
from proof_serving import add_serving_costs
from proof_summary import PRIMARY, TIGHT, draw_picture, print_table, summary
from proof_tasks import NAMES, Pool, Row, Sizes, draw
from transformers import AutoConfig

from demo.tasks import write_rows
from guilomo_train.base import load_base, sizes_of
from guilomo_train.config import CommonConfig
from guilomo_train.data import load_rows
from guilomo_train.errors import DivergedError
from guilomo_train.evaluate import completion_loss
from guilomo_train.limits import replace_file
from guilomo_train.search.allocation import Allocation
from guilomo_train.search.space import SearchSpace, latency_prices

RATES = (0.01, 0.02, 0.04, 0.08, 0.16)  # and one more beyond an end that is best (docs/protocol.md)
TUNING_SEED = 1000
PILOT_SEEDS = (1001, 1002, 1003)
MAX_LENGTH = 512
EVAL_BATCH = 32


@dataclass(frozen=True)
class Run:
    """One training and its score.

    `budget` is a share of the base's parameters; `pool` says which rows are scored; a tuning run
    has its `rate` (of learning) and `shape` (of uniform, the spectrum of one-shot, else empty),
    another one takes the best of those.
    """

    arm: str
    budget: float
    task: str
    seed: int
    pool: Pool
    rate: float | None = None
    shape: str | None = None

    @property
    def name(self) -> str:
        tuned = [f"{self.rate:g}"] if self.rate is not None else []
        tuned += [self.shape] if self.shape else []
        parts = [self.pool, self.task, f"{self.budget:g}", self.arm, *tuned, str(self.seed)]
        return "_".join(parts)


@dataclass(frozen=True)
class Stage:
    """Runs that belong together, in the order in which they answer most."""

    arms: tuple[str, ...]
    budgets: tuple[float, ...]
    seeds: tuple[int, ...]
    pool: Pool = "test"
    tasks: tuple[str, ...] = NAMES
    tuned_on: tuple[str, ...] = ("banking77", "mixture")  # the mixture has rows of all tasks

    def runs(self) -> Iterator[Run]:
        for seed in self.seeds:
            for budget in self.budgets:
                for task in self.tasks:
                    for arm in self.arms:
                        yield Run(arm, budget, task, seed, self.pool)


AMPLE = (0.01, 0.03)
OTHERS = tuple(arm for arm in ARMS if arm not in PRIMARY)
STAGES = {
    "pilot": Stage(PRIMARY, TIGHT, PILOT_SEEDS, "dev"),
    "primary": Stage(PRIMARY, TIGHT, tuple(range(14))),  # the first look; 40 is the second
    "ample": Stage(PRIMARY, AMPLE, tuple(range(6))),
    "others": Stage(OTHERS, (0.003,), tuple(range(5))),
    "confirm": Stage(PRIMARY, (0.003,), tuple(range(5)), tasks=("banking77", "mixture")),
}
DEFAULT_STAGES = ("pilot", "primary", "ample", "others")  # `confirm` is for a larger base


class Proof:
    """The plan on one base, as far as its folder has come."""

    def __init__(self, base: Path, data: Path, out: Path, sizes: Sizes) -> None:
        self.data, self.out, self.sizes = data, out, sizes
        # As it is stored, whatever the machine: `auto` would differ on one without AVX-512.
        dtype = AutoConfig.from_pretrained(base).dtype
        self.base = load_base(str(base), str(dtype).removeprefix("torch."))
        self.base_parameters = sizes_of(str(base), "all-linear").parameters
        self.space = SearchSpace(adapted_linears(base))
        (out / "locks").mkdir(parents=True, exist_ok=True)

    def stage(self, stage: Stage) -> None:
        """Does all runs of a stage that no other process has under way, then waits for those."""
        self.all_of(list(stage.runs()), stage)

    def all_of(self, runs: list[Run], stage: Stage) -> list[dict[str, Any]]:
        for run in runs:
            self.result(run, stage, wait=False)
        found = [self.result(run, stage) for run in runs]
        return [result for result in found if result is not None]

    def result(self, run: Run, stage: Stage, wait: bool = True) -> dict[str, Any] | None:
        """A run's result, from its file or by doing it; None where another process has it."""
        file, tuning = self.out / f"{run.name}.json", run.rate is not None
        if not file.is_file():
            run = self.tuned(run, stage)
            with self.lock(file.stem, wait) as mine:
                if not mine:
                    return None
                if not file.is_file():
                    write(file, {**self.do(run, stage), "tuning": tuning})
        return json.loads(file.read_text())

    def tuned(self, run: Run, stage: Stage) -> Run:
        """The run with the rate and shape that its arm has at this budget.

        Those of lowest loss on dev rows, one for all tasks: the mean of the log losses of
        `stage.tuned_on` decides. The rate is chosen with the first shape, the shape at that rate.
        """
        shapes = self.shapes(run)
        if run.rate is None:
            rates = [replace(run, rate=rate, shape=shapes[0]) for rate in RATES]
            run = replace(run, rate=self.best(rates, stage).rate)
        if run.shape is None:
            choices = [replace(run, shape=shape) for shape in shapes]
            best = self.best(choices, stage) if len(choices) > 1 else choices[0]
            run = replace(run, shape=best.shape)
        return run

    def best(self, choices: list[Run], stage: Stage) -> Run:
        def loss(choice: Run) -> float:
            tries = [
                replace(choice, task=task, seed=TUNING_SEED, pool="dev") for task in stage.tuned_on
            ]
            return sum(math.log(result["loss"]) for result in self.all_of(tries, stage))

        return min(choices, key=loss)

    def shapes(self, run: Run) -> list[str]:
        """What the arm chooses from: shapes of uniform whose allocations differ, or spectra."""
        if run.arm == "one-shot":
            return list(SPECTRA)
        if run.arm not in ("uniform", "uniform-run"):
            return [""]
        different: dict[tuple[Any, ...], str] = {}
        for shape in SHAPES:
            allocation = uniform_allocation(self.space, shape, self.parameters(run))
            different.setdefault(tuple(allocation.ranks.values()), shape)
        return list(different.values())

    def parameters(self, run: Run) -> int:
        return round(run.budget * self.base_parameters)

    def do(self, run: Run, stage: Stage) -> dict[str, Any]:
        """Trains and scores a run whose rate and shape are known."""
        started, cpu = time.monotonic(), time.process_time()
        rows = draw(run.task, run.seed, run.pool, self.data, self.sizes)
        with tempfile.TemporaryDirectory() as folder, quiet():
            setting = self.setting(run, stage, Path(folder))
            try:
                trained = ARMS[run.arm](setting)
                loss = {
                    part: self.loss(trained.model, of_part, Path(folder))
                    for part, of_part in rows.score.items()
                }
            except DivergedError:
                trained, loss = None, dict.fromkeys(rows.score, math.inf)
        gc.collect()
        return {
            **asdict(run),
            "loss": statistics.mean(loss.values()),
            "loss_by_part": loss,
            "parameters": trained.parameters if trained else None,
            "parameters_allowed": setting.budget,
            "base_parameters": self.base_parameters,
            "dtype": str(self.base.model.dtype).removeprefix("torch."),
            "sizes": asdict(self.sizes),
            "seconds": round(time.monotonic() - started, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "rows": trained.rows if trained else None,
        }

    def setting(self, run: Run, stage: Stage, folder: Path) -> Setting:
        assert run.rate is not None
        assert run.shape is not None
        common = CommonConfig(
            base=self.base.name,
            train="",  # the rows are given
            output=str(folder),
            max_length=MAX_LENGTH,
            seed=run.seed,
            save_steps=0,
        )
        rows = draw(run.task, run.seed, run.pool, self.data, self.sizes).train
        return Setting(
            base=replace(self.base, model=copy.deepcopy(self.base.model)),
            space=self.space,
            budget=self.parameters(run),
            train=self.dataset(rows, folder),
            common=common,
            rate=run.rate,
            shape=run.shape,
            searched=lambda: self.searched(run, stage, folder),
            work=folder,
        )

    def searched(self, run: Run, stage: Stage, folder: Path) -> Allocation:
        """What the search finds on the run's rows, with the rate of the arm `searched`."""
        if run.arm != "searched":
            run = self.tuned(replace(run, arm="searched", rate=None, shape=None), stage)
        name = f"{run.task}_{run.budget:g}_{run.rate:g}_{run.seed}"
        file = self.out / "searches" / f"{name}.json"
        with self.lock(f"search_{name}", wait=True):
            if not file.is_file():
                found = search_of(self.setting(run, stage, folder))
                write(file.with_suffix(".record.json"), found.record)
                found.allocation.save(file)
        return Allocation.load(file)

    def loss(self, model: PeftModel, rows: list[Row], folder: Path) -> float:
        tokenizer = self.base.tokenizer
        model.eval()
        return completion_loss(model, tokenizer, self.dataset(rows, folder), EVAL_BATCH)

    def dataset(self, rows: list[Row], folder: Path) -> Dataset:
        path = folder / "rows.jsonl"
        write_rows(rows, path)
        return load_rows(str(path), self.base.tokenizer)

    @contextlib.contextmanager
    def lock(self, name: str, wait: bool) -> Iterator[bool]:
        """Whether this process has the lock `name` while the block runs; its end releases it."""
        with (self.out / "locks" / name).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True


def adapted_linears(base: Path) -> dict[str, tuple[int, int]]:
    """(out, in) features of each module that arms may adapt."""
    known = sizes_of(str(base), "all-linear")
    return {module: known.linears[module] for module in known.adapted}


def write(file: Path, value: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    with replace_file(file) as partial:
        partial.write_text(json.dumps(value) + "\n")
    print(f"{time.strftime('%H:%M:%S')} {file.stem}", value.get("loss", ""), flush=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what the trainer prints every few steps, and without progress bars."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path, help="folder of the base model")
    parser.add_argument("--data", type=Path, help="folder of the tasks' files")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished runs")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(DEFAULT_STAGES))
    parser.add_argument("--resume", action="store_true", help="go on with what --out has")
    parser.add_argument("--summary", action="store_true", help="of the finished runs; no training")
    parser.add_argument("--picture", type=Path, help="with --summary: the PNG to write")
    parser.add_argument("--prices", type=Path, help="with --summary: prices of serving")
    parser.add_argument("--result", type=Path, help="with --summary: the JSON file to write")
    args = parser.parse_args()
    if args.prices and args.base is None:
        parser.error("--prices are of a base's modules: name it with --base")
    if args.summary:
        results = finished(args.out)
        if args.prices:
            linears = adapted_linears(args.base)
            space = SearchSpace(linears, prices=latency_prices(linears, args.prices))
            add_serving_costs(results, space, args.out / "searches")
        found = summary(results)
        print_table(found)
        if args.picture:
            draw_picture(found, args.picture, "serving_us" if args.prices else "parameters")
        report(found, args, args.result)
        return
    if args.base is None or args.data is None:
        parser.error("--base and --data are needed, or --summary")
    if not args.resume and any(args.out.glob("*.json")):
        parser.error(f"--out {args.out} has finished runs: go on with --resume, or name another")
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    proof = Proof(args.base, args.data, args.out, Sizes())
    for name in args.stage:
        proof.stage(STAGES[name])


def finished(out: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(out.glob("*.json"))]


if __name__ == "__main__":
    main()
