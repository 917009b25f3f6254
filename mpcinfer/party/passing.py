"""Corrections on their way from the last party to its witness, which asks the dealer whether they are the right."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, ClassVar

from mpcinfer.errors import AbortedError, TamperingError
from mpcinfer.wire.v1 import mesh_pb2


class Unwatched:
    """What becomes of the corrections of a tape besides being used: nothing, where there is no witness."""

    def __init__(self, tape: bytes) -> None:
        pass

    def add(self, chunk: memoryview) -> None:
        """One part of them, in order."""

    def end(self) -> None:
        """That was all."""

    def cancel(self) -> None:
        """More was to come, and will not."""


class Passing(Unwatched):
    """Passes them on. Never waits: a witness that does not take them in will be missed at the next vote."""

    _running: ClassVar[set[Any]] = set()  # gRPC cancels a call that nobody refers to

    def __init__(self, stub: Any, session: bytes, tape: bytes) -> None:
        super().__init__(tape)
        self._parts: SimpleQueue[mesh_pb2.CorrectionsRequest | None] = SimpleQueue()
        self._parts.put(mesh_pb2.CorrectionsRequest(session=session, tape=tape))
        self._call = stub.Corrections.future(iter(self._parts.get, None))
        self._running.add(self._call)
        self._call.add_done_callback(self._running.discard)

    def add(self, chunk: memoryview) -> None:
        """See `Unwatched`."""
        self._parts.put(mesh_pb2.CorrectionsRequest(chunk=bytes(chunk)))

    def end(self) -> None:
        """See `Unwatched`."""
        self._parts.put(None)

    def cancel(self) -> None:
        """See `Unwatched`: the witness is not to take what it has for all, and another amount for tampering."""
        self._call.cancel()
        self._parts.put(None)


class Deliveries:
    """At the witness: each tape's corrections are read from their stream when they are needed, not before."""

    def __init__(self) -> None:
        self._streams: dict[tuple[bytes, bytes], Iterator[mesh_pb2.CorrectionsRequest]] = {}
        self._changed = threading.Condition()

    def serve(self, parts: Iterator[mesh_pb2.CorrectionsRequest], alive: Callable[[], bool]) -> None:
        """Offer a stream, and return once it was taken or the party that sends it has gone (then call `wake`)."""
        head = next(parts)
        name = head.session, head.tape
        with self._changed:
            if name in self._streams:
                raise AbortedError("the corrections of a tape were passed on twice")
            self._streams[name] = parts
            self._changed.notify_all()
            self._changed.wait_for(lambda: name not in self._streams or not alive())
            self._streams.pop(name, None)

    def wake(self) -> None:
        """Look again whether those who send are still there."""
        with self._changed:
            self._changed.notify_all()

    def take(self, session: bytes, tape: bytes, size: int, timeout: float, alive: Callable[[], bool]) -> bytearray:
        """The corrections of a tape, `size` bytes, from their stream."""
        end = time.monotonic() + timeout
        name = session, tape
        with self._changed:
            while name not in self._streams and alive() and time.monotonic() < end:
                self._changed.wait(0.2)
            parts = self._streams.get(name)
        if parts is None:
            raise AbortedError("the party of this witness did not pass on its corrections")
        received, at = bytearray(size), 0
        try:
            for part in parts:
                received[at : at + len(part.chunk)] = part.chunk
                at += len(part.chunk)
                if at > size:
                    break
        except Exception as error:  # what gRPC raises at this end has no class of its own
            raise AbortedError("the party of this witness left while it passed on corrections") from error
        finally:
            with self._changed:
                self._streams.pop(name, None)
                self._changed.notify_all()
        if at != size:
            raise TamperingError("the party of this witness passed on another amount of corrections than was dealt")
        return received
