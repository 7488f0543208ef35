"""vLLM's flags, read by vLLM's own parser, and what guilomo adds to them.

So a YAML file of `--config`, abbreviations and `--no-...` mean here what they mean to vLLM. What a
server with adapters cannot be is refused by the plugin, on the configuration that comes of them
(runtime/unsupported.py): plain `vllm serve` refuses the same.

The seam, for vLLM 0.32: the parser of `vllm serve` as `ServeSubcommand.subparser_init` makes it,
whose defaults are set anew here; `AsyncEngineArgs.from_cli_args` and `create_engine_config`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from guilomo_serve.adapter import BaseModel, is_guilomo_adapter, read_adapter
from guilomo_serve.catalogue import check_name
from guilomo_serve.precision import half_precision_is_slow
from guilomo_serve.runtime.unsupported import BYPASS, ONE_PROCESS

# Different adapters of a batch, at least. Twice the adapters at start: while a name is swapped its
# old version still has requests.
_IN_BATCH = 16
# Storage is ragged, so a rank costs nothing until an adapter has it.
_MAX_RANK = 512
_DRAIN_S = 30


class UsageError(ValueError):
    """The command line names something that cannot be served."""


def parse(
    prog: str, argv: Sequence[str], add_flags: Callable[[argparse.ArgumentParser], None]
) -> argparse.Namespace:
    """Reads a command line of vLLM's flags and further ones.

    Args:
        prog: what to call the command in its help.
        argv: the base model and flags, as for `vllm serve`.
        add_flags: adds the further ones.

    Returns:
        As `vllm serve` has it: `model` is the base. With LoRA, and with our defaults.

    Raises:
        UsageError: vLLM cannot read them. SystemExit: it has said so, or has shown its help.
    """
    _check_plugin()
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    outer = FlexibleArgumentParser(prog=prog)
    (serve,) = cmd_init()
    parser = serve.subparser_init(outer.add_subparsers(dest="subparser"))
    parser.prog, parser.usage = prog, f"{prog} BASE [options of vLLM's too]"
    parser.description = "Serves a base model and its adapters with vLLM's OpenAI API."
    add_flags(parser.add_argument_group("guilomo"))
    parser.set_defaults(
        model=None,
        enable_lora=True,
        max_loras=None,
        max_lora_rank=_MAX_RANK,
        shutdown_timeout=_DRAIN_S,
    )
    # vLLM looks for the file of `--config FILE` alone, and would leave one of `--config=FILE` out.
    parts = [
        part
        for arg in argv
        for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])
    ]
    try:
        args = outer.parse_args(["serve", *parts])
        args.model = args.model_tag or args.model
        if args.model is None:
            raise UsageError("which model? Name the base, a folder or a name on the Hub, first")
        serve.validate(args)
    except (AssertionError, OSError, TypeError, ValueError) as e:
        raise UsageError(_in_a_line(e)) from None
    return args


def complete(args: argparse.Namespace, adapters: Sequence[str]) -> None:
    """Checks what vLLM is to serve, and fills in what guilomo decides.

    Args:
        args: of `parse`.
        adapters: `name=folder` each.

    Raises:
        UsageError: a name or flag is wrong, there is no such base, or vLLM cannot serve it so.
        AdapterError: an adapter cannot be served on this base.
    """
    from guilomo_serve.runtime.loading import check_plain, tasks_of

    if args.lora_modules:
        raise UsageError("--lora-modules: use --adapter NAME=FOLDER, which checks the adapter")
    if not args.enable_lora:
        raise UsageError("--no-enable-lora: a server of adapters needs vLLM's LoRA")
    if args.headless:
        raise UsageError("--headless: adapters are served by a process with an HTTP server")
    if args.grpc:
        raise UsageError(f"--grpc: {BYPASS}")
    if (args.api_server_count or 1) != 1:
        raise UsageError(f"--api-server-count: {ONE_PROCESS}")
    folders = _parse_adapters(adapters, args.served_model_name or [args.model])
    if args.max_loras is None:
        most = max(_IN_BATCH, 2 * len(folders))
        args.max_loras = min(most, args.max_cpu_loras or most)
    base = _config_of(args)
    quantized = args.quantization or getattr(base, "quantization_config", None) is not None
    if args.dtype == "auto" and half_precision_is_slow() and not quantized:
        args.dtype = "float32"
    config = _engine_config(args)
    described = _described(config.model_config.hf_config)
    for folder in folders.values():
        if is_guilomo_adapter(folder):
            read_adapter(folder, described)
        else:
            check_plain(folder, config.lora_config, tasks_of(config.model_config))
    if folders:
        from vllm.entrypoints.openai.models.protocol import LoRAModulePath

        args.lora_modules = [LoRAModulePath(name=n, path=str(f)) for n, f in folders.items()]


def _engine_config(args: argparse.Namespace) -> Any:
    """vLLM's configuration of these flags, which the plugin has let pass."""
    from vllm import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    try:
        return AsyncEngineArgs.from_cli_args(args).create_engine_config(
            UsageContext.OPENAI_API_SERVER
        )
    except (NotImplementedError, OSError, TypeError, ValueError) as e:
        raise UsageError(_in_a_line(e)) from None


def _described(config: Any) -> BaseModel | None:
    """The base as adapters see it; None leaves their shapes to the engine."""
    try:
        return BaseModel.from_config(config)
    except (AttributeError, ValueError):
        return None  # no plain causal LM to transformers: one with images, say


def _parse_adapters(adapters: Sequence[str], taken: Sequence[str]) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for adapter in adapters:
        name, separator, folder = adapter.partition("=")
        if not separator or not name or not folder:
            raise UsageError(f"--adapter {adapter}: expected NAME=FOLDER")
        if name in folders:
            raise UsageError(f"--adapter {adapter}: the name {name!r} is given twice")
        if name in taken:
            raise UsageError(f"--adapter {adapter}: {name!r} is the name of the base model")
        check_name(name)
        if not Path(folder).is_dir():
            raise UsageError(f"--adapter {adapter}: there is no folder {folder}")
        folders[name] = Path(folder).resolve()
    return folders


def _config_of(args: argparse.Namespace) -> Any:
    """The base's config; None where vLLM fetches it later.

    A base that vLLM would not find is refused here, since vLLM says so below a traceback.
    """
    from vllm.transformers_utils.config import get_config
    from vllm.transformers_utils.utils import is_cloud_storage

    if is_cloud_storage(args.model):
        return None
    try:
        return get_config(
            args.hf_config_path or args.model,
            args.trust_remote_code,
            args.revision,
            args.code_revision,
            args.config_format,
            token=args.hf_token,
        )
    except Exception as e:  # of several libraries
        raise UsageError(
            f"{args.model}: no model can be read there: {' '.join(str(e).split())}"
        ) from None


def _in_a_line(error: Exception) -> str:
    """What an error says, without what pydantic puts around it."""
    errors = getattr(error, "errors", None)
    if errors is not None:
        return "; ".join(each["msg"].removeprefix("Value error, ") for each in errors())
    return " ".join(str(error).split()) or type(error).__name__


def _check_plugin() -> None:
    if "guilomo" not in entry_points(group="vllm.general_plugins").names:
        raise UsageError(
            "guilomo is not installed, so vLLM would not load its plugin: pip install -e ."
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "guilomo" not in allowed.split(","):
        raise UsageError(f"VLLM_PLUGINS is {allowed!r}, which keeps guilomo out: add guilomo to it")
