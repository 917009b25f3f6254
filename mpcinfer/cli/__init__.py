"""The command `mpcinfer`: only wiring. What it prints for people goes to stdout in plain lines, or as JSON.

An error is one line `error: ...` on stderr, with --json an object on stdout too. Exit codes: 0, 2 for wrong usage,
input or configuration, 3 if a party or the dealer is unavailable or too slow, 1 otherwise.
"""

from __future__ import annotations

# Each command imports what it needs itself: a party's process must not pay for the client, nor `--help` for torch.
import json
import os
import signal
import sys
import threading
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from mpcinfer import __version__
from mpcinfer.cli.auditing import RATE, AuditFile, AuditRate, canaries, set_audit
from mpcinfer.cli.certificates import certs_app
from mpcinfer.cli.grants import grant, revoke, words
from mpcinfer.cli.options import CLUSTER, ClusterPath, IdentityPath, Json, ModelVersion, NodePath, StopAtEof
from mpcinfer.cli.output import announcing, load_array, print_json, print_table, shapes, write_array
from mpcinfer.cli.owner import deploy, explain
from mpcinfer.cli.parties import pin, status
from mpcinfer.cli.receipts import ReceiptFile, ReceiptSalts, audit_app, save, verify_receipt
from mpcinfer.cli.serving import proxy
from mpcinfer.cli.store import refresh, store_app
from mpcinfer.cli.writing import chat, embed, generate
from mpcinfer.config import Node
from mpcinfer.errors import ConfigError, DeadlineError, InputError, MpcInferError, UnavailableError

app = typer.Typer(
    help="Private inference by secure multi-party computation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they would print the values of local variables
)
models_app = typer.Typer(help="The deployed models.", invoke_without_command=True)
app.add_typer(certs_app, name="certs")
app.command()(explain)
app.command()(deploy)
app.command()(canaries)
app.command()(grant)
app.command()(revoke)
app.command()(refresh)
app.add_typer(models_app, name="models")
app.command()(generate)
app.command()(chat)
app.command()(embed)
app.command()(proxy)
app.command()(status)
app.command()(pin)
app.command()(verify_receipt)
app.add_typer(audit_app, name="audit")
app.add_typer(store_app, name="store")


def main() -> None:
    """Run the command line and exit."""
    as_json = "--json" in sys.argv[1:]
    try:
        code = app(standalone_mode=False)
    except MpcInferError as error:
        _fail(type(error).__name__, str(error), _exit_code(error), as_json)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:
        # A usage error of typer's; the class to catch has another place in each version.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        _fail("UsageError", message(), 2, as_json)
    sys.exit(code if isinstance(code, int) else 0)


def _exit_code(error: MpcInferError) -> int:
    if isinstance(error, InputError | ConfigError):
        return 2
    return 3 if isinstance(error, UnavailableError | DeadlineError) else 1


def _fail(kind: str, message: str, code: int, as_json: bool) -> NoReturn:
    if as_json:
        print(json.dumps({"error": {"type": kind, "message": message}}))
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _version(asked: bool) -> None:
    if asked:
        print(f"mpcinfer {__version__}")
        raise typer.Exit()


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# --- processes -----------------------------------------------------------------------------------------------------


@app.command()
def party(
    config: NodePath,
    stop_at_eof: StopAtEof = False,
    witness_of: Annotated[
        int | None, typer.Option(help="Run the witness of this party, which the node file must be for.")
    ] = None,
) -> None:
    """Run a party, or the witness of one, until it is told to stop."""
    from mpcinfer.party.server import serve

    node = _node(config, stop_at_eof)
    if node.role == "dealer":
        raise ConfigError(f"{config} is for {node.role}, not for a party; use `mpcinfer dealer`")
    # Which of the two this host is decides whom it must not be run by: nobody starts one for the other unawares.
    if witness_of is None and node.role.startswith("witness/"):
        raise ConfigError(
            f"{config} is for {node.role}: start it with --witness-of {node.cluster.endpoint(node.role).index}"
        )
    if witness_of is not None and node.role != f"witness/{witness_of}":
        raise ConfigError(f"{config} is for {node.role}, not for witness/{witness_of}")
    serve(node)


@app.command()
def dealer(config: NodePath, stop_at_eof: StopAtEof = False) -> None:
    """Run the dealer until it is told to stop."""
    from mpcinfer.dealer.server import serve

    node = _node(config, stop_at_eof)
    if node.role != "dealer":
        raise ConfigError(f"{config} is for {node.role}, not for a dealer; use `mpcinfer party`")
    serve(node)


def _node(config: Path, stop_at_eof: bool) -> Node:
    node = Node.load(config)
    if stop_at_eof:
        threading.Thread(target=_stop_at_eof, name="stop-at-eof", daemon=True).start()
    return node


def _stop_at_eof() -> None:
    """Whoever started this process holds the other end of its standard input: when they are gone, stop."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


@app.command()
def up(
    parties: Annotated[
        int | None, typer.Option(min=2, help="How many parties (default: 2, or those that exist).")
    ] = None,
    directory: Annotated[
        Path | None, typer.Option(help="Where keys, configuration, stores and logs are (default: a temporary one).")
    ] = None,
    owner: Annotated[list[str] | None, typer.Option(help="Name of a model owner (default: owner).")] = None,
    client: Annotated[list[str] | None, typer.Option(help="Name of a data owner (default: client).")] = None,
    base_port: Annotated[int | None, typer.Option(min=1, max=65000, help="Party I listens at this port + I.")] = None,
    witnesses: Annotated[bool, typer.Option("--witnesses", help="A witness for each party of a new cluster.")] = False,
    ready_file: Annotated[Path | None, typer.Option(help="A file that is there while all are ready.")] = None,
) -> None:
    """Run a whole cluster on this machine, each member a process of its own, until Ctrl-C. For trying things out."""
    from mpcinfer.client.local import LocalCluster

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: an exception here, which stops them all
    owners, clients = owner or ["owner"], client or ["client"]
    local = LocalCluster(
        directory, parties=parties, owners=owners, clients=clients, base_port=base_port, witnesses=witnesses
    )
    try:
        with ExitStack() as ending:
            ending.callback(local.stop)  # also where it never starts: it may have a temporary directory
            announce = ending.enter_context(announcing(ready_file))
            local.start()
            for endpoint in local.cluster.members:
                print(f"{endpoint.role} at {endpoint.address}, log {local.logs[endpoint.role]}")
            for role in [*(f"owner/{name}" for name in owners), *(f"client/{name}" for name in clients)]:
                print(f"{role}: {local.identity(role)}")
            print(f"cluster file: {local.cluster_path}")
            announce()
            print("ready", flush=True)
            local.watch()
    except KeyboardInterrupt:
        print("stopped")


# --- owners and clients --------------------------------------------------------------------------------------------


@models_app.callback()
def models(
    context: typer.Context, cluster: ClusterPath = CLUSTER, identity: IdentityPath = None, as_json: Json = False
) -> None:
    """The deployed models: list them, or remove one."""
    if context.invoked_subcommand is None:
        list_models(cluster, identity, as_json)
        return
    for parameter in context.params:
        source = context.get_parameter_source(parameter)
        if source is not None and source.name == "COMMANDLINE":  # the subcommand would not see it
            raise InputError(f"write the options after {context.invoked_subcommand!r}")


@models_app.command("list")
def list_models(cluster: ClusterPath = CLUSTER, identity: IdentityPath = None, as_json: Json = False) -> None:
    """List the deployed models."""
    from mpcinfer.client.cluster import Connection

    with Connection.to(cluster, identity) as connection:
        found = connection.models()
    if as_json:
        print_json({"models": [asdict(model) for model in found]})
        return
    rows = [
        [m.name, str(m.version), m.owner, m.reveal, str(m.parameters), shapes(m.inputs), shapes(m.outputs)]
        + [words(m.grant) if m.grant is not None else "to you"]
        for m in found
    ]
    print_table(["NAME", "VERSION", "OWNER", "REVEAL", "PARAMETERS", "INPUTS", "OUTPUTS", "GRANTED"], rows)


@models_app.command("rm")
def remove_model(
    name: Annotated[str, typer.Argument(help="The model.")],
    version: ModelVersion = 0,
    cluster: ClusterPath = CLUSTER,
    identity: IdentityPath = None,
    as_json: Json = False,
) -> None:
    """Remove a version of a model (by default all) from all parties."""
    from mpcinfer.client.owner import ModelOwner

    with ModelOwner.connect(cluster, identity) as model_owner:
        removed, parties = model_owner.remove(name, version), model_owner.parties
    if as_json:
        print_json({"removed": removed, "confirmed_by": parties})
    else:
        print(f"removed {removed} version{'' if removed == 1 else 's'} of {name}, confirmed by all {parties} parties")


@app.command()
def infer(
    name: Annotated[str, typer.Argument(help="The model.")],
    inputs: Annotated[list[Path], typer.Argument(help="One .npy file per input of the model.")],
    out: Annotated[
        Path | None, typer.Option(help="Write the output here (.npy); several get -0, -1, ... added.")
    ] = None,
    version: ModelVersion = 0,
    timeout: Annotated[float, typer.Option(help="Seconds.")] = 60.0,
    audit: AuditFile = None,
    audit_rate: AuditRate = RATE,
    receipt: ReceiptFile = None,
    receipt_salts: ReceiptSalts = False,
    cluster: ClusterPath = CLUSTER,
    identity: IdentityPath = None,
    as_json: Json = False,
) -> None:
    """Evaluate a model on private inputs."""
    import numpy as np

    from mpcinfer.client.data import Client

    arrays = [load_array(file) for file in inputs]
    with Client.connect(cluster, identity) as data_owner:
        set_audit(data_owner, audit, audit_rate)
        answer = data_owner.infer(name, *arrays, version=version, timeout=timeout)
        cost = data_owner.last_cost
        save(data_owner.last_receipt, receipt, receipt_salts)
    outputs = answer if isinstance(answer, tuple) else (answer,)
    files = []
    if out is not None:
        files = [out] if len(outputs) == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(len(outputs))]
        for file, output in zip(files, outputs, strict=True):
            write_array(file, output)
    if as_json:
        content: dict[str, Any] = (
            {"files": list(map(str, files))} if files else {"outputs": [o.tolist() for o in outputs]}
        )
        print_json({**content, "shapes": [list(output.shape) for output in outputs], **(cost or {})})
        return
    lines = [np.array2string(output, precision=4, suppress_small=True) for output in outputs]
    print("\n".join(map(str, files or lines)))
    if cost is not None:
        online, offline = cost["online"], cost["offline"]
        print(
            f"online {online['seconds']:.3f} s, {online['rounds']:.0f} rounds, "
            f"{online['bytes_sent_per_party']:.0f} bytes sent per party; offline {offline['seconds']:.3f} s, "
            f"{offline['bytes_sent_by_dealer']:.0f} bytes sent by the dealer",
            file=sys.stderr,
        )
