"""`guilomo-serve adapters ls|put|rm|rollback`: a server's adapters, over HTTP."""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from guilomo_serve.catalogue import keys
from guilomo_serve.catalogue.remote import is_address
from guilomo_serve.catalogue.settings import ADMIN_KEY

_TIMEOUT_S = 600


class _Refused(Exception):
    """The server's answer, or that there was none."""


def main(argv: Sequence[str]) -> int:
    """Runs a command; the answer is on stdout.

    Returns:
        1 if the server refuses, with its reason on stderr.
    """
    args = _parser().parse_args(argv)
    path = f"/{quote(args.name, safe='')}" if "name" in args else ""
    try:
        if args.command == "ls":
            adapters = _all(args)
            print(json.dumps(adapters, indent=2) if args.json else _table(adapters))
            _warn(adapters)
        elif args.command == "put":
            # A path that is one here is one for a server on this machine too, wherever it runs.
            source = args.source
            if not is_address(source) and Path(source).exists():
                source = str(Path(source).resolve())
            body = {"source": source, "dry_run": args.dry_run}
            answer = _ask(args, "PUT", path, body)
            state = "would be served" if args.dry_run else f"is version {answer['version']}"
            print(f"{args.name} {state}: {answer['experts']} experts, total rank {answer['rank']}")
            _warn([answer])
        elif args.command == "rm":
            _ask(args, "DELETE", path)
            print(f"{args.name} was removed")
        else:
            answer = _ask(args, "POST", f"{path}/rollback")
            print(f"{args.name} is version {answer['version']}, from {answer['source']}")
    except _Refused as e:
        print(f"guilomo-serve adapters: {e}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--url", default="http://localhost:8000", help="of the server")
    shared.add_argument(
        "--key",
        help=f"the admin key; better in the environment, as {ADMIN_KEY}; neither is needed where "
        "this user runs the server on this machine and has given it no key",
    )
    parser = argparse.ArgumentParser(
        prog="guilomo-serve adapters", description="The adapters of a running server."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    ls = commands.add_parser("ls", parents=[shared], help="list the adapters")
    ls.add_argument("--json", action="store_true", help="all that the server says of them")
    put = commands.add_parser("put", parents=[shared], help="add or replace an adapter")
    put.add_argument("name")
    put.add_argument(
        "source",
        help="adapter folder on the server's machine, hf://OWNER/REPO[@REVISION][/FOLDER] or "
        "s3://BUCKET/PREFIX below one of the server's roots",
    )
    put.add_argument("--dry-run", action="store_true", help="check it and change nothing")
    rm = commands.add_parser("rm", parents=[shared], help="take an adapter away")
    rm.add_argument("name")
    rollback = commands.add_parser(
        "rollback", parents=[shared], help="serve an adapter's previous version again"
    )
    rollback.add_argument("name")
    return parser


def _all(args: argparse.Namespace) -> list[dict[str, Any]]:
    adapters: list[dict[str, Any]] = []
    more = True
    while more:
        after = quote(adapters[-1]["name"], safe="") if adapters else ""
        page = _ask(args, "GET", f"?limit=1000&after={after}")
        adapters += page["data"]
        more = page["has_more"]
    return adapters


def _ask(args: argparse.Namespace, method: str, path: str, body: Any = None) -> Any:
    request = urllib.request.Request(
        f"{args.url.rstrip('/')}/v1/adapters{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
        method=method,
    )
    key = args.key or os.environ.get(ADMIN_KEY) or keys.find(args.url)
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as e:
        raise _Refused(_reason(e.read().decode(errors="replace")) or str(e)) from None
    except (OSError, ValueError) as e:
        raise _Refused(f"{args.url}: no guilomo server answers there ({e})") from None


def _reason(answer: str) -> str:
    try:
        return str(json.loads(answer)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer[:500]


def _warn(adapters: Sequence[dict[str, Any]]) -> None:
    for adapter in adapters:
        for warning in adapter["warnings"]:
            print(f"warning: {adapter['name']}: {warning}", file=sys.stderr)


def _table(adapters: Sequence[dict[str, Any]]) -> str:
    head = ("NAME", "VERSION", "KIND", "EXPERTS", "RANK", "MB", "RUNNING", "STATE", "DIGEST")
    rows = [head]
    for a in adapters:
        state = "failed" if a["error"] else "loaded" if a["resident"] else "on disk"
        state += ", pinned" if a["pinned"] else ""
        numbers = (str(a["experts"]), str(a["rank"]), f"{a['bytes'] / 1e6:.1f}")
        rows.append(
            (
                *(a["name"], str(a["version"]), a["kind"], *numbers),
                *(str(a["in_flight"]), state, a["digest"][:12]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)
