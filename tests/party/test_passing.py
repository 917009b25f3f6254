"""Corrections that the last party passes on: read when they are needed, and no longer waited for than makes sense."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from mpcinfer.errors import AbortedError, MpcInferError, TamperingError
from mpcinfer.party.passing import Deliveries, Passing
from mpcinfer.wire.v1 import mesh_pb2

SESSION, TAPE = b"s" * 16, b"t" * 16


def stream(chunks: Sequence[bytes], read: list[int] | None = None) -> Iterator[mesh_pb2.CorrectionsRequest]:
    yield mesh_pb2.CorrectionsRequest(session=SESSION, tape=TAPE)
    for i, chunk in enumerate(chunks):
        if read is not None:
            read.append(i)
        yield mesh_pb2.CorrectionsRequest(chunk=chunk)


def serving(deliveries: Deliveries, parts: Iterator[Any], alive: Callable[[], bool] = lambda: True) -> threading.Thread:
    thread = threading.Thread(target=deliveries.serve, args=[parts, alive], daemon=True)
    thread.start()
    return thread


def take(deliveries: Deliveries, size: int, alive: Callable[[], bool] = lambda: True, timeout: float = 20) -> bytes:
    return bytes(deliveries.take(SESSION, TAPE, size, timeout, alive))


def test_nothing_is_read_before_it_is_needed() -> None:
    deliveries, read = Deliveries(), list[int]()
    thread = serving(deliveries, stream([b"ab", b"", b"cde"], read))
    assert not read
    assert take(deliveries, 5) == b"abcde"
    thread.join(20)
    assert not thread.is_alive() and read == [0, 1, 2]


@pytest.mark.parametrize("chunks", [[], [b"abcd"], [b"abc", b"def"], [b"a" * 1000] * 1000])
def test_another_amount_is_tampering(chunks: list[bytes]) -> None:
    deliveries, read = Deliveries(), list[int]()
    serving(deliveries, stream(chunks, read))
    with pytest.raises(TamperingError):
        take(deliveries, 5)
    assert len(read) <= 2  # whatever more there is


def test_a_party_that_does_not_deliver_is_not_waited_for() -> None:
    with pytest.raises(AbortedError):
        take(Deliveries(), 5, alive=lambda: False)
    with pytest.raises(AbortedError):
        take(Deliveries(), 5, timeout=0)


def test_a_stream_that_breaks_ends_in_our_error() -> None:
    def broken() -> Iterator[Any]:
        yield from stream([b"ab"])
        raise RuntimeError("as gRPC's")

    deliveries = Deliveries()
    thread = serving(deliveries, broken())
    with pytest.raises(AbortedError):
        take(deliveries, 5)
    thread.join(20)
    assert not thread.is_alive()


def test_whoever_offers_goes_when_its_caller_has_gone() -> None:
    deliveries, alive = Deliveries(), [True]
    thread = serving(deliveries, stream([b"ab"]), lambda: alive[0])
    alive[0] = False
    deliveries.wake()
    thread.join(20)
    assert not thread.is_alive()
    with pytest.raises(MpcInferError):
        take(deliveries, 2, timeout=0)


class Call:
    """A call of `Corrections`, which runs until its stream ends."""

    def __init__(self, parts: Iterator[Any]) -> None:
        self.got: list[mesh_pb2.CorrectionsRequest] = []
        self.cancelled: list[int] = []  # what it had when it was
        self.thread = threading.Thread(target=lambda: self.got.extend(parts), daemon=True)
        self.thread.start()

    def cancel(self) -> None:
        self.cancelled.append(len(self.got))

    def add_done_callback(self, done: Callable[[Any], Any]) -> None:
        """It is never told: what matters here is that somebody refers to the call until then."""


def test_what_is_passed_on_is_what_was_received_in_order() -> None:
    calls: list[Call] = []

    def future(parts: Iterator[Any]) -> Call:
        calls.append(Call(parts))
        return calls[-1]

    passing = Passing(SimpleNamespace(Corrections=SimpleNamespace(future=future)), SESSION, TAPE)
    passing.add(memoryview(b"ab"))
    passing.add(memoryview(b"c"))
    passing.end()
    calls[0].thread.join(20)
    assert not calls[0].cancelled
    head, *rest = calls[0].got
    assert (head.session, head.tape) == (SESSION, TAPE)
    assert [each.chunk for each in rest] == [b"ab", b"c"]
    assert calls[0] in Passing._running
    Passing._running.discard(calls[0])
