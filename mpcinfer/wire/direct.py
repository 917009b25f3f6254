"""Party to party, beside the gRPC stream: two TLS connections of a pair, one for each direction, that carry openings.

A round over them takes a fraction of what gRPC needs, whose threads hand every message on several times. Certificates
and pins are the same, and so are the messages, to the byte. The ends find each other over the gRPC stream, which goes
on to carry everything else: the acceptor names its port and a token, the dialler connects and shows the token.
"""

from __future__ import annotations

import logging
import secrets
import socket
import ssl
import threading
import time
from queue import SimpleQueue

from mpcinfer.config import Cluster, Endpoint
from mpcinfer.config.reading import split_address
from mpcinfer.errors import ConfigError, IdentityError, MpcInferError, UnavailableError
from mpcinfer.wire.frames import CHUNK, HEADER
from mpcinfer.wire.identity import Identity, dns_name, peer_from_certificate
from mpcinfer.wire.tls import TlsStream, tls_context

_log = logging.getLogger(__name__)

_TOKEN_BYTES = 32
# so much, four times, fits into the buffers between two ends: sending it never waits for the other end
_INLINE = 1 << 15
_RECORD_BYTES = 1 << 14  # of TLS, at most
_HANDSHAKE_SECONDS = 5.0
_CONNECT_SECONDS = 2.0
_HANDSHAKES = 16  # at a time
_DIALLER_WRITES, _ACCEPTOR_WRITES = b"\0", b"\1"


class Direct:
    """Both connections to one peer: messages go to `put` and come from `next`, each in one thread at a time."""

    def __init__(self, out: TlsStream, incoming: TlsStream) -> None:
        self._out, self._in = out, incoming
        for stream in (out, incoming):
            stream.unlimited()
            stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._record = memoryview(bytearray(_RECORD_BYTES))
        self._rest = self._record[:0]  # what has come of it and was not asked for yet
        self._writing, self._reading = threading.Lock(), threading.Lock()
        self._later: SimpleQueue[tuple[bytes, bytes | memoryview] | None] = SimpleQueue()
        self._queued = self._written = 0
        self._progress = threading.Condition()
        threading.Thread(target=self._write_queued, name="direct", daemon=True).start()

    def put(self, head: bytes, payload: bytes | memoryview) -> None:
        """Send a frame, at once if it is small and nothing waits; never waits for the other end to read.

        That holds since nobody is more than four rounds ahead of anybody: two may be under way.
        """
        if len(head) + len(payload) <= _INLINE and self._queued == self._written:
            self._write(head + payload)
        else:
            self._queued += 1
            self._later.put((head, payload))

    def _write_queued(self) -> None:
        while (frame := self._later.get()) is not None:
            self._write(*frame)
            with self._progress:
                self._written += 1
                self._progress.notify_all()

    def flush(self, seconds: float) -> None:
        """Wait until all that was put is on its way, for at most `seconds`."""
        with self._progress:
            self._progress.wait_for(lambda: self._queued == self._written, seconds)

    def _write(self, *parts: bytes | memoryview) -> None:
        try:
            with self._writing:
                self._out.write(*parts)
        except (OSError, ValueError):  # it has ended; whoever reads will say so
            self._shut()

    def __iter__(self) -> Direct:
        return self

    def __next__(self) -> memoryview:
        """The next frame's message, without its header; StopIteration when the other end has closed.

        OSError when the connection broke.
        """
        with self._reading:
            none, length = HEADER.unpack(self._exactly(HEADER.size))
            if none or length > CHUNK + 64:
                raise ConnectionError("no frame of ours")
            return self._exactly(length)

    def _exactly(self, size: int) -> memoryview:
        content, at = memoryview(bytearray(size)), 0
        while at < size:
            if not self._rest and size - at >= _RECORD_BYTES:
                got = self._in.read_into(content[at:])
            else:
                if not self._rest:
                    self._rest = self._record[: self._in.read_into(self._record)]
                got = min(size - at, len(self._rest))
                content[at : at + got] = self._rest[:got]
                self._rest = self._rest[got:]
            if not got:
                raise StopIteration
            at += got
        return content

    def close(self) -> None:
        """End both; whoever reads or writes is woken first."""
        self._shut()
        self._later.put(None)
        for lock, stream in ((self._writing, self._out), (self._reading, self._in)):
            with lock:
                stream.socket.close()

    def _shut(self) -> None:
        for stream in (self._out, self._in):
            try:
                stream.socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


class Listener:
    """Where the parties with lower indices connect to."""

    def __init__(self, address: str, cluster: Cluster, identity: Identity) -> None:
        """Take the port (any free one for port 0); ConfigError if it cannot be had."""
        host, port = split_address(address)
        self._cluster, self._context = cluster, tls_context(cluster, identity, server=True)
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._socket = socket.create_server((host, port), family=family)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {address} for parties: {error.strerror}; set another peer_port"
            ) from error
        self.port: int = self._socket.getsockname()[1]
        self._offers: dict[bytes, str] = {}
        self._arrived: dict[bytes, dict[bytes, TlsStream]] = {}
        self._changed = threading.Condition()
        self._slots, self._closed = threading.Semaphore(_HANDSHAKES), False
        threading.Thread(target=self._accept, name="direct-listener", daemon=True).start()

    def offer(self, role: str) -> bytes:
        """A token with which `role` may connect, until it is taken or withdrawn."""
        token = secrets.token_bytes(_TOKEN_BYTES)
        with self._changed:
            self._offers[token], self._arrived[token] = role, {}
        return token

    def take(self, token: bytes, timeout: float) -> Direct:
        """The connections that were made with the token; UnavailableError if they do not come."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._arrived.get(token, {})) == 2, timeout)
            found = self._arrived.get(token, {})
            if len(found) == 2:
                del self._offers[token], self._arrived[token]
                return Direct(found[_ACCEPTOR_WRITES], found[_DIALLER_WRITES])
        raise UnavailableError("the connections that a party has announced did not arrive")

    def withdraw(self) -> None:
        """Nobody may use a token any more that was offered and not taken; who did is disconnected."""
        with self._changed:
            for arrived in self._arrived.values():
                for stream in arrived.values():
                    stream.socket.close()
            self._offers.clear()
            self._arrived.clear()

    def close(self) -> None:
        """Accept nothing more."""
        self._closed = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._socket.close()
        self.withdraw()

    def _accept(self) -> None:
        while True:
            try:
                plain, _ = self._socket.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(0.1)  # as without descriptors that are free
                continue
            if not self._slots.acquire(blocking=False):
                plain.close()
                continue
            try:
                threading.Thread(target=self._receive, args=[plain], name="direct-handshake", daemon=True).start()
            except RuntimeError:  # as many threads as the system allows
                self._slots.release()
                plain.close()

    def _receive(self, plain: socket.socket) -> None:
        try:
            tls = TlsStream(plain, self._context, seconds=_HANDSHAKE_SECONDS)
            role = _role(tls, self._cluster)
            said, at = bytearray(_TOKEN_BYTES + 1), 0
            while at < len(said):
                got = tls.read_into(memoryview(said)[at:])
                if not got:
                    raise ConnectionError
                at += got
            token, direction = bytes(said[:-1]), bytes(said[-1:])
            with self._changed:
                expected = self._offers.get(token) == role and direction in (_DIALLER_WRITES, _ACCEPTOR_WRITES)
                if not expected or direction in self._arrived[token]:
                    raise ConnectionError
                tls.write(b"\1")
                self._arrived[token][direction] = tls
                self._changed.notify_all()
        except (OSError, MpcInferError) as error:
            _log.warning("a connection to the port for parties was refused (%s)", type(error).__name__)
            plain.close()
        finally:
            self._slots.release()


def dial(endpoint: Endpoint, port: int, token: bytes, cluster: Cluster, identity: Identity) -> Direct:
    """Connect to a party that offers `port` and has given this token.

    UnavailableError if the port cannot be reached, IdentityError if it is not that party that answers.
    """
    context, host = tls_context(cluster, identity), split_address(endpoint.address)[0]
    deadline = time.monotonic() + _HANDSHAKE_SECONDS
    made: list[TlsStream] = []
    try:
        for direction in (_DIALLER_WRITES, _ACCEPTOR_WRITES):
            plain = socket.create_connection((host, port), timeout=_CONNECT_SECONDS)
            left = max(0.1, deadline - time.monotonic())
            made.append(TlsStream(plain, context, dns_name(endpoint.role), seconds=left))
            if _role(made[-1], cluster) != endpoint.role:
                raise IdentityError(f"another party than {endpoint.role} listens on its port {port}")
            made[-1].write(token + direction)
            answer = bytearray(1)
            if not made[-1].read_into(memoryview(answer)) or answer != b"\1":
                raise ConnectionError("refused")
    except OSError as error:
        _close(made)
        raise UnavailableError(f"{endpoint.role} cannot be reached on port {port} ({type(error).__name__})") from error
    except MpcInferError:
        _close(made)
        raise
    return Direct(*made)


def _role(tls: TlsStream, cluster: Cluster) -> str:
    certificate = tls.certificate
    if certificate is None:
        raise IdentityError("no certificate was shown")
    return peer_from_certificate(ssl.DER_cert_to_PEM_cert(certificate).encode(), cluster).role


def _close(streams: list[TlsStream]) -> None:
    for stream in streams:
        stream.socket.close()
