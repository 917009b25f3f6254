"""Tapes on their way: in order, and what they have taken is counted once."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from mpcinfer.errors import AbortedError
from mpcinfer.party import ahead as module
from mpcinfer.party.ahead import Ahead
from tests.inprocess import wait_for


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def fetching(gate: threading.Event, begun: threading.Event, tape: Any) -> Any:
    def fetch() -> Any:
        begun.set()
        assert gate.wait(10)
        return tape

    return fetch


def test_what_passed_before_somebody_waited_is_not_counted_as_waiting(clock: Clock) -> None:
    gate, begun, tape = threading.Event(), threading.Event(), object()
    ahead = Ahead(b"a", fetching(gate, begun, tape))
    assert begun.wait(10)
    clock.now += 5  # beside other work
    taken: list[Any] = []
    waiter = threading.Thread(target=lambda: taken.append(ahead.take()))
    waiter.start()
    wait_for(lambda: bool(ahead._tape._condition._waiters))  # type: ignore[attr-defined]
    clock.now += 2
    gate.set()
    waiter.join(10)
    assert taken == [tape] and (ahead.seconds, ahead.waited) == (7.0, 2.0)
    clock.now += 3
    assert ahead.take() is tape and ahead.waited == 2.0  # it was there


def test_one_comes_after_another(clock: Clock) -> None:
    gates, begun = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]
    first = Ahead(b"a", fetching(gates[0], begun[0], 1))
    second = Ahead(b"b", fetching(gates[1], begun[1], 2), after=first)
    assert begun[0].wait(10) and not begun[1].is_set()
    gates[1].set()
    clock.now += 4
    gates[0].set()
    assert second.take() == 2 and (first.seconds, second.seconds) == (4.0, 0.0)


def test_a_failure_is_that_of_all_that_follow() -> None:
    def fail() -> Any:
        raise AbortedError("gone")

    first = Ahead(b"a", fail)
    with pytest.raises(AbortedError):
        Ahead(b"b", lambda: pytest.fail("it must not begin"), after=first).take()
