"""The pin: what a client or owner has seen of the parties once, asked their operators about, and holds them to."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mpcinfer.config import Cluster
from mpcinfer.errors import ConfigError, ManifestError
from mpcinfer.trust import evidence
from mpcinfer.trust.facts import Facts, digest

FORMAT = 1
_AGAIN = "Ask the operators whether they meant it, then pin the parties again with `mpcinfer pin`"
_WORDS = {
    "key_pin": "TLS key",
    "signing_key": "signing key",
    "package": "package version",
    "code": "code digest",
    "protocol": "protocol version",
    "evidence": "kind of evidence",
}


@dataclass(frozen=True)
class Member:
    """A party as it has shown itself: its facts, and what its evidence measures (None: could not be checked here)."""

    facts: Facts
    measured: Mapping[str, str] | None

    @property
    def evidence(self) -> str:
        """The kind of evidence and what it proves, in words."""
        words = evidence.find(self.facts.evidence).words
        return f"{self.facts.evidence}: {words if self.measured is not None else 'NOT CHECKED, for lack of collateral'}"


@dataclass(frozen=True)
class Earlier:
    """Who was pinned until a time (in Unix seconds), when others were."""

    members: tuple[Member, ...]
    until: float


@dataclass(frozen=True)
class Pin:
    """All parties and then witnesses, by index, as they were; and who was pinned before, the oldest first.

    Whoever was pinned before is held to nothing any more and connected to no more: it is what old receipts are checked
    with.
    """

    members: tuple[Member, ...]
    earlier: tuple[Earlier, ...] = ()

    def after(self, before: Pin | None, now: float) -> Pin:
        """This pin as the successor of another at a time in Unix seconds."""
        if before is None:
            return self
        own, past = _manifest(self.members), before.earlier
        if _manifest(before.members) != own:
            past = (*past, Earlier(before.members, now))
        last = {_manifest(each.members): each for each in past}  # of those that were pinned twice
        return replace(self, earlier=tuple(each for each in past if each is last[_manifest(each.members)]))

    def find(self, manifest: str) -> Earlier | None:
        """Who was pinned, now (until then: infinity) or before, if the digest of their manifest is this one."""
        known = (*self.earlier, Earlier(self.members, math.inf))
        return next((each for each in reversed(known) if _manifest(each.members) == manifest), None)

    def check_cluster(self, cluster: Cluster) -> None:
        """ManifestError if it was made for another cluster file."""
        if len(self.members) != len(cluster.holders) or self.members[0].facts.cluster != cluster.digest().hex():
            raise ManifestError(
                "the parties were pinned under another cluster file than the one used now. If all operators say that "
                "the new one is right, pin the parties again with `mpcinfer pin`"
            )

    def check(self, now: Facts) -> Mapping[str, str]:
        """What the evidence of this party measured; ManifestError saying which of its facts are others now."""
        for member in self.members:
            if member.facts.role == now.role:
                changed = _changed(member.facts, now)
                if changed:
                    raise ManifestError(f"{now.role} is not what was pinned: {'; '.join(changed)}. {_AGAIN}")
                return member.measured or {}
        raise ManifestError(f"{now.role} is not among the parties that were pinned. {_AGAIN}")

    def changes(self, now: Pin) -> list[str]:
        """What is different in another pin, in words."""
        known, found = {member.facts.role: member for member in self.members}, []
        for member in now.members:
            role = member.facts.role
            if role not in known:
                found.append(f"{role} is new")
                continue
            found += [f"{role}: {change}" for change in _changed(known[role].facts, member.facts)]
            found += [f"{role}: {c}" for c in differences(known[role].measured or {}, member.measured or {})]
        return found

    def save(self, path: Path) -> None:
        """Write it, replacing what is there at once. ManifestError if some evidence could not be checked."""
        for member in self.members:
            if member.measured is None:
                raise ManifestError(
                    f"the evidence of {member.facts.role} ({member.facts.evidence}) was not checked, so it cannot be "
                    "pinned: say where its collateral is, in MPCINFER_COLLATERAL"
                )
        content = {"format": FORMAT, "parties": _entries(self.members)}
        content["earlier"] = [{"until": each.until, "parties": _entries(each.members)} for each in self.earlier]
        fresh = path.with_name(path.name + ".new")
        try:
            fresh.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            os.replace(fresh, path)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error

    @staticmethod
    def load(path: Path) -> Pin:
        """Read a pin file; ConfigError if it is none."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ValueError("another format")
            earlier = [Earlier(_members(e["parties"]), float(e["until"])) for e in data.get("earlier", ())]
            return Pin(_members(data["parties"]), tuple(earlier))
        except OSError as error:
            raise ConfigError(f"cannot read the pin {path}: {error.strerror or 'unreadable'}") from error
        except (ValueError, KeyError, TypeError, RecursionError, ManifestError) as error:
            raise ConfigError(
                f"{path} is no pin of this release: restore it, or make it anew with `mpcinfer pin`"
            ) from error


def _manifest(members: Sequence[Member]) -> str:
    return digest([member.facts for member in members]).hex()


def _entries(members: Sequence[Member]) -> list[dict[str, Any]]:
    return [{"facts": m.facts.to_json(), "measured": dict(m.measured or {})} for m in members]


def _members(entries: Any) -> tuple[Member, ...]:
    """The inverse; ValueError if there is none."""
    if not entries:
        raise ValueError("no parties")
    return tuple(Member(Facts.from_json(entry["facts"]), _texts(entry["measured"])) for entry in entries)


def differences(pinned: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """What evidence measures now and did not when it was pinned, in words."""
    return [
        f"its {name} was {_shown(pinned.get(name, ''))} and is now {_shown(found.get(name, ''))}"
        for name in sorted({*pinned, *found})
        if pinned.get(name) != found.get(name)
    ]


def _changed(before: Facts, now: Facts) -> list[str]:
    named = [(_WORDS.get(f.name, f.name), getattr(before, f.name), getattr(now, f.name)) for f in fields(Facts)]
    return [f"its {word} was {_shown(old)} and is now {_shown(new)}" for word, old, new in named if old != new]


def _shown(value: object) -> str:
    return repr(value) if value != "" else "not said"


def _texts(data: Any) -> dict[str, str]:
    if not isinstance(data, dict) or not all(isinstance(value, str) for value in data.values()):
        raise ValueError("not texts")
    return data
