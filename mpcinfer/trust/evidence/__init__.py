"""What a party can show for what it says of itself: kinds of evidence, by name.

A kind is a class with the methods of `Evidence`. Others' kinds are known by `register`, called before a party is
started or a client connects, or by an entry point of the group `mpcinfer.evidence` whose name is the kind's and whose
value is the class: installing the package is enough then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Protocol

from mpcinfer.errors import ConfigError

_DOMAIN = b"mpcinfer v1 evidence\0"


@dataclass(frozen=True)
class Expected:
    """What a client holds evidence against.

    `measured` is what `verify` returned when the party was pinned, None if it is not pinned. `collateral` is where the
    client's own operator says that what the verification needs is to be had: a URL, a file, or a directory with a
    file for each party (`party-0.json`); "" if he does not say.
    """

    role: str
    measured: Mapping[str, str] | None = None
    collateral: str = field(default="", repr=False)


class Evidence(Protocol):
    """A kind of evidence."""

    words: str
    """What it proves, in a few words that people are shown wherever the kind is."""

    needs_collateral: bool
    """Whether `verify` can do nothing without `Expected.collateral`."""

    def produce(self, report_data: bytes) -> bytes:
        """At the party: evidence bound to these 64 bytes. ManifestError if this host cannot."""
        ...

    def verify(self, evidence: bytes, report_data: bytes, expected: Expected) -> dict[str, str]:
        """At the client: what the evidence measures, by name.

        ManifestError, which says what is wrong and what to do, unless it is genuine, bound to `report_data`, and
        measures what is expected.
        """
        ...


def report_data(key_pin: str, signing_key: bytes, nonce: bytes) -> bytes:
    """The 64 bytes that evidence is bound to: a party's keys, and what the client drew for this connection."""
    return hashlib.sha512(_DOMAIN + key_pin.encode() + b"\0" + signing_key + nonce).digest()


_KINDS: dict[str, Callable[[], Evidence]] = {}


def register(kind: str, make: Callable[[], Evidence]) -> None:
    """Make a kind of evidence known; ConfigError if its name is taken."""
    if _KINDS.setdefault(kind, make) is not make:
        raise ConfigError(f"there are two kinds of evidence {kind!r}; rename one")


def find(kind: str) -> Evidence:
    """The kind of evidence of this name; ConfigError listing those that there are."""
    if kind not in _KINDS:
        for found in entry_points(group="mpcinfer.evidence", name=kind):
            register(kind, found.load())
    if kind not in _KINDS:
        known = ", ".join(sorted(_KINDS))
        raise ConfigError(f"no kind of evidence {kind!r} here; there are {known}, others come with packages of theirs")
    return _KINDS[kind]()


def _register_own() -> None:
    from mpcinfer.trust.evidence.quotes import Sgx, Tdx
    from mpcinfer.trust.evidence.said import CodeDigest, Nothing

    register("none", Nothing)
    register("code-digest", CodeDigest)
    register("tdx", Tdx)
    register("sgx", Sgx)


_register_own()
