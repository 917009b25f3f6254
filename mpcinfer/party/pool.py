"""Tapes that are ready before a request comes: of the shapes asked for lately, within a budget of memory."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from mpcinfer.errors import BusyError
from mpcinfer.party.ahead import Ahead
from mpcinfer.party.catalogue import Model
from mpcinfer.party.tape import held_bytes
from mpcinfer.protocol.tracing import Plan

READY = 2  # tapes of a shape
_SHAPES = 64  # that are remembered
_LATER = 1.0  # seconds after which it is looked again whether all has come
Shapes = tuple[tuple[int, ...], ...]


@dataclass
class Shelf:
    """The tapes for so many requests with inputs of these shapes, all of one plan. `size`: what one of them takes of
    memory, in bytes.
    """

    model: Model
    shapes: Shapes
    count: int
    size: int
    tapes: deque[Ahead] = field(default_factory=deque)
    # party 0: some party has no room for another one
    full: bool = False


class Pool:
    """Filled and emptied in steps, so that it holds the same at all parties; party 0 says what comes in and what goes.

    The lane's thread changes it; others may look.
    """

    def __init__(self, megabytes: float) -> None:
        self._most = megabytes * (1 << 20)
        self._shelves: dict[bytes, Shelf] = {}  # by the plan's digest; what was asked for last is at the end
        self._not_before = 0.0

    def __len__(self) -> int:
        """For how many runs all has come."""
        return sum(tape.complete for shelf in self.shelves().values() for tape in tuple(shelf.tapes))

    def shelves(self) -> dict[bytes, Shelf]:
        """What there is, by the plan's digest."""
        return dict(self._shelves)

    def take(self, digest: bytes, model: Model, shapes: Shapes, plan: Plan, count: int = 1) -> Ahead | None:
        """The oldest tape of this plan, for `count` requests, if there is one. That it was asked for is remembered."""
        shelf = self._shelves.pop(digest, None) or Shelf(model, shapes, count, held_bytes(plan))
        self._shelves[digest] = shelf
        if len(self._shelves) > _SHAPES:
            self._shelves.pop(next(iter(self._shelves)))
        shelf.full = False
        return shelf.tapes.popleft() if shelf.tapes else None

    def wanted(self) -> tuple[bytes, list[bytes]] | None:
        """Party 0: the plan to fetch a tape of while there is nothing else to do, and the tapes that make room for it.

        Those are of plans that were not asked for since, one for each digest named.
        """
        if time.monotonic() < self._not_before:
            return None
        order = list(self._shelves.items())
        for at in range(len(order) - 1, -1, -1):
            digest, shelf = order[at]
            if len(shelf.tapes) >= READY or shelf.full:
                continue
            over, drops = self._used() + shelf.size - self._most, []
            for other, older in order[:at]:
                for _ in older.tapes:
                    if over > 0:
                        drops.append(other)
                        over -= older.size
            if over <= 0:
                return digest, drops
        return None

    @property
    def coming(self) -> bool:
        """Whether something was fetched that has not come yet: one after the other is, so that a request that needs
        another tape waits for little else.
        """
        return any(not tape.complete for shelf in self.shelves().values() for tape in tuple(shelf.tapes))

    def wait(self) -> None:
        """Some party still waits for what was fetched before."""
        self._not_before = time.monotonic() + _LATER

    def drop(self, digests: list[bytes]) -> None:
        """Make room: the oldest tape of each plan named."""
        for digest in digests:
            self._shelves[digest].tapes.popleft()

    def check_room(self, digest: bytes) -> None:
        """BusyError if this party has no memory for another tape of the plan."""
        if self._used() + self._shelves[digest].size > self._most:
            raise BusyError("this party's pool has no room for another tape (pool_mb)")

    def put(self, digest: bytes, ahead: Ahead) -> None:
        """A tape is on its way, or there."""
        self._shelves[digest].tapes.append(ahead)

    def forget(self, deployment: bytes) -> None:
        """A model is gone."""
        self._shelves = {d: shelf for d, shelf in self._shelves.items() if shelf.model.id != deployment}

    def clear(self) -> None:
        """The epoch has ended, and its tapes are burnt."""
        self._shelves.clear()

    def _used(self) -> int:
        return sum(shelf.size * len(shelf.tapes) for shelf in self._shelves.values())
