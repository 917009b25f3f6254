"""Sessions: texts whose keys and values this party holds shares of, from one step to the next.

All that happens to a session happens in steps, so it is the same at all parties. Only party 0 looks at the clock and
says which sessions to forget.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mpcinfer.errors import BusyError, ConflictError, ContextLengthError, NotFoundError
from mpcinfer.graph.lifted import Lifted
from mpcinfer.graph.program import Program
from mpcinfer.party.ahead import Ahead
from mpcinfer.party.catalogue import Model
from mpcinfer.party.tape import Tape
from mpcinfer.protocol.cache import CacheUse, RowStore, joined, side_by_side
from mpcinfer.protocol.evidence import KeptMasks
from mpcinfer.protocol.types import Cached, Shared

Runs = tuple[tuple[int, int], ...]


@dataclass
class Run:
    """The randomness of a step to come: the digest of what it is for, the rows it gives masks, the seconds it took."""

    tape: Tape = field(repr=False)
    digest: bytes
    rows: int
    seconds: float


@dataclass
class Supply:
    """The randomness of steps to come: of the text that grows in a slot, or of those in several that share their runs.

    What is there, what is on its way for the steps after those, of how many steps that was last, and how many steps the
    slots' texts have been written in together.
    """

    slots: tuple[Slot, ...]
    ready: deque[Run] = field(default_factory=deque, repr=False)
    ahead: Ahead | None = field(default=None, repr=False)
    pace: int = 0
    steps: int = 0

    @staticmethod
    def of(slots: Sequence[Slot]) -> Supply:
        """What these have in common, in this order; what one of them has with others is dropped."""
        held = slots[0].supply
        if held is not None and [each.id for each in held.slots] == [each.id for each in slots]:
            if all(slot.supply is held for slot in slots):  # none was written without the others since
                return held
        for slot in slots:
            if slot.supply is not None:
                slot.supply.drop()
        made = Supply(tuple(slots))
        for slot in slots:
            slot.supply = made
        return made

    def drop(self) -> None:
        """What was fetched ahead is of no use: a text has taken another turn. Its rows have masks, and are left out.

        Who asks the dealer next waits for what is on its way, if it is.
        """
        rows = sum(run.rows for run in self.ready) + (self.ahead.rows if self.ahead is not None else 0)
        self.ready.clear()
        self.ahead, self.pace = None, 0
        for slot in self.slots:
            slot.skip(rows)


@dataclass
class Slot:
    """The rows of a text and of all that continue or change it: shares, and what was opened of them, by cache."""

    id: bytes
    shares: dict[str, RowStore] = field(repr=False)
    masked: dict[str, RowStore] = field(repr=False)

    supply: Supply | None = field(default=None, repr=False)
    last: bytes = b""  # whose step was the last one
    # where the rows' masks came from: [first, end), for audits of the dealer
    masks: list[tuple[int, int, KeptMasks]] = field(default_factory=list, repr=False)

    @property
    def count(self) -> int:
        """How many rows have been appended to each cache."""
        return next(iter(self.shares.values())).count

    def mask(self, cache: str, runs: Runs) -> list[torch.Tensor]:
        """This party's shares of the masks of these rows of a cache, in parts."""
        parts = []
        for first, end in runs:
            for start, stop, masks in self.masks:
                low, high = max(first, start), min(end, stop)
                if low < high:
                    parts.append(masks.share(cache)[..., low - start : high - start, :])
        return parts

    def skip(self, rows: int) -> None:
        """Leave out the numbers of rows whose masks will never be used."""
        for store in (*self.shares.values(), *self.masked.values()):
            store.skip(rows)


@dataclass
class Session:
    """One text: which rows of its slot it is made of, and this party's shares of its tokens' indices, [1, length].

    `counts`: how often each token of the vocabulary is among the first `counted`, if a penalty needed to know.

    `token`: the one that was chosen last, which no step has taken in yet. `request`: the answer to whoever began it.
    """

    id: bytes
    caller: str
    model: Model
    slot: Slot
    runs: Runs
    tokens: torch.Tensor = field(repr=False)
    token: Shared | None = field(default=None, repr=False)
    counts: Shared | None = field(default=None, repr=False)
    counted: int = 0
    request: Future[Any] = field(default_factory=Future, repr=False)
    touched: float = field(default_factory=time.monotonic)

    @property
    def active(self) -> bool:
        """Whether its request is being worked on."""
        return not self.request.done()

    @property
    def length(self) -> int:
        """How many tokens have been taken in."""
        return sum(end - first for first, end in self.runs)

    def use(self) -> CacheUse:
        """What to tell the dealer."""
        return CacheUse(self.slot.id, self.runs, self.slot.count)

    def caches(self, room: int) -> dict[str, Cached]:
        """The caches, with room for so many rows."""
        if not self.runs:
            none = [(c, torch.zeros(c.shape, dtype=torch.int64)) for c in self.model.program.caches]
            return {c.name: Cached(c.name, rows, rows, room, c.frac_bits) for c, rows in none}
        return {
            c.name: Cached(
                c.name,
                self.slot.shares[c.name].read(self.runs),
                self.slot.masked[c.name].read(self.runs),
                room,
                c.frac_bits,
            )
            for c in self.model.program.caches
        }

    def grow(self, grown: list[Cached], tokens: Shared, masks: KeptMasks) -> None:
        """Take in what a step has appended, for these tokens, under these masks."""
        first, new = self.slot.count, tokens.shape[1]
        self.slot.masks.append((first, first + new, masks))
        for cache in grown:
            self.slot.shares[cache.name].append(cache.share[..., -new:, :])
            self.slot.masked[cache.name].append(cache.masked[..., -new:, :])
        self.runs = tuple(joined([*self.runs, (first, first + new)]))
        self.tokens = torch.cat([self.tokens, tokens.share], dim=1)
        self.touched = time.monotonic()


class Sessions:
    """The sessions of this party. The lane's thread changes them; others may look."""

    def __init__(
        self,
        most: int,
        megabytes: int,
        idle_seconds: float,
        most_of_caller: int | None = None,
        most_of_owner: int | None = None,
    ) -> None:
        self._most = most
        self._most_of_caller = min(most, most_of_caller or most)
        self._most_of_owner = min(most, most_of_owner or most)
        self._megabytes = megabytes
        self._idle_seconds = idle_seconds
        self._sessions: dict[bytes, Session] = {}
        self._ending: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._sessions)

    def slot(self, session_id: bytes) -> bytes:
        """The id of a session's slot; nothing if there is no such session."""
        session = self._sessions.get(session_id)
        return session.slot.id if session is not None else b""

    def ahead(self) -> int:
        """For how many steps of all of them randomness is there, or on its way."""
        supplies = {id(s.slot.supply): s.slot.supply for s in self._sessions.copy().values()}
        return sum(
            len(each.ready) + (len(each.ahead.digests) if each.ahead is not None else 0)
            for each in supplies.values()
            if each is not None
        )

    def rows(self, program: Program) -> int:
        """How many rows a slot of this model may have here."""
        return (self._megabytes << 20) // row_bytes(program)

    def find(self, session_id: bytes, caller: str, model: Model) -> Session:
        """A session of this caller and model; NotFoundError for any other."""
        session = self._sessions.get(session_id)
        if session is None or session.caller != caller or session.model.id != model.id:
            raise NotFoundError("there is no such session (any more); send the text from its beginning")
        return session

    def begin(
        self, session_id: bytes, caller: str, model: Model, parent: bytes, keep: int, tape: bytes, more: int
    ) -> Session:
        """A new text, or one that keeps the first tokens of another, to which `more` tokens may be added.

        ContextLengthError if it would be longer than the model takes or than there is memory for, BusyError if there
        are as many sessions as there may be, of all, of this caller, or of this owner's models; NotFoundError if the
        parent is gone.
        """
        if session_id in self._sessions:
            raise ConflictError("a session with this id exists; draw a new id for every request")
        if len(self._sessions) >= self._most:
            raise BusyError(f"{self._most} sessions are in use; try again later")
        if sum(s.caller == caller for s in self._sessions.values()) >= self._most_of_caller:
            raise BusyError(f"{self._most_of_caller} sessions of yours are in use; end one, or try again later")
        if sum(s.model.owner == model.owner for s in self._sessions.values()) >= self._most_of_owner:
            raise BusyError(
                f"{self._most_of_owner} sessions of this owner's models are in use, as many as one owner's may be; end "
                "one of yours, or try again later"
            )
        names = [c.name for c in model.program.caches]
        if parent:
            origin = self.find(parent, caller, model)
            if not 0 <= keep <= origin.length:
                raise NotFoundError(f"the session has {origin.length} tokens, fewer than are to be kept")
            slot, runs, tokens = origin.slot, first_rows(origin.runs, keep), origin.tokens[:, :keep]
        else:
            keep = 0
            slot = Slot(tape, {name: RowStore() for name in names}, {name: RowStore() for name in names})
            runs, tokens = (), torch.empty((1, 0), dtype=torch.int64)
        self.check_length(model.program, keep, more, slot.count)
        session = Session(session_id, caller, model, slot, runs, tokens)
        if parent and origin.counted <= keep:
            session.counts, session.counted = origin.counts, origin.counted
        self._sessions[session_id] = session
        return session

    def check_length(self, program: Program, keep: int, more: int, appended: int = 0) -> None:
        """ContextLengthError unless a text of keep + more tokens fits the model, and its rows this party's memory."""
        if keep + more > program.context:
            raise ContextLengthError(
                f"the text and its answer have up to {keep + more} tokens and the model takes {program.context}: "
                "shorten the text, or ask for fewer tokens"
            )
        if appended + more > self.rows(program):
            raise ContextLengthError(
                f"a session may take {self._megabytes} MiB of memory at a party (session_mb), which is "
                f"{self.rows(program)} tokens of this model, those that were changed included: begin a new one, with a "
                "shorter text"
            )

    def idle(self, new: Sequence[tuple[str, str]] = ()) -> list[bytes]:
        """Party 0: which sessions to forget now, so that there is room for new ones (at least one): who begins each,
        and whose model it is of. A client or owner that has its part makes room among its own."""
        now = time.monotonic()
        resting = sorted((s for s in self._sessions.values() if not s.active), key=lambda s: s.touched)
        crowd = max(0, len(self._sessions) - (self._most - max(1, len(new))))
        over = {s.id for s in resting[:crowd]} | {s.id for s in resting if now - s.touched > self._idle_seconds}
        for most, of, begun in (
            (self._most_of_caller, _caller, [caller for caller, _ in new]),
            (self._most_of_owner, _owner, [owner for _, owner in new]),
        ):
            held = Counter(map(of, self._sessions.values()))
            for who, wanted in Counter(begun).items():
                own = [s for s in resting if of(s) == who]
                over |= {s.id for s in own[: max(0, held[who] + wanted - most)]}
        ended = {i for i in self._ending.copy() if i in self._sessions and not self._sessions[i].active}
        return sorted(over | ended)

    def end(self, session_id: bytes, caller: str) -> None:
        """Its client does not need a session any more."""
        session = self._sessions.get(session_id)
        if session is not None and session.caller == caller:
            self._ending.add(session_id)

    def forget(self, ids: list[bytes]) -> list[bytes]:
        """Drop sessions; the slots that no session is left of."""
        gone = [self._sessions.pop(i) for i in ids if i in self._sessions]
        self._ending.difference_update(ids)
        kept = {s.slot.id for s in self._sessions.values()}
        return sorted({s.slot.id for s in gone} - kept)

    def of_model(self, deployment: bytes) -> list[bytes]:
        """The sessions of a model."""
        return sorted(s.id for s in self._sessions.values() if s.model.id == deployment)

    def clear(self) -> None:
        """The epoch has ended, and with it the masks of all rows."""
        self._sessions.clear()
        self._ending.clear()


def use_of(sessions: Sequence[Session]) -> CacheUse:
    """What to tell the dealer of texts that share their runs."""
    own, *beside = (session.use() for session in sessions)
    return replace(own, beside=tuple(beside))


def caches_of(sessions: Sequence[Session], room: int) -> dict[str, Lifted]:
    """Their caches side by side, with room for so many rows each."""
    each, found = [session.caches(room) for session in sessions], {}
    for name, first in each[0].items():
        share = side_by_side([own[name].share for own in each])
        masked = side_by_side([own[name].masked for own in each])
        found[name] = Lifted(Cached(name, share, masked, room, first.frac_bits), tuple(s.length for s in sessions))
    return found


def _caller(session: Session) -> str:
    return session.caller


def _owner(session: Session) -> str:
    return session.model.owner


def first_rows(runs: Runs, count: int) -> Runs:
    """The first `count` rows of these runs."""
    kept = []
    for first, end in runs:
        take = min(count, end - first)
        if take:
            kept.append((first, first + take))
        count -= take
    return tuple(kept)


def row_bytes(program: Program) -> int:
    """What a token's rows take at a party: shares, and what was opened."""
    return sum(16 * math.prod(size for size in c.shape if size) for c in program.caches)
