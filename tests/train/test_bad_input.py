"""What goes wrong ends in one line that says what to do, and leaves nothing half-written.

The command's own function runs here, in a process of its own where it needs other limits.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    OPTConfig,
    PretrainedConfig,
)
from trl import SFTConfig

from guilomo_train.cli import main
from guilomo_train.errors import ConfigError
from guilomo_train.lora_moe import LoraMoeConfig
from guilomo_train.search.allocation import Allocation
from guilomo_train.trainer import LoraMoeTrainer
from tests.train.tiny import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer

ROWS = [{"prompt": f"number {i}", "completion": "odd" if i % 2 else "even"} for i in range(44)]
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
SMALL = ["--max_experts", 2, "--max_rank", 2, "--search_epochs", 0.2]

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def allocation(tmp_path: Path) -> Path:
    path = tmp_path / "allocation.json"
    Allocation.uniform(MODULES, 2, 2).save(path)
    return path


@pytest.fixture
def refused(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a command that must fail, and gives the line it ends with."""

    def run(command: str, *arguments: Any) -> str:
        output = tmp_path / "out"
        given = ["--base", base, "--train", data, "--output", output, *arguments]
        assert main([command, *map(str, given)]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"guilomo-train {command}: error: ")
        assert not output.is_dir() or contents(output) == {}, "something was written"
        return line

    return run


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "rows.jsonl: has no rows"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt"', "rows.jsonl, line 2: not JSON"),
        ('{"text": "a"}', "rows.jsonl, line 1: has ['text'], expected prompt and completion"),
        ("\0\1\2", "rows.jsonl, line 1: not JSON"),
    ],
)
def test_rows_that_are_none(text: str, expected: str, refused: Refused, data: Path) -> None:
    data.write_text(text)
    assert expected in refused("search")


def test_rows_whose_completion_is_cut_off_are_left_out_and_counted(
    base: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = [{"prompt": "x" * 80, "completion": "y"}] * 3
    write(data, [*ROWS[:2], *long, *ROWS[2:], *long])
    given = ["--base", base, "--train", data, "--output", tmp_path / "out", "--max_length", 64]
    assert main(["search", *map(str, [*given, *SMALL])]) == 0
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "have no token of their completion within --max_length 64 (first: " in said
    assert (
        sum(int(r.getMessage().split()[0]) for r in caplog.records if "no token" in r.msg % r.args)
        == 6
    )


def test_completions_that_are_cut_are_counted(
    base: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(
        data, [*ROWS, {"prompt": "x", "completion": "y" * 80}, {"prompt": "x", "completion": "y"}]
    )
    given = ["--base", base, "--train", data, "--output", tmp_path / "out", "--max_length", 64]
    assert main(["search", *map(str, [*given, *SMALL])]) == 0
    said = [
        record.getMessage()
        for record in caplog.records
        if "teach no end" in record.msg % record.args
    ]
    assert sum(int(line.split()[0]) for line in said) == 1
    assert f"line {len(ROWS) + 1})" in said[0]


def test_a_prompt_that_ends_otherwise_than_a_whole_row_is_said(
    base: Path,
    data: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As of bases that think: an answer is asked for with `<think>`, and rows have none."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    opened = "<|im_start|>assistant\n"
    tokenizer.chat_template = CHAT_TEMPLATE.replace(f"'{opened}'", f"'{opened}<think>\n'")
    assert tokenizer.chat_template != CHAT_TEMPLATE
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "thinking")
    tokenizer.save_pretrained(tmp_path / "thinking")
    given = ["--base", tmp_path / "thinking", "--train", data]
    assert main(["search", *map(str, [*given, "--output", tmp_path / "out", *SMALL])]) == 0
    said = " ".join(record.getMessage() for record in caplog.records)
    expected = "have an end of the prompt that a whole row does not have"
    assert f"44 of 44 rows {expected}" in said
    assert f"(first: {data}, line 1), there '<think>\\n'" in said
    capsys.readouterr()
    assert main(["data", *map(str, given)]) == 0
    assert f"44 {expected}" in capsys.readouterr().out
    caplog.clear()
    given = ["--base", base, "--train", data, "--output", tmp_path / "other", *SMALL]
    assert main(["search", *map(str, given)]) == 0
    assert expected not in " ".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("option", "value"),
    [("packing_strategy", "wrapped"), ("padding_free", True), ("label_smoothing_factor", 0.1),
     ("loss_type", "dft"), ("router_aux_loss_coef", 0.01), ("dataloader_drop_last", True),
     ("data_seed", 3),
     ("train_sampling_strategy", "sequential"), ("average_tokens_across_devices", False)],
)  # fmt: skip
def test_an_option_of_other_losses_is_refused_by_name(
    option: str, value: object, tmp_path: Path
) -> None:
    args = SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    setattr(args, option, value)
    with pytest.raises(ConfigError, match=f"{option} is {value!r}, expected"):
        LoraMoeTrainer(model=None, args=args, balance_coefficient=0.0)  # type: ignore[arg-type]


def test_metrics_that_would_not_be_computed_are_refused(tmp_path: Path) -> None:
    args = SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises(ConfigError, match="compute_metrics is given"):
        LoraMoeTrainer(
            model=None,
            args=args,
            balance_coefficient=0.0,
            compute_metrics=len,  # type: ignore
        )


def test_several_gpus_in_one_process_are_refused(tmp_path: Path) -> None:
    args = SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    assert args.n_gpu <= 1
    args._n_gpu = 2
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2"):
        LoraMoeTrainer(model=None, args=args, balance_coefficient=0.0)  # type: ignore[arg-type]


def test_float16_without_loss_scaling_is_refused(tmp_path: Path) -> None:
    args = SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    model = tiny_llama(len(tiny_tokenizer())).half()
    with pytest.raises(ConfigError, match="the base is float16"):
        LoraMoeTrainer(model=model, args=args, balance_coefficient=0.0)  # type: ignore[arg-type]


def test_an_adapter_is_no_base(refused: Refused, base: Path, tmp_path: Path) -> None:
    for config in (LoraConfig(), LoraMoeConfig(num_experts=2, expert_rank=2)):
        config.target_modules = ["q_proj"]
        folder = tmp_path / type(config).__name__
        model = AutoModelForCausalLM.from_pretrained(base)
        get_peft_model(model, config).save_pretrained(folder)
        line = refused("search", "--base", folder)
        assert f"--base {folder}: is an adapter and no model" in line
        assert "finetune --start" in line


def test_a_base_without_an_end_token(refused: Refused, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "endless")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    assert "its tokenizer has no eos_token" in refused("search", "--base", tmp_path / "endless")


OPT = OPTConfig(
    vocab_size=259, hidden_size=32, word_embed_proj_dim=32, ffn_dim=32, num_hidden_layers=1,
    num_attention_heads=4, max_position_embeddings=50,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=259, n_embd=32, n_layer=1, n_head=4, n_positions=50)


@pytest.mark.parametrize(
    ("config", "embedding"), [(OPT, "embed_positions"), (GPT2, "wpe")], ids=["OPT", "GPT-2"]
)
def test_rows_longer_than_learned_positions(
    config: PretrainedConfig, embedding: str, refused: Refused, data: Path, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == config.vocab_size
    for saved in (AutoModelForCausalLM.from_config(config), tokenizer):
        saved.save_pretrained(tmp_path / "base")
    write(data, [*ROWS, {"prompt": "x" * 40, "completion": "y"}])
    line = refused("search", "--base", tmp_path / "base")
    assert re.search(rf"has 50 positions \([a-z_.]*{embedding}\)", line)
    assert "give --max_length 50 or less" in line


def test_no_completion_is_left_at_all(refused: Refused, base: Path, allocation: Path) -> None:
    line = refused("finetune", "--allocation", allocation, "--max_length", 8)
    assert "44 of 44 rows have no token of their completion within --max_length 8" in line
    assert "rows.jsonl, line 1); raise --max_length" in line


def test_too_few_rows_to_validate_on(refused: Refused, tmp_path: Path) -> None:
    few = write(tmp_path / "few.jsonl", ROWS[:3])
    expected = "3 rows to validate on are too few for a search, expected at least 8"
    assert expected in refused("search", "--validation", few)
    assert "too few for a search" in refused("search", "--validation_share", 0.1)
    assert "3 rows to validate on" in refused("search", "--train_rows", 3)


def test_an_online_search_has_no_use_for_held_out_rows(refused: Refused, tmp_path: Path) -> None:
    held_out = write(tmp_path / "held_out.jsonl", ROWS)
    for option in (("--validation", held_out), ("--validation_share", 0.2)):
        line = refused("search", "--order", "online", *option)
        assert "leave out --validation and --validation_share, or use --order first" in line
    line = refused("search", "--order", "online", "--search_epochs", 1.5)
    assert "search_epochs is 1.5, expected at most 1 with --order online" in line


@pytest.mark.parametrize("targets", ["q_proj,query", "query", r".*\.query"])
def test_an_unknown_target_module(targets: str, refused: Refused) -> None:
    line = refused("search", "--target_modules", targets)
    assert "--target_modules has " in line
    assert "query" in line
    assert "some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in line


def test_a_target_module_that_cannot_be_adapted(refused: Refused) -> None:
    line = refused("search", "--target_modules", "lm_head")
    assert "error: --target_modules: lm_head is the output layer" in line


def test_an_allocation_of_another_base(refused: Refused, tmp_path: Path) -> None:
    path, module = tmp_path / "other.json", "model.layers.7.mlp.up_proj"
    for ranks in ((2, 2), ()):  # an adapter would not name the latter
        Allocation({MODULES[0]: (2,), module: ranks}, 2, 2).save(path)
        line = refused("finetune", "--allocation", path)
        assert f"--allocation: the base has no linear layer {module!r}" in line


def test_an_allocation_without_experts(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "empty.json"
    Allocation.uniform(MODULES, 0, 2).save(path)
    line = refused("finetune", "--allocation", path)
    assert f"{path}: gives no module an expert" in line


def test_a_base_without_tokenizer(refused: Refused, tmp_path: Path) -> None:
    tiny_llama(64).save_pretrained(tmp_path / "bare")
    line = refused("search", "--base", tmp_path / "bare")
    assert "bare: has no tokenizer that can be loaded" in line


@pytest.mark.parametrize("command", ["search", "eval"])
def test_a_tokenizer_of_another_base(
    command: str, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "smaller"
    tiny_llama(200).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(folder)
    largest = max(tokenizer(CHAT_TEMPLATE + ROWS[1]["prompt"] + "<|im_start|>")["input_ids"])
    given = ["--base", folder, "--train" if command == "search" else "--data", data]
    given += ["--output", tmp_path / "out"]
    assert main([command, *map(str, given)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"--base: its tokenizer makes token {largest} (" in line
    assert "but its embedding has 200 tokens alone" in line


def test_a_chat_template_that_rejects_a_row(refused: Refused, base: Path, data: Path) -> None:
    folder = data.parent / "strict"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}" + CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    messages = [{"role": r, "content": "hello"} for r in ("system", "user", "assistant")]
    write(data, [*ROWS, {"messages": messages}])
    line = refused("search", "--base", folder)
    assert "rows.jsonl, line 45: the base's chat template rejects" in line
    assert "System role not supported" in line


def test_an_output_folder_that_cannot_be_written_to(refused: Refused, data: Path) -> None:
    for output in ("/proc/self", "/proc/nowhere", data):
        expected = f"--output {output}: no folder that can be written to ("
        assert expected in refused("search", "--output", output)


@pytest.mark.parametrize("order", ["online", "first", "second"])
def test_a_search_that_diverges_stops_in_its_step(order: str, refused: Refused) -> None:
    line = refused("search", *SMALL[:4], "--order", order, "--search_learning_rate", 1e30)
    assert re.search(
        r"loss is nan in step [2-6] of [56]: lower --search_learning_rate \(1e\+30\)", line
    )


def test_a_fine_tuning_that_diverges_stops_in_its_step(refused: Refused, allocation: Path) -> None:
    line = refused("finetune", "--allocation", allocation, "--learning_rate", 1e30)
    assert re.search(r"the loss is nan in step [34] of 12: lower --learning_rate \(1e\+30\)", line)


def test_a_base_that_gives_nan_is_not_blamed_on_the_learning_rate(
    refused: Refused, base: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    model.save_pretrained(tmp_path / "nan")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "nan")
    line = refused("search", "--base", tmp_path / "nan", *SMALL)
    assert "nan in the first step, before any weight has moved: the base itself" in line


def test_too_little_memory(refused: Refused, allocation: Path) -> None:
    line = refused("search", "--max_rank", 10**12)
    assert "out of memory in the search: lower --search_batch_size (8), --max_experts (8)" in line
    assert "--gradient_checkpointing" in line
    Allocation.uniform(MODULES, 2, 10**12).save(allocation)
    line = refused("finetune", "--allocation", allocation)
    assert "out of memory in fine-tuning: lower --batch_size (8; " in line


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_too_little_memory_on_a_gpu(refused: Refused, data: Path) -> None:
    torch.cuda.set_per_process_memory_fraction(0.0005)
    try:
        write(data, [{"prompt": "x" * 4000, "completion": "y"}] * 400)
        line = refused("search", "--search_batch_size", 256, "--max_length", 8000)
        assert "out of memory in the search: lower --search_batch_size (256)" in line
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# A limit on the size of files stands in for a full disk: both fail a write half-way.
SMALL_DISK = """
import resource, sys
from guilomo_train.cli import main
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("limit", "save_steps", "file", "reason"),
    [
        (1500, 0, "adapter_model.safetensors", "File too large"),
        (100, 0, "allocation.json", "File too large"),
        (9000, 1, "checkpoint-1", "is the disk full?"),
    ],
)
def test_a_full_disk(
    limit: int,
    save_steps: int,
    file: str,
    reason: str,
    base: Path,
    data: Path,
    allocation: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "out"
    given = ["--base", base, "--train", data, "--output", output]
    tune = ["finetune", *given, "--allocation", allocation, "--epochs", 0.2]
    assert main(list(map(str, tune))) == 0
    before = contents(output)
    again = ["search", *given, *SMALL] if file == "allocation.json" else [*tune, "--seed", 1]
    done = subprocess.run(
        [sys.executable, "-c", SMALL_DISK, *map(str, [limit, *again, "--save_steps", save_steps])],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert f"{file}: cannot be written (" in done.stderr.splitlines()[-1]
    assert reason in done.stderr.splitlines()[-1]
    assert contents(output) == before


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}
