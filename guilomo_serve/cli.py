"""`guilomo-serve BASE --adapter name=folder ...`: vLLM's OpenAI server with searched adapters.

Adapters are checked before vLLM's engine starts, which takes half a minute or more. Every other
flag is vLLM's: see flags.py.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guilomo_serve import flags, importing
from guilomo_serve.adapter import AdapterError
from guilomo_serve.catalogue import CatalogueError, Settings, check_name, command, keys
from guilomo_serve.catalogue.database import hold
from guilomo_serve.catalogue.remote import Address, is_address
from guilomo_serve.catalogue.settings import ADMIN_KEY, Admission
from guilomo_serve.catalogue.sources import storage_class
from guilomo_serve.ending import end_within, ended_by_signals
from guilomo_serve.flags import UsageError

_DATABASES = ("postgresql://", "postgres://")
_ENDING_S = 5.0  # for threads that still wait for a storage, once nobody waits for them
# Longer than load balancers keep a connection that nobody uses (nginx and AWS 60 s, Google 600 s):
# one that the server closes just when a request comes over it loses the request.
_KEEP_ALIVE_S = 620


if multiprocessing.parent_process() is not None:  # vLLM's, which imports what it was started by
    importing.begin()


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
    importing.begin()
    try:
        with ended_by_signals():
            return _run(arguments)
    finally:
        importing.end()  # where the plugin, which does so, was there before


def _run(arguments: Sequence[str]) -> int:
    """See `main`."""
    try:
        args = flags.parse("guilomo-serve", arguments, _add_flags)
        settings = _settings(args)
        held = hold(settings.state) if settings.state else None
        if settings.shared:
            _shared_catalogue(settings.shared)
        flags.complete(args, args.adapter)
    except (UsageError, AdapterError, CatalogueError) as e:
        print(f"guilomo-serve: {e}", file=sys.stderr)
        return 2
    settings.export(os.environ)
    # Loading and unloading while serving; vLLM keeps the routes away without it.
    os.environ.setdefault("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    os.environ.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", str(_KEEP_ALIVE_S))
    # The last one is the outermost: what the others refuse has a lease too, and counts.
    ours = (
        "access.AdminGuard",
        "limits.Limits",
        "lifecycle.Lifecycle",
        "prometheus.Metrics",
        "leases.Leasing",
    )
    args.middleware = [*args.middleware, *(f"guilomo_serve.server.{name}" for name in ours)]
    from guilomo_serve import server

    server.install()  # again, now that the settings are there: vLLM's parser has loaded the plugin
    from guilomo_serve.server import lifecycle

    try:
        _serve(args)
        status = lifecycle.exit_status()
    except AdapterError as e:  # what the engine alone can tell of one on the command line
        print(f"guilomo-serve: {e}", file=sys.stderr)
        status = 2
    end_within(_ENDING_S, status)
    if held is not None:
        held.close()
    return status


def _add_flags(parser: Any) -> None:
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="adapter to serve under NAME (LoRA-MoE, or a plain PEFT LoRA); may be repeated",
    )
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
        metavar="FOLDER|postgresql://...",
        help="where names and versions are kept, so that a restarted server has them: a folder of "
        "one server's, or a PostgreSQL database that replicas share",
    )
    parser.add_argument(
        "--state-files",
        metavar="FOLDER|ADDRESS",
        help="where replicas that share a database keep adapters' files: a folder that all see, "
        "or s3://BUCKET[/PREFIX]",
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
        "go that were not used for longest (default: a quarter of the machine's or container's, "
        "and at most a tenth of a GPU's; a GPU's is reserved at the start)",
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
        dest="shutdown_timeout",
        type=int,
        default=argparse.SUPPRESS,
        metavar="SECONDS",
        help="how long running requests may take to finish on SIGTERM; as --shutdown-timeout",
    )


def _address(flag: str, text: str) -> Address:
    """An address that a flag names, of a storage that can be asked."""
    try:
        address = Address.parse(text)
        storage_class(address.scheme)
    except AdapterError as e:
        raise UsageError(f"{flag}: {e}") from None
    if address.revision is not None:
        raise UsageError(f"{flag} {text}: a root has no revision; its adapters may")
    return address


def _shared_files(place: str) -> Path | Address:
    if not is_address(place):
        return _folder("--state-files", place)
    address = _address("--state-files", place)
    if address.scheme != "s3":
        raise UsageError(f"--state-files {place}: expected a folder or s3://BUCKET[/PREFIX]")
    return address


def _settings(args: argparse.Namespace) -> Settings:
    roots, remote_roots = [], []
    for root in args.adapter_root:
        if is_address(root):
            remote_roots.append(_address("--adapter-root", root))
            continue
        if not Path(root).is_dir():
            raise UsageError(f"--adapter-root {root}: there is no such folder")
        roots.append(Path(root).resolve())
    if args.evict_idle is not None and not args.evict_idle > 0:
        raise UsageError(f"--evict-idle {args.evict_idle}: expected a number of seconds > 0")
    memory = args.adapter_memory
    if memory is not None and not 0 < memory < math.inf:
        raise UsageError(f"--adapter-memory {memory}: expected a number of GiB > 0")
    shared = args.state if args.state and args.state.startswith(_DATABASES) else None
    if shared is not None:
        # It may have a password in it, and vLLM logs the flags that it was given.
        args.state = shared.partition("://")[0]
    state = _folder("--state", args.state) if args.state and not shared else None
    if bool(shared) != bool(args.state_files):
        raise UsageError(
            "--state-files: a database of --state needs it, a folder that all replicas see or "
            "s3://BUCKET[/PREFIX], and nothing else does"
        )
    files = _shared_files(args.state_files) if shared else None
    budget = None if memory is None else int(memory * 2**30)
    drain = args.shutdown_timeout
    if drain < 0:
        raise UsageError(f"--drain-timeout {drain}: expected a number of seconds >= 0")
    if args.max_body_mib < 1:
        raise UsageError(f"--max-body-mib {args.max_body_mib}: expected a number >= 1")
    if args.list_models < 0:
        raise UsageError(f"--list-models {args.list_models}: expected a number >= 0")
    limits = _concurrency(args.max_concurrency)
    given = args.admin_key if args.admin_key is not None else os.environ.get(ADMIN_KEY) or None
    if shared and given is None:
        raise UsageError(f"--state: replicas have one admin key; give it to each as {ADMIN_KEY}")
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
        shared=shared,
        files=files,
        evict_idle=args.evict_idle,
        memory=budget,
        check_adapters=args.check_adapters,
        admission=Admission(limits.pop("", None), limits, args.max_body_mib * 2**20),
        list_models=args.list_models,
        admin_key=key,
        made_key=given is None,
        expert_load=args.expert_load,
    )


def _folder(flag: str, name: str) -> Path:
    """A folder that a flag names, made if it is missing."""
    folder = Path(name).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(f"{flag} {folder}: cannot be made a folder ({e.strerror})") from None
    return folder


def _shared_catalogue(address: str) -> None:
    """Makes sure of a database before a model is loaded that could not be served.

    Raises:
        UsageError: what it needs is not installed; CatalogueError: it cannot be used.
    """
    try:
        from guilomo_serve.catalogue.postgres import prepare
    except ImportError as e:
        raise UsageError(
            f"--state: a database needs a package that is not installed ({e.name}): "
            "pip install 'guilomo[fleet]'"
        ) from None
    prepare(address)


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


def _serve(args: argparse.Namespace) -> None:
    """What vLLM's `vllm serve` does for one HTTP server in this process.

    (vllm/entrypoints/launchers/api_server/entry.py; its `run_server` would put a handler of SIGTERM
    in the place of ours.)
    """
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server_worker, setup_server
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.system_utils import decorate_logs

    async def serve() -> None:
        address, sock = setup_server(args, reuse_port=False)
        await run_server_worker(address, sock, args)

    cli_env_setup()
    configure_logging_from_args(args)
    decorate_logs("APIServer", skip_if_decorated=True)
    args.api_server_count = None
    uvloop.run(serve())


if __name__ == "__main__":
    sys.exit(main())
