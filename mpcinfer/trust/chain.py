"""A log in which nothing can be changed unnoticed: JSON lines, each with the hash of the one before it.

What the chain alone does not show is that a log was cut off at its end, or written anew from some line on. For that
its heads are kept elsewhere: in the logs of the other parties, and in receipts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpcinfer.canonical import canonical
from mpcinfer.errors import StoreError, TamperingError

_LINE = b"mpcinfer v1 audit line\0"


@dataclass(frozen=True)
class Head:
    """The last line of a log, or any: its number, from 0, and its hash. Of an empty log the number is -1."""

    sequence: int = -1
    hash: str = "0" * 64

    def to_json(self) -> list[Any]:
        """As it is written down elsewhere."""
        return [self.sequence, self.hash]

    @staticmethod
    def from_json(data: Any) -> Head:
        """The inverse; ValueError for anything else."""
        sequence, digest = data
        if type(sequence) is not int or not isinstance(digest, str) or len(digest) != 64:
            raise ValueError("no head of a log")
        return Head(sequence, digest)


def linked(head: Head, content: Mapping[str, Any]) -> tuple[bytes, Head]:
    """The line with this content that follows `head`, and the head that it is."""
    body = {**content, "sequence": head.sequence + 1, "previous": head.hash}
    digest = _hash(body)
    return canonical({**body, "hash": digest}) + b"\n", Head(head.sequence + 1, digest)


def parsed(line: bytes) -> dict[str, Any]:
    """The content of a line that is as it was written, whatever was before it; ValueError for any other."""
    content = json.loads(line)
    if not isinstance(content, dict) or canonical(content) + b"\n" != line:
        raise ValueError("not as it was written")
    if content.get("hash") != _hash({k: v for k, v in content.items() if k != "hash"}):
        raise ValueError("its hash is another")
    return content


def _hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_LINE + canonical(body)).hexdigest()


@dataclass
class Log:
    """A log that was found to be whole: whose it is, its lines, and the heads of other logs that it has."""

    path: Path
    party: str
    entries: list[dict[str, Any]] = field(repr=False)
    heads: list[tuple[str, Head]]

    @property
    def head(self) -> Head:
        """Of the last line."""
        return Head(self.entries[-1]["sequence"], self.entries[-1]["hash"])

    def check(self, party: str, heads: Iterable[Head], source: str) -> int:
        """TamperingError unless all heads that `source` has of this party's log are lines of it: how many."""
        count = 0
        for head in heads if party == self.party else ():
            count += 1
            there = head.sequence < len(self.entries)
            if not there or self.entries[head.sequence]["hash"] != head.hash:
                what = "has another line" if there else "ends before line"
                raise TamperingError(
                    f"{self.path} was rewritten: it {what} {head.sequence}, which {source} has seen; "
                    f"keep both files and ask the operator of {self.party}"
                )
        return count


def read(path: Path) -> Log:
    """A whole log, every line checked; StoreError naming the first that is not as it was written."""
    entries: list[dict[str, Any]] = []
    heads: list[tuple[str, Head]] = []
    head = Head()
    try:
        for number, line in enumerate(_lines(path)):
            try:
                content = parsed(line)
                if (content["sequence"], content["previous"]) != (head.sequence + 1, head.hash):
                    raise ValueError("it does not follow the line before")
                heads += [(str(who), Head.from_json(each)) for who, each in content.get("heads", {}).items()]
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise StoreError(
                    f"{path} is damaged or was changed: line {number} (from 0) is not as it was written. Keep the "
                    "file, and compare it with the logs of the other parties"
                ) from error
            entries.append(content)
            head = Head(content["sequence"], content["hash"])
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    if not entries or not isinstance(entries[0].get("party"), str):
        raise StoreError(f"{path} is no audit log: it does not begin with whose it is")
    return Log(path, entries[0]["party"], entries, heads)


def compare(log: Log, other: Log) -> int:
    """How many heads two parties have seen of each other's logs; TamperingError if one of them is not there."""
    seen = log.check(log.party, [head for who, head in other.heads if who == log.party], str(other.path))
    return seen + other.check(other.party, [head for who, head in log.heads if who == other.party], str(log.path))


def _lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from file
