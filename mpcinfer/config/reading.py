"""Reading configuration files: what can be a name, a role, an address; and tables in which nothing is left over."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from mpcinfer.errors import ConfigError

# A name is also a DNS label and part of a URI, hence lower case and short.
_NAME = r"[a-z0-9](?:[a-z0-9-]{0,48}[a-z0-9])?"
_NAME_PATTERN = re.compile(_NAME)
_ROLE_PATTERN = re.compile(rf"dealer|(?:party|witness)/(?:0|[1-9][0-9]{{0,2}})|(?:owner|client)/{_NAME}")
_ADDRESS_PATTERN = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")

_T = TypeVar("_T")


def check_name(name: str) -> str:
    """Return `name` if it can name a cluster, an owner or a client; otherwise ConfigError."""
    if not _NAME_PATTERN.fullmatch(name):
        raise ConfigError(f"{name!r} cannot be a name: use 1 to 50 lower-case letters, digits and inner hyphens")
    return name


def check_role(role: str) -> str:
    """Return `role` if it is one of party/I, witness/I, dealer, owner/NAME, client/NAME; otherwise ConfigError."""
    if not _ROLE_PATTERN.fullmatch(role):
        raise ConfigError(
            f"{role!r} is not a role: use party/0, party/1, ..., witness/0, ..., dealer, owner/NAME or client/NAME, "
            "NAME being 1 to 50 lower-case letters, digits and inner hyphens"
        )
    return role


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[ipv6]:port` as (host without brackets, port); ConfigError if it is neither."""
    match = _ADDRESS_PATTERN.fullmatch(address)
    if match is None or int(match[2]) > 65535:
        raise ConfigError(f"{address!r} is not an address: write host:port, for example 127.0.0.1:7100 or [::1]:7100")
    return match[1].strip("[]"), int(match[2])


class Table:
    """One TOML table being read: take the known keys, then `finish` refuses what is left over."""

    def __init__(self, where: str, content: object) -> None:
        if not isinstance(content, dict):
            raise ConfigError(f"{where}: expected a table")
        self.where = where
        self.content: dict[str, Any] = dict(content)

    @staticmethod
    def read(file: Path) -> Table:
        try:
            return Table(str(file), tomllib.loads(read_file(file).decode()))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not valid TOML: {error}") from error

    def take(self, key: str, kind: type[_T], default: _T | None = None) -> _T:
        value = self.content.pop(key, default)
        if value is None:
            raise ConfigError(f"{self.where}: {key!r} is missing")
        if kind is float and type(value) is int:  # `step_timeout_s = 30` is fine; a boolean never is a number
            value = float(value)
        if type(value) is not kind:
            raise ConfigError(f"{self.where}: {key!r} must be of type {kind.__name__}, not {type(value).__name__}")
        return value

    def take_address(self, key: str) -> str:
        """An address, "" if the key is missing. A port alone is one that only this machine reaches."""
        if type(self.content.get(key)) is int:
            return f"127.0.0.1:{self.take(key, int)}"
        return self.take(key, str, "")

    def finish(self) -> None:
        if self.content:
            raise ConfigError(f"{self.where}: unknown {', '.join(sorted(map(repr, self.content)))}; check the spelling")


def read_file(file: Path) -> bytes:
    """The content of a file that a configuration names; ConfigError if it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or 'unreadable'}") from error
