"""A party's mesh and its witness's: the same steps, the same digests, in whatever order links carry what."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import pytest

from mpcinfer.errors import AbortedError, ProtocolError
from mpcinfer.wire.mesh import CONTROL, MAX_MESSAGE, OPENING
from mpcinfer.wire.witnessed import ShadowMesh, WitnessedMesh


class End:
    """One end of a link: what was sent at the other end, by kind, as over gRPC and direct connections."""

    def __init__(self) -> None:
        self.got: dict[int, deque[bytes]] = {CONTROL: deque(), OPENING: deque()}
        self.other: End | None = None
        self.bytes_sent = 0
        self.broken = threading.Event()

    def send(self, kind: int, payload: bytes) -> None:
        assert self.other is not None
        self.other.got[kind].append(payload)

    def receive(self, kind: int, most: int = MAX_MESSAGE) -> bytes:
        if not self.got[kind]:
            raise AbortedError("nothing has come")
        if len(self.got[kind][0]) > most:
            raise ProtocolError("more than is due")
        return self.got[kind].popleft()

    def close(self) -> None:
        self.broken.set()


def linked() -> tuple[Any, Any]:
    a, b = End(), End()
    a.other, b.other = b, a
    return a, b


@pytest.fixture
def world() -> tuple[WitnessedMesh, ShadowMesh, End]:
    """Party 0's mesh, that of its witness, and party 1's end of the link between the parties."""
    (here, there), (told, listening) = linked(), linked()
    return WitnessedMesh(0, {1: here}, told), ShadowMesh(0, 2, listening), there


def agree(party: WitnessedMesh, witness: ShadowMesh) -> bool:
    return party.traffic.digests() == witness.traffic.digests()


def test_a_witness_follows_its_party(world: tuple[WitnessedMesh, ShadowMesh, End]) -> None:
    party, witness, peer = world
    party.announce(b"step")
    peer.send(OPENING, b"theirs")
    assert party.exchange(b"mine") == {1: b"theirs"}
    assert not agree(party, witness)
    assert witness.announced() == b"step"
    assert witness.exchange(b"mine") == {1: b"theirs"}
    assert agree(party, witness)
    assert (party.parties, witness.parties, witness.rounds, witness.shadow, party.shadow) == (2, 2, 1, True, False)


def test_what_a_witness_computes_differently_shows(world: tuple[WitnessedMesh, ShadowMesh, End]) -> None:
    party, witness, peer = world
    peer.send(OPENING, b"theirs")
    party.exchange(b"minf")
    witness.exchange(b"mine")
    assert not agree(party, witness)


def test_they_speak_with_one_voice(world: tuple[WitnessedMesh, ShadowMesh, End]) -> None:
    party, witness, peer = world
    witness._link.send(CONTROL, b"no")  # what `consult` begins with, before it waits
    peer.send(CONTROL, b"yes")
    assert party.consult(b"yes", lambda own, other: own + b"/" + other) == {0: b"yes/no", 1: b"yes"}
    assert peer.receive(CONTROL) == b"yes/no"
    assert witness.consult(b"no", lambda own, other: b"") == {0: b"yes/no", 1: b"yes"}
    assert agree(party, witness)


def test_rounds_may_be_large_where_the_plan_is(world: tuple[WitnessedMesh, ShadowMesh, End]) -> None:
    party, witness, peer = world
    large = bytes(MAX_MESSAGE + 1)
    peer.send(OPENING, large)
    party.exchange(bytes(len(large)))
    assert witness.exchange(bytes(len(large))) == {1: large}
    peer.send(OPENING, large)
    with pytest.raises(ProtocolError):
        witness._link.other.send(OPENING, large)
        witness.exchange(b"small")


def test_what_they_say_may_be_as_large_as_is_due(world: tuple[WitnessedMesh, ShadowMesh, End]) -> None:
    party, witness, peer = world
    large = bytes(MAX_MESSAGE + 1)
    for end in (witness._link, peer):
        end.send(CONTROL, large)
    assert party.consult(b"own", lambda own, other: own + other[:1], len(large)) == {0: b"own\0", 1: large}
    assert witness.consult(large, lambda own, other: b"", len(large)) == {0: b"own\0", 1: large}
    peer.send(CONTROL, large)
    witness._link.send(CONTROL, large)
    with pytest.raises(ProtocolError):
        party.consult(b"own", lambda own, other: own)


def test_a_party_without_its_witness_is_alone(world: tuple[WitnessedMesh, ShadowMesh, End]) -> None:
    party, witness, _ = world
    assert not party.alone and not party.broken
    party._witness.close()  # type: ignore[union-attr]
    assert party.alone and not party.broken
    with pytest.raises(AbortedError):
        party.consult(b"yes", lambda own, other: own)
    assert not WitnessedMesh(0, {}, None).alone
