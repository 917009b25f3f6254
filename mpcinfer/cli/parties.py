"""`mpcinfer status` and `mpcinfer pin`: who the parties are, how they are doing, and holding them to it."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpcinfer.cli.options import CLUSTER, ClusterPath, IdentityPath, Json
from mpcinfer.cli.output import print_json, print_table

if TYPE_CHECKING:
    from mpcinfer.trust.manifest import Manifest

_SHORT = 12
_NOT_PINNED = (
    "NOT PINNED: nothing holds the parties to who they are and what they run today. Compare operators and code digests "
    "with what the operators say, then run `mpcinfer pin`"
)


def status(
    timeout: Annotated[float, typer.Option(help="Seconds to wait for each party.")] = 5.0,
    cluster: ClusterPath = CLUSTER,
    identity: IdentityPath = None,
    as_json: Json = False,
) -> None:
    """How each party is doing, who operates it, and what it shows for its code. Exit code 1 if one is not ready."""
    from mpcinfer.client.locate import locate
    from mpcinfer.client.manifest import Demands
    from mpcinfer.client.status import cluster_status

    demands = Demands.find(cluster)
    found = cluster_status(*locate(cluster, identity), timeout=timeout, demands=demands)
    ready, pinned = all(party.state == "ready" for party in found), demands.pin is not None
    if as_json:
        print_json({"ready": ready, "pinned": pinned, "parties": [asdict(party) for party in found]})
    else:
        rows = [
            [
                *(p.role, p.address, p.state, str(len(p.models)), str(p.requests_done), str(p.requests_failed)),
                *(str(p.runs_ready), p.operator or "(not said)", p.code[:_SHORT] or "(not said)", p.evidence, p.detail),
            ]
            for p in found
        ]
        head = ["PARTY", "ADDRESS", "STATE", "MODELS", "DONE", "FAILED", "READY"]
        print_table([*head, "OPERATOR", "CODE", "EVIDENCE", "DETAIL"], rows)
        if not pinned:
            print(_NOT_PINNED, file=sys.stderr)
    if not ready:
        raise typer.Exit(1)


def pin(
    check: Annotated[bool, typer.Option("--check", help="Write nothing: exit code 1 if the parties differ.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="The pin file (default: MPCINFER_PIN, else manifest.pin beside the cluster file)."),
    ] = None,
    cluster: ClusterPath = CLUSTER,
    identity: IdentityPath = None,
    as_json: Json = False,
) -> None:
    """Show who the parties are and what they run, and hold them to it from now on. Who was pinned before is kept for
    old receipts.

    Connections made with this cluster file then refuse, before anything is sent, parties of which any of it changes.
    """
    from mpcinfer.client.cluster import Connection
    from mpcinfer.client.locate import locate
    from mpcinfer.client.manifest import Demands, pin_file
    from mpcinfer.trust.pin import Pin

    file = out or pin_file(cluster)
    before = Pin.load(file) if check or file.exists() else None
    demands = Demands.unpinned() if not check else replace(Demands.unpinned(), pin=before)
    with Connection(*locate(cluster, identity), demands=demands) as connection:
        manifest = connection.manifest
    found = Pin(manifest.members).after(before, time.time())
    changed = before.changes(found) if before is not None else []
    if not check:
        found.save(file)
    if as_json:
        parties = [{**m.facts.to_json(), "measured": dict(m.measured or {})} for m in manifest.members]
        print_json({"file": str(file), "manifest": manifest.digest.hex(), "changed": changed, "parties": parties})
        return
    _show(manifest)
    for change in changed:
        print(f"changed: {change}")
    print(f"as pinned in {file}" if check else f"pinned in {file}")


def _show(manifest: Manifest) -> None:
    """Everything that is pinned, and what of it is not proven."""
    rows = [
        [f.role, f.operator or "(not said)", f.package, f.code or "(not said)", f.signing_key[:_SHORT], f.evidence]
        for f in (member.facts for member in manifest.members)
    ]
    print_table(["PARTY", "OPERATOR", "PACKAGE", "CODE", "SIGNING KEY", "EVIDENCE"], rows)
    for member in manifest.members:
        print(f"{member.facts.role} shows {member.evidence}")
        for name, value in (member.measured or {}).items():
            print(f"  {name} {value}")
    print(f"manifest {manifest.digest.hex()}")
