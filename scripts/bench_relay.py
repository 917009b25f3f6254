"""The network of a benchmark, as a process: TCP connections are passed on late, and no faster than a rate.

    bench_relay.py BITS_PER_SECOND SECONDS

A link has two directions, each of this rate and this delay; all connections over a link share it. What a direction is
given leaves it in order: a piece has passed when the pieces before it and then its own bits have, and arrives SECONDS
later. Nothing is lost or reordered, and a connection starts at full speed: of TCP only its flow control remains, since
at most `_WINDOW` bytes, and what the link can hold, are under way. Bytes are not looked at, TLS passes untouched.

Requests come from standard input, a line of JSON each, until it ends, and are answered on standard output:

    {"link": NAME, "port": PORT, "listen": 0}   connections to the port answered are passed on to PORT, over link NAME;
                                                it is any port or the one in "listen", 0 if that is taken
    {"count": true}                             [[NAME, PORT, bytes to PORT, bytes from PORT], ...] since the beginning
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass, field

_PIECE = 1 << 16  # bytes
_WINDOW = 1 << 20
_LATEST = 200e-6  # seconds; waking up later than this is other work's doing and says nothing of the next time
_PR_SET_PDEATHSIG, _PR_SET_TIMERSLACK = 1, 29


@dataclass
class Direction:
    """One direction of a link: when what it was given has passed, and what is under way, in order of arrival."""

    free_at: float = 0.0
    under_way: deque[tuple[float, Pipe, bytes]] = field(default_factory=deque)


@dataclass
class Route:
    """A port that is listened on for another one; bytes to it and from it."""

    link: str
    port: int
    listener: socket.socket
    to: int = 0
    back: int = 0


@dataclass(eq=False)
class Pipe:
    """One direction of one connection: from the socket it is read from to the one it is written to."""

    source: socket.socket
    target: socket.socket
    direction: Direction
    route: Route
    forth: bool
    held: int = 0  # bytes, under way and in `outbox`
    outbox: deque[bytes] = field(default_factory=deque)  # has arrived, but `target` takes no more now; b"" is the end


class Relay:
    """All routes of one network, in one thread."""

    def __init__(self, rate: float, delay: float) -> None:
        self.rate, self.delay = rate / 8, delay
        self.window = _WINDOW + int(2 * self.rate * delay)
        self.late = 0.0  # how long this process takes to wake up, on average
        self.links: dict[str, tuple[Direction, Direction]] = {}
        self.routes: dict[int, Route] = {}  # by the listener's file number
        self.reads: dict[int, Pipe] = {}  # by file numbers
        self.writes: dict[int, Pipe] = {}
        self.poller = select.epoll()
        self.poller.register(0, select.EPOLLIN)

    def run(self) -> None:
        """Until standard input ends."""
        requests = b""
        while True:
            due = [d.under_way[0][0] for link in self.links.values() for d in link if d.under_way]
            # it woke up to read a piece and will wake up to hand it on: neither is the network's time
            at = min(due) - min(2 * self.late, self.delay / 2) if due else 0.0
            wait = max(0.0, at - time.monotonic())
            # an epoll alone would wait for whole milliseconds
            ready, _, _ = select.select([self.poller], [], [], wait if due else None)
            now = time.monotonic()
            if due and wait and not ready and now - at < _LATEST:
                self.late += (now - at - self.late) / 16
            self._arrive(now + min(2 * self.late, self.delay / 2))
            for number, events in self.poller.poll(0) if ready else ():
                if number == 0:
                    part = os.read(0, 65536)
                    if not part:
                        return
                    *lines, requests = (requests + part).split(b"\n")
                    for line in lines:
                        print(json.dumps(self._answer(json.loads(line))), flush=True)
                elif number in self.routes:
                    self._accept(self.routes[number])
                else:
                    if events & select.EPOLLOUT and number in self.writes:
                        self._write(self.writes[number])
                    if events & ~select.EPOLLOUT and number in self.reads:
                        self._read(self.reads[number])
                    elif events & (select.EPOLLERR | select.EPOLLHUP) and number in self.writes:
                        self._drop(self.writes[number])

    def _answer(self, request: dict[str, object]) -> object:
        if "count" in request:
            return [[r.link, r.port, r.to, r.back] for r in self.routes.values()]
        name, port, listen = str(request["link"]), int(str(request["port"])), int(str(request.get("listen", 0)))
        try:
            listener = socket.create_server(("127.0.0.1", listen))
        except OSError:
            return 0
        self.links.setdefault(name, (Direction(), Direction()))
        self.routes[listener.fileno()] = Route(name, port, listener)
        self.poller.register(listener, select.EPOLLIN)
        return listener.getsockname()[1]

    def _accept(self, route: Route) -> None:
        near, _ = route.listener.accept()
        try:
            far = socket.create_connection(("127.0.0.1", route.port), timeout=5)
        except OSError:  # nobody listens: who has connected will see that it ended
            near.close()
            return
        for sock in (near, far):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        there, back = self.links[route.link]
        for pipe in (Pipe(near, far, there, route, True), Pipe(far, near, back, route, False)):
            self.reads[pipe.source.fileno()] = self.writes[pipe.target.fileno()] = pipe
        for sock in (near, far):
            self.poller.register(sock, select.EPOLLIN)

    def _read(self, pipe: Pipe) -> None:
        try:
            piece = pipe.source.recv(_PIECE)
        except BlockingIOError:
            return
        except OSError:
            self._drop(pipe)
            return
        if pipe.forth:
            pipe.route.to += len(piece)
        else:
            pipe.route.back += len(piece)
        direction = pipe.direction
        direction.free_at = max(direction.free_at, time.monotonic()) + len(piece) / self.rate
        direction.under_way.append((direction.free_at + self.delay, pipe, piece))
        pipe.held += len(piece)
        if not piece:
            del self.reads[pipe.source.fileno()]
            self._watch(pipe.source)
        elif pipe.held >= self.window:
            self._watch(pipe.source)

    def _arrive(self, now: float) -> None:
        """Hand on what is due."""
        for link in self.links.values():
            for direction in link:
                while direction.under_way and direction.under_way[0][0] <= now:
                    _, pipe, piece = direction.under_way.popleft()
                    if pipe.target.fileno() < 0:  # the connection is gone
                        continue
                    pipe.outbox.append(piece)
                    if len(pipe.outbox) == 1:
                        self._write(pipe)

    def _write(self, pipe: Pipe) -> None:
        full = pipe.held >= self.window
        try:
            while pipe.outbox:
                piece = pipe.outbox[0]
                if not piece:
                    pipe.target.shutdown(socket.SHUT_WR)
                    del self.writes[pipe.target.fileno()]
                    pipe.outbox.clear()
                    break
                sent = pipe.target.send(piece)
                pipe.held -= sent
                pipe.outbox.popleft()
                if sent < len(piece):
                    pipe.outbox.appendleft(piece[sent:])
                    break
        except BlockingIOError:
            pass
        except OSError:
            self._drop(pipe)
            return
        if full and pipe.held < self.window:
            self._watch(pipe.source)
        self._watch(pipe.target)

    def _watch(self, sock: socket.socket) -> None:
        """Wait for what the socket is needed for now; close the connection once both its directions have ended."""
        number = sock.fileno()
        reads, writes = self.reads.get(number), self.writes.get(number)
        if reads is None and writes is None:
            if number >= 0:
                self.poller.unregister(number)
                sock.close()
            return
        events = select.EPOLLIN if reads is not None and reads.held < self.window else 0
        self.poller.modify(number, events | (select.EPOLLOUT if writes is not None and writes.outbox else 0))

    def _drop(self, pipe: Pipe) -> None:
        """A connection broke: both its ends see that."""
        for sock in (pipe.source, pipe.target):
            number = sock.fileno()
            self.reads.pop(number, None)
            self.writes.pop(number, None)
            if number >= 0:
                self.poller.unregister(number)
                sock.close()


if __name__ == "__main__":
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a benchmark that was killed leaves nothing behind
        libc.prctl(_PR_SET_TIMERSLACK, 1)  # nanoseconds by which it may wake late; else 50,000
    with contextlib.suppress(
        OSError
    ):  # a network does not wait for a core; without the right to that, it sometimes will
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    Relay(float(sys.argv[1]), float(sys.argv[2])).run()
