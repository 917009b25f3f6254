"""`mpcinfer verify-receipt`: what all parties signed about an answer; `mpcinfer audit`: what a party wrote down."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpcinfer.cli.options import CLUSTER, ClusterPath, Json
from mpcinfer.cli.output import print_json, print_table
from mpcinfer.errors import InputError

if TYPE_CHECKING:
    from mpcinfer.trust.receipt import Receipt

ReceiptFile = Annotated[
    Path | None, typer.Option("--receipt", help="Write what all parties sign about the answer here (JSON).")
]
ReceiptSalts = Annotated[
    bool, typer.Option("--receipt-salts", help="With the salts: whoever has these can test guesses of a share.")
]
LogPath = Annotated[Path, typer.Argument(metavar="LOG", help="audit.log in a party's store.")]
Messages = list[str] | None

audit_app = typer.Typer(help="A party's audit log.", no_args_is_help=True)


def save(receipt: Receipt | None, file: Path | None, salts: bool) -> None:
    """Write the receipt, if a file was named."""
    if file is None:
        return
    if receipt is None:
        raise InputError("there is no receipt: not one token has arrived")
    receipt.save(file, salts=salts)


def verify_receipt(
    file: Annotated[Path, typer.Argument(help="A receipt, as --receipt or /v1/receipts/{id} gave it.")],
    request: Annotated[
        Messages,
        typer.Option(help="PARTY:FILE: the Infer- or GenerateRequest that a party was sent, serialised."),
    ] = None,
    response: Annotated[
        Messages, typer.Option(help="PARTY:FILE: a response with outputs, serialised; of a text all, in their order.")
    ] = None,
    log: Annotated[list[Path] | None, typer.Option(help="Audit logs that must have a line about it.")] = None,
    cluster: ClusterPath = CLUSTER,
    as_json: Json = False,
) -> None:
    """Check a receipt: signatures, keys, that all parties say the same; with its salts, which shares it is about.

    The keys are those of the parties that were pinned when it was signed (`mpcinfer pin`), else those in the cluster
    file.
    """
    from mpcinfer.client.locate import cluster_file
    from mpcinfer.client.manifest import Demands
    from mpcinfer.config import Cluster
    from mpcinfer.trust.receipt import Receipt

    pinned = Demands.find(cluster).pin
    receipt = Receipt.load(file, Cluster.load(cluster_file(cluster)), pinned)
    then = pinned.find(receipt.shared["manifest"]) if pinned is not None else None
    until = then.until if then is not None and math.isfinite(then.until) else None
    for index, data in _messages(request).items():
        receipt.check_request(_within(index, receipt), _inputs(receipt, data[-1]))
    for index, data in _messages(response).items():
        receipt.check_answers(_within(index, receipt), [_outputs(receipt, each) for each in data])
    for path in log or ():
        _check_line(receipt, path)
    if as_json:
        print_json(
            {"valid": True, "pinned_until": until, **receipt.shared, "parties": [dict(own) for own in receipt.own]}
        )
        return
    said = receipt.shared
    whose = ""
    if until is not None:
        whose = f" as they were pinned until {time.strftime('%Y-%m-%d %H:%M', time.gmtime(until))} UTC"
    print(f"valid: signed by all {said['parties']} parties{whose}")
    print(
        f"{said['action']} of {said['model']} version {said['version']} for {said['client']}, request {said['request']}"
    )
    print(f"{said['answers']} answers, {said['rounds']} rounds, {sum(said['openings'].values())} openings")


def _messages(given: Messages) -> dict[int, list[bytes]]:
    """By party, what is in the files named as PARTY:FILE."""
    found: dict[int, list[bytes]] = {}
    for each in given or ():
        index, _, name = each.partition(":")
        try:
            found.setdefault(int(index), []).append(Path(name).read_bytes())
        except (ValueError, OSError) as error:
            raise InputError(f"{each!r}: name a party and a file that can be read, as 0:request.bin") from error
    return found


def _within(index: int, receipt: Receipt) -> int:
    if not 0 <= index < receipt.shared["parties"]:
        raise InputError(f"there is no party {index}")
    return index


def _inputs(receipt: Receipt, data: bytes) -> Any:
    from mpcinfer.wire.v1 import party_pb2

    if receipt.shared["action"] == "infer":
        return _parsed(party_pb2.InferRequest, data).inputs
    return [_parsed(party_pb2.GenerateRequest, data).tokens]


def _outputs(receipt: Receipt, data: bytes) -> Any:
    from mpcinfer.wire.v1 import party_pb2

    infer = receipt.shared["action"] == "infer"
    return _parsed(party_pb2.InferResponse if infer else party_pb2.GenerateResponse, data).outputs


def _parsed(kind: Any, data: bytes) -> Any:
    from google.protobuf.message import DecodeError

    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise InputError(f"a file holds no {kind.DESCRIPTOR.name}") from error


def _check_line(receipt: Receipt, path: Path) -> None:
    """TamperingError unless the log has the line that its party has named in the receipt."""
    from mpcinfer.trust import chain

    log = chain.read(path)
    kind, _, index = log.party.partition("/")
    if kind != "party" or not index.isdecimal():
        raise InputError(f"{path} is the log of {log.party}, which signs no receipts")
    log.check(log.party, [receipt.line(_within(int(index), receipt))], "the receipt")


@audit_app.command("verify")
def verify_log(
    log: LogPath,
    against: Annotated[list[Path] | None, typer.Option(help="Logs of other parties, to compare with.")] = None,
    as_json: Json = False,
) -> None:
    """Check that nothing in a log was changed, and (--against) that no line was, since other parties have seen it."""
    from mpcinfer.trust import chain

    found = chain.read(log)
    seen = sum(chain.compare(found, chain.read(other)) for other in against or ())
    if as_json:
        print_json(
            {"valid": True, "party": found.party, "lines": len(found.entries), "head": found.head.hash, "seen": seen}
        )
        return
    print(f"valid: {len(found.entries)} lines of {found.party}, the last one {found.head.hash}")
    if against:
        print(f"{seen} lines of these logs were seen by other parties, and are as they were")


@audit_app.command("show")
def show_log(log: LogPath, as_json: Json = False) -> None:
    """What is in a log, once it is checked."""
    from mpcinfer.trust import chain

    entries = chain.read(log).entries
    if as_json:
        print_json({"entries": entries})
        return
    rows = [
        [
            time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(e["time"])) if "time" in e else "",
            *(str(e.get(name, "")) for name in ("action", "outcome", "who", "model", "version", "request")),
        ]
        for e in entries
    ]
    print_table(["TIME (UTC)", "ACTION", "OUTCOME", "WHO", "MODEL", "VERSION", "REQUEST"], rows)
