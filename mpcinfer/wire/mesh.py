"""Party to party: one bidirectional stream per pair, frames in order, messages in chunks.

The party with the lower index dials. Both ends of a stream look the same afterwards: a `Link`. Anything wrong with a
stream (a peer that died, a gap in the sequence, a deadline) ends it for good: links are not repaired but made anew.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from queue import SimpleQueue
from typing import Any

import grpc

from mpcinfer.errors import AbortedError, ConfigError, IdentityError, MpcInferError, ProtocolError
from mpcinfer.wire import channel
from mpcinfer.wire.frames import CHUNK, GRPC_HEADER
from mpcinfer.wire.v1 import mesh_pb2, mesh_pb2_grpc

HELLO = mesh_pb2.FRAME_KIND_HELLO
CONTROL = mesh_pb2.FRAME_KIND_CONTROL
OPENING = mesh_pb2.FRAME_KIND_OPENING


class Link:
    """One peer's stream, used by one thread at a time in each direction."""

    def __init__(
        self,
        peer: int,
        incoming: Iterator[Any],
        outgoing: SimpleQueue[Any],
        wrap: Callable[..., Any],
        cancel: Callable[[], Any],
    ) -> None:
        self.peer = peer
        self.bytes_sent = 0
        self._incoming = incoming
        self._outgoing = outgoing
        self._wrap = wrap
        self._cancel = cancel
        self._sent = 0
        self._received = 0
        self.broken = threading.Event()

    def send(self, kind: int, payload: bytes) -> None:
        """Queue a message; never blocks."""
        for start in range(0, len(payload) or 1, CHUNK):
            part = payload if len(payload) <= CHUNK else payload[start : start + CHUNK]
            frame = mesh_pb2.Frame(
                sequence=self._sent,
                kind=kind,  # type: ignore[arg-type]
                more=start + CHUNK < len(payload),
                payload=part,
            )
            self._sent += 1
            message = self._wrap(frame=frame)
            self.bytes_sent += message.ByteSize() + GRPC_HEADER
            self._outgoing.put(message)

    def receive(self, kind: int) -> bytes:
        """The next message, which must be of this kind; AbortedError when the stream has ended.

        ConfigError or IdentityError if the other end refused the stream for that.
        """
        parts: list[bytes] = []
        while True:
            try:
                frame = next(self._incoming).frame
            except StopIteration:
                raise self._lost() from None
            except Exception as error:  # grpc raises RpcError at the dialler and bare exceptions at the acceptor
                raise self._lost(error) from error
            if frame.sequence != self._received or frame.kind != kind:
                self.close()
                raise ProtocolError(f"party {self.peer} sent a frame out of order")
            self._received += 1
            if not frame.more and not parts:
                payload: bytes = frame.payload
                return payload
            parts.append(frame.payload)
            if not frame.more:
                return b"".join(parts)

    def close(self) -> None:
        """End the stream; whoever waits on it gets AbortedError."""
        self.broken.set()
        self._outgoing.put(None)
        self._cancel()

    def finish(self) -> None:
        """Send nothing more, but let what is queued arrive; `close` must follow."""
        self._outgoing.put(None)

    def _lost(self, error: Exception | None = None) -> MpcInferError:
        self.close()
        if isinstance(error, grpc.RpcError):
            said = channel.from_rpc_error(error, f"party {self.peer}")
            if isinstance(said, ConfigError | IdentityError):  # it refused the stream, and trying again changes nothing
                return said
        return AbortedError(
            f"the connection to party {self.peer} broke; what was being computed is void and its randomness is burnt. "
            "Send the request again; if it keeps happening, look at that party's log"
        )


def dial(peer: int, opened: grpc.Channel, on_end: Callable[[], None]) -> Link:
    """Open the stream to a party with a higher index."""
    outgoing: SimpleQueue[Any] = SimpleQueue()
    call = mesh_pb2_grpc.MeshServiceStub(opened).Connect(iter(outgoing.get, None))
    link = Link(peer, call, outgoing, mesh_pb2.ConnectRequest, call.cancel)

    def ended() -> None:
        link.broken.set()
        on_end()

    if not call.add_callback(ended):
        ended()
    return link


def accept(
    peer: int, incoming: Iterator[Any], context: grpc.ServicerContext, on_end: Callable[[], None]
) -> tuple[Link, Iterator[Any]]:
    """The other end: the link, and the iterator that the RPC handler must return."""
    outgoing: SimpleQueue[Any] = SimpleQueue()
    link = Link(peer, incoming, outgoing, mesh_pb2.ConnectResponse, context.cancel)

    def ended() -> None:
        link.broken.set()
        outgoing.put(None)
        on_end()

    if not context.add_callback(ended):
        ended()
    return link, iter(outgoing.get, None)


class Mesh:
    """All links of one party in one session, and the rounds over them."""

    def __init__(self, index: int, links: Mapping[int, Link]) -> None:
        self.index = index
        self.links = dict(sorted(links.items()))
        self.rounds = 0

    @property
    def parties(self) -> int:
        """How many parties there are, this one included."""
        return len(self.links) + 1

    @property
    def bytes_sent(self) -> int:
        """Frame bytes with headers, to all peers, since the session began."""
        return sum(link.bytes_sent for link in self.links.values())

    @property
    def broken(self) -> bool:
        """Whether any link has ended."""
        return any(link.broken.is_set() for link in self.links.values())

    def exchange(self, payload: bytes, kind: int = OPENING) -> dict[int, bytes]:
        """Send the same message to all peers and receive one from each, by index: one round."""
        self.rounds += kind == OPENING
        for link in self.links.values():
            link.send(kind, payload)
        return {peer: link.receive(kind) for peer, link in self.links.items()}

    def announce(self, payload: bytes) -> None:
        """Send a control message to all peers."""
        for link in self.links.values():
            link.send(CONTROL, payload)

    def close(self) -> None:
        """End all links."""
        for link in self.links.values():
            link.close()

    def finish(self, seconds: float) -> None:
        """End all links, but let what was sent arrive first, for at most `seconds`."""
        end = time.monotonic() + seconds
        for link in self.links.values():
            link.finish()
        for link in self.links.values():
            link.broken.wait(max(0.0, end - time.monotonic()))
        self.close()

    def limited(self, seconds: float) -> threading.Timer:
        """A running timer that closes the mesh after `seconds` unless cancelled: the watchdog of one step."""
        timer = threading.Timer(seconds, self.close)
        timer.daemon = True
        timer.start()
        return timer
