"""The command `guilomo-train`.

search     data -> allocation.json and its picture
finetune   data and an allocation -> adapter folder, and an evaluation
run        both
plan       memory and time of a run, before it starts
push       an adapter to the Hugging Face Hub
data       how training reads rows: some as the model sees them, counts, what is left out
eval       scores of an adapter, or of the base alone, by its answers
baseline   an allocation made without a search, to compare a searched one with
compare    two allocations of one base side by side
report     the report page of a run, with a control beside it
export     an adapter as a plain LoRA
import     an adapter of MoLA, LoRAMoE or HydraLoRA as one of guilomo
inspect    the table and picture of an adapter or allocation
"""

from __future__ import annotations

import gc
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch.distributed import TCPStore
from transformers import HfArgumentParser

import guilomo_serve
from guilomo_serve.adapter import AdapterError, BaseModel, read_adapter
from guilomo_train.allocation_map import allocation_of, heat_map, table
from guilomo_train.config import (
    REVISION,
    TRUST_REMOTE_CODE,
    BaselineConfig,
    CommonConfig,
    EvalConfig,
    ExportConfig,
    FinetuneConfig,
    ImportConfig,
    PlanConfig,
    PreviewConfig,
    PushConfig,
    SearchConfig,
    option,
)
from guilomo_train.errors import TrainError
from guilomo_train.limits import WRITE_ERRORS
from guilomo_train.search.allocation import Allocation
from guilomo_train.settings import read_settings, take_settings

if TYPE_CHECKING:
    from datasets import Dataset

    from guilomo_train.run import Run


@dataclass
class AllocationOption:
    """The allocation to fine-tune."""

    allocation: str = field(metadata={"help": "allocation.json of a search."})
    start: str | None = option(
        None,
        "Adapter of that allocation to start from, such as the folder `start` of a search; by "
        "default fresh weights.",
    )


@dataclass
class FreshOption:
    """What a searched allocation is fine-tuned from."""

    fresh: bool = option(
        False, "Fine-tune from fresh weights, as in the paper, not from those of the search."
    )


@dataclass
class HeldOutOption:
    """Rows to evaluate a new adapter on."""

    eval: str | None = option(None, "Rows to evaluate on when the adapter is trained.")


@dataclass
class EvalOptions:
    """What to evaluate."""

    base: str = field(metadata={"help": "Base model: a folder or a hub name."})
    data: str = field(metadata={"help": "Rows, in any form that --train takes."})
    adapter: str | None = option(None, "Adapter folder; without it the base answers alone.")
    output: str | None = option(None, "Write scores and answers into this JSON file.")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "Precision of the base model.")
    quantize: Literal["none", "4bit", "8bit"] = option("none", "Load the base quantised.")
    revision: str | None = option(None, REVISION)
    trust_remote_code: bool = option(False, TRUST_REMOTE_CODE)


@dataclass
class InspectOptions:
    """What to show."""

    path: str = field(metadata={"help": "An adapter folder or an allocation.json."})
    png: str | None = option(None, "Draw the heat map into this file.")


@dataclass
class CompareOptions:
    """How to show it."""

    png: str | None = option(None, "Draw both heat maps and their difference into this file.")


@dataclass
class ReportOptions:
    """What to compare with."""

    control: str | None = option(
        None, "Output folder of another run on the same data, such as one of a uniform allocation."
    )


def _search(common: CommonConfig, config: SearchConfig) -> None:
    from guilomo_train.run import Run

    run = Run("search", common)
    run.search_stage(config)
    run.finish()


def _finetune(
    common: CommonConfig,
    chosen: AllocationOption,
    config: FinetuneConfig,
    held_out: HeldOutOption,
    evaluation: EvalConfig,
) -> None:
    allocation = Allocation.load(Path(chosen.allocation))
    from guilomo_train.run import Run

    run = Run("finetune", common, asdict(chosen) | asdict(held_out))
    start = None
    if chosen.start is not None:
        start = read_adapter(chosen.start, BaseModel.from_module(run.base.model))
    rows, dev = _held_out(run, held_out, evaluation), _dev(run, config)
    result = run.finetune_stage(allocation, config, None, start, dev)
    if rows is not None:
        run.evaluate_stage(result, rows, evaluation)
    run.finish()


def _run(
    common: CommonConfig,
    search: SearchConfig,
    chosen: FreshOption,
    finetune: FinetuneConfig,
    held_out: HeldOutOption,
    evaluation: EvalConfig,
) -> None:
    from guilomo_train.run import Run

    run = Run("run", common, asdict(chosen) | asdict(held_out))
    rows, dev = _held_out(run, held_out, evaluation), _dev(run, finetune)
    found = run.search_stage(search)
    start = None if chosen.fresh else found.adapter
    result = run.finetune_stage(found.allocation, finetune, found.record, start, dev)
    if rows is not None:
        run.evaluate_stage(result, rows, evaluation)
    run.finish()


def _plan(
    common: CommonConfig,
    search: SearchConfig,
    chosen: FreshOption,
    finetune: FinetuneConfig,
    held_out: HeldOutOption,
    evaluation: EvalConfig,
    machine: PlanConfig,
) -> None:
    from guilomo_train.plan import plan
    from guilomo_train.run_files import write_json

    planned = plan(common, search, finetune, machine)
    if machine.json is not None:
        write_json(Path(machine.json), planned.to_json())
    print(planned.table())


def _held_out(run: Run, held_out: HeldOutOption, evaluation: EvalConfig) -> Dataset | None:
    """Rows to evaluate on: read before hours of training, not after them."""
    if held_out.eval is None:
        return None
    from guilomo_train.data import load_rows

    return load_rows(held_out.eval, run.base.tokenizer, evaluation.eval_rows)


def _dev(run: Run, config: FinetuneConfig) -> Dataset | None:
    """Rows to watch the loss on, read before a search too."""
    if config.dev is None:
        return None
    from guilomo_train.data import load_rows

    return load_rows(config.dev, run.base.tokenizer, loss_on=run.common.loss_on)


def _eval(chosen: EvalOptions, config: EvalConfig) -> None:
    from guilomo_train.evaluate import evaluate_adapter
    from guilomo_train.run_files import write_json

    scores, answers = evaluate_adapter(
        chosen.base,
        chosen.data,
        chosen.adapter,
        chosen.dtype,
        config,
        chosen.quantize,
        revision=chosen.revision,
        trust_remote_code=chosen.trust_remote_code,
    )
    if chosen.output is not None:
        write_json(Path(chosen.output), {**scores.to_json(), "answers": answers})
    print(scores.sentence())


def _export(config: ExportConfig) -> None:
    from guilomo_train.export import export

    print(f"{config.output}: {export(config)}")


def _import(config: ImportConfig) -> None:
    from guilomo_train.foreign import import_adapter

    print(f"{config.output}: {import_adapter(config)}")


def _push(config: PushConfig) -> None:
    from guilomo_train.push import push

    print(push(config))


def _data(config: PreviewConfig) -> None:
    from guilomo_train.preview import preview

    for line in preview(config):
        print(line)


def _baseline(config: BaselineConfig) -> None:
    from guilomo_train.baseline import baseline

    print(table(baseline(config)))


def _compare(first: str, second: str, chosen: CompareOptions) -> None:
    from guilomo_train.compare import Comparison, picture

    comparison = Comparison.read(Path(first), Path(second))
    print(comparison.table())
    if chosen.png is not None:
        picture(comparison, Path(chosen.png))


def _report(run: str, chosen: ReportOptions) -> None:
    from guilomo_train.report import write_page

    print(write_page(Path(run), Path(chosen.control) if chosen.control is not None else None))


def _inspect(chosen: InspectOptions) -> None:
    path = Path(chosen.path)
    if path.is_dir():
        from guilomo_train.adapters import read_trained_spec

        spec, whole = read_trained_spec(path)
        allocation = allocation_of(spec)
        also = f"; trained whole: {', '.join(whole)}" if whole else ""
        print(f"adapter for {spec.base_model_name_or_path}, top {spec.top_k} experts a token{also}")
    else:
        allocation = Allocation.load(path)
    print(table(allocation))
    if chosen.png is not None:
        heat_map(allocation, Path(chosen.png))


class Command(NamedTuple):
    """A subcommand: its line in `--help`, the settings it takes, and what it does with them.

    `paths` are its positional arguments, name -> help; `run` gets them first.
    """

    text: str
    settings: tuple[type, ...]
    run: Callable[..., None]
    paths: Mapping[str, str] = MappingProxyType({})


COMMANDS = {
    "search": Command("search an allocation", (CommonConfig, SearchConfig), _search),
    "finetune": Command(
        "train a given allocation",
        (CommonConfig, AllocationOption, FinetuneConfig, HeldOutOption, EvalConfig),
        _finetune,
    ),
    "run": Command(
        "search, fine-tune and evaluate",
        (CommonConfig, SearchConfig, FreshOption, FinetuneConfig, HeldOutOption, EvalConfig),
        _run,
    ),
    "plan": Command(
        "memory and time of a run, before it starts",
        (
            CommonConfig,
            SearchConfig,
            FreshOption,
            FinetuneConfig,
            HeldOutOption,
            EvalConfig,
            PlanConfig,
        ),
        _plan,
    ),
    "push": Command("upload an adapter to the Hugging Face Hub", (PushConfig,), _push),
    "data": Command("show how training reads rows", (PreviewConfig,), _data),
    "eval": Command("score an adapter by its answers", (EvalOptions, EvalConfig), _eval),
    "baseline": Command("an allocation without a search", (BaselineConfig,), _baseline),
    "compare": Command(
        "two allocations of one base side by side",
        (CompareOptions,),
        _compare,
        dict.fromkeys(("first", "second"), "An adapter folder or an allocation.json."),
    ),
    "report": Command(
        "the report page of a run",
        (ReportOptions,),
        _report,
        {"run": "Output folder of search, finetune or run."},
    ),
    "export": Command("an adapter as a plain LoRA", (ExportConfig,), _export),
    "import": Command(
        "an adapter of MoLA, LoRAMoE or HydraLoRA as one of guilomo", (ImportConfig,), _import
    ),
    "inspect": Command("show an adapter or allocation", (InspectOptions,), _inspect),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit status; an error a user can act on is one line."""
    argv = sys.argv[1:] if argv is None else argv
    parser, commands = _parsers()
    try:
        _take_file(argv, commands)
    except TrainError as e:
        print(f"guilomo-train {argv[0]}: error: {e}", file=sys.stderr)
        return 2
    arguments = parser.parse_args(argv)
    command = COMMANDS[arguments.command]
    try:
        paths = (getattr(arguments, name) for name in command.paths)
        command.run(*paths, *(_take(kind, arguments) for kind in command.settings))
        return 0
    except (TrainError, AdapterError) as e:
        message = str(e)
    except OSError as e:
        if e.errno not in WRITE_ERRORS:
            raise
        message = f"{e.filename or 'a file'}: cannot be written ({e.strerror})"
    except RuntimeError:
        if not _said_elsewhere(None):
            raise
        return 2  # another process ended with an error, and this one lost the connection to it
    gc.collect()  # a progress bar that the error left open ends its line when it goes
    if not _said_elsewhere(message):
        print(f"guilomo-train {arguments.command}: error: {message}", file=sys.stderr)
    return 2


def _said_elsewhere(message: str | None) -> bool:
    """Whether another process of this run has said this error; or any, for None.

    The processes that `torchrun` or `accelerate launch` started share a store, which outlives
    them; there each counts what it is about to say.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    key = f"guilomo, errors of start {os.environ['TORCHELASTIC_RESTART_COUNT']}"
    try:
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))
        if message is None:
            return store.add(key, 0) > 0
        store.add(key, 1)
        return store.add(f"{key}: {message}", 1) > 1
    except RuntimeError:  # better said twice than not at all
        return False


def _parsers() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """The parser, and those of its commands."""
    parser = ArgumentParser(prog="guilomo-train", description="Train searched LoRA-MoE adapters.")
    parser.add_argument("--version", action="version", version=guilomo_serve.__version__)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=HfArgumentParser
    )
    subparsers = {}
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(
            name, help=command.text, description=command.text, dataclass_types=command.settings
        )
        for path, text in command.paths.items():
            subparser.add_argument(path, help=text)
        subparser.add_argument(
            "--config",
            help="A YAML or JSON file of settings, or the run.json of a run; flags win over it.",
        )
        subparsers[name] = subparser
    return parser, subparsers


def _take_file(argv: list[str], commands: dict[str, ArgumentParser]) -> None:
    """Makes what the file of `--config` says the defaults of the command's flags."""
    asked = ArgumentParser(add_help=False)
    asked.add_argument("--config")
    file = asked.parse_known_args(argv[1:])[0].config
    if file is not None and argv[0] in commands:
        kinds = (kind for command in COMMANDS.values() for kind in command.settings)
        known = {f.name for kind in kinds for f in fields(kind)}
        take_settings(commands[argv[0]], read_settings(Path(file)), known, Path(file))


def _take(kind: type, arguments: Namespace) -> Any:
    return kind(**{f.name: getattr(arguments, f.name) for f in fields(kind)})


if __name__ == "__main__":
    sys.exit(main())
