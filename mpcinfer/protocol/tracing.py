"""Running a protocol on meta tensors: what it asks for is the plan, and what it opens is checked, before any data.

The trace proves that every mask hides exactly one opening over exactly its ring (statically, for all data: nothing
in a protocol depends on values), and counts rounds and bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from mpcinfer.canonical import canonical
from mpcinfer.errors import InputError, ProtocolError
from mpcinfer.protocol.batch import Batch, batches, expanded_bytes, portions
from mpcinfer.protocol.context import Context, Opening, drive
from mpcinfer.protocol.correlation import Correlation, Kind, Tensors, from_json, to_json
from mpcinfer.protocol.types import Mask, Weight

_SEPARATORS = re.compile("[/#]")


@dataclass(frozen=True)
class Plan:
    """The correlations of one run, in the order they are drawn. Public: kinds and shapes only."""

    entries: tuple[tuple[str, Kind], ...]
    # whose lasting masks the entries refer to (hex), or "" if none
    deployment: str = ""
    # whether they are those of several runs, which are dealt together
    together: bool = False

    def repeated(self, runs: int) -> Plan:
        """The plan of so many runs one after the other, whose names begin with the run's number; of one, itself."""
        if runs == 1:
            return self
        if runs not in self._repeated:
            entries = tuple((f"{run}/{name}", item) for run in range(runs) for name, item in self.entries)
            self._repeated[runs] = Plan(entries, self.deployment, together=True)
        return self._repeated[runs]

    @cached_property
    def _repeated(self) -> dict[int, Plan]:
        return {}

    def to_bytes(self) -> bytes:
        """JSON with one spelling."""
        return canonical({"deployment": self.deployment, "entries": [[n, to_json(k)] for n, k in self.entries]})

    @staticmethod
    def from_bytes(data: bytes) -> Plan:
        """The inverse; InputError if it isn't a plan."""
        try:
            raw = json.loads(data)
            entries = tuple((str(n), from_json(k)) for n, k in raw["entries"])
            plan = Plan(entries, str(raw["deployment"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError("this is not a plan") from error
        if len({name for name, _ in entries}) != len(entries):
            raise InputError("a plan names each correlation once")
        return plan

    def digest(self) -> bytes:
        """SHA-256 of the plan."""
        return hashlib.sha256(self.to_bytes()).digest()

    @cached_property
    def portions(self) -> list[list[Batch]]:
        """The entries as they are dealt, in portions that are drawn one after the other; of several runs there is one:
        equal correlations of all of them are dealt together.
        """
        return [batches(part) for part in ([self.entries] if self.together else portions(self.entries))]

    @cached_property
    def places(self) -> dict[str, int]:
        """In which portion each entry is."""
        return {name: i for i, part in enumerate(self.portions) for batch in part for name in batch.drawn}

    @property
    def batches(self) -> list[Batch]:
        """Those of all portions, in order."""
        return [batch for part in self.portions for batch in part]

    @cached_property
    def kept(self) -> dict[str, tuple[str, Kind]]:
        """The entries whose masks outlive a tape, by the weight or the cache that they mask."""
        return {item.operand: (name, item) for name, item in self.entries if item.kept}

    @property
    def rows(self) -> int:
        """How many rows of each cache a tape gives masks."""
        return max((item.shape[-2] for _, item in self.kept.values() if item.growing), default=0)  # type: ignore[attr-defined]

    @cached_property
    def expanded_bytes(self) -> int:
        """What a tape of it takes of a party's memory."""
        return sum(expanded_bytes(item) for _, item in self.entries)

    def correction_bytes(self) -> int:
        """What the dealer sends for one tape of it."""
        return sum(batch.correction_bytes for batch in self.batches)


@dataclass
class Cost:
    """Online cost for one party, frame headers excluded."""

    rounds: int = 0
    bytes_sent: int = 0
    openings: Counter[str] = field(default_factory=Counter)
    # of each round, the bytes one peer is sent, by the outermost scope whose openings they are
    messages: list[Counter[str]] = field(default_factory=list)


def outermost_scope(name: str) -> str:
    """The scope under which a correlation, or a mask's label, was named first: of a model, the node; "" for none."""
    return _SEPARATORS.split(name, maxsplit=1)[0]


class _Recorder:
    def __init__(self) -> None:
        self.entries: dict[str, Kind] = {}
        self.masks: dict[str, Mask] = {}  # by label, which is unique as the names of correlations are

    def draw(self, name: str, item: Kind) -> Tensors:
        if name in self.entries:
            raise ProtocolError(f"correlation {name} drawn twice")
        self.entries[name] = item
        fields = item.free() | item.derived()
        return {n: torch.empty(f.shape, dtype=f.ring.dtype, device="meta") for n, f in fields.items()}


class TracingContext(Context):
    """A context that records; scopes share the record."""

    def __init__(self, recorder: _Recorder, parties: int, weights: Mapping[str, Weight], path: str = "") -> None:
        super().__init__(0, parties, recorder, weights, path)
        self._recorder = recorder

    def scope(self, name: str) -> Context:
        """As in Context."""
        inner = super().scope(name)
        return TracingContext(self._recorder, self.parties, self.weights, inner.path)

    def correlation(self, item: Kind) -> Correlation:
        """As in Context; keeps the masks to check that each was used."""
        drawn = super().correlation(item)
        self._recorder.masks |= {mask.label: mask for mask in drawn.masks()}
        return drawn


def trace(
    protocol: Callable[[Context], Coroutine[Any, Any, Any]],
    *,
    parties: int,
    weights: Mapping[str, Weight] | None = None,
    deployment: str = "",
) -> tuple[Plan, Cost, Any]:
    """The plan and the cost of `protocol(ctx)` on meta tensors, and its result; ProtocolError if a mask is misused."""
    recorder = _Recorder()
    cost = Cost()
    opened: set[str] = set()

    def check(opening: Opening) -> None:
        mask = recorder.masks.get(opening.label)
        if mask is None or opening.label in opened:
            raise ProtocolError(f"opening {opening.label} has no mask of its own")
        if mask.ring != opening.ring or mask.share.shape != opening.masked.shape:
            raise ProtocolError(f"opening {opening.label} has another ring or shape than its mask: it would leak")
        opened.add(opening.label)

    def exchange(batch: list[Opening]) -> list[torch.Tensor]:
        cost.rounds += 1
        message: Counter[str] = Counter()
        for opening in batch:
            check(opening)
            message[outermost_scope(opening.label)] += opening.ring.packed_bytes(opening.masked.numel())
            cost.openings[opening.label.partition(":")[2]] += 1
        cost.messages.append(message)
        cost.bytes_sent += message.total() * (parties - 1)
        return [torch.empty(o.masked.shape, dtype=o.ring.dtype, device="meta") for o in batch]

    result = drive(protocol(TracingContext(recorder, parties, weights or {})), exchange)
    unused = [label for label in recorder.masks if label not in opened]
    if unused:
        raise ProtocolError(f"masks that hide nothing: {', '.join(unused[:5])}")
    return Plan(tuple(recorder.entries.items()), deployment), cost, result
