"""Calls at several parties are over once gRPC's own thread has let go of them."""

from __future__ import annotations

import threading
from collections.abc import Callable

from mpcinfer.client.link import Calls


class Slow:
    """A call that a thread of gRPC's lets go of some time after it was cancelled, when the test says so."""

    def __init__(self) -> None:
        self.cancelled, self.let_go = threading.Event(), threading.Event()

    def add_done_callback(self, done: Callable[[Slow], None]) -> None:
        def release() -> None:
            self.let_go.wait()
            done(self)

        threading.Thread(target=release, daemon=True).start()

    def cancel(self) -> None:
        self.cancelled.set()


def test_calls_end_once_all_are_let_go() -> None:
    calls, one, other = Calls(), Slow(), Slow()
    assert calls.add(one) is one and calls.add(other) is other
    ended = threading.Event()

    def end() -> None:
        calls.end()
        ended.set()

    threading.Thread(target=end, daemon=True).start()
    assert one.cancelled.wait(5) and other.cancelled.wait(5)
    one.let_go.set()
    assert not ended.wait(0.1)  # the other one's lock may still be held
    other.let_go.set()
    assert ended.wait(5)


def test_what_has_ended_is_not_waited_for() -> None:
    calls, one = Calls(), Slow()
    one.let_go.set()
    calls.add(one)
    calls.end()
    calls.end()
