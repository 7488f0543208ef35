"""A small Hugging Face Hub in this process: what huggingface_hub asks to find and read files.

Repositories have commits; the newest is `main`. Paths and headers are those of the real Hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class HubStandIn:
    """The Hub at `url` while it is in use as a context manager.

    Attributes:
        repositories: "owner/name" -> commit -> path -> contents.
        moved: "owner/name" -> what the Hub has it as now.
        denied: repositories that nobody may read.
        busy: repositories that may not be asked for now -> the Retry-After that it answers.
        claimed: path -> the size that the Hub says it has.
        silent: set while requests are accepted and not answered.
        slow: set while files come byte by byte, two a second.
        requests: method, path and Authorization header of each request so far.
    """

    repositories: dict[str, dict[str, Files]] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    denied: set[str] = field(default_factory=set)
    busy: dict[str, str] = field(default_factory=dict)
    claimed: dict[str, int] = field(default_factory=dict)
    silent: threading.Event = field(default_factory=threading.Event)
    slow: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)

    def __enter__(self) -> HubStandIn:
        self._ended = threading.Event()
        hub = self

        class Handler(_Handler):
            stand_in = hub

        self._server = _Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def commit(self, repository: str, folder: Path, below: str = "") -> str:
        """Adds an adapter folder's files to a repository; returns the commit."""
        commits = self.repositories.setdefault(repository, {})
        files = dict(list(commits.values())[-1]) if commits else {}
        files |= {below + path.name: path.read_bytes() for path in folder.iterdir()}
        sha = hashlib.sha1(f"{repository} {len(commits)}".encode()).hexdigest()
        commits[sha] = files
        return sha

    def write_slowly(self, file: Any, body: bytes) -> None:
        for byte in body:
            if self._ended.wait(0.5):
                return
            file.write(bytes([byte]))

    def wait_if_silent(self) -> None:
        while self.silent.is_set() and not self._ended.wait(0.1):
            pass


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Nothing: clients that were kept waiting have gone."""


class _Handler(BaseHTTPRequestHandler):
    stand_in: HubStandIn

    def do_GET(self) -> None:
        hub, path = self.stand_in, urlsplit(self.path).path
        if path == "/api/agent-harnesses":  # of the library's own, once a process
            self._answer(404, b"")
            return
        hub.requests.append((self.command, path, self.headers.get("Authorization")))
        hub.wait_if_silent()
        if path.startswith("/api/models/"):
            repository, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            file = None
        else:
            repository, _, rest = path.lstrip("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
        revision = unquote(revision) or "main"
        if repository in hub.busy:
            self._answer(429, b"", {"Retry-After": hub.busy[repository]})
            return
        if repository in hub.denied:
            self._answer(403, b"")
            return
        repository = hub.moved.get(repository, repository)
        commits = hub.repositories.get(repository)
        if commits is None:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        sha = list(commits)[-1] if revision == "main" else revision
        if sha not in commits:
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif file is None:
            self._answer(200, json.dumps({"id": repository, "sha": sha}).encode())
        elif file not in commits[sha]:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            self._answer(200, commits[sha][file], {"X-Repo-Commit": sha, "ETag": '"e"'}, file)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """An upload: a repository is made, files are announced and come in one commit."""
        hub, path = self.stand_in, urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.requests.append((self.command, path, self.headers.get("Authorization")))
        answer: dict[str, Any] = {}
        if path == "/api/repos/create":
            made = json.loads(body)
            repository = f"{made['organization']}/{made['name']}"
            if repository in hub.denied:
                self._answer(403, b"")
                return
            hub.repositories.setdefault(repository, {"0" * 40: {}})
            answer = {"url": f"{hub.url}/{repository}"}
        elif "/preupload/" in path:
            files = [file["path"] for file in json.loads(body)["files"]]
            kind = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": file, **kind} for file in files]}
        elif "/commit/" in path:
            repository = path.removeprefix("/api/models/").partition("/commit/")[0]
            commits = hub.repositories[repository]
            files = dict(list(commits.values())[-1])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            sha = hashlib.sha1(f"{repository} {len(commits)}".encode()).hexdigest()
            commits[sha] = files
            answer = {"commitUrl": f"{hub.url}/{repository}/commit/{sha}", "commitOid": sha}
        self._answer(200, json.dumps(answer).encode())

    def _answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, file: str = ""
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        head = self.command == "HEAD"
        size = self.stand_in.claimed.get(file, len(body)) if head else len(body)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        if not head and file and self.stand_in.slow.is_set():
            self.stand_in.write_slowly(self.wfile, body)
        elif not head:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: `requests` has them."""
