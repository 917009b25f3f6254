"""Tokens that a caller shows: given, returned by a function, or in a file that is read again when it changes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from mpcinfer.errors import ConfigError

UserToken = str | Path | Callable[[], str]


def read_token(path: Path) -> str:
    """The token in a file that only its owner can read; ConfigError otherwise."""
    return _read(path)[0]


class TokenFile:
    """Returns the token in a file, as it is now: what renews it replaces the file, and nothing has to be restarted."""

    def __init__(self, path: Path) -> None:
        """ConfigError if there is no token in it, or others can read it."""
        self._path = path
        self._lock = threading.Lock()
        self._token, self._state = _read(path)

    def __call__(self) -> str:
        """The token; ConfigError once the file is gone, or is what it must not be."""
        with self._lock:
            try:
                same = _state(self._path.stat()) == self._state
            except OSError:
                same = False
            if not same:
                self._token, self._state = _read(self._path)
            return self._token

    def __repr__(self) -> str:
        return f"TokenFile({self._path})"


def source(token: UserToken | None) -> Callable[[], str] | None:
    """What returns the token to show with the next call; None if there is none."""
    if isinstance(token, Path):
        return TokenFile(token)
    if isinstance(token, str):
        return lambda: token
    return token


def _read(path: Path) -> tuple[str, tuple[int, ...]]:
    try:
        with path.open(encoding="utf-8") as file:
            status = os.fstat(file.fileno())
            if status.st_mode & 0o077:
                raise ConfigError(f"others can read {path}: make it yours alone (chmod 600)")
            token = file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is no text'}") from error
    if not token or not token.isascii() or not token.isprintable():
        raise ConfigError(f"{path} holds no token: put it there, on one line")
    return token, _state(status)


def _state(status: os.stat_result) -> tuple[int, ...]:
    """What is another once the file is written or replaced."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_mode
