"""`guilomo-serve` refuses before vLLM starts, with one message; and passes vLLM's flags on."""

import json
import platform
import shutil
from pathlib import Path

import pytest
import torch

from guilomo_serve import cli
from guilomo_serve.adapter import CONFIG_FILE
from guilomo_serve.precision import half_precision_is_slow
from tests.serve.helpers import random_lora


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(argv) == 2
    return capsys.readouterr().err


def test_names_and_folders_are_checked(tiny_model, adapters, capsys, tmp_path):
    base, first = str(tiny_model), f"first={adapters['first']}"
    assert "NAME=FOLDER" in refused(capsys, base, "--adapter", "first")
    assert "given twice" in refused(capsys, base, "--adapter", first, "--adapter", first)
    assert "no folder" in refused(capsys, base, "--adapter", f"a={tmp_path / 'missing'}")
    folder = adapters["first"]
    assert "name of the base" in refused(capsys, base, "--adapter", f"{base}={folder}")
    served = ("--served-model-name", "other", "base")
    assert "name of the base" in refused(capsys, base, *served, "--adapter", f"base={folder}")
    assert "--adapter NAME=FOLDER" in refused(capsys, base, "--lora-modules", first)


def test_adapters_are_checked_against_the_base(tiny_model, adapters, capsys, tmp_path):
    bad = tmp_path / "bad"
    random_lora(tiny_model, bad, seed=1)
    config = json.loads((bad / CONFIG_FILE).read_text())
    (bad / CONFIG_FILE).write_text(json.dumps({**config, "bias": "all"}))
    message = refused(capsys, str(tiny_model), "--adapter", f"bad={bad}")
    assert str(bad) in message
    assert "bias" in message
    (bad / CONFIG_FILE).unlink()
    assert CONFIG_FILE in refused(capsys, str(tiny_model), "--adapter", f"bad={bad}")
    missing = refused(capsys, str(tmp_path / "no-model"), "--adapter", f"a={adapters['first']}")
    assert "no-model" in missing


def test_a_model_split_by_layers_is_refused(tiny_model, capsys):
    assert "split by layers" in refused(capsys, str(tiny_model), "--pipeline-parallel-size", "2")
    assert "split by layers" in refused(capsys, str(tiny_model), "-pp=2")


def test_several_server_processes_are_refused(tiny_model, capsys):
    for flags in (("--data-parallel-size", "2"), ("-dp=2",), ("--api-server-count=4",)):
        message = refused(capsys, str(tiny_model), *flags)
        assert message.startswith(f"guilomo-serve: {flags[0].partition('=')[0]}: ")
        assert "one server process" in message
    cli.vllm_command(str(tiny_model), [], ["--data-parallel-size", "1", "-asc", "1"])


def test_a_base_that_is_not_there_is_one_error(capsys, tmp_path):
    """Without adapters too; a folder, and a name on the hub that is not in the cache."""
    for base in (str(tmp_path / "nowhere"), str(tmp_path), "nobody/has-no-such-model"):
        (line,) = refused(capsys, base).strip().splitlines()
        assert line.startswith(f"guilomo-serve: {base}: no model can be read there: ")


def test_limits_are_checked(tiny_model, capsys, tmp_path):
    base = str(tiny_model)
    for value in ("0", "-1", "x", "=3", "first=", "first=0", ""):
        assert "[NAME=]N" in refused(capsys, base, f"--max-concurrency={value}"), value
    twice = ("--max-concurrency", "a=1", "--max-concurrency", "a=2")
    assert "given twice" in refused(capsys, base, *twice)
    assert "cannot be served" in refused(capsys, base, "--max-concurrency", "a@1=2")
    for value in ("0", "-1", "nan", "inf"):
        assert "GiB > 0" in refused(capsys, base, f"--adapter-memory={value}"), value
    file = tmp_path / "file"
    file.touch()
    assert "cannot be made a folder" in refused(capsys, base, "--state", str(file))
    assert "--max-body-mib" in refused(capsys, base, "--max-body-mib", "0")
    assert "--drain-timeout" in refused(capsys, base, "--drain-timeout=-1")
    assert "--drain-timeout" in refused(capsys, base, "--shutdown-timeout=-1")  # vLLM's name


def test_flags_are_passed_on_and_ours_give_way(tiny_model, adapters):
    command = cli.vllm_command(
        str(tiny_model), [f"a={adapters['first']}"], ["--port", "9", "--max-loras=3"]
    )
    assert command[:4] == ["serve", str(tiny_model), "--port", "9"]
    assert "--enable-lora" in command
    assert "--max-loras" not in command
    module = json.loads(command[command.index("--lora-modules") + 1])
    assert module == {"name": "a", "path": str(adapters["first"])}


def test_a_cpu_that_is_slow_in_half_precision_gets_float32(
    tiny_model, adapters, monkeypatch, tmp_path
):
    def dtype(base, *flags, adapter=()):
        command = cli.vllm_command(str(base), adapter, flags)
        return command[command.index("--dtype") + 1] if "--dtype" in command else None

    quantized = tmp_path / "quantized"
    shutil.copytree(tiny_model, quantized)
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (quantized / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(cli, "half_precision_is_slow", lambda: True)
    assert dtype(tiny_model) == "float32"
    assert dtype(tiny_model, adapter=[f"a={adapters['first']}"]) == "float32"
    assert dtype(tiny_model, "--dtype", "bfloat16") == "bfloat16"
    assert dtype(tiny_model, "--dtype=half") is None, "as it was given"
    assert dtype(tiny_model, "-q", "fp8") is None
    assert dtype(quantized) is None
    monkeypatch.setattr(cli, "half_precision_is_slow", lambda: False)
    assert dtype(tiny_model) is None


@pytest.mark.skipif(platform.machine() != "x86_64", reason="asks an x86 CPU what it can")
def test_a_cpu_is_slow_in_half_precision_without_its_instructions():
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    fast = torch.cuda.is_available() or {"avx512f", "avx_ne_convert"} & set(flags)
    assert half_precision_is_slow() != bool(fast)


def test_a_plugin_that_would_not_load_is_an_error(tiny_model, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "VLLM_PLUGINS" in refused(capsys, str(tiny_model))
