"""The command `mpcinfer`: only wiring. What it prints for people goes to stdout in plain lines, or as JSON.

An error is one line `error: ...` on stderr, with --json an object on stdout too. Exit codes: 0, 2 for wrong usage,
input or configuration, 3 if a party or the dealer is unavailable or too slow, 1 otherwise.
"""

from __future__ import annotations

# Each command imports what it needs itself: a party's process must not pay for the client, nor `--help` for torch.
import importlib.util
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from mpcinfer import __version__
from mpcinfer.config import Node
from mpcinfer.errors import ConfigError, DeadlineError, InputError, MpcInferError, UnavailableError

app = typer.Typer(
    help="Private inference by secure multi-party computation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they would print the values of local variables
)
certs_app = typer.Typer(help="Keys, certificates and the cluster file.", no_args_is_help=True)
models_app = typer.Typer(help="The deployed models.", invoke_without_command=True)
app.add_typer(certs_app, name="certs")
app.add_typer(models_app, name="models")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
ClusterPath = Annotated[
    Path, typer.Option("--cluster", envvar="MPCINFER_CLUSTER", help="The cluster file, or the directory it is in.")
]
IdentityPath = Annotated[
    str | None,
    typer.Option(
        "--identity",
        envvar="MPCINFER_IDENTITY",
        help="Whose key to use: client/NAME, owner/NAME or its path; by default the only one beside the cluster file.",
        show_default=False,
    ),
]
NodePath = Annotated[Path, typer.Option("--config", help="The node's TOML file.")]
StopAtEof = Annotated[bool, typer.Option("--stop-at-eof", hidden=True)]
ModelVersion = Annotated[int, typer.Option("--version", min=0, help="A version of the model.")]
HERE = Path(".")
CLUSTER = Path("cluster.toml")


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
def party(config: NodePath, stop_at_eof: StopAtEof = False) -> None:
    """Run a party until it is told to stop."""
    from mpcinfer.party.server import serve

    node = _node(config, stop_at_eof)
    if not node.role.startswith("party/"):
        raise ConfigError(f"{config} is for {node.role}, not for a party; use `mpcinfer dealer`")
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
    ready_file: Annotated[Path | None, typer.Option(help="A file to write when all are ready.")] = None,
) -> None:
    """Run a whole cluster on this machine, each member a process of its own, until Ctrl-C. For trying things out."""
    from mpcinfer.client.local import LocalCluster

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: an exception here, which stops them all
    owners, clients = owner or ["owner"], client or ["client"]
    local = LocalCluster(directory, parties=parties, owners=owners, clients=clients, base_port=base_port)
    try:
        with local:
            for endpoint in (local.cluster.dealer, *local.cluster.parties):
                print(f"{endpoint.role} at {endpoint.address}, log {local.logs[endpoint.role]}")
            for role in [*(f"owner/{name}" for name in owners), *(f"client/{name}" for name in clients)]:
                print(f"{role}: {local.identity(role)}")
            print(f"cluster file: {local.cluster_path}")
            print("ready", flush=True)
            if ready_file is not None:
                ready_file.write_text("ready\n")
            local.watch()
    except KeyboardInterrupt:
        print("stopped")


# --- owners and clients --------------------------------------------------------------------------------------------


@app.command()
def deploy(
    path: Annotated[
        str,
        typer.Argument(
            help="A .pt2 file of torch.export, or MODULE_OR_FILE.py:FUNCTION returning (model, example_inputs)."
        ),
    ],
    name: Annotated[str, typer.Option(help="What clients call the model.")],
    inputs: Annotated[
        list[Path] | None, typer.Option(help="An example input (.npy), instead of the function's.")
    ] = None,
    reveal: Annotated[str, typer.Option(help="What clients learn: logits, probabilities, top-k or argmax.")] = "logits",
    k: Annotated[int, typer.Option("--k", min=1, help="How many indices top-k reveals.")] = 5,
    frac_bits: Annotated[int, typer.Option(help="Precision: fraction bits, 8 to 24.")] = 16,
    public: Annotated[list[str] | None, typer.Option(help="The name of a constant that is no secret.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds.")] = 1800.0,
    cluster: ClusterPath = CLUSTER,
    identity: IdentityPath = None,
    as_json: Json = False,
) -> None:
    """Share a model among the parties. A name that exists gets a new version."""
    from mpcinfer.client.owner import ModelOwner

    # The cheap checks first: exporting a large model takes its time.
    with ModelOwner.connect(cluster, identity) as model_owner, _progress(as_json) as progress:
        model, examples = _load_model(path)
        deployed = model_owner.deploy(
            model,
            [_load_array(file, as_torch=True) for file in inputs] if inputs else examples,
            name=name,
            frac_bits=frac_bits,
            reveal=reveal,
            k=k,
            public=public or (),
            progress=progress,
            timeout=timeout,
        )
    if as_json:
        _print_json(asdict(deployed))
    else:
        print(f"deployed {deployed.name} version {deployed.version} ({deployed.parameters} secret parameters)")


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
        _print_json({"models": [asdict(model) for model in found]})
        return
    rows = [
        [m.name, str(m.version), m.owner, m.reveal, str(m.parameters), _shapes(m.inputs), _shapes(m.outputs)]
        for m in found
    ]
    _print_table(["NAME", "VERSION", "OWNER", "REVEAL", "PARAMETERS", "INPUTS", "OUTPUTS"], rows)


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
        removed = model_owner.remove(name, version)
    if as_json:
        _print_json({"removed": removed})
    else:
        print(f"removed {removed} version{'' if removed == 1 else 's'} of {name}")


@app.command()
def infer(
    name: Annotated[str, typer.Argument(help="The model.")],
    inputs: Annotated[list[Path], typer.Argument(help="One .npy file per input of the model.")],
    out: Annotated[
        Path | None, typer.Option(help="Write the output here (.npy); several get -0, -1, ... added.")
    ] = None,
    version: ModelVersion = 0,
    timeout: Annotated[float, typer.Option(help="Seconds.")] = 60.0,
    cluster: ClusterPath = CLUSTER,
    identity: IdentityPath = None,
    as_json: Json = False,
) -> None:
    """Evaluate a model on private inputs."""
    import numpy as np

    from mpcinfer.client.data import Client

    arrays = [_load_array(file) for file in inputs]
    with Client.connect(cluster, identity) as data_owner:
        answer = data_owner.infer(name, *arrays, version=version, timeout=timeout)
        cost = data_owner.last_cost
    outputs = answer if isinstance(answer, tuple) else (answer,)
    files = []
    if out is not None:
        files = [out] if len(outputs) == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(len(outputs))]
        for file, output in zip(files, outputs, strict=True):
            _write_array(file, output)
    if as_json:
        content: dict[str, Any] = (
            {"files": list(map(str, files))} if files else {"outputs": [o.tolist() for o in outputs]}
        )
        _print_json({**content, "shapes": [list(output.shape) for output in outputs], **(cost or {})})
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


@app.command()
def status(
    timeout: Annotated[float, typer.Option(help="Seconds to wait for each party.")] = 5.0,
    cluster: ClusterPath = CLUSTER,
    identity: IdentityPath = None,
    as_json: Json = False,
) -> None:
    """How each party is doing. Exit code 1 if one is not ready."""
    from mpcinfer.client.cluster import cluster_status
    from mpcinfer.client.locate import locate

    found = cluster_status(*locate(cluster, identity), timeout=timeout)
    ready = all(party.state == "ready" for party in found)
    if as_json:
        _print_json({"ready": ready, "parties": [asdict(party) for party in found]})
    else:
        rows = [
            [p.role, p.address, p.state, str(len(p.models)), str(p.requests_done), str(p.requests_failed), p.detail]
            for p in found
        ]
        _print_table(["PARTY", "ADDRESS", "STATE", "MODELS", "DONE", "FAILED", "DETAIL"], rows)
    if not ready:
        raise typer.Exit(1)


# --- certificates --------------------------------------------------------------------------------------------------


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
    role: Annotated[str, typer.Argument(help="party/I, dealer, owner/NAME or client/NAME.")],
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
    ca: Annotated[Path, typer.Option(help="The CA's certificate.")] = Path("ca.pem"),
    out: Annotated[Path, typer.Option(help="The cluster file to write.")] = CLUSTER,
) -> None:
    """Write the cluster file, which pins the key of each party and of the dealer."""
    from mpcinfer.client.certs import write_cluster_file

    print(write_cluster_file(out, name, ca, parties=[_entry(p) for p in party], dealer=_entry(dealer)))


def _entry(text: str) -> tuple[str, Path]:
    address, equals, file = text.partition("=")
    if not equals:
        raise ConfigError(f"{text!r} is not HOST:PORT=FILE, for example 10.0.0.5:7100=party-0.pem")
    return address, Path(file)


# --- files and output ----------------------------------------------------------------------------------------------


def _load_model(path: str) -> tuple[Any, Sequence[Any]]:
    """The model and example inputs that PATH stands for."""
    if path.endswith(".pt2"):
        import torch

        try:
            exported = torch.export.load(path)
        except Exception as error:  # whatever a damaged archive makes torch raise
            raise InputError(f"cannot load {path} as an exported program ({type(error).__name__})") from error
        return exported, ()
    source, colon, function = path.rpartition(":")
    if not colon:
        raise InputError(f"{path!r} is neither a .pt2 file nor MODULE:FUNCTION nor FILE.py:FUNCTION")
    try:
        model, examples = getattr(_load_module(source), function)()
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__} at {at.filename}:{at.lineno}: {error}"
        raise InputError(f"{path} does not give (model, example_inputs): {what}") from error
    return model, examples


def _load_module(source: str) -> Any:
    if not source.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(source)
    file = Path(source)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ConfigError(f"no file {source}")
    sys.path.insert(0, str(file.parent.absolute()))  # as if it were run: it may import its neighbours
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def _load_array(file: Path, *, as_torch: bool = False) -> Any:
    import numpy as np

    try:
        array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"cannot read {file} as a .npy file: {getattr(error, 'strerror', None) or 'not one'}"
        ) from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{file} holds several arrays; give a .npy file for each input")
    if not as_torch:
        return array
    import torch

    return torch.from_numpy(array)


def _write_array(file: Path, array: Any) -> None:
    import numpy as np

    try:
        with file.open("wb") as stream:  # np.save would add a suffix
            np.save(stream, array, allow_pickle=False)
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error


@contextmanager
def _progress(as_json: bool) -> Iterator[Any]:
    """A progress bar to be called with (bytes done, bytes in all), or None if nobody is looking."""
    if as_json or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("exporting", total=None)

        def report(done: int, total: int) -> None:
            bar.update(task, description="sharing" if done < total else "committing", completed=done, total=total)

        yield report


def _shapes(specs: Sequence[Any]) -> str:
    return " ".join("x".join("N" if size == -1 else str(size) for size in spec.shape) or "scalar" for spec in specs)


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content))


def _print_table(head: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
