"""The stages with their files: what each command of `guilomo-train` does.

<output>/allocation.json   the allocation a search found
<output>/allocation.png    its heat map
<output>/adapter/          the adapter folder
<output>/run.json          settings, seed, versions, times, scores
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel

import guilomo_serve
from guilomo_serve.adapter import BaseModel, read_adapter, write_adapter
from guilomo_train.config import CommonConfig, EvalConfig, FinetuneConfig, SearchConfig
from guilomo_train.data import load_rows
from guilomo_train.errors import ConfigError
from guilomo_train.evaluate import Scores, evaluate
from guilomo_train.finetune import FinetuneResult, finetune
from guilomo_train.limits import enough_memory, replace_file
from guilomo_train.models import Base, load_base
from guilomo_train.report import heat_map, model_card, table
from guilomo_train.search.allocation import Allocation
from guilomo_train.search.search import SearchResult, search

ALLOCATION_FILE = "allocation.json"
PICTURE_FILE = "allocation.png"
ADAPTER_FOLDER = "adapter"
RUN_FILE = "run.json"


class Run:
    """One run of one or more stages into an output folder.

    Raises:
        TrainError: a setting, the base or the data cannot be used; nothing is written then.
    """

    def __init__(self, command: str, common: CommonConfig) -> None:
        self.common = common
        self.output = Path(common.output)
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.output):
                pass
        except OSError as e:
            raise ConfigError(
                f"--output {self.output}: no folder that can be written to ({e.strerror})"
            ) from None
        self.base: Base = load_base(common.base, common.dtype, common.quantize)
        self.train: Dataset = load_rows(
            common.train, self.base.tokenizer, common.train_rows, common.seed
        )
        self.linears = BaseModel.from_module(self.base.model).linears
        self.record: dict[str, Any] = {
            "command": command,
            "config": {"common": asdict(common)},
            "train_rows": len(self.train),
            "versions": versions(),
        }

    def search(self, config: SearchConfig) -> SearchResult:
        """Searches an allocation and writes it with its picture."""
        say(f"search: {len(self.train)} rows, {config.order} order")
        validation = (
            load_rows(self.common.validation, self.base.tokenizer)
            if self.common.validation is not None
            else None
        )
        space = (
            f"--search_batch_size ({config.search_batch_size}), "
            f"--max_experts ({config.max_experts}) or --max_rank ({config.max_rank})"
        )
        with (
            enough_memory("the search", self._less_memory(space)),
            tempfile.TemporaryDirectory() as work,
        ):
            result = search(self.base, self.train, validation, self.common, config, Path(work))
        result.allocation.save(self.output / ALLOCATION_FILE)
        heat_map(result.allocation, self.output / PICTURE_FILE)
        print(table(result.allocation))
        say(f"search took {result.seconds:.0f} s: {self.output / ALLOCATION_FILE}")
        self._note("search", config, {"search": result.record})
        return result

    def finetune(
        self, allocation: Allocation, config: FinetuneConfig, search_record: dict[str, Any] | None
    ) -> FinetuneResult:
        """Trains the adapter and writes its folder."""
        say(f"fine-tuning: {len(self.train)} rows, {config.epochs:g} epochs")
        batch = f"--batch_size ({config.batch_size}; --gradient_accumulation_steps makes up for it)"
        with (
            enough_memory("fine-tuning", self._less_memory(batch)),
            tempfile.TemporaryDirectory() as work,
        ):
            result = finetune(
                self.base, self.train, allocation, self.common, config, Path(work), search_record
            )
        self._write_adapter(result, None)
        say(f"fine-tuning took {result.seconds:.0f} s: {self.output / ADAPTER_FOLDER}")
        facts = {
            "finetune_seconds": round(result.seconds, 1),
            "training_loss": result.loss,
            "parameters": allocation.parameters(self.linears),
        }
        self._note("finetune", config, facts)
        return result

    def evaluate(self, result: FinetuneResult, rows: Dataset, config: EvalConfig) -> Scores:
        """Scores the new adapter and writes the scores into its card."""
        with enough_memory("the evaluation", less_memory(config)):
            scores, _ = evaluate(result.model, self.base.tokenizer, rows, config)
        self._write_adapter(result, scores)
        print(score_line(scores))
        self._note("eval", config, {"scores": scores.to_json()})
        return scores

    def _less_memory(self, settings: str) -> str:
        """What to lower when memory runs out, beside a stage's own settings."""
        common = self.common
        remedy = f"lower {settings} or --max_length ({common.max_length})"
        if not common.gradient_checkpointing:
            remedy += ", or give --gradient_checkpointing"
        return remedy if common.quantize == "4bit" else f"{remedy}, or --quantize 4bit"

    def _write_adapter(self, result: FinetuneResult, scores: Scores | None) -> None:
        spec = result.adapter.spec
        parameters = sum(
            t.numel()
            for w in result.adapter.weights.values()
            for t in (w.lora_a, w.lora_b, w.router)
            if t is not None
        )
        data = f"{self.common.train} ({len(self.train)} rows)"
        card = model_card(spec, data, parameters, scores.to_json() if scores else None)
        write_adapter(result.adapter, self.output / ADAPTER_FOLDER, card)

    def _note(self, stage: str, config: Any, facts: dict[str, Any]) -> None:
        """Adds a finished stage to run.json."""
        self.record["config"][stage] = asdict(config)
        self.record.update(facts)
        write_json(self.output / RUN_FILE, self.record)


def evaluate_adapter(
    base_name: str,
    data: str,
    adapter: str | None,
    dtype: str,
    config: EvalConfig,
    quantize: str = "none",
) -> tuple[Scores, list[dict[str, str]]]:
    """Scores an adapter folder, or the base alone.

    Returns:
        The scores and, for each row, what was generated and what was expected.

    Raises:
        TrainError, AdapterError: the base, the data or the adapter cannot be used.
    """
    base = load_base(base_name, dtype, quantize)
    rows = load_rows(data, base.tokenizer, config.eval_rows)
    model: Any = base.model
    if adapter is not None:
        read_adapter(adapter, BaseModel.from_module(base.model))  # refuses what PEFT would not
        model = PeftModel.from_pretrained(base.model, adapter)
    with enough_memory("the evaluation", less_memory(config)):
        scores, texts = evaluate(model, base.tokenizer, rows, config)
    answers = [
        {"generated": text, "answer": answer}
        for text, answer in zip(texts, rows["answer"], strict=True)
    ]
    return scores, answers


def less_memory(config: EvalConfig) -> str:
    """What to lower when memory runs out in an evaluation."""
    return (
        f"lower --eval_batch_size ({config.eval_batch_size}) "
        f"or --max_new_tokens ({config.max_new_tokens})"
    )


def score_line(scores: Scores) -> str:
    return (
        f"{scores.rows} rows: exact match {scores.exact_match:.3f}, accuracy "
        f"{scores.accuracy:.3f} (most frequent answer alone {scores.majority:.3f})"
    )


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    packages = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
    return {
        "guilomo": guilomo_serve.__version__,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file; one of that name is replaced only when all is written."""
    with replace_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
