"""The settings of each stage. The command line, the saved run and `--help` derive from these."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from guilomo_train.errors import ConfigError

# Settings that do not change a result.
WITHOUT_EFFECT = frozenset(
    {"output", "save_steps", "resume", "report_to", "gradient_checkpointing"}
)
VALIDATION_SHARE = 0.2  # of the training rows, where a search needs held-out ones
# In a run's record: what a fine-tuning began with, where no adapter was given.
FRESH = "fresh weights"


REVISION = "Branch, tag or commit of a base on the hub; the adapter records the commit."
TRUST_REMOTE_CODE = "Run Python code that comes with the base, where its architecture needs it."


def option(default: Any, text: str) -> Any:
    """A field with the text that `--help` shows."""
    return field(default=default, metadata={"help": text})


@dataclass
class RowsConfig:
    """A base and the rows that are to train on it."""

    base: str = field(metadata={"help": "Base model: a folder or a hub name."})
    train: list[str] = field(
        metadata={
            "help": "Training rows: a .jsonl, .json, .csv or .parquet file, a folder of such, or a "
            "data set as NAME, NAME:SPLIT or NAME:CONFIG:SPLIT; or several of these. Rows have "
            "prompt and completion, or messages, or conversations, or instruction, input and "
            "output, and may have tools."
        }
    )
    train_rows: int | None = option(None, "Use this many training rows, drawn by the seed.")
    train_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Shares of the training rows from each of --train, such as 3 1: as many rows "
            "as there are without one twice. By default all rows of all."
        },
    )
    loss_on: Literal["last", "all"] = option(
        "last", "Which of the assistant's turns in a row are learned: the last one, or all."
    )
    max_length: int = option(1024, "Tokens of a row; longer ones are cut at the end.")
    seed: int = option(0, "Seeds data order, weights and choices: same seed, same result.")
    revision: str | None = option(None, REVISION)
    trust_remote_code: bool = option(False, TRUST_REMOTE_CODE)

    def __post_init__(self) -> None:
        given: Any = self.train
        if isinstance(given, str):  # in Python one source needs no list
            self.train = [given]
        check_weights(self.train, self.train_weights)
        at_least("max_length", self.max_length, 2)
        if self.train_rows is not None:
            at_least("train_rows", self.train_rows, 1)
        check_seed(self.seed)


@dataclass
class CommonConfig(RowsConfig):
    """What search and fine-tuning share: base, data, the shape of the adapter."""

    output: str = field(kw_only=True, metadata={"help": "Folder for the results."})
    validation: str | None = option(None, "Held-out rows for the search to validate on.")
    validation_share: float | None = option(
        None,
        "Share of the training rows to hold out for the search to validate on; "
        f"{VALIDATION_SHARE} where it needs some.",
    )
    target_modules: str = option(
        "all-linear", "Linear layers to adapt, by name, with commas; 'all-linear' is all of them."
    )
    top_k: int = option(2, "Experts that a token uses in a layer.")
    lora_alpha: float = option(16.0, "Every expert is scaled by lora_alpha / max_rank.")
    use_rslora: bool = option(
        False, "Scale by lora_alpha / sqrt(max_rank) instead (rsLoRA, arXiv 2312.03732)."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "Precision of the base model; auto is the one it is stored in, or float32 on a CPU without "
        "AVX-512, which is many times faster there.",
    )
    quantize: Literal["none", "4bit", "8bit"] = option(
        "none", "Load the base's linear layers quantised, by bitsandbytes; the adapter is not."
    )
    attn_implementation: str | None = option(
        None,
        "How the base computes attention: eager, sdpa, flash_attention_2 or what else transformers "
        "knows; by default what it chooses.",
    )
    gradient_checkpointing: bool = option(
        False, "Keep no activations: less memory, about a third more time."
    )
    save_steps: int = option(
        50,
        "Steps between two checkpoints under OUTPUT/checkpoints, of which two are kept; 0: none.",
    )
    resume: bool = option(
        False,
        "Go on with what stands in --output: finished stages are not run again, the others go on "
        "from their newest complete checkpoint, or start where there is none. Without it an "
        "--output with an unfinished run is refused.",
    )
    report_to: Literal["none", "tensorboard", "wandb", "mlflow"] = option(
        "none",
        "Log as well to TensorBoard, below <output>/logs, or to Weights & Biases or MLflow, which "
        "read their own environment (WANDB_PROJECT, MLFLOW_TRACKING_URI, ...).",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("top_k", self.top_k, 1)
        at_least("save_steps", self.save_steps, 0)
        if self.validation_share is not None and not 0 < self.validation_share < 1:
            raise ConfigError(f"validation_share is {self.validation_share}, expected 0 < s < 1")
        positive("lora_alpha", self.lora_alpha)
        if self.report_to != "none" and find_spec(self.report_to) is None:
            raise ConfigError(
                f"report_to is {self.report_to!r}, but that package is not installed: "
                f"pip install {self.report_to}"
            )

    def targets(self) -> str | list[str]:
        """`target_modules` as PEFT takes them."""
        return targets_of(self.target_modules)

    def alpha(self, max_rank: int) -> float:
        """What divided by `max_rank` is the scaling of every expert."""
        return self.lora_alpha * max_rank**0.5 if self.use_rslora else self.lora_alpha


@dataclass
class PreviewConfig(RowsConfig):
    """Rows to look at as training would read them."""

    show: int = option(3, "Rows to show.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("show", self.show, 0)


@dataclass
class SearchConfig:
    """The bilevel search."""

    max_experts: int = option(8, "Most experts a layer can get.")
    max_rank: int = option(8, "Largest rank an expert can get.")
    order: Literal["auto", "online", "first", "second"] = option(
        "auto",
        "Where the vectors' gradient comes from: each training batch before the weights learn it "
        "(online, no further pass), or held-out rows, second differentiating through the weights' "
        "step as well. auto is online, or first where rows are held out (--validation, "
        "--validation_share) or seen again (--search_epochs above 1).",
    )
    estimator: Literal["marginal", "cumulative", "argmax"] = option(
        "marginal",
        "How the selection vectors learn: from what one more expert or rank is worth (marginal), "
        "or by Adam, its gradient passed to all counts (cumulative) or to the chosen one (argmax).",
    )
    choice: Literal["sample", "argmax"] = option(
        "sample", "Counts in a step: drawn from their probabilities, or the most likely ones."
    )
    budget: str | None = option(
        None,
        "Size of the adapter: a share of the base's parameters (0.01) or a number of parameters; "
        "with --budget_in latency a share of the serving time of the largest layers. By default a "
        "third of the largest layers.",
    )
    budget_in: Literal["parameters", "latency"] = option(
        "parameters", "What the budget counts: parameters, or the time of serving."
    )
    prices: str | None = option(
        None,
        "What a layer's experts and rank rows cost in serving: a result of "
        "benchmarks/serving_prices.py, for --budget_in latency.",
    )
    search_epochs: float = option(1.0, "Passes over the training rows.")
    search_batch_size: int = option(8, "Rows at once, in each process.")
    search_gradient_accumulation_steps: int = option(
        1, "Batches whose gradients are added up to one step."
    )
    search_learning_rate: float = option(1e-3, "Of the weights.")
    selection_learning_rate: float = option(
        0.1, "Of the selection vectors, where the estimator is cumulative or argmax."
    )
    search_balance_coefficient: float = option(0.01, "Weight of the load-balance loss.")

    def __post_init__(self) -> None:
        at_least("max_experts", self.max_experts, 1)
        at_least("max_rank", self.max_rank, 1)
        if (self.budget_in == "latency") != (self.prices is not None):
            raise ConfigError(
                f"budget_in is {self.budget_in} and prices is {self.prices}, expected prices with "
                "budget_in latency alone"
            )
        at_least("search_batch_size", self.search_batch_size, 1)
        at_least("search_gradient_accumulation_steps", self.search_gradient_accumulation_steps, 1)
        positive("search_epochs", self.search_epochs)
        if self.order == "online" and self.search_epochs > 1:
            raise ConfigError(
                f"search_epochs is {self.search_epochs:g}, expected at most 1 with --order online: "
                "a second pass would validate on rows that were learned; use --order first"
            )
        positive("search_learning_rate", self.search_learning_rate)
        positive("selection_learning_rate", self.selection_learning_rate)
        at_least("search_balance_coefficient", self.search_balance_coefficient, 0)


def order_of(common: CommonConfig, search: SearchConfig) -> Literal["online", "first", "second"]:
    """A search's `order`, without `auto`.

    Raises:
        ConfigError: rows are held out for an online search, which has no use for them.
    """
    held_out = common.validation is not None or common.validation_share is not None
    if search.order == "auto":
        return "first" if held_out or search.search_epochs > 1 else "online"
    if search.order == "online" and held_out:
        raise ConfigError(
            "order is online, which validates on the training rows themselves: leave out "
            "--validation and --validation_share, or use --order first"
        )
    return search.order


@dataclass
class FinetuneConfig:
    """Fine-tuning of a found allocation."""

    epochs: float = option(2.0, "Passes over the training rows.")
    batch_size: int = option(8, "Rows at once, in each process.")
    gradient_accumulation_steps: int = option(
        1, "Batches whose gradients are added up to one step."
    )
    packing: bool = option(
        False,
        "Put whole rows one after another, up to --max_length tokens, that do not see one another: "
        "no padding. --batch_size then counts packed rows. A search before it is not packed.",
    )
    learning_rate: float = option(1e-3, "Of the adapter's weights, at its highest.")
    lr_scheduler_type: Literal[
        "linear", "cosine", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = option("cosine", "How the learning rate goes over the steps.")
    warmup_steps: float = option(
        0.05, "Steps over which the learning rate rises; below 1 a share of all steps."
    )
    weight_decay: float = option(0.0, "Of AdamW, on the adapter's weights.")
    max_grad_norm: float = option(1.0, "The gradient's norm is cut to this; 0 leaves it as it is.")
    dev: str | None = option(
        None,
        "Held-out rows, in any form that --train takes, whose loss is logged while fine-tuning.",
    )
    eval_steps: int | None = option(
        None, "Steps between two looks at --dev; by default one after each epoch."
    )
    load_best_model_at_end: bool = option(
        False, "End with the weights that had the lowest loss on --dev, not with the last ones."
    )
    early_stopping_patience: int | None = option(
        None,
        "End when the loss on --dev has not fallen for so many looks; the best weights are taken.",
    )
    lora_dropout: float = option(0.0, "Dropout on the input of the experts.")
    modules_to_save: str | None = option(
        None,
        "Modules of the base to train whole beside the experts, by name, with commas: embed_tokens "
        "and lm_head for tokens that are new to it. PEFT loads such an adapter; servers refuse it.",
    )
    balance_coefficient: float = option(0.01, "Weight of the load-balance loss.")

    def __post_init__(self) -> None:
        positive("epochs", self.epochs)
        positive("learning_rate", self.learning_rate)
        at_least("batch_size", self.batch_size, 1)
        at_least("gradient_accumulation_steps", self.gradient_accumulation_steps, 1)
        at_least("balance_coefficient", self.balance_coefficient, 0)
        for name in ("warmup_steps", "weight_decay", "max_grad_norm"):
            at_least(name, getattr(self, name), 0)
        for name in ("eval_steps", "early_stopping_patience"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        looks = (self.eval_steps, self.load_best_model_at_end, self.early_stopping_patience)
        if self.dev is None and looks != (None, False, None):
            raise ConfigError(
                "eval_steps, load_best_model_at_end and early_stopping_patience look at rows of "
                "--dev, which is not given"
            )
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout is {self.lora_dropout}, expected 0 <= p < 1")

    def whole_modules(self) -> list[str] | None:
        """`modules_to_save` as PEFT takes them."""
        return names_of(self.modules_to_save) if self.modules_to_save is not None else None


@dataclass
class EvalConfig:
    """Evaluation by greedy generation."""

    eval_rows: int | None = option(None, "Evaluate on this many rows, the same ones each time.")
    eval_batch_size: int = option(16, "Rows generated at once.")
    max_new_tokens: int = option(128, "Tokens an answer may have.")

    def __post_init__(self) -> None:
        at_least("eval_batch_size", self.eval_batch_size, 1)
        at_least("max_new_tokens", self.max_new_tokens, 1)
        if self.eval_rows is not None:
            at_least("eval_rows", self.eval_rows, 1)


@dataclass
class PlanConfig:
    """What a plan assumes of machine and data, where it is not to find out."""

    processes: int = option(1, "Processes that train, each with a device of its own.")
    fsdp: bool = option(False, "The base is spread over the processes, by FSDP or ZeRO-3.")
    tokens: int | None = option(
        None, "Tokens of all training rows; then neither --train nor a tokenizer is read."
    )
    rate: float | None = option(
        None,
        "Tokens a second of one process, such as a run's progress line has; by default blocks of "
        "the base are measured here.",
    )
    json: str | None = option(None, "Write the plan into this file, too.")

    def __post_init__(self) -> None:
        at_least("processes", self.processes, 1)
        if self.tokens is not None:
            at_least("tokens", self.tokens, 1)
        if self.rate is not None:
            positive("rate", self.rate)
        if self.fsdp and self.processes == 1:
            raise ConfigError("fsdp is given with one process, expected --processes 2 or more")


@dataclass
class PushConfig:
    """An adapter for the Hugging Face Hub."""

    adapter: str = field(metadata={"help": "Adapter folder."})
    repo: str = field(metadata={"help": "OWNER/NAME on the Hub; made where there is none."})
    base: str | None = option(
        None, "The base's name on the Hub, where the adapter was trained on a local folder."
    )
    private: bool = option(False, "Make a new repository private.")

    def __post_init__(self) -> None:
        if len(self.repo.split("/")) != 2 or not all(self.repo.split("/")):
            raise ConfigError(f"repo is {self.repo!r}, expected OWNER/NAME")


@dataclass
class ExportConfig:
    """A LoRA-MoE adapter as a plain LoRA."""

    adapter: str = field(metadata={"help": "Adapter folder."})
    output: str = field(metadata={"help": "Folder for the LoRA."})
    base: str | None = option(None, "Base model, where modules have several experts.")
    data: str | None = option(None, "Rows over which the LoRA is to be near the adapter.")
    rank: int | None = option(None, "At most this rank; by default the adapter's largest.")
    rows: int | None = option(None, "Use this many of the rows.")
    batch_size: int = option(8, "Rows at once.")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "Precision of the base model.")

    def __post_init__(self) -> None:
        at_least("batch_size", self.batch_size, 1)
        for name in ("rank", "rows"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)


@dataclass
class ImportConfig:
    """An adapter that MoLA, LoRAMoE or HydraLoRA trained, as one of guilomo."""

    adapter: str = field(metadata={"help": "Folder with adapter_config.json and the weights."})
    base: str = field(
        metadata={"help": "The base that it was trained on: a folder or a hub name; no weights."}
    )
    output: str = field(metadata={"help": "Folder for the adapter."})
    top_k: str | None = option(
        None,
        "MoLA: experts that a token uses, a number or one a layer (2,2,2,...): its files do not "
        "have it.",
    )
    revision: str | None = option(None, REVISION)
    trust_remote_code: bool = option(False, TRUST_REMOTE_CODE)

    def __post_init__(self) -> None:
        if self.top_k is not None and not re.fullmatch("[1-9][0-9]*(,[1-9][0-9]*)*", self.top_k):
            raise ConfigError(
                f"top_k is {self.top_k!r}, expected a number >= 1, or such with commas between them"
            )
        if Path(self.output).resolve() == Path(self.adapter).resolve():
            raise ConfigError(f"output is {self.output!r}, expected another folder than --adapter")


@dataclass
class BaselineConfig:
    """An allocation made without a search, to compare a searched one with."""

    base: str = field(metadata={"help": "Base model: a folder or a hub name; weights not needed."})
    kind: Literal["lora", "uniform", "mola-2468", "mola-8642", "mola-5555", "random", "authors"] = (
        field(
            metadata={
                "help": "lora: one expert a layer; uniform: the same experts everywhere; mola-*: "
                "so many experts in each quarter of the layers; random: drawn at a size; authors: "
                "rank.json and expert.json of the GuiLoMo release."
            }
        )
    )
    output: str = field(metadata={"help": "The allocation.json to write."})
    experts: int = option(8, "Experts of a layer (uniform), the most of a layer (random).")
    rank: int = option(
        8, "Rank of an expert, the largest (random), or where a size fits the ranks, their scale."
    )
    top_k: int = option(2, "Experts that a token uses in a layer; lora has one.")
    target_modules: str | None = option(
        None, "Linear layers to adapt, as in training; by default those of --like, or all-linear."
    )
    budget: str | None = option(
        None, "Size: a share of the base's parameters (0.01) or a number of parameters."
    )
    like: str | None = option(
        None, "Size: that of this allocation.json; its top_k and largest rank hold too."
    )
    rank_file: str | None = option(None, "authors: their rank.json.")
    expert_file: str | None = option(None, "authors: their expert.json.")
    seed: int = option(0, "random: another seed, another allocation.")
    revision: str | None = option(None, REVISION)
    trust_remote_code: bool = option(False, TRUST_REMOTE_CODE)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name in ("experts", "rank", "top_k"):
            at_least(name, getattr(self, name), 1)
        if self.budget is not None and self.like is not None:
            raise ConfigError("budget and like are both given, expected one size")
        sized = self.budget is not None or self.like is not None
        if self.kind == "random" and not sized:
            raise ConfigError("kind random needs a size: --budget or --like")
        files = (self.rank_file, self.expert_file)
        if self.kind == "authors" and (None in files or sized):
            raise ConfigError("kind authors needs --rank_file and --expert_file, and no size")
        if self.kind != "authors" and files != (None, None):
            raise ConfigError(f"rank_file and expert_file are of kind authors, not {self.kind}")


def targets_of(target_modules: str) -> str | list[str]:
    """`target_modules` of the command line as PEFT takes them."""
    if target_modules == "all-linear":
        return target_modules
    return names_of(target_modules)


def names_of(text: str) -> list[str]:
    """Names with commas between them."""
    return [name.strip() for name in text.split(",")]


def at_least(name: str, value: float, least: float) -> None:
    if not least <= value < math.inf:
        raise ConfigError(f"{name} is {value}, expected at least {least}")


def positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} is {value}, expected more than 0")


def check_weights(train: list[str], weights: list[float] | None) -> None:
    """Shares of several sources."""
    if weights is None:
        return
    if len(weights) != len(train):
        raise ConfigError(
            f"train_weights has {len(weights)} numbers, expected one for each of the {len(train)} "
            "of --train"
        )
    for weight in weights:
        positive("train_weights", weight)


def check_seed(seed: int) -> None:
    """As numpy takes it, which draws the order of rows."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed is {seed}, expected 0 to {2**32 - 1}")
