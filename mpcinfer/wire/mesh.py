"""Party to party: one bidirectional stream per pair, frames in order, messages in chunks.

The party with the lower index dials. Both ends of a stream look the same afterwards: a `Link`. Anything wrong with a
stream (a peer that died, a gap in the sequence, a deadline) ends it for good: links are not repaired but made anew.
Openings, most of what is sent, leave the stream where direct connections stand beside it (see `wire.direct`).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from mpcinfer.errors import AbortedError, ConfigError, IdentityError, MpcInferError, ProtocolError
from mpcinfer.wire import channel
from mpcinfer.wire.direct import Direct
from mpcinfer.wire.frames import CHUNK, GRPC_HEADER, head, payload
from mpcinfer.wire.v1 import mesh_pb2, mesh_pb2_grpc

_M = TypeVar("_M", bound=Message)

HELLO = mesh_pb2.FRAME_KIND_HELLO
CONTROL = mesh_pb2.FRAME_KIND_CONTROL
OPENING = mesh_pb2.FRAME_KIND_OPENING

Merge = Callable[[bytes, bytes], bytes]

MAX_MESSAGE = 16 << 20  # bytes, or as many as this end sends in the same round: no more are collected
_DRAIN_SECONDS = 2.0  # what has arrived over direct connections may be read for so long after the gRPC stream has ended


class _Count:
    """Frames in both directions, counted."""

    def __init__(self, first: int) -> None:
        self.sent = self.received = first


class Link:
    """One peer's stream, used by one thread at a time in each direction. `who` is at its other end, for errors."""

    def __init__(
        self,
        peer: int,
        incoming: Iterator[Any],
        outgoing: SimpleQueue[Any],
        wrap: Callable[..., Any],
        cancel: Callable[[], Any],
    ) -> None:
        self.peer = peer
        self.who = f"party {peer}"
        self.bytes_sent = self.openings_sent = 0  # bytes, the latter only of openings
        self._outgoing = outgoing
        self._wrap = wrap
        self._incoming, self._cancel = incoming, cancel
        self._grpc = self._openings = _Count(0)
        self._direct: Direct | None = None
        self.broken = threading.Event()

    def use(self, direct: Direct) -> None:
        """From now on openings travel over direct connections."""
        self._direct = direct
        # counted from 1: a number 0 takes fewer bytes, and every round should cost the same
        self._openings = _Count(1)
        if self.broken.is_set():
            direct.close()

    def send(self, kind: int, payload: bytes) -> None:
        """Queue a message; never blocks."""
        view = memoryview(payload)
        for start in range(0, len(payload) or 1, CHUNK):
            part = view[start : start + CHUNK]
            size = self._send(kind, start + CHUNK < len(payload), part)
            self.bytes_sent += size
            if kind == OPENING:
                self.openings_sent += size

    def _send(self, kind: int, more: bool, part: memoryview) -> int:
        """Queue a frame: how many bytes it is."""
        if kind == OPENING and self._direct is not None:
            first = head(self._openings.sent, kind, more, len(part))
            self._openings.sent += 1
            self._direct.put(first, part)
            return len(first) + len(part)
        frame = mesh_pb2.Frame(sequence=self._grpc.sent, kind=kind, more=more, payload=bytes(part))  # type: ignore[arg-type]
        self._grpc.sent += 1
        message = self._wrap(frame=frame)
        self._outgoing.put(message)
        return int(message.ByteSize()) + GRPC_HEADER

    def receive(self, kind: int, most: int = MAX_MESSAGE) -> bytes:
        """The next message, which must be of this kind; AbortedError when the stream has ended.

        ProtocolError for one of more than `most` bytes, of which no more are kept. ConfigError or IdentityError if the
        other end refused the stream for that.
        """
        parts, size = list[bytes | memoryview](), 0
        while True:
            try:
                part, more = self._next(kind)
            except StopIteration:
                raise self._lost() from None
            except ProtocolError:
                self.close()
                raise
            except Exception as error:  # grpc raises RpcError at the dialler and bare exceptions at the acceptor
                raise self._lost(error) from error
            size += len(part)
            if size > most:
                self.close()
                raise ProtocolError(f"{self.who} sent more than the {most} bytes that are due")
            if not more and not parts:
                return bytes(part)
            parts.append(part)
            if not more:
                return b"".join(parts)

    def _next(self, kind: int) -> tuple[bytes | memoryview, bool]:
        """The payload of the next frame, and whether more follow; ProtocolError if it is not the one that is due."""
        if kind == OPENING and self._direct is not None:
            message = next(self._direct)
            try:
                part, more = payload(message, self._openings.received, kind)
            except ValueError:
                raise ProtocolError(f"{self.who} sent a frame out of order") from None
            self._openings.received += 1
            return part, more
        frame = next(self._incoming).frame
        if frame.sequence != self._grpc.received or frame.kind != kind or frame.more and len(frame.payload) != CHUNK:
            raise ProtocolError(f"{self.who} sent a frame out of order")
        self._grpc.received += 1
        return frame.payload, frame.more

    def close(self) -> None:
        """End the stream; whoever waits on it gets AbortedError."""
        self.broken.set()
        self._outgoing.put(None)
        self._cancel()
        if self._direct is not None:
            self._direct.close()

    def ended(self) -> None:
        """The gRPC stream has ended. What arrived over direct connections before may still be read, for a moment."""
        self.broken.set()
        self._outgoing.put(None)
        if self._direct is not None:
            timer = threading.Timer(_DRAIN_SECONDS, self._direct.close)
            timer.daemon = True
            timer.start()

    def finish(self, seconds: float) -> None:
        """Send nothing more, but let what is queued arrive, for at most `seconds`; `close` must follow."""
        if self._direct is not None:
            self._direct.flush(seconds)
        self._outgoing.put(None)

    def _lost(self, error: Exception | None = None) -> MpcInferError:
        self.close()
        if isinstance(error, grpc.RpcError):
            said = channel.from_rpc_error(error, self.who)
            if isinstance(said, ConfigError | IdentityError):  # it refused the stream, and trying again changes nothing
                return said
        return AbortedError(
            f"the connection to {self.who} broke; what was being computed is void and its randomness is burnt. "
            "Send the request again; if it keeps happening, look at that party's log"
        )


def read_json(raw: bytes, who: str) -> Any:
    """What a control message says; ProtocolError if it cannot be read."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{who} sent a control message that cannot be read") from error


def read_message(kind: type[_M], raw: bytes, who: str) -> _M:
    """The message in a frame; ProtocolError if it cannot be read."""
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise ProtocolError(f"{who} sent a frame that cannot be read") from error


def dial(peer: int, opened: grpc.Channel, on_end: Callable[[], None]) -> Link:
    """Open the stream to a party with a higher index."""
    outgoing: SimpleQueue[Any] = SimpleQueue()
    call = mesh_pb2_grpc.MeshServiceStub(opened).Connect(iter(outgoing.get, None))
    link = Link(peer, call, outgoing, mesh_pb2.ConnectRequest, call.cancel)

    def ended() -> None:
        link.ended()
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
        link.ended()
        on_end()

    if not context.add_callback(ended):
        ended()
    return link, iter(outgoing.get, None)


@dataclass
class Account:
    """What steps of one kind have taken, for the metrics. Plain numbers: this is written in every round.

    Seconds are those of waiting for the others: for their openings, for their votes, for the dealer.
    """

    rounds: int = 0
    openings_seconds: float = 0.0
    votes_seconds: float = 0.0
    dealer_seconds: float = 0.0
    dealer_bytes: int = 0


class Mesh:
    """All links of one party in one session, and the rounds over them."""

    shadow = False  # whether this is a witness's

    def __init__(self, index: int, links: Mapping[int, Link]) -> None:
        self.index = index
        self.links = dict(sorted(links.items()))
        self.rounds = 0
        self.account = Account()  # of what is being done

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
        """Whether the link to any peer has ended."""
        return any(link.broken.is_set() for link in self.links.values())

    @property
    def alone(self) -> bool:
        """Whether this party's witness has gone, without which it does not work on."""
        return False

    def exchange(self, payload: bytes, kind: int = OPENING, most: int = MAX_MESSAGE) -> dict[int, bytes]:
        """Send the same message to all peers and receive one from each, by index: one round."""
        return self.begin(payload, kind, most)()

    def begin(self, payload: bytes, kind: int = OPENING, most: int = MAX_MESSAGE) -> Callable[[], dict[int, bytes]]:
        """The first half of a round, which sends. What it returns is the second one, which receives: from each at most
        `most` bytes, or as many as it was sent.

        Rounds end in the order in which they have begun, all before a message of another kind; at most two are under
        way (see `direct.Direct.put`).
        """
        self.rounds += kind == OPENING
        for link in self.links.values():
            link.send(kind, payload)
        most = max(len(payload), most)

        def receive() -> dict[int, bytes]:
            began = time.perf_counter()
            try:
                return {peer: link.receive(kind, most) for peer, link in self.links.items()}
            finally:
                waited = time.perf_counter() - began
                if kind == OPENING:
                    self.account.rounds += 1
                    self.account.openings_seconds += waited
                else:
                    self.account.votes_seconds += waited

        return receive

    def consult(self, payload: bytes, merge: Merge, most: int = MAX_MESSAGE) -> dict[int, bytes]:
        """Tell all peers something and hear the same from them: what each party says, this one included, by index.

        merge: makes one message of a party's and its witness's, where there are witnesses. most: bytes of what any of
        them says.
        """
        return {self.index: payload, **self.exchange(payload, CONTROL, most)}

    def confide(self, secret: bytes) -> bytes:
        """What a party has drawn, which nobody may know but its witness, if it has one: the same at both."""
        return secret

    def announce(self, payload: bytes) -> None:
        """Party 0: send a control message to all peers."""
        for link in self.links.values():
            link.send(CONTROL, payload)

    def announced(self) -> bytes:
        """What party 0 announces next."""
        return self.links[0].receive(CONTROL)

    def close(self) -> None:
        """End all links."""
        for link in self._all():
            link.close()

    def finish(self, seconds: float) -> None:
        """End all links, but let what was sent arrive first, for at most `seconds`."""
        end = time.monotonic() + seconds
        for link in self._all():
            link.finish(max(0.0, end - time.monotonic()))
        for link in self._all():
            link.broken.wait(max(0.0, end - time.monotonic()))
        self.close()

    def limited(self, seconds: float) -> threading.Timer:
        """A running timer that closes the mesh after `seconds` unless cancelled: the watchdog of one step."""
        timer = threading.Timer(seconds, self.close)
        timer.daemon = True
        timer.start()
        return timer

    def _all(self) -> list[Link]:
        return list(self.links.values())
