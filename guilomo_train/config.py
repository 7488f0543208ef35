"""The settings of each stage. The command line, the saved run and `--help` derive from these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from guilomo_train.errors import ConfigError


def option(default: Any, text: str) -> Any:
    """A field with the text that `--help` shows."""
    return field(default=default, metadata={"help": text})


@dataclass
class CommonConfig:
    """What search and fine-tuning share: base, data, the shape of the adapter."""

    base: str = field(metadata={"help": "Base model: a folder or a hub name."})
    train: str = field(
        metadata={
            "help": "Training rows: a .jsonl file, or a data set as NAME, NAME:SPLIT or "
            "NAME:CONFIG:SPLIT. Rows have prompt and completion, or messages, or instruction, "
            "input and output."
        }
    )
    output: str = field(metadata={"help": "Folder for the results."})
    validation: str | None = option(
        None, "Rows the search validates on; by default a share of the training rows."
    )
    validation_share: float = option(
        0.2, "Share of the training rows the search validates on, without --validation."
    )
    train_rows: int | None = option(None, "Use this many training rows, drawn by the seed.")
    max_length: int = option(1024, "Tokens of a row; longer ones are cut at the end.")
    target_modules: str = option(
        "all-linear", "Linear layers to adapt, by name, with commas; 'all-linear' is all of them."
    )
    top_k: int = option(2, "Experts that a token uses in a layer.")
    lora_alpha: float = option(16.0, "Every expert is scaled by lora_alpha / max_rank.")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "Precision of the base model; auto is the one it is stored in."
    )
    quantize: Literal["none", "4bit", "8bit"] = option(
        "none", "Load the base's linear layers quantised, by bitsandbytes; the adapter is not."
    )
    gradient_checkpointing: bool = option(
        False, "Keep no activations: less memory, about a third more time."
    )
    seed: int = option(0, "Seeds data order, weights and choices: same seed, same result.")

    def __post_init__(self) -> None:
        at_least("top_k", self.top_k, 1)
        at_least("max_length", self.max_length, 2)
        if self.train_rows is not None:
            at_least("train_rows", self.train_rows, 1)
        if not 0 < self.validation_share < 1:
            raise ConfigError(f"validation_share is {self.validation_share}, expected 0 < s < 1")
        positive("lora_alpha", self.lora_alpha)

    def targets(self) -> str | list[str]:
        """`target_modules` as PEFT takes them."""
        if self.target_modules == "all-linear":
            return self.target_modules
        return [name.strip() for name in self.target_modules.split(",")]


@dataclass
class SearchConfig:
    """The bilevel search."""

    max_experts: int = option(8, "Most experts a layer can get.")
    max_rank: int = option(8, "Largest rank an expert can get.")
    order: Literal["first", "second"] = option(
        "first", "Of the hypergradient; second differentiates through the weights' step as well."
    )
    estimator: Literal["cumulative", "argmax"] = option(
        "cumulative", "How the gradient passes the choice of a count."
    )
    choice: Literal["sample", "argmax"] = option(
        "sample", "Counts in a step: drawn from their probabilities, or the most likely ones."
    )
    search_epochs: float = option(1.0, "Passes over the training rows.")
    search_batch_size: int = option(8, "Rows a step.")
    search_learning_rate: float = option(1e-3, "Of the weights.")
    selection_learning_rate: float = option(0.1, "Of the selection vectors.")
    search_balance_coefficient: float = option(0.01, "Weight of the load-balance loss.")

    def __post_init__(self) -> None:
        at_least("max_experts", self.max_experts, 1)
        at_least("max_rank", self.max_rank, 1)
        at_least("search_batch_size", self.search_batch_size, 1)
        positive("search_epochs", self.search_epochs)
        positive("search_learning_rate", self.search_learning_rate)
        positive("selection_learning_rate", self.selection_learning_rate)
        at_least("search_balance_coefficient", self.search_balance_coefficient, 0)


@dataclass
class FinetuneConfig:
    """Fine-tuning of a found allocation."""

    epochs: float = option(2.0, "Passes over the training rows.")
    batch_size: int = option(8, "Rows a step.")
    gradient_accumulation_steps: int = option(1, "Steps whose gradients are added up.")
    learning_rate: float = option(1e-3, "Of the adapter's weights.")
    lora_dropout: float = option(0.0, "Dropout on the input of the experts.")
    balance_coefficient: float = option(0.01, "Weight of the load-balance loss.")

    def __post_init__(self) -> None:
        positive("epochs", self.epochs)
        positive("learning_rate", self.learning_rate)
        at_least("batch_size", self.batch_size, 1)
        at_least("gradient_accumulation_steps", self.gradient_accumulation_steps, 1)
        at_least("balance_coefficient", self.balance_coefficient, 0)
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout is {self.lora_dropout}, expected 0 <= p < 1")


@dataclass
class EvalConfig:
    """Evaluation by greedy generation."""

    eval_rows: int | None = option(None, "Evaluate on this many rows, from the start of the file.")
    eval_batch_size: int = option(16, "Rows generated at once.")
    max_new_tokens: int = option(128, "Tokens an answer may have.")

    def __post_init__(self) -> None:
        at_least("eval_batch_size", self.eval_batch_size, 1)
        at_least("max_new_tokens", self.max_new_tokens, 1)
        if self.eval_rows is not None:
            at_least("eval_rows", self.eval_rows, 1)


def at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ConfigError(f"{name} is {value}, expected at least {least}")


def positive(name: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{name} is {value}, expected more than 0")
