"""The mesh of a cluster with witnesses: at a party, whose own witness gets what it receives, and at a witness.

A witness has no connection to other parties. All that its party receives, and what its party itself announces and
votes, comes from that party, in the order in which it happened; what its party must have opened it computes. So both go
through the same steps, the witness a little later, and have the same running digests, unless one of them is not honest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from mpcinfer.wire.mesh import CONTROL, MAX_MESSAGE, OPENING, Link, Merge, Mesh
from mpcinfer.wire.traffic import Traffic


class WitnessedMesh(Mesh):
    """A party's links, and the one to its witness, if it has one."""

    def __init__(self, index: int, links: Mapping[int, Link], witness: Link | None) -> None:
        super().__init__(index, links)
        self.traffic = Traffic(index, self.links)
        self._witness = witness

    @property
    def alone(self) -> bool:
        """See `Mesh`."""
        return self._witness is not None and self._witness.broken.is_set()

    def begin(self, payload: bytes, kind: int = OPENING, most: int = MAX_MESSAGE) -> Callable[[], dict[int, bytes]]:
        """See `Mesh`."""
        receive = super().begin(payload, kind, most)
        self.traffic.sent(kind, payload)

        def told() -> dict[int, bytes]:
            found = receive()
            if kind == CONTROL:
                self._tell(CONTROL, payload)
            for peer, received in found.items():
                self.traffic.received(peer, kind, received)
                self._tell(kind, received)
            return found

        return told

    def consult(self, payload: bytes, merge: Merge, most: int = MAX_MESSAGE) -> dict[int, bytes]:
        """See `Mesh`: a party and its witness speak with one voice."""
        if self._witness is not None:
            payload = merge(payload, self._witness.receive(CONTROL, most))
        return super().consult(payload, merge, most)

    def confide(self, secret: bytes) -> bytes:
        """See `Mesh`: no other party is told, so it is not part of what all compare."""
        self._tell(CONTROL, secret)
        return secret

    def announce(self, payload: bytes) -> None:
        """See `Mesh`."""
        super().announce(payload)
        self.traffic.sent(CONTROL, payload)
        self._tell(CONTROL, payload)

    def announced(self) -> bytes:
        """See `Mesh`."""
        payload = super().announced()
        self.traffic.received(0, CONTROL, payload)
        self._tell(CONTROL, payload)
        return payload

    def _tell(self, kind: int, payload: bytes) -> None:
        if self._witness is not None:
            self._witness.send(kind, payload)

    def _all(self) -> list[Link]:
        return [*super()._all(), *([self._witness] if self._witness is not None else [])]


class ShadowMesh(Mesh):
    """A witness's view of its party's mesh: of `parties`, through the one link to it."""

    shadow = True

    def __init__(self, index: int, parties: int, link: Link) -> None:
        super().__init__(index, {})
        self._parties = parties
        self._peers = [peer for peer in range(parties) if peer != index]
        self._link = link
        self.traffic = Traffic(index, self._peers)

    @property
    def parties(self) -> int:
        """How many parties there are."""
        return self._parties

    @property
    def broken(self) -> bool:
        """Whether its party has gone."""
        return self._link.broken.is_set()

    def begin(self, payload: bytes, kind: int = OPENING, most: int = MAX_MESSAGE) -> Callable[[], dict[int, bytes]]:
        """What the party has received, in return for what it must have sent."""
        self.rounds += kind == OPENING
        self.traffic.sent(kind, payload)
        most = max(len(payload), most)

        def receive() -> dict[int, bytes]:
            began = time.perf_counter()
            found = {peer: self._link.receive(kind, most) for peer in self._peers}
            for peer, received in found.items():
                self.traffic.received(peer, kind, received)
            self.account.rounds += kind == OPENING
            self.account.openings_seconds += time.perf_counter() - began
            return found

        return receive

    def consult(self, payload: bytes, merge: Merge, most: int = MAX_MESSAGE) -> dict[int, bytes]:
        """See `Mesh`: the party speaks for both; whoever calls this checks that it does."""
        self._link.send(CONTROL, payload)
        joint = self._link.receive(CONTROL, most)
        return {self.index: joint, **self.exchange(joint, CONTROL, most)}

    def confide(self, secret: bytes) -> bytes:
        """See `Mesh`: what the party has drawn; whoever calls this checks that the party goes by it."""
        return self._link.receive(CONTROL)

    def announced(self) -> bytes:
        """See `Mesh`; of party 0, what it has announced itself."""
        payload = self._link.receive(CONTROL)
        if self.index == 0:
            self.traffic.sent(CONTROL, payload)
        else:
            self.traffic.received(0, CONTROL, payload)
        return payload

    def _all(self) -> list[Link]:
        return [self._link]
