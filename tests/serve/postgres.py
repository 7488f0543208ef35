"""A PostgreSQL of its own for tests and benchmarks: real, empty, and gone afterwards."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Where Debian has what is in no PATH.
_PLACES = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]


def why_not() -> str | None:
    """Why there can be no database here; None if there can."""
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "psycopg is not installed (extra `fleet`)"
    return None if _program("initdb") else "PostgreSQL's programs are not installed (initdb)"


class Postgres:
    """A server in a folder, which can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self._data = folder / "data"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        # It refuses to run as root.
        self._as: list[str] = []
        if os.getuid() == 0:
            pwd.getpwnam("postgres")
            shutil.chown(folder, "postgres")
            self._as = ["runuser", "-u", "postgres", "--"]
        self._run("initdb", "--auth=trust", "--username=guilomo", "--no-sync", "--no-locale")
        self.start()

    @property
    def address(self) -> str:
        return f"postgresql://guilomo@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
        log = str(self._data / "log")
        self._run("pg_ctl", "start", "--wait", "--silent", f"--log={log}", "-o", options)

    def stop(self, mode: str = "fast") -> None:
        self._run("pg_ctl", "stop", "--wait", "--silent", f"--mode={mode}")

    def client(self, program: str, *arguments: str) -> None:
        """Runs one of PostgreSQL's client programs."""
        found = _program(program)
        assert found is not None
        subprocess.run([found, *arguments], check=True, stdout=subprocess.DEVNULL)

    def _run(self, program: str, *arguments: str) -> None:
        found = _program(program)
        assert found is not None
        command = [*self._as, found, f"--pgdata={self._data}", *arguments]
        subprocess.run(command, check=True, cwd="/", stdout=subprocess.DEVNULL)


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A database while the block runs."""
    # Not below a folder of pytest's, which its user alone may enter.
    folder = Path(tempfile.mkdtemp(prefix="guilomo-postgres-"))
    try:
        database = Postgres(folder)
        try:
            yield database
        finally:
            database.stop("immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *_PLACES]))
