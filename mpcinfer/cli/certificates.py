"""`mpcinfer certs`: keys, certificates and the cluster file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpcinfer.cli.options import CLUSTER, HERE
from mpcinfer.errors import ConfigError

certs_app = typer.Typer(help="Keys, certificates and the cluster file.", no_args_is_help=True)


@certs_app.command("init")
def certs_init(
    name: Annotated[str, typer.Argument(help="The cluster's name.")],
    directory: Annotated[Path, typer.Option(help="Where to put ca.key and ca.pem.")] = HERE,
    days: Annotated[int, typer.Option(min=1, help="How long the CA is valid.")] = 3650,
) -> None:
    """Make the CA of a cluster. Its key stays here; everyone gets ca.pem."""
    from mpcinfer.client.certs import init_ca

    for path in init_ca(directory, name, days=days):
        print(path)


@certs_app.command("request")
def certs_request(
    role: Annotated[str, typer.Argument(help="party/I, witness/I, dealer, owner/NAME or client/NAME.")],
    cluster_name: Annotated[str, typer.Option("--cluster-name", help="The cluster's name.")],
    directory: Annotated[Path, typer.Option(help="Where to put the key and the request.")] = HERE,
) -> None:
    """On the host that will use it: make a key, and the request to send to the CA."""
    from mpcinfer.client.certs import request

    for path in request(directory, cluster_name, role):
        print(path)


@certs_app.command("sign")
def certs_sign(
    request: Annotated[Path, typer.Argument(help="The .csr file of the applicant.")],
    role: Annotated[str, typer.Option(help="The role that you grant; the request must ask for this one.")],
    ca: Annotated[Path, typer.Option(help="The directory with ca.key and ca.pem.")] = HERE,
    out: Annotated[Path | None, typer.Option(help="The certificate (default: beside the request, .pem).")] = None,
    days: Annotated[int, typer.Option(min=1, help="How long the certificate is valid.")] = 365,
) -> None:
    """At the CA: sign a request."""
    from mpcinfer.client.certs import sign

    print(sign(ca, request, role, out or request.with_suffix(".pem"), days=days))


@certs_app.command("pin")
def certs_pin(file: Annotated[Path, typer.Argument(help="A certificate or a request.")]) -> None:
    """Print the pin of the public key in a certificate or request, to compare it with its holder's."""
    from mpcinfer.wire.identity import key_pin

    try:
        print(key_pin(file.read_bytes()))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error


@certs_app.command("cluster")
def certs_cluster(
    name: Annotated[str, typer.Argument(help="The cluster's name.")],
    party: Annotated[list[str], typer.Option(help="HOST:PORT=FILE, its certificate or request; party 0 first.")],
    dealer: Annotated[str, typer.Option(help="HOST:PORT=FILE of the dealer.")],
    witness: Annotated[
        list[str] | None, typer.Option(help="I:HOST:PORT=FILE of the witness of party I, if it has one.")
    ] = None,
    ca: Annotated[Path, typer.Option(help="The CA's certificate.")] = Path("ca.pem"),
    out: Annotated[Path, typer.Option(help="The cluster file to write.")] = CLUSTER,
) -> None:
    """Write the cluster file, which pins the key of each party, of the dealer, and of witnesses if there are any."""
    from mpcinfer.client.certs import write_cluster_file

    witnesses = dict(_witness(each) for each in witness or ())
    parties = [_entry(each) for each in party]
    print(write_cluster_file(out, name, ca, parties=parties, dealer=_entry(dealer), witnesses=witnesses))


def _witness(text: str) -> tuple[int, tuple[str, Path]]:
    index, colon, entry = text.partition(":")
    if not colon or not index.isdecimal():
        raise ConfigError(f"{text!r} is not I:HOST:PORT=FILE, for example 0:10.0.0.6:7100=witness-0.pem")
    return int(index), _entry(entry)


def _entry(text: str) -> tuple[str, Path]:
    address, equals, file = text.partition("=")
    if not equals:
        raise ConfigError(f"{text!r} is not HOST:PORT=FILE, for example 10.0.0.5:7100=party-0.pem")
    return address, Path(file)
