"""`mpcinfer proxy`: OpenAI's API and a chat page on the data owner's machine."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from mpcinfer.cli.auditing import RATE, AuditFile, AuditRate, set_audit
from mpcinfer.cli.options import CLUSTER, ClusterPath, IdentityPath
from mpcinfer.cli.writing import connected
from mpcinfer.errors import ConfigError

if TYPE_CHECKING:
    from mpcinfer.client.data import Client


def proxy(
    host: Annotated[str, typer.Option(help="Where to listen. Anything but this machine itself needs a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: one that is free.")] = 8321,
    token_file: Annotated[
        Path | None, typer.Option(help="A file with the token that callers must send as their API key.")
    ] = None,
    user_token_file: Annotated[
        Path | None,
        typer.Option(
            help="A file with the token (JWT) of the user whom this proxy works for, read again when it changes; the "
            "identity is then that of a gateway."
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one answer.")] = 600.0,
    audit: AuditFile = None,
    audit_rate: AuditRate = RATE,
    cluster: ClusterPath = CLUSTER,
    identity: IdentityPath = None,
) -> None:
    """Serve OpenAI's API on this machine, for applications as they are, and a page to chat on, until Ctrl-C."""
    from mpcinfer.client.locate import locate
    from mpcinfer.client.proxy.app import create_app, server
    from mpcinfer.client.proxy.backend import of_client
    from mpcinfer.client.tokens import read_token
    from mpcinfer.wire.memory import guard_memory
    from mpcinfer.wire.server import configure_logging

    token = None if token_file is None else read_token(token_file)
    members, _ = locate(cluster, identity)
    with connected(cluster, identity, user_token_file) as client:
        set_audit(cast("Client", client), audit, audit_rate)
        app = create_app(of_client(client, members, timeout=timeout), host=host, token=token)
        with listen(host, port) as listening:
            configure_logging("info")
            guard_memory(swap=False)
            logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
            shown = f"[{host}]" if ":" in host else host
            print(f"http://{shown}:{listening.getsockname()[1]}/ (API at /v1); Ctrl-C stops it", flush=True)
            server(app, host, port).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; ConfigError if somebody else does or the address is none of this machine's."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ConfigError(f"cannot listen at {host} port {port}: {error.strerror}") from error
