"""gRPC channels with mutual TLS and pinned keys, and the one mapping between our errors and gRPC's.

gRPC for Python cannot compare a server's key with a pin. So `connect` first makes a TLS handshake with the standard
library, checks the server's certificate against the cluster file, and then opens a gRPC channel that trusts exactly
that certificate and no CA. The channel keeps the check for its whole life, reconnections included.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import ssl
import time
import traceback
from collections.abc import Iterable
from typing import NoReturn

import grpc
import grpc.aio

from mpcinfer import errors
from mpcinfer.config import Cluster, Endpoint
from mpcinfer.config.reading import split_address
from mpcinfer.errors import ConfigError, IdentityError, InputError, MpcInferError, UnavailableError
from mpcinfer.wire.identity import Identity, dns_name, peer_from_certificate
from mpcinfer.wire.tls import tls_context

_log = logging.getLogger(__name__)

Options = list[tuple[str, int | str]]

# --- servers -----------------------------------------------------------------------------------------------------


def server_credentials(identity: Identity, cluster: Cluster) -> grpc.ServerCredentials:
    """Mutual TLS: callers must show a certificate of the cluster's CA; see `identity.peer_of` for who they are.

    IdentityError if `identity` is one that the cluster's members would refuse.
    """
    identity.check(cluster)
    return grpc.ssl_server_credentials(
        [(identity.key_pem, identity.cert_pem)], root_certificates=cluster.ca_pem, require_client_auth=True
    )


def server_options(max_message_mb: int = 256) -> Options:
    """Options for `grpc.server` that fit the channels of `connect`."""
    return [
        *_message_limits(max_message_mb),
        ("grpc.so_reuseport", 0),  # a port in use is an error, not a port shared with a stranger
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # By default a server closes channels that ping, and on a busy machine pings arrive bunched up.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def bind(server: grpc.Server, address: str, credentials: grpc.ServerCredentials) -> int:
    """Make `server` listen on `address`; the port (chosen by the system for port 0). ConfigError if it cannot."""
    split_address(address)
    try:
        port = server.add_secure_port(address, credentials)
    except RuntimeError:
        port = 0
    if port == 0:
        raise ConfigError(
            f"cannot listen on {address}: another process uses the port, or the host is not one of this machine's; "
            "stop the other process or set another `listen` address"
        )
    return port


# --- clients -----------------------------------------------------------------------------------------------------


def connect(
    endpoint: Endpoint, cluster: Cluster, identity: Identity, *, timeout: float, max_message_mb: int = 256
) -> grpc.Channel:
    """A channel to a party or the dealer whose certificate, role and key pin have been checked.

    `timeout` in seconds bounds the check. UnavailableError if nobody answers, IdentityError if the other side is not
    who the cluster file says or refuses `identity`.
    """
    credentials = _checked_credentials(endpoint, cluster, identity, timeout)
    return grpc.secure_channel(endpoint.address, credentials, options=_channel_options(endpoint, max_message_mb))


async def connect_aio(
    endpoint: Endpoint, cluster: Cluster, identity: Identity, *, timeout: float, max_message_mb: int = 256
) -> grpc.aio.Channel:
    """`connect` for asyncio: the same checks and errors, a `grpc.aio` channel."""
    credentials = await asyncio.to_thread(_checked_credentials, endpoint, cluster, identity, timeout)
    return grpc.aio.secure_channel(endpoint.address, credentials, options=_channel_options(endpoint, max_message_mb))


def _message_limits(max_message_mb: int) -> Options:
    size = max_message_mb * 2**20
    return [("grpc.max_send_message_length", size), ("grpc.max_receive_message_length", size)]


def _channel_options(endpoint: Endpoint, max_message_mb: int) -> Options:
    return [
        *_message_limits(max_message_mb),
        ("grpc.ssl_target_name_override", dns_name(endpoint.role)),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.enable_http_proxy", 0),  # the handshake below uses none either
        ("grpc.use_local_subchannel_pool", 1),  # a new channel connects at once, whatever an older one waits for
    ]


def _checked_credentials(
    endpoint: Endpoint, cluster: Cluster, identity: Identity, timeout: float
) -> grpc.ChannelCredentials:
    identity.check(cluster)
    certificate = _handshake(endpoint, cluster, identity, timeout)
    try:
        role = peer_from_certificate(certificate, cluster).role
    except IdentityError as error:
        raise IdentityError(f"{_who(endpoint)} is not who the cluster file says: {error}") from error
    if role != endpoint.role:
        raise IdentityError(f"{_who(endpoint)} showed a certificate of {role}; check the addresses in the cluster file")
    return grpc.ssl_channel_credentials(
        root_certificates=certificate, private_key=identity.key_pem, certificate_chain=identity.cert_pem
    )


# What every HTTP/2 client says first: the preface and an empty SETTINGS frame.
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


class _ClosedAfterHandshake(Exception):
    """The server ended the connection once it had seen our certificate."""


def _handshake(endpoint: Endpoint, cluster: Cluster, identity: Identity, timeout: float) -> bytes:
    """The server's certificate (PEM), after a handshake in which both sides accepted each other's."""
    context, deadline = tls_context(cluster, identity), time.monotonic() + timeout
    context.set_alpn_protocols(["h2"])
    # gRPC servers refuse a client's certificate by closing the connection, without a TLS alert. A server that stops
    # in this moment does the same once; by the second attempt it no longer listens.
    for _ in range(2):
        try:
            return _attempt(context, endpoint, identity, deadline)
        except _ClosedAfterHandshake:
            continue
    raise IdentityError(
        f"{_who(endpoint)} closes the connection on seeing the certificate of {identity.role}: to that host it has "
        "expired or is not yet valid, or comes from another CA; compare both hosts' clocks and CA files"
    )


def _attempt(context: ssl.SSLContext, endpoint: Endpoint, identity: Identity, deadline: float) -> bytes:
    who = _who(endpoint)
    certificate: bytes | None = None
    try:
        with socket.create_connection(split_address(endpoint.address), timeout=_left(deadline)) as plain:
            plain.settimeout(_left(deadline))
            with context.wrap_socket(plain, server_hostname=dns_name(endpoint.role)) as tls:
                certificate = tls.getpeercert(binary_form=True)
                # In TLS 1.3 the client is done before the server has looked at the client's certificate. Only a
                # first byte of HTTP/2 from the server says that it accepted ours.
                tls.settimeout(_left(deadline))
                tls.sendall(_HTTP2_HELLO)
                if not tls.recv(1):
                    raise ConnectionResetError
    except ssl.SSLCertVerificationError as error:
        raise IdentityError(
            f"{who} showed a certificate that cannot be accepted: {error.verify_message}; if it has expired, its "
            "operator has it signed again, else check address and CA in the cluster file"
        ) from error
    except (ConnectionError, ssl.SSLEOFError) as error:
        if certificate is not None:
            raise _ClosedAfterHandshake from error
        cause = "refuses connections" if isinstance(error, ConnectionRefusedError) else "closed the connection"
        raise UnavailableError(f"{who} {cause}; start it (again), or check its address and log") from error
    except ssl.SSLError as error:
        reason = (error.reason or "unknown").lower().replace("_", " ")
        if certificate is not None and "alert" in reason:
            raise IdentityError(
                f"{who} refused the certificate of {identity.role}: {reason}; "
                "compare its dates, both hosts' clocks and CA files"
            ) from error
        raise UnavailableError(
            f"{who} does not speak TLS as a party or dealer does ({reason}); check whether another program has its port"
        ) from error
    except TimeoutError as error:
        raise UnavailableError(
            f"{who} did not answer in time; check that it runs, its address, and the network between"
        ) from error
    except socket.gaierror as error:
        raise UnavailableError(f"{who}: the host name does not resolve; check the cluster file and DNS") from error
    except OSError as error:
        raise UnavailableError(f"{who} cannot be reached: {error.strerror or 'network error'}") from error
    if certificate is None:
        raise IdentityError(f"{who} showed no certificate")
    return ssl.DER_cert_to_PEM_cert(certificate).encode()


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)


def _who(endpoint: Endpoint) -> str:
    return f"{endpoint.role} at {endpoint.address}"


# --- errors ------------------------------------------------------------------------------------------------------

_ERROR_KEY = "mpcinfer-error"  # trailing metadata: the class name, where several classes share a status
_MAX_TEXT = 1500  # a status travels in HTTP/2 trailers, which peers limit to a few KiB

_CLASSES: dict[str, type[MpcInferError]] = {
    name: item for name, item in vars(errors).items() if isinstance(item, type) and issubclass(item, MpcInferError)
}
# Without the class name: the most general class of each status (errors.py defines parents before children).
_BY_STATUS: dict[str, type[MpcInferError]] = {}
for _class in _CLASSES.values():
    _BY_STATUS.setdefault(_class.grpc_status, _class)
_BY_STATUS["CANCELLED"] = errors.AbortedError


def to_status(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """The status and text that tell a peer about `error`.

    An error not raised on purpose may carry anything in its message, so the peer gets an incident id, and the log the
    same id with the exception's types and the code locations it passed, no values.
    """
    if isinstance(error, MpcInferError):
        text = str(error)
        return grpc.StatusCode[error.grpc_status], text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + "..."
    incident = secrets.token_hex(6)
    _log.error("incident %s: %s", incident, _locations(error))
    return grpc.StatusCode.INTERNAL, f"unexpected failure, incident {incident}; the log of that process says where"


def abort(context: grpc.ServicerContext, error: BaseException) -> NoReturn:
    """End the RPC of a synchronous servicer with `error`, so that `from_rpc_error` gets the same class back."""
    status, text = to_status(error)
    name = type(error).__name__
    if name in _CLASSES:
        context.set_trailing_metadata(((_ERROR_KEY, name),))
    context.abort(status, text)
    raise AssertionError("unreachable: abort raises")


def from_rpc_error(e: grpc.RpcError, who: str) -> MpcInferError:
    """The error (to be raised) that a failed RPC to `who`, for example "party/0", stands for.

    `e` is what a call of a synchronous or asyncio stub raised.
    """
    status, details = grpc.StatusCode.UNKNOWN, ""
    metadata: Iterable[tuple[str, str | bytes]] = ()
    if isinstance(e, (grpc.Call, grpc.aio.AioRpcError)):
        status, details, metadata = e.code(), e.details() or "", e.trailing_metadata() or ()
    text = f"{who}: {details or status.name.lower().replace('_', ' ')}"
    name = next((value for key, value in metadata if key == _ERROR_KEY), "")
    kind = _CLASSES.get(name if isinstance(name, str) else "")
    if kind is not None and kind.grpc_status == status.name:
        return kind(text)
    # From here on gRPC itself speaks, not a servicer of ours.
    if status is grpc.StatusCode.UNAVAILABLE and "CERTIFICATE_VERIFY_FAILED" in details:
        return IdentityError(f"{who} now shows another certificate than when it was connected to; connect again")
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return InputError(f"{text}; send less at once or raise limits.max_message_mb on both sides")
    return _BY_STATUS.get(status.name, MpcInferError)(text)


def _locations(error: BaseException) -> str:
    """Type and code locations of an exception and of what caused it, the cause last."""
    parts: list[str] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        frames = traceback.walk_tb(current.__traceback__)
        path = " > ".join(f"{frame.f_globals.get('__name__', '?')}:{line}" for frame, line in frames)
        parts.append(f"{type(current).__module__}.{type(current).__qualname__} at {path or 'an unknown place'}")
        current = current.__cause__ or current.__context__
    return "; caused by ".join(parts)
