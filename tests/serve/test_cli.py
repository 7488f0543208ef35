"""`guilomo-serve` refuses before vLLM starts, with one message; and passes vLLM's flags on."""

import argparse
import gc
import json
import platform
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from vllm import AsyncEngineArgs
from vllm.entrypoints.cli.serve import cmd_init, run_multi_api_server
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from guilomo_serve import cli, flags, room
from guilomo_serve.adapter import CONFIG_FILE
from guilomo_serve.precision import half_precision_is_slow
from tests.serve.helpers import byte_tokenizer, random_lora


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that says why; vLLM's log is beside it."""
    assert cli.main(argv) == 2
    printed = capsys.readouterr().err
    (line,) = [line for line in printed.splitlines() if line.startswith("guilomo-serve: ")]
    return line


@contextmanager
def signals_kept() -> Iterator[None]:
    """Puts handlers of signals back that vLLM's servers set."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


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


def test_who_calls_main_keeps_its_signals_and_its_collector(capsys):
    def settings() -> list[object]:
        return [*map(signal.getsignal, (signal.SIGTERM, signal.SIGINT)), gc.get_threshold()]

    before = settings()
    refused(capsys, "/no/such/model")
    assert settings() == before


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


ONE_PROCESS = "the names and versions of adapters are kept by one server process"
REFUSED = (
    (("--fully-sharded-lo",), "--fully-sharded-loras: ", "leave it out"),
    (("--fully-sharded-loras",), "--fully-sharded-loras: ", "leave it out"),
    (("--enable_tower_connector_lora",), "--enable-tower-connector-lora: ", "leave it out"),
    (("--specialize-active-lora",), "--specialize-active-lora: ", "leave it out"),
    (("--lora-dtype", "float16", "--dtype", "float32"), "--lora-dtype: ", "torch.float32"),
)


@pytest.mark.parametrize(("flags", "setting", "reason"), REFUSED)
def test_what_adapters_do_not_go_with_is_refused_in_the_same_words_everywhere(
    tiny_model, capsys, tmp_path, flags, setting, reason
):
    """By `guilomo-serve`, from a YAML file too, and by the plugin alone, as in `vllm serve`."""
    message = refused(capsys, str(tiny_model), *flags).removeprefix("guilomo-serve: ")
    assert message.startswith(setting)
    assert reason in message

    name, *value = flags[0].partition("=")[::2] if "=" in flags[0] else flags[:2]
    if name.startswith("--") and name in setting:
        config = tmp_path / "config.yaml"
        given = {name.removeprefix("--"): value[0] if value else True}
        given |= {"dtype": "float32"} if "--dtype" in flags else {}
        config.write_text("".join(f"{key}: {str(of).lower()}\n" for key, of in given.items()))
        for way in (("--config", str(config)), (f"--config={config}",)):
            assert message in refused(capsys, str(tiny_model), *way)

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(["--model", str(tiny_model), "--enable-lora", *flags])
    with pytest.raises(ValueError, match=setting) as plain:
        AsyncEngineArgs.from_cli_args(args).create_engine_config()
    assert str(plain.value) == message
    if "lora" not in setting:  # without adapters it is vLLM's own affair
        args = parser.parse_args(["--model", str(tiny_model), *flags])
        AsyncEngineArgs.from_cli_args(args).create_engine_config()


def test_front_ends_that_go_around_ours_are_refused(tiny_model, capsys, monkeypatch):
    base = str(tiny_model)
    assert ONE_PROCESS in refused(capsys, base, "--api-server-count=4")
    assert ONE_PROCESS in refused(capsys, base, "-asc", "4")
    assert "--headless: " in refused(capsys, base, "--headless")
    two = (base, "--data-parallel-size", "2")
    assert "on its machine" in refused(capsys, *two, "--data-parallel-size-local", "1")
    # vLLM's own words, for a base that is no mixture of experts.
    assert "independent vLLM instances" in refused(capsys, *two, "--data-parallel-rank", "0")
    assert "--no-enable-lora: " in refused(capsys, base, "--no-enable-lora")
    assert "--grpc: this front end goes around" in refused(capsys, base, "--grpc")
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert "VLLM_USE_RUST_FRONTEND: this front end" in refused(capsys, base)

    engine = AsyncEngineArgs(model=base, enable_lora=True, enforce_eager=True)
    with pytest.raises(ValueError, match="VLLM_USE_RUST_FRONTEND: this front end"):
        engine.create_engine_config()
    monkeypatch.delenv("VLLM_USE_RUST_FRONTEND")
    engine.create_engine_config()
    # What vLLM imports for --grpc, where its packages are installed.
    module = "vllm.entrypoints.launchers.grpc_server"
    monkeypatch.setitem(sys.modules, module, ModuleType(module))
    with pytest.raises(ValueError, match="--grpc: this front end"):
        engine.create_engine_config()


def test_slots_follow_what_host_memory_may_hold(tiny_model, adapters, capsys):
    assert completed(tiny_model, "--max-cpu-loras", "2").max_loras == 2
    assert completed(tiny_model, "--max-cpu-loras", "200").max_loras == 16
    assert not completed(tiny_model).enforce_eager  # CUDA graphs are for adapters, too
    assert completed(tiny_model, "--max-loras=3", "--max-cpu-loras=8").max_loras == 3
    # Without the flag memory alone bounds them; vLLM would keep no more than its slots.
    for given, most in (({}, sys.maxsize), ({"max_cpu_loras": 2}, 2)):
        engine = AsyncEngineArgs(model=str(tiny_model), enable_lora=True, **given)
        assert engine.create_engine_config().lora_config.max_cpu_loras == most
    line = refused(capsys, str(tiny_model), "--max-loras=3", "--max-cpu-loras=2")
    assert line == "guilomo-serve: max_cpu_loras (2) must be >= max_loras (3)."
    line = refused(capsys, str(tiny_model), "--max-model-len", "99999999")
    assert "max_model_len" in line


def test_a_base_that_is_not_there_is_one_error(capsys, tmp_path):
    """Without adapters too; a folder, and a name on the hub that is not in the cache."""
    for base in (str(tmp_path / "nowhere"), str(tmp_path), "nobody/has-no-such-model"):
        line = refused(capsys, base)
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


def completed(base: Path, *argv: str, adapter: Sequence[str] = ()) -> argparse.Namespace:
    """What vLLM is given for a command line."""
    args = flags.parse("guilomo-serve", [str(base), *argv], lambda parser: None)
    flags.complete(args, adapter)
    return args


def test_flags_are_passed_on_and_ours_give_way(tiny_model, adapters):
    args = completed(tiny_model, "--port", "9", "--max-loras=3", adapter=[f"a={adapters['first']}"])
    assert (args.model, args.port, args.max_loras) == (str(tiny_model), 9, 3)
    assert (args.enable_lora, args.max_lora_rank, args.shutdown_timeout) == (True, 512, 30)
    (module,) = args.lora_modules
    assert (module.name, module.path) == ("a", str(adapters["first"]))


def test_a_base_may_be_named_in_a_file(tiny_model, capsys, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {tiny_model}\nport: 9\n")
    args = flags.parse("guilomo-serve", ["--config", str(config)], lambda parser: None)
    assert (args.model, args.port) == (str(tiny_model), 9)
    assert "which model?" in refused(capsys)
    assert "missing.yaml" in refused(capsys, "--config", str(tmp_path / "missing.yaml"))


def test_adapters_take_little_of_a_gpu_by_default(monkeypatch):
    """What the server lets in and its workers reserve."""
    of_host = room.default_memory()
    assert of_host > 0
    platform_of_a_gpu = type(current_platform)
    monkeypatch.setattr(platform_of_a_gpu, "is_cuda", lambda platform: True)
    for total, expected in ((1000, 100), (100 * of_host, of_host)):
        monkeypatch.setattr(
            platform_of_a_gpu, "get_device_total_memory", lambda *args, total=total: total
        )
        assert room.default_memory() == expected


def test_a_base_that_vllm_cannot_read_is_refused_in_a_line(tiny_model, capsys, tmp_path):
    """vLLM 0.32 has no bitsandbytes: an adapter trained on such a base is served on another one."""
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    assert "Unknown quantization method: bitsandbytes" in refused(capsys, str(base))


def test_a_cpu_that_is_slow_in_half_precision_gets_float32(
    tiny_model, adapters, monkeypatch, tmp_path
):
    def dtype(base, *argv, adapter=()):
        return completed(base, *argv, adapter=adapter).dtype

    quantized = tmp_path / "quantized"
    shutil.copytree(tiny_model, quantized)
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (quantized / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(flags, "half_precision_is_slow", lambda: True)
    assert dtype(tiny_model) == "float32"
    assert dtype(tiny_model, adapter=[f"a={adapters['first']}"]) == "float32"
    assert dtype(tiny_model, "--dtype", "bfloat16") == "bfloat16"
    assert dtype(tiny_model, "--dtype=half") == "half", "as it was given"
    monkeypatch.setattr(flags, "half_precision_is_slow", lambda: False)
    assert dtype(tiny_model) == "auto"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="asks an x86 CPU what it can")
def test_a_cpu_is_slow_in_half_precision_without_its_instructions():
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    fast = torch.cuda.is_available() or {"avx512f", "avx_ne_convert"} & set(flags)
    assert half_precision_is_slow() != bool(fast)


def test_a_plugin_that_would_not_load_is_an_error(tiny_model, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "VLLM_PLUGINS" in refused(capsys, str(tiny_model))


def test_ranks_of_a_mixture_behind_a_load_balancer_are_to_be_replicas(tmp_path, capsys):
    """Where vLLM itself has them: for other bases it says so by itself (above)."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    transformers.Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        architectures=["Qwen3MoeForCausalLM"],
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        moe_intermediate_size=64,
    ).save_pretrained(tmp_path)
    two = (str(tmp_path), "--data-parallel-size", "2", "--data-parallel-rank", "0")
    for flags_of_rank in ((), ("--data-parallel-external-lb",)):
        message = refused(capsys, *two, *flags_of_rank)
        assert "--data-parallel-external-lb" in message
        assert "with one --state postgresql://" in message


def test_vllm_has_no_runtime_updates_with_several_servers_whatever_else(
    tiny_model, tmp_path, monkeypatch
):
    """So a catalogue that API servers share would be of no use: replicas of one server have it."""
    parser = FlexibleArgumentParser()
    serve = cmd_init()[0].subparser_init(parser.add_subparsers())
    several = ("--api-server-count", "2", "--port", "0", "--host", "127.0.0.1")
    plain = serve.parse_args(["--model", str(tiny_model), *several])
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))  # or it would set it
    with signals_kept(), pytest.raises(ValueError, match="VLLM_ALLOW") as theirs:
        run_multi_api_server(plain)
    words = "VLLM_ALLOW_RUNTIME_LORA_UPDATING cannot be used with api_server_count > 1"
    assert str(theirs.value) == words
    with_adapters = serve.parse_args(["--model", str(tiny_model), *several, "--enable-lora"])
    with signals_kept(), pytest.raises(ValueError, match="--state postgresql://"):
        run_multi_api_server(with_adapters)
