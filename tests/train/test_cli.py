"""`guilomo-train` as a user runs it, on a tiny model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import MISSING, Field, fields
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from guilomo_serve.adapter import read_adapter
from guilomo_train import base
from guilomo_train.base import load_base
from guilomo_train.cli import COMMANDS, main
from guilomo_train.errors import TrainError
from guilomo_train.search.allocation import Allocation

ROWS = [{"prompt": f"number {i}", "completion": "odd" if i % 2 else "even"} for i in range(48)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "parity.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    return path


def guilomo_train(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own. It starts for longer than it runs: once is enough."""
    command = [sys.executable, "-m", "guilomo_train.cli", *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env=env
    )


def call(*arguments: object) -> int:
    return main([str(item) for item in arguments])


def settings(base: Path, data: Path, output: Path) -> list[object]:
    return [
        "--base", base, "--train", data, "--output", output,
        "--max_experts", 3, "--max_rank", 2, "--search_batch_size", 4,
    ]  # fmt: skip


def test_run_makes_an_adapter_and_the_same_seed_makes_the_same(
    tiny_base: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    outputs = [tmp_path / "one", tmp_path / "two"]
    commands = [
        [
            "run", *settings(tiny_base, data, output), "--order", "second", "--epochs", 1,
            "--eval", data, "--eval_rows", 8, "--max_new_tokens", 2,
        ]
        for output in outputs
    ]  # fmt: skip
    # In another process: what was done before in one must not matter.
    done = guilomo_train(*commands[0])
    assert done.returncode == 0, done.stderr
    assert "exact match" in done.stdout
    assert "self_attn" not in done.stdout
    assert call(*commands[1]) == 0
    one, two = ((o / "allocation.json").read_text() for o in outputs)
    assert one == two
    assert outputs[0].joinpath("allocation.png").read_bytes()[:4] == b"\x89PNG"
    modes = {path.stat().st_mode for path in outputs[0].iterdir() if path.is_file()}
    assert len(modes) == 1, "who may read one of the files may read all"

    adapter = read_adapter(outputs[0] / "adapter")
    found = json.loads(one)["ranks"]
    assert {m: [e.rank for e in listed] for m, listed in adapter.spec.experts.items()} == found
    assert adapter.spec.search is not None
    assert adapter.spec.search["order"] == "second"
    other = read_adapter(outputs[1] / "adapter")
    for module, weights in adapter.weights.items():
        assert weights.lora_b.abs().max() > 0
        assert weights.lora_b.equal(other.weights[module].lora_b)
    run = json.loads((outputs[0] / "run.json").read_text())
    assert run["config"]["common"]["seed"] == 0
    assert run["versions"]["torch"]
    assert run["scores"]["rows"] == 8
    assert "# LoRA-MoE adapter" in (outputs[0] / "adapter" / "README.md").read_text()

    # Resumed without --eval the scores stay, with all that they are scores of.
    assert call("run", *settings(tiny_base, data, outputs[0]), "--order", "second", "--epochs", 1,
                "--resume") == 0  # fmt: skip
    again = json.loads((outputs[0] / "run.json").read_text())
    again["config"]["common"]["resume"] = False
    for part in ("scores", "inputs", "config", "stages"):
        assert again[part] == run[part], part
    capsys.readouterr()

    # Another seed draws other counts.
    third = tmp_path / "three"
    search = ["search", *settings(tiny_base, data, third), "--seed", 1, "--budget", 5000]
    assert call(*search) == 0
    assert (third / "allocation.json").read_text() != one
    searched = json.loads((third / "run.json").read_text())
    assert 0.95 * 5000 <= searched["parameters"] <= 5000
    assert searched["search"]["order"] == "online"

    # The stages by hand, from the allocation that was found.
    tuned = tmp_path / "tuned"
    assert call(
        "finetune", "--base", tiny_base, "--train", data, "--output", tuned,
        "--allocation", third / "allocation.json", "--epochs", 1,
    ) == 0  # fmt: skip
    scores = tmp_path / "scores.json"
    assert call(
        "eval", "--base", tiny_base, "--data", data, "--adapter", tuned / "adapter",
        "--eval_rows", 4, "--max_new_tokens", 2, "--output", scores,
    ) == 0  # fmt: skip
    assert len(json.loads(scores.read_text())["answers"]) == 4
    capsys.readouterr()
    assert call("inspect", "--path", tuned / "adapter", "--png", tmp_path / "map.png") == 0
    assert "14 modules" in capsys.readouterr().out
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_a_half_precision_base_is_loaded_as_this_machine_is_fast(
    tiny_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_base).bfloat16().save_pretrained(half)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(half)
    found = {}
    for is_slow in (True, False):
        monkeypatch.setattr(base, "half_precision_is_slow", lambda slow=is_slow: slow)
        found[is_slow] = [
            load_base(str(half), dtype).model.dtype for dtype in ("auto", "float32", "bfloat16")
        ]
    assert found[True] == [torch.float32, torch.float32, torch.bfloat16]
    assert found[False] == [torch.bfloat16, torch.float32, torch.bfloat16]

    # A run that goes on elsewhere must not go on in another precision.
    search = ["search", *settings(half, data, tmp_path / "out"), "--search_epochs", 0.2]
    assert call(*search) == 0
    monkeypatch.setattr(base, "half_precision_is_slow", lambda: True)
    assert call(*search, "--resume") == 2
    assert "--resume: dtype is 'float32', but" in capsys.readouterr().err.splitlines()[-1]


def test_a_search_keeps_to_a_budget_of_serving_time(
    tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    linears = base.sizes_of(str(tiny_base), "all-linear")
    shapes = {"x".join(map(str, shape)) for shape in linears.linears.values()}
    prices = {shape: {"present": 2e-6, "row": 1e-6, "router": 5e-7} for shape in shapes}
    file = tmp_path / "prices.json"
    file.write_text(json.dumps({"result": {"shapes": prices}}))
    output = tmp_path / "out"
    given = [*settings(tiny_base, data, output), "--budget_in", "latency", "--prices", file]
    assert call("search", *given, "--budget", 0.25, "--search_epochs", 0.25) == 0
    record = json.loads((output / "run.json").read_text())["search"]
    modules = len(linears.adapted)
    assert record["budget"] == pytest.approx(modules * (2e-6 + 6e-6 + 1.5e-6) / 4)
    ranks = json.loads((output / "allocation.json").read_text())["ranks"]
    seconds = sum(
        (2e-6 if r else 0) + 1e-6 * sum(r) + (5e-7 * len(r) if len(r) > 1 else 0)
        for r in ranks.values()
    )
    assert record["budget"] - 2e-6 - 2e-6 < seconds <= record["budget"]
    assert record["told_apart"] is False  # three steps have eight ways to set their signs
    assert "Nothing found: the data do not tell layers apart" in (output / "report.md").read_text()
    assert call("search", *given, "--budget", 2, "--output", tmp_path / "other") == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--train", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--base", "nowhere"], "--base nowhere: not a causal language model"),
        (["--top_k", "0"], "top_k is 0, expected at least 1"),
        (["--revision", "main"], "is a folder, of which there is one version"),
        (["--seed", "-1"], "seed is -1, expected 0 to 4294967295"),
        (["--search_epochs", "inf"], "search_epochs is inf, expected more than 0"),
        (["--search_balance_coefficient", "inf"], "expected at least 0"),
        (["--train_rows", "7"], "too few for a search"),
        (["--target_modules", "query"], "target_modules"),
        (["--budget", "half"], "budget is 'half', expected a share"),
        (
            ["--budget", "10"],
            "budget is 10, which is 10 parameters, expected 48 ",
        ),
        (["--budget_in", "latency"], "budget_in is latency and prices is None, expected prices"),
        (["--prices", "p.json"], "budget_in is parameters and prices is p.json, expected prices"),
        (
            ["--budget_in", "latency", "--prices", "nowhere.json"],
            "prices nowhere.json: no result of benchmarks/serving_prices.py",
        ),
    ],
)
def test_a_wrong_setting_is_one_line(
    change: list[str],
    message: str,
    tiny_base: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call("search", *settings(tiny_base, data, tmp_path / "out"), *change) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "out").glob("*")), "nothing is written"


@pytest.mark.parametrize(
    "kind", sorted({k for c in COMMANDS.values() for k in c.settings}, key=str)
)
def test_every_number_has_a_range(kind: type) -> None:
    """A flag that is out of it is refused before anything is read."""
    given = {"train": ["x"], "kind": "uniform", "repo": "some/one", "adapter": "other"}
    needed = {f.name: given.get(f.name, "x") for f in fields(kind) if _has_no_default(f)}
    kind(**needed)
    for name, hint in get_type_hints(kind).items():
        kinds = get_args(hint) or (hint,)
        for value in (-1, *((math.nan, math.inf) if float in kinds else ())):
            if int in kinds or float in kinds:
                with pytest.raises(TrainError, match=name):
                    kind(**{**needed, name: value})


def _has_no_default(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def test_a_precision_that_there_is_not_is_refused_by_the_parser(
    tiny_base: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        call("eval", "--base", tiny_base, "--data", data, "--dtype", "bf16")
    assert "invalid choice: 'bf16' (choose from 'auto', 'float32'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("order", "estimator"),
    [*product(["online"], ["marginal", "cumulative", "argmax"]),
     ("first", "marginal"), ("second", "cumulative")],
)  # fmt: skip
def test_ranks_alone_are_searched(
    order: str, estimator: str, tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    """With one expert a module there is no router to choose with or to balance."""
    given = ["--base", tiny_base, "--train", data, "--output", tmp_path / "out", "--max_rank", 3]
    given += ["--max_experts", 1, "--search_epochs", 0.2, "--order", order]
    assert call("search", *given, "--estimator", estimator) == 0
    found = Allocation.load(tmp_path / "out" / "allocation.json")
    assert all(len(ranks) <= 1 for ranks in found.ranks.values())
    assert found.adapted


def test_one_file_says_a_run_flags_win_and_its_run_json_repeats_it(
    tiny_base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"base: {tiny_base}\ntrain: {data}\noutput: {tmp_path / 'first'}\n"
        "target_modules: [q_proj, v_proj]\nmax-experts: 3\nmax_rank: 2\nsearch_epochs: 0.5\n"
        "search_batch_size: 2\nsearch_gradient_accumulation_steps: 2\nlearning_rate: 1e-3\n"
        "epochs: 3\nbatch_size: 4\nlr_scheduler_type: linear\nwarmup_steps: 2\n"
        f"weight_decay: 0.1\nmax_grad_norm: 0.5\ndev: {data}\neval_steps: 4\n"
        f"early_stopping_patience: 1\neval: {data}\neval_rows: 4\nmax_new_tokens: 2\n"
        "report_to: tensorboard\nadapter: null\nbudget: 300\n"  # budget is of baseline too
        "use_rslora: true\nlora_alpha: 8\n"
    )
    # The rate of 2 spoils the weights, so that the first look at --dev stays the best.
    given = ["--config", config, "--learning_rate", 2, "--seed", 3]
    assert call("run", *given) == 0
    first = tmp_path / "first"
    run = json.loads((first / "run.json").read_text())
    assert run["config"]["common"]["seed"] == 3
    assert run["config"]["common"]["target_modules"] == "q_proj,v_proj"
    assert run["config"]["finetune"]["learning_rate"] == 2
    assert run["search"]["steps"] == 6  # half of 48 rows by 2 parts of 2
    for folder in ("start", "adapter"):
        experts = read_adapter(first / folder).spec.experts.values()
        scalings = {round(e.scaling, 6) for listed in experts for e in listed}
        assert scalings == {5.656854}  # 8 / sqrt(2)
    log = json.loads((first / "history.json").read_text())["finetune"]["log"]
    looks = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    assert run["best"] == {"step": min(looks, key=looks.get), "dev_loss": min(looks.values())}
    assert max(looks) < 36, "it stopped before the end"
    assert any("tokens_per_second" in entry for entry in log)
    # The weights are those of the best look: the same rows have its loss.
    scores = tmp_path / "scores.json"
    assert call("eval", "--base", tiny_base, "--data", data, "--adapter", first / "adapter",
                "--max_new_tokens", 1, "--output", scores) == 0  # fmt: skip
    assert json.loads(scores.read_text())["loss"] == pytest.approx(
        run["best"]["dev_loss"], rel=1e-3
    )

    capsys.readouterr()
    assert call("run", "--config", first / "run.json", "--output", tmp_path / "second") == 0
    second = json.loads((tmp_path / "second" / "run.json").read_text())
    assert second["config"]["common"].pop("output") != run["config"]["common"].pop("output")
    assert second["config"] == run["config"]
    assert second["best"] == run["best"]
    assert "tokens_per_second" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1", "there is no setting 'learning_rte': did you mean learning_rate"),
        ("xyzzy: 1", "there is no setting 'xyzzy'"),
        ("seed: one", "seed is 'one', expected an integer"),
        ("order: third", "order is 'third', expected one of auto, online, first, second"),
        ("epochs: {a: 1}", "expected a value or a list of values"),
        ("- base", "expected lines of `setting: value`"),
        ("base: [", "cannot be read"),
        ("eval_steps: 3", "look at rows of --dev, which is not given"),
        ("report_to: wandb", "report_to is 'wandb', but that package is not installed"),
    ],
)
def test_a_wrong_file_of_settings_is_one_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(text)
    command = ["run", "--config", config, "--base", "b", "--train", "t", "--output", tmp_path / "o"]
    assert call(*command) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_run_learns_every_turn_of_several_files(
    tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    turns = [("user", "1?"), ("assistant", "odd"), ("user", "2?"), ("assistant", "even")]
    chats = tmp_path / "chats.jsonl"
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    chats.write_text("\n".join([json.dumps(row)] * 12))
    output = tmp_path / "out"
    command = ["run", *settings(tiny_base, data, output), "--train", data, chats]
    command += ["--train_weights", 2, 1, "--loss_on", "all", "--epochs", 1]
    assert call(*command) == 0
    run = json.loads((output / "run.json").read_text())
    assert run["train_rows"] == 36
    assert run["config"]["common"]["train"] == [str(data), str(chats)]
    assert f"{data}, {chats} (36 rows)" in (output / "adapter" / "README.md").read_text()
