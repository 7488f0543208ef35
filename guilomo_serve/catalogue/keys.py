"""The key of administration: where a server leaves one that it made itself, and who finds it there.

    STATE/admin.key                   made once for a `--state`, and kept over restarts
    RUNTIME/guilomo-serve/PORT.key    of a server that runs, for commands of the same user

RUNTIME is `$XDG_RUNTIME_DIR`; without one the folder is `guilomo-serve-UID` in the temporary
folder. Only their user can read the files. A server holds a lock on the second one for as long as
it runs, so that nobody sends the key of a server that has ended to whatever has its port now.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import stat
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

_LEAST = 16  # characters of a key
_BYTES = 32  # of randomness in a key that is made
_HERE = ("localhost", "127.0.0.1", "::1")
_PORTS = {"http": 80, "https": 443}
_held: list[int] = []  # open files with a lock, until the process ends


class KeyFileError(ValueError):
    """A file or folder that is to keep a key would show it to others, or cannot be used."""


def check_key(key: str) -> None:
    """Refuses a key that is easily guessed.

    Raises:
        KeyFileError: it is too short.
    """
    if len(key) < _LEAST:
        raise KeyFileError(f"the admin key is too short: expected at least {_LEAST} characters")


def fingerprint(key: str) -> str:
    """What replicas see of each other's key: whether it is theirs, and nothing to guess it by."""
    return hashlib.scrypt(key.encode(), salt=b"guilomo replicas", n=2**14, r=8, p=1).hex()


def key_of(state: Path | None) -> str:
    """A key for a server that was given none: that of its state if it has one, else a new one.

    Raises:
        KeyFileError: the state's key cannot be read or written, is others' to read, or too short.
    """
    new = secrets.token_urlsafe(_BYTES)
    if state is None:
        return new
    path = state / "admin.key"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _read(path)
    except OSError as e:
        raise KeyFileError(f"{path}: cannot be written ({e.strerror})") from None
    with open(descriptor, "w", encoding="ascii") as file:
        file.write(f"{new}\n")
    return new


def leave(key: str, port: int) -> Path:
    """Writes a server's key where `find` finds it for as long as this process runs.

    Raises:
        KeyFileError: the place is not this user's alone, or another server of this port has it.
    """
    path = _runtime_folder() / f"{port}.key"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{key}\n".encode())
    except OSError as e:
        raise KeyFileError(f"{path}: the admin key cannot be left there ({e.strerror})") from None
    _held.append(descriptor)
    return path


def find(url: str) -> str | None:
    """The key that a server of this user on this machine has left; None if there is none."""
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS.get(parts.scheme)
        if parts.hostname not in _HERE:
            return None
        path = _runtime_folder() / f"{port}.key"
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _read(path)
    except (KeyFileError, OSError, ValueError):
        return None
    return None  # nobody holds it: its server has ended


def _runtime_folder() -> Path:
    """The folder of running servers' keys, of this user alone; made if it is missing.

    Raises:
        KeyFileError: it is another user's, or others can read it.
    """
    given = os.environ.get("XDG_RUNTIME_DIR")
    folder = (
        Path(given) / "guilomo-serve"
        if given
        else Path(tempfile.gettempdir()) / f"guilomo-serve-{os.getuid()}"
    )
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        _check_private(folder, folder.lstat())
    except OSError as e:
        raise KeyFileError(f"{folder}: cannot be made a folder ({e.strerror})") from None
    return folder


def _read(path: Path) -> str:
    try:
        with path.open(encoding="ascii") as file:
            _check_private(path, os.fstat(file.fileno()))
            key = file.read().strip()
    except (OSError, UnicodeDecodeError) as e:
        raise KeyFileError(f"{path}: no key can be read there ({e})") from None
    try:
        check_key(key)
    except KeyFileError as e:
        raise KeyFileError(f"{path}: {e}") from None
    return key


def _check_private(path: Path, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise KeyFileError(
            f"{path}: others could read or change the admin key there; expected a place that "
            "belongs to this user and that nobody else can use (chmod go-rwx)"
        )
