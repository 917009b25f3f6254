"""Direct connections: who may make them, what is refused, and that nothing of a broken one stays behind."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterator

import pytest

from mpcinfer.errors import ConfigError, IdentityError, UnavailableError
from mpcinfer.wire import direct
from mpcinfer.wire.direct import Direct, Listener
from mpcinfer.wire.frames import HEADER
from mpcinfer.wire.identity import dns_name
from mpcinfer.wire.tls import tls_context
from tests.inprocess import Keys

MIB = 1 << 20


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"), 3)


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """Another cluster of the same name."""
    return Keys(tmp_path_factory.mktemp("strangers"), 3)


@pytest.fixture
def listener(keys: Keys) -> Iterator[Listener]:
    """Party 1's."""
    made = Listener("127.0.0.1:0", keys.cluster, keys.identity("party/1"))
    yield made
    made.close()


def dial(
    keys: Keys, port: int, token: bytes, role: str = "party/0", peer: int = 1, known: Keys | None = None
) -> Direct:
    cluster = (known or keys).cluster
    return direct.dial(cluster.parties[peer], port, token, cluster, keys.identity(role))


def put(one: Direct, content: bytes) -> None:
    one.put(HEADER.pack(0, 1 + len(content)) + b"h", content)


def test_both_directions_at_once_whatever_the_size(keys: Keys, listener: Listener) -> None:
    token = listener.offer("party/0")
    here = dial(keys, listener.port, token)
    there = listener.take(token, 10)
    sent = [bytes([i]) * size for i, size in enumerate((0, 5, MIB, 3, MIB - 1, 70_000, MIB, MIB, 9))]
    for one in (here, there):  # nobody reads yet, and nobody waits
        for content in sent:
            put(one, content)
    for one in (here, there):
        assert [bytes(next(one)) for _ in sent] == [b"h" + content for content in sent]
    here.close()
    with pytest.raises(StopIteration):
        next(there)
    there.close()


@pytest.mark.parametrize("who", ["reader", "other end"])
def test_close_wakes_whoever_reads(keys: Keys, listener: Listener, who: str) -> None:
    token = listener.offer("party/0")
    here = dial(keys, listener.port, token)
    there = listener.take(token, 10)
    threading.Timer(0.2, (here if who == "reader" else there).close).start()
    with pytest.raises((StopIteration, OSError)):
        next(here)
    put(here, b"to nobody")
    here.close()
    there.close()
    there.close()


def test_close_wakes_whoever_writes(keys: Keys, listener: Listener) -> None:
    token = listener.offer("party/0")
    here = dial(keys, listener.port, token)
    there = listener.take(token, 10)
    for _ in range(16):  # more than the buffers hold, and nobody reads
        put(here, bytes(MIB))
    time.sleep(0.2)
    here.close()
    there.close()


@pytest.mark.parametrize("content", [b"\1\0\0\0\1x", b"\0\xff\xff\xff\xffx"], ids=["flag", "size"])
def test_what_is_no_frame_is_refused(keys: Keys, listener: Listener, content: bytes) -> None:
    token = listener.offer("party/0")
    here = dial(keys, listener.port, token)
    there = listener.take(token, 10)
    here._write(content)
    with pytest.raises(ConnectionError, match="no frame of ours"):
        next(there)
    here.close()
    there.close()


def test_a_token_is_for_one_party_and_one_time(
    keys: Keys, listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    token = listener.offer("party/0")
    for wrong in (bytes(32), token[::-1]):
        with pytest.raises(UnavailableError, match="party/1 cannot be reached on port"):
            dial(keys, listener.port, wrong)
    for role in ("party/2", "client/bob"):
        with pytest.raises(UnavailableError):
            dial(keys, listener.port, token, role)
    first = dial(keys, listener.port, token)
    with pytest.raises(UnavailableError):
        dial(keys, listener.port, token)
    taken = listener.take(token, 10)
    with pytest.raises(UnavailableError):
        dial(keys, listener.port, token)
    assert token.hex() not in caplog.text and all(r.levelno <= logging.WARNING for r in caplog.records)
    first.close()
    taken.close()


def test_a_withdrawn_token_connects_nobody(keys: Keys, listener: Listener) -> None:
    token = listener.offer("party/0")
    with pytest.raises(UnavailableError, match="did not arrive"):
        listener.take(token, 0.05)
    listener.withdraw()
    with pytest.raises(UnavailableError):
        dial(keys, listener.port, token)


def test_another_cluster_connects_neither_way(keys: Keys, strangers: Keys, listener: Listener) -> None:
    token = listener.offer("party/0")
    with pytest.raises(UnavailableError):  # its certificate is not of our CA
        dial(strangers, listener.port, token, known=keys)
    with pytest.raises(UnavailableError):  # ours is not of its CA
        dial(strangers, listener.port, token)


def test_a_port_of_another_party_is_noticed(keys: Keys, listener: Listener) -> None:
    token = listener.offer("party/0")
    with pytest.raises((IdentityError, UnavailableError)):
        dial(keys, listener.port, token, peer=2)


def test_a_certificate_is_asked_for(keys: Keys, listener: Listener) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=keys.cluster.ca_pem.decode())
    token = listener.offer("party/0")
    with socket.create_connection(("127.0.0.1", listener.port), timeout=10) as plain, pytest.raises(OSError):
        with context.wrap_socket(plain, server_hostname=dns_name("party/1")) as tls:
            tls.sendall(token + b"\0")
            if not tls.recv(1):
                raise ConnectionError
    assert not listener._arrived[token]


def test_a_key_that_is_not_pinned_is_refused(keys: Keys, listener: Listener) -> None:
    """Its certificate is of the cluster's CA, for the right role."""
    token = listener.offer("party/0")
    with pytest.raises((IdentityError, UnavailableError)):
        direct.dial(keys.cluster.parties[1], listener.port, token, keys.cluster, keys.issue("party/0", "other"))


def test_old_versions_of_tls_are_refused(keys: Keys, listener: Listener) -> None:
    context = tls_context(keys.cluster, keys.identity("party/0"))
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(("127.0.0.1", listener.port), timeout=10) as plain, pytest.raises(OSError):
        context.wrap_socket(plain, server_hostname=dns_name("party/1"))


def test_a_port_in_use_is_an_error(keys: Keys, listener: Listener) -> None:
    with pytest.raises(ConfigError, match="peer_port"):
        Listener(f"127.0.0.1:{listener.port}", keys.cluster, keys.identity("party/1"))


def test_silent_callers_do_not_keep_others_out(keys: Keys, listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_HANDSHAKE_SECONDS", 0.5)
    silent = [socket.create_connection(("127.0.0.1", listener.port)) for _ in range(direct._HANDSHAKES + 4)]
    time.sleep(1.2)
    token = listener.offer("party/0")
    made = dial(keys, listener.port, token)
    taken = listener.take(token, 10)
    for one in (*silent, made, taken):
        one.close()


@pytest.mark.parametrize("pause", [0.1, 0.0005])
def test_callers_who_dribble_do_not_keep_their_places(
    keys: Keys, listener: Listener, monkeypatch: pytest.MonkeyPatch, pause: float
) -> None:
    monkeypatch.setattr(direct, "_HANDSHAKE_SECONDS", 0.5)
    hello = bytes([22, 3, 3, 64, 0, 1, 1, 255, 0]) + bytes(16_000)  # the beginning of a long one
    with socket.create_connection(("127.0.0.1", listener.port), timeout=10) as plain:
        began = time.monotonic()
        with pytest.raises(OSError):
            for byte in hello:
                plain.sendall(bytes([byte]))
                time.sleep(pause)
        assert time.monotonic() - began < 5
