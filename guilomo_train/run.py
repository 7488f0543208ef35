"""A run of `search`, `finetune` or `run`: its stages, one after another, with their files
(run_files.py).

Of several processes all train and the first writes.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import transformers
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save

from guilomo_serve.adapter import Adapter, BaseModel, read_adapter, write_adapter
from guilomo_train.adapters import put_on, write_with_whole_modules
from guilomo_train.allocation_map import heat_map, table
from guilomo_train.base import Base, load_base
from guilomo_train.checkpoints import (
    Checkpointing,
    check_same,
    checkpoints,
    describe_allocation,
    describe_rows,
    describe_start,
    half_written,
    made_with,
)
from guilomo_train.config import CommonConfig, EvalConfig, FinetuneConfig, SearchConfig, order_of
from guilomo_train.data import load_rows
from guilomo_train.errors import ConfigError, ResumeError
from guilomo_train.evaluate import evaluate, less_memory
from guilomo_train.finetuning import FinetuneResult, finetune
from guilomo_train.limits import enough_memory, replace_file
from guilomo_train.model_card import finding, model_card
from guilomo_train.processes import Sharding, processes, take_sharding_request
from guilomo_train.report import write_page
from guilomo_train.run_files import (
    ADAPTER_FOLDER,
    ALLOCATION_FILE,
    CHECKPOINT_FOLDER,
    HISTORY_FILE,
    PICTURE_FILE,
    RUN_FILE,
    SELECTION_FILE,
    START_FOLDER,
    read_json,
    write_json,
)
from guilomo_train.scoring import Scores, expected_text, hits
from guilomo_train.search.allocation import Allocation
from guilomo_train.searching import SearchResult, search
from guilomo_train.shards import check_spreading, count_parameters
from guilomo_train.versions import versions

# Their versions decide what a run results in.
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")


class Run:
    """One run of one or more stages into an output folder; `finish` ends it.

    Raises:
        TrainError: a setting, the base or the data cannot be used, or the folder has an unfinished
            run that this one is not told to resume; nothing is written then.
    """

    def __init__(
        self, command: str, common: CommonConfig, options: Mapping[str, Any] | None = None
    ) -> None:
        self.common = common
        self.output = Path(common.output)
        self.checkpoints = self.output / CHECKPOINT_FOLDER
        self.sharding = take_sharding_request()
        if self.sharding is not None:
            check_spreading(common.quantize)
        self.writes = processes().is_main_process
        if not self.writes:
            datasets.disable_progress_bars()
            transformers.logging.disable_progress_bar()
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.output):
                pass
        except OSError as e:
            raise ConfigError(
                f"--output {self.output}: no folder that can be written to ({e.strerror})"
            ) from None
        self.before = self._before(command)
        self.history: dict[str, Any] = read_json(self.output / HISTORY_FILE) if self.before else {}
        self.base = self._load_base(self.sharding)
        self.train: Dataset = load_rows(
            common.train, self.base.tokenizer, common.train_rows, common.seed,
            common.train_weights, common.loss_on,
        )  # fmt: skip
        if unusual := self.base.ending():
            say(unusual)
        self.base_parameters = count_parameters(self.base.model)
        self.linears = BaseModel.from_module(self.base.model).linears
        self.record: dict[str, Any] = {
            **(self.before or {}),
            "command": command,
            "stages": [],  # finished ones
            # What is no stage's: `options` say what to start from and to evaluate on.
            "config": {"common": asdict(common), "options": dict(options or {})},
            "train_rows": len(self.train),
            "inputs": {
                "rows of --train": describe_rows(self.train),
                "dtype": str(self.base.model.dtype).removeprefix("torch."),  # what auto was
                "number of processes": processes().num_processes,
            },
            "versions": versions(*PACKAGES),
        }

    def search_stage(self, config: SearchConfig) -> SearchResult:
        """Searches an allocation and writes it, with its picture and the search's weights."""
        if self._finished("search", config):
            say(f"search: finished before, going on with {self.output / ALLOCATION_FILE}")
            self._note("search", {})
            return SearchResult(
                Allocation.load(self.output / ALLOCATION_FILE),
                read_adapter(self.output / START_FOLDER, BaseModel.from_module(self.base.model)),
                load_file(self.output / SELECTION_FILE),
                self.record["search"]["seconds"],
                self.record["search"],
                self.history["search"],
            )
        validation = (
            load_rows(self.common.validation, self.base.tokenizer, loss_on=self.common.loss_on)
            if self.common.validation is not None
            else None
        )
        if validation is not None:
            self.record["inputs"]["rows of --validation"] = describe_rows(validation)
        order = order_of(self.common, config)
        how = "online" if order == "online" else f"{order} order"
        say(f"search: {len(self.train)} rows, {how}{self._shards()}")
        work = self.checkpoints / "search"
        checkpointing = self._checkpointing(work)
        space = (
            f"--search_batch_size ({config.search_batch_size}), "
            f"--max_experts ({config.max_experts}) or --max_rank ({config.max_rank})"
        )
        with enough_memory("the search", self._less_memory(space)):
            result = search(
                self.base, self.train, validation, self.common, config, work, checkpointing
            )
        if self.writes:
            result.allocation.save(self.output / ALLOCATION_FILE)
            heat_map(result.allocation, self.output / PICTURE_FILE)
            with replace_file(self.output / SELECTION_FILE) as partial:
                partial.write_bytes(save(result.vectors))  # save_file's are for their owner alone
            self._write_adapter(result.adapter, START_FOLDER, None)
            print(table(result.allocation))
        if told := finding(result.record):
            say(told)
        say(f"search took {result.seconds:.0f} s: {self.output / ALLOCATION_FILE}")
        facts = {"search": result.record, **self._sizes(result.allocation)}
        self._note("search", facts, result.history)
        return result

    def finetune_stage(
        self,
        allocation: Allocation,
        config: FinetuneConfig,
        search_record: dict[str, Any] | None,
        start: Adapter | None,
        dev: Dataset | None = None,
    ) -> FinetuneResult:
        """Trains the adapter, from the weights of `start` or fresh ones, and writes its folder.

        `dev` are the rows of `config.dev`.
        """
        if dev is not None:
            self.record["inputs"]["rows of --dev"] = describe_rows(dev)
        self.record["inputs"]["allocation"] = describe_allocation(allocation)
        self.record["inputs"]["start"] = describe_start(start)
        if self._finished("finetune", config):
            folder = self.output / ADAPTER_FOLDER
            say(f"fine-tuning: finished before, going on with {folder}")
            self._note("finetune", {})
            model, adapter = put_on(self.base.model, folder)
            seconds, loss = self.record["finetune_seconds"], self.record["training_loss"]
            return FinetuneResult(adapter, model, seconds, loss, self.history["finetune"])
        say(f"fine-tuning: {len(self.train)} rows, {config.epochs:g} epochs{self._shards()}")
        work = self.checkpoints / "finetune"
        checkpointing = self._checkpointing(work)
        batch = f"--batch_size ({config.batch_size}; --gradient_accumulation_steps makes up for it)"
        with enough_memory("fine-tuning", self._less_memory(batch)):
            result = finetune(
                self.base, self.train, allocation, self.common, config, work, search_record,
                start, checkpointing, dev,
            )  # fmt: skip
        self._write_adapter(result.adapter, ADAPTER_FOLDER, None, result.model)
        say(f"fine-tuning took {result.seconds:.0f} s: {self.output / ADAPTER_FOLDER}")
        facts = {
            "finetune_seconds": round(result.seconds, 1),
            "training_loss": result.loss,
            **({"best": result.best} if result.best is not None else {}),
            **self._sizes(allocation),
        }
        self._note("finetune", facts, result.history)
        return result

    def evaluate_stage(self, result: FinetuneResult, rows: Dataset, config: EvalConfig) -> None:
        """Scores the new adapter and writes the scores into its card; the first process does."""
        if not self.writes:
            return
        self.record["inputs"]["rows of --eval"] = describe_rows(rows)
        if self._finished("eval", config):
            say("evaluation: finished before")
            self._note("eval", {})
            return
        model = result.model
        if self.sharding is not None:  # it would need all processes in every step of every answer
            whole = self._load_base(sharding=None).model
            model = PeftModel.from_pretrained(whole, self.output / ADAPTER_FOLDER)
        with enough_memory("the evaluation", less_memory(config)):
            scores, texts = evaluate(model, self.base.tokenizer, rows, config)
        self._write_adapter(result.adapter, ADAPTER_FOLDER, scores, result.model)
        print(scores.sentence())
        completions = [expected_text(row) for row in rows]
        by_row = hits(texts, completions, rows["answer"])
        self._note("eval", {"scores": scores.to_json()}, by_row)

    def finish(self) -> None:
        """Puts the record of the finished run in place, writes the report page of it, and deletes
        what a resumption would need."""
        if self.before is not None and "eval" in set(self.before["stages"]) - set(
            self.record["stages"]
        ):
            # Resumed without --eval: the adapter is the one that was scored, so the scores stay,
            # with what they are scores of.
            for group in ("eval", "options"):
                self.record["config"][group] = self.before["config"][group]
            rows = "rows of --eval"
            self.record["inputs"][rows] = self.before["inputs"][rows]
            self._note("eval", {})
        if self.writes:
            os.replace(self.checkpoints / RUN_FILE, self.output / RUN_FILE)
            say(f"report: {write_page(self.output)}")
            shutil.rmtree(self.checkpoints)
        processes().destroy_process_group()

    def _load_base(self, sharding: Sharding | None) -> Base:
        common = self.common
        return load_base(
            common.base,
            common.dtype,
            common.quantize,
            sharding,
            revision=common.revision,
            trust_remote_code=common.trust_remote_code,
            attn_implementation=common.attn_implementation,
        )

    def _before(self, command: str) -> dict[str, Any] | None:
        """The record of the run to resume, as far as it came."""
        unfinished = self.checkpoints / RUN_FILE
        stages = [p.parent.name for p in self.checkpoints.glob("*/checkpoint-*/complete.json")]
        if not self.common.resume:
            if unfinished.is_file() or stages:
                raise ResumeError(
                    f"--output {self.output}: has an unfinished run; go on with it by --resume, "
                    f"or delete {self.checkpoints} to start anew"
                )
            return None
        # A finished run has left its record alone; then no stage is to be run.
        path = unfinished if unfinished.is_file() or stages else self.output / RUN_FILE
        before = read_json(path) if path.is_file() else None
        processes().wait_for_everyone()  # the first process will write there
        if before is not None and before["command"] != command:
            raise ResumeError(
                f"--resume: {path} is of `guilomo-train {before['command']}`, not of "
                f"`guilomo-train {command}`"
            )
        return before

    def _finished(self, stage: str, config: Any) -> bool:
        """Takes the settings of a stage; whether the run to resume had finished it.

        Raises:
            ResumeError: it had, with other settings.
        """
        self.record["config"][stage] = asdict(config)
        if self.before is None or stage not in self.before.get("stages", []):
            return False
        then, now = settings_of(self.before, stage), settings_of(self.record, stage)
        unfinished = self.checkpoints / RUN_FILE
        check_same(then, now, unfinished if unfinished.is_file() else self.output / RUN_FILE)
        return True

    def _checkpointing(self, folder: Path) -> Checkpointing:
        """Where a stage goes on from; what cannot be gone on from is deleted."""
        settings = settings_of(self.record, folder.name)
        found = checkpoints(folder)
        resume = found[-1] if found else None
        if resume is not None:
            check_same(made_with(resume), settings, folder)
            say(f"going on from {resume}")
        processes().wait_for_everyone()  # all have looked
        if self.writes:
            for path in half_written(folder):
                shutil.rmtree(path)
        return Checkpointing(self.common.save_steps, settings, resume)

    def _shards(self) -> str:
        if self.sharding is None:
            return ""
        by = "FSDP" if self.sharding.zero3 is None else "ZeRO-3"
        return f", base in {processes().num_processes} shards ({by})"

    def _less_memory(self, settings: str) -> str:
        """What to lower when memory runs out, beside a stage's own settings."""
        common = self.common
        remedy = f"lower {settings} or --max_length ({common.max_length})"
        if not common.gradient_checkpointing:
            remedy += ", or give --gradient_checkpointing"
        return remedy if common.quantize == "4bit" else f"{remedy}, or --quantize 4bit"

    def _write_adapter(
        self, adapter: Adapter, folder: str, scores: Scores | None, model: PeftModel | None = None
    ) -> None:
        """Args: model: has the modules that were trained whole, if any were."""
        if not self.writes:
            return
        spec = adapter.spec
        whole = [] if model is None else sorted(model.active_peft_config.modules_to_save or ())
        parameters = sum(tensor.numel() for tensor in adapter.tensors().values())
        data = f"{', '.join(self.common.train)} ({len(self.train)} rows)"
        card = model_card(spec, data, parameters, scores.to_json() if scores else None, whole)
        if model is not None and whole:
            write_with_whole_modules(model, self.output / folder, card)
        else:
            write_adapter(adapter, self.output / folder, card)

    def _sizes(self, allocation: Allocation) -> dict[str, int]:
        modules = tuple(allocation.ranks)
        return {
            "parameters": allocation.parameters(self.linears),
            "uniform_parameters": Allocation.uniform(modules, 8, 8).parameters(self.linears),
            "base_parameters": self.base_parameters,
        }

    def _note(
        self, stage: str, facts: dict[str, Any], history: dict[str, Any] | None = None
    ) -> None:
        """Adds a finished stage to the record; its checkpoints are not needed any more.

        Args:
            stage: its name.
            facts: what the record gets.
            history: what history.json gets; None leaves what it has.
        """
        self.record["stages"].append(stage)
        self.record.update(facts)
        if history is not None:
            self.history[stage] = history
        if self.writes:
            if history is not None:
                write_json(self.output / HISTORY_FILE, self.history, indent=None)
            self.checkpoints.mkdir(exist_ok=True)
            write_json(self.checkpoints / RUN_FILE, self.record)
            shutil.rmtree(self.checkpoints / stage, ignore_errors=True)


def settings_of(record: dict[str, Any], stage: str) -> dict[str, Any]:
    """All that the result of a stage depends on, as `checkpoints.check_same` compares it."""
    config = record["config"]
    return {"common": config["common"], stage: config[stage], "inputs": dict(record["inputs"])}


def say(text: str) -> None:
    """Tells people how far a run is; the first process does."""
    if processes().is_main_process:
        print(text, file=sys.stderr, flush=True)
