"""Channels against real gRPC servers on 127.0.0.1: who is accepted, who is refused, and how errors travel."""

from __future__ import annotations

import asyncio
import datetime
import errno
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import NoReturn

import grpc
import grpc.aio
import pytest

from mpcinfer import errors
from mpcinfer.config import Cluster, Endpoint
from mpcinfer.errors import ConfigError, ForbiddenError, IdentityError, InputError, MpcInferError, UnavailableError
from mpcinfer.wire import channel, identity
from mpcinfer.wire.identity import Identity

Method = Callable[[bytes, grpc.ServicerContext], bytes]
CA_KEY, CA = identity.create_ca("local")
ALL = [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, MpcInferError)]


def issue(role: str, days: int = 365, ca: tuple[bytes, bytes] = (CA_KEY, CA)) -> Identity:
    """A fresh key and certificate, unchecked; negative days make one that expired that long ago."""
    key, csr = identity.create_request("local", role)
    if days >= 0:
        return Identity(role, "local", key, identity.sign_request(*ca, csr, role=role, days=days))
    with pytest.MonkeyPatch.context() as patch:
        past = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
        patch.setattr(identity, "_now", lambda: past)
        patch.setattr(identity, "_check_validity", lambda *_: None)  # at that time the CA was not made yet
        return Identity(role, "local", key, identity.sign_request(*ca, csr, role=role, days=0))


PARTY, CLIENT = issue("party/0"), issue("client/x")
OTHERS = [issue("party/1"), issue("dealer")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cluster_at(port: int, party: Identity = PARTY) -> Cluster:
    endpoints = [
        Endpoint(who.role, f"127.0.0.1:{port if i == 0 else i}", identity.key_pin(who.cert_pem))
        for i, who in enumerate([party, *OTHERS])
    ]
    return Cluster("local", CA, (endpoints[0], endpoints[1]), endpoints[2])


def raw_credentials(server: Identity) -> grpc.ServerCredentials:
    """What an impostor starts: no check of its own identity."""
    return grpc.ssl_server_credentials(
        [(server.key_pem, server.cert_pem)], root_certificates=CA, require_client_auth=True
    )


@contextmanager
def serving(method: Method, who: Identity = PARTY, port: int = 0, max_message_mb: int = 256) -> Iterator[int]:
    """A gRPC server with one method, /test.Echo/Call, over bytes; gives its port."""
    handler = grpc.method_handlers_generic_handler("test.Echo", {"Call": grpc.unary_unary_rpc_method_handler(method)})
    server = grpc.server(futures.ThreadPoolExecutor(2), options=channel.server_options(max_message_mb))
    server.add_generic_rpc_handlers((handler,))
    bound = channel.bind(server, f"127.0.0.1:{port}", raw_credentials(who))
    server.start()
    try:
        yield bound
    finally:
        server.stop(None).wait()


def echo(request: bytes, context: grpc.ServicerContext) -> bytes:
    return request


def call(cluster: Cluster, who: Identity = CLIENT, request: bytes = b"hello", max_message_mb: int = 256) -> bytes:
    with channel.connect(cluster.parties[0], cluster, who, timeout=5, max_message_mb=max_message_mb) as opened:
        return invoke(opened, request)


def invoke(opened: grpc.Channel, request: bytes = b"hello") -> bytes:
    stub: grpc.UnaryUnaryMultiCallable[bytes, bytes] = opened.unary_unary("/test.Echo/Call")
    try:
        return stub(request, timeout=10)
    except grpc.RpcError as error:
        raise channel.from_rpc_error(error, "party/0") from error


# --- identities ----------------------------------------------------------------------------------------------------


def test_the_pinned_party_is_reached() -> None:
    with serving(echo) as port:
        assert call(cluster_at(port)) == b"hello"


def test_server_credentials_serve_and_refuse_what_others_would_refuse() -> None:
    cluster = cluster_at(7100)
    assert channel.server_credentials(PARTY, cluster)
    with pytest.raises(IdentityError, match="pins"):
        channel.server_credentials(issue("party/0"), cluster)
    with pytest.raises(IdentityError, match="expired"):
        channel.server_credentials(issue("party/0", days=-1), cluster)


def test_the_ca_alone_impersonates_nobody() -> None:
    with serving(echo, issue("party/0")) as port, pytest.raises(IdentityError, match="not who the cluster file says"):
        call(cluster_at(port))


def test_a_server_of_another_role_or_ca_is_refused() -> None:
    with serving(echo, OTHERS[0]) as port, pytest.raises(IdentityError, match="[Hh]ostname mismatch"):
        call(cluster_at(port))
    stranger = issue("party/0", ca=identity.create_ca("local"))
    with serving(echo, stranger) as port, pytest.raises(IdentityError, match="cannot be accepted: .*certificate"):
        call(cluster_at(port, party=stranger))


def test_an_open_channel_keeps_the_pin_when_the_server_is_replaced() -> None:
    with serving(echo) as port:
        cluster = cluster_at(port)
        opened = channel.connect(cluster.parties[0], cluster, CLIENT, timeout=5)
        assert invoke(opened) == b"hello"
    with opened, serving(echo, issue("party/0"), port), pytest.raises(IdentityError, match="another certificate"):
        stub: grpc.UnaryUnaryMultiCallable[bytes, bytes] = opened.unary_unary("/test.Echo/Call")
        for _ in range(100):  # until gRPC has tried to reconnect
            try:
                stub(b"secret", timeout=10)
            except grpc.RpcError as error:
                mapped = channel.from_rpc_error(error, "party/0")
                if not isinstance(mapped, UnavailableError):
                    raise mapped from error
            threading.Event().wait(0.05)


def test_an_open_channel_survives_a_restart_of_the_right_server() -> None:
    with serving(echo) as port:
        cluster = cluster_at(port)
        opened = channel.connect(cluster.parties[0], cluster, CLIENT, timeout=5)
        assert invoke(opened) == b"hello"
    with opened, serving(echo, port=port):
        stub: grpc.UnaryUnaryMultiCallable[bytes, bytes] = opened.unary_unary("/test.Echo/Call")
        assert stub(b"again", timeout=10, wait_for_ready=True) == b"again"


def test_expired_server_certificate() -> None:
    party = issue("party/0", days=-1)
    with serving(echo, party) as port, pytest.raises(IdentityError, match=r"party/0 at .*certificate has expired"):
        call(cluster_at(port, party))


def test_expired_client_certificate_is_noticed_before_connecting() -> None:
    with pytest.raises(IdentityError, match=r"certificate of client/x expired on \d{4}-"):
        call(cluster_at(free_port()), issue("client/x", days=-1))


@pytest.mark.parametrize("stranger", [issue("client/x", days=-1), issue("client/x", ca=identity.create_ca("local"))])
def test_a_client_that_only_the_server_refuses(stranger: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a wrong clock or CA file on one of the hosts."""
    monkeypatch.setattr(Identity, "check", lambda *_: None)
    with serving(echo) as port, pytest.raises(IdentityError, match=r"seeing the certificate of client/x.*expired.*CA"):
        call(cluster_at(port), stranger)


def test_who_is_calling() -> None:
    """Owners and clients are whom the CA says; a party needs the pinned key too."""
    cluster = cluster_at(free_port())

    def who_am_i(request: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            peer = identity.peer_of(context, cluster)
            identity.require(peer, "client/", "party/")
            return peer.role.encode()
        except MpcInferError as error:
            channel.abort(context, error)

    def ask(who: Identity, port: int) -> bytes:
        credentials = grpc.ssl_channel_credentials(PARTY.cert_pem, who.key_pem, who.cert_pem)
        options = [("grpc.ssl_target_name_override", "party-0.mpcinfer")]
        with grpc.secure_channel(f"127.0.0.1:{port}", credentials, options) as opened:
            return invoke(opened)

    with serving(who_am_i) as port:
        assert ask(CLIENT, port) == b"client/x"
        assert ask(OTHERS[0], port) == b"party/1"
        with pytest.raises(IdentityError, match="claims to be party/0 but its key is not") as caught:
            ask(issue("party/0"), port)
        assert type(caught.value) is IdentityError
        with pytest.raises(ForbiddenError, match="owner/y may not do this"):
            ask(issue("owner/y"), port)


def test_a_caller_without_a_certificate_gets_nothing() -> None:
    with serving(echo) as port:
        options = [("grpc.ssl_target_name_override", "party-0.mpcinfer")]
        credentials = grpc.ssl_channel_credentials(CA)
        with grpc.secure_channel(f"127.0.0.1:{port}", credentials, options) as opened:
            with pytest.raises(UnavailableError):
                invoke(opened)


# --- reaching ------------------------------------------------------------------------------------------------------


def test_nobody_listens() -> None:
    port = free_port()
    with pytest.raises(UnavailableError, match=rf"party/0 at 127.0.0.1:{port} refuses connections; start it"):
        call(cluster_at(port))


@contextmanager
def plain_server(answer: bytes | None) -> Iterator[int]:
    """Accepts connections; answers the first bytes with `answer`, or never if None."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        done = threading.Event()

        def run() -> None:
            connection, _ = listening.accept()
            with connection:
                if answer is None:
                    done.wait(10)
                else:
                    connection.recv(4096)
                    connection.sendall(answer)

        thread = threading.Thread(target=run)
        thread.start()
        yield listening.getsockname()[1]
        done.set()
        thread.join()


@pytest.mark.parametrize(
    ("answer", "message"),
    [(b"HTTP/1.1 400 Bad Request\r\n\r\n", "another program has its port"), (b"", "closed"), (None, "in time")],
)
def test_something_else_listens(answer: bytes | None, message: str) -> None:
    with plain_server(answer) as port, pytest.raises(UnavailableError, match=message):
        cluster = cluster_at(port)
        channel.connect(cluster.parties[0], cluster, CLIENT, timeout=0.5)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "does not resolve"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "cannot be reached: Network is unreachable"),
    ],
)
def test_no_way_to_the_host(failure: OSError, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise failure

    monkeypatch.setattr(socket, "create_connection", fail)
    with pytest.raises(UnavailableError, match=message):
        call(cluster_at(7100))


def test_port_in_use() -> None:
    with serving(echo) as port, pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
        with serving(echo, port=port):
            pass


def test_message_limit() -> None:
    with serving(echo, max_message_mb=1) as port:
        assert len(call(cluster_at(port), request=bytes(2**20 - 100))) == 2**20 - 100
        with pytest.raises(InputError, match="max_message_mb"):
            call(cluster_at(port), request=bytes(2**20 + 1))


def test_asyncio_channel_makes_the_same_checks() -> None:
    async def run(cluster: Cluster) -> bytes:
        async with await channel.connect_aio(cluster.parties[0], cluster, CLIENT, timeout=5) as opened:
            stub: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = opened.unary_unary("/test.Echo/Call")
            try:
                return await stub(b"hello", timeout=10)
            except grpc.RpcError as error:
                raise channel.from_rpc_error(error, "party/0") from error

    def refuse(request: bytes, context: grpc.ServicerContext) -> bytes:
        channel.abort(context, errors.ShapeError("3 rows, not 4"))

    with serving(echo) as port:
        assert asyncio.run(run(cluster_at(port))) == b"hello"
    with serving(refuse) as port, pytest.raises(errors.ShapeError, match="^party/0: 3 rows, not 4$"):
        asyncio.run(run(cluster_at(port)))
    with serving(echo, issue("party/0")) as port, pytest.raises(IdentityError):
        asyncio.run(run(cluster_at(port)))


# --- errors --------------------------------------------------------------------------------------------------------


def test_every_error_class_comes_back_as_itself() -> None:
    def fail(request: bytes, context: grpc.ServicerContext) -> bytes:
        channel.abort(context, getattr(errors, request.decode())("größer than 4; send less"))

    with serving(fail) as port:
        cluster = cluster_at(port)
        with channel.connect(cluster.parties[0], cluster, CLIENT, timeout=5) as opened:
            for kind in ALL:
                with pytest.raises(MpcInferError) as caught:
                    invoke(opened, kind.__name__.encode())
                assert type(caught.value) is kind
                assert str(caught.value) == "party/0: größer than 4; send less"


@pytest.mark.parametrize("kind", ALL)
def test_to_status(kind: type[MpcInferError]) -> None:
    assert channel.to_status(kind("why")) == (grpc.StatusCode[kind.grpc_status], "why")
    assert len(channel.to_status(kind("x" * 10_000))[1]) < 2_000


def test_errors_that_grpc_itself_raises() -> None:
    def fail(request: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode[request.decode()], "details")

    expected = {
        "INVALID_ARGUMENT": errors.InputError,
        "FAILED_PRECONDITION": errors.ConfigError,
        "DEADLINE_EXCEEDED": errors.DeadlineError,
        "UNAVAILABLE": errors.UnavailableError,
        "CANCELLED": errors.AbortedError,
        "UNIMPLEMENTED": errors.UnsupportedError,
        "INTERNAL": errors.MpcInferError,
        "UNKNOWN": errors.MpcInferError,
        "OUT_OF_RANGE": errors.MpcInferError,
    }
    with serving(fail) as port:
        cluster = cluster_at(port)
        with channel.connect(cluster.parties[0], cluster, CLIENT, timeout=5) as opened:
            for status, kind in expected.items():
                with pytest.raises(MpcInferError, match="^party/0: details$") as caught:
                    invoke(opened, status.encode())
                assert type(caught.value) is kind


def test_a_class_name_that_contradicts_the_status_is_not_believed() -> None:
    def fail(request: bytes, context: grpc.ServicerContext) -> bytes:
        context.set_trailing_metadata((("mpcinfer-error", request.decode()),))
        context.abort(grpc.StatusCode.UNAVAILABLE, "details")

    with serving(fail) as port:
        for name in ("ShapeError", "SystemExit", "_CLASSES", ""):
            with pytest.raises(UnavailableError) as caught:
                call(cluster_at(port), request=name.encode())
            assert type(caught.value) is UnavailableError


def test_unexpected_exceptions_tell_nothing_but_an_incident(caplog: pytest.LogCaptureFixture) -> None:
    def fail(request: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            try:
                raise KeyError(request)
            except KeyError as error:
                raise ValueError(f"bad share {request!r}") from error
        except Exception as error:
            channel.abort(context, error)

    with serving(fail) as port, caplog.at_level(logging.DEBUG):
        with pytest.raises(MpcInferError, match=r"unexpected failure, incident [0-9a-f]{12};") as caught:
            call(cluster_at(port), request=b"c0ffee")
    incident = str(caught.value).split("incident ")[1][:12]
    (record,) = (record for record in caplog.records if incident in record.getMessage())
    text = record.getMessage()
    assert record.exc_info is None
    assert "builtins.ValueError at " in text and "builtins.KeyError at " in text and "test_channel" in text
    assert "c0ffee" not in caplog.text and "c0ffee" not in str(caught.value)
