"""TLS contexts of the standard library, for what does not go through gRPC."""

from __future__ import annotations

import secrets
import socket
import ssl
import tempfile
import time
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from mpcinfer.config import Cluster
from mpcinfer.wire.identity import Identity

_READ_BYTES = 1 << 18  # at a time, at most


def tls_context(cluster: Cluster, identity: Identity, *, server: bool = False) -> ssl.SSLContext:
    """TLS 1.3 with `identity`, trusting the cluster's CA; a server asks for the caller's certificate.

    Pins are not checked here: see `identity.peer_from_certificate`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=cluster.ca_pem.decode())
    if server:
        context.verify_mode = ssl.CERT_REQUIRED
        context.num_tickets = 0  # nobody resumes, and a ticket would arrive where nobody reads
    # The standard library takes a key only from a file, so it goes there encrypted with a passphrase used once.
    passphrase = secrets.token_bytes(32).hex().encode()
    key = serialization.load_pem_private_key(identity.key_pem, password=None)
    with tempfile.TemporaryDirectory() as directory:
        key_file, cert_file = Path(directory, "key"), Path(directory, "certificate")
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(passphrase),
            )
        )
        cert_file.write_bytes(identity.cert_pem)
        context.load_cert_chain(cert_file, key_file, password=passphrase)
    return context


class TlsStream:
    """TLS over a connected socket, for one thread at a time; shutting the socket down wakes it. OSError where it fails.

    As `ssl.SSLSocket`, which makes two system calls for each record that it reads, of 16 KiB at most, and one for each
    that it writes: here as much comes and goes in one as there is.
    """

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, server_hostname: str | None = None, *, seconds: float
    ) -> None:
        """Makes the handshake, as a client of `server_hostname` or as a server; the socket is closed if that fails.

        seconds: for all that comes and goes, however little at a time, until `unlimited`.
        """
        self.socket = sock
        self._ends: float | None = time.monotonic() + seconds
        self._coming, self._going = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._raw = memoryview(bytearray(_READ_BYTES))
        server = server_hostname is None
        try:
            self._tls = context.wrap_bio(self._coming, self._going, server_side=server, server_hostname=server_hostname)
            while not self._shake_hands():
                self._receive()
        except BaseException:
            sock.close()
            raise

    def _shake_hands(self) -> bool:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        finally:
            self._send()  # of a failure too: the alert
        return True

    def unlimited(self) -> None:
        """From now on it may wait for as long as it takes."""
        self._ends = None
        self.socket.settimeout(None)

    @property
    def certificate(self) -> bytes | None:
        """The other end's, as DER."""
        return self._tls.getpeercert(binary_form=True)

    def write(self, *parts: bytes | memoryview) -> None:
        """Send all of them."""
        for part in parts:
            if part and self._tls.write(part) != len(part):
                raise OSError("TLS took less than it was given")
        self._send()

    def read_into(self, into: memoryview) -> int:
        """Some bytes of what comes, at least one: how many; 0 once the other end has closed."""
        while True:
            try:
                return self._tls.read(len(into), into)  # type: ignore[return-value]  # so many bytes
            except ssl.SSLWantReadError:
                self._receive()
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return 0

    def _send(self) -> None:
        if self._going.pending:
            self._limit()
            self.socket.sendall(self._going.read())

    def _receive(self) -> None:
        self._limit()
        size = self.socket.recv_into(self._raw)
        if size:
            self._coming.write(self._raw[:size])
        else:
            self._coming.write_eof()

    def _limit(self) -> None:
        if self._ends is not None:
            left = self._ends - time.monotonic()
            if left <= 0:
                raise TimeoutError("the handshake took too long")
            self.socket.settimeout(left)
