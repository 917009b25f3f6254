"""Stored shares: `mpcinfer refresh` makes them anew, `mpcinfer store rotate-key` what one party encrypts them with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpcinfer.cli.options import CLUSTER, ClusterPath, IdentityPath, Json, ModelVersion
from mpcinfer.cli.output import print_json
from mpcinfer.config import Node
from mpcinfer.errors import ConfigError

store_app = typer.Typer(help="A party's stored shares.", no_args_is_help=True)


@store_app.callback()
def _store() -> None:
    pass


@store_app.command("rotate-key")
def rotate_key(
    config: Annotated[Path, typer.Argument(metavar="NODE.toml", help="The node's TOML file.")],
    as_json: Json = False,
) -> None:
    """Encrypt all stored shares anew under a fresh key, which replaces the one in the party's key file."""
    from mpcinfer.party.store import Store

    node = Node.load(config)
    if node.store is None or node.store_key is None:
        raise ConfigError(f"{config} is for {node.role}, which keeps nothing at rest")
    count = Store.rotate_key(node.store, node.store_key)
    if as_json:
        print_json({"deployments": count, "store_key": str(node.store_key)})
    else:
        print(f"{count} deployment{'' if count == 1 else 's'} under the new key in {node.store_key}")


def refresh(
    name: Annotated[str, typer.Argument(help="The model; for a party's operator maybe OWNER/NAME.")],
    version: ModelVersion = 0,
    timeout: Annotated[float, typer.Option(help="Seconds.")] = 1800.0,
    cluster: ClusterPath = CLUSTER,
    identity: IdentityPath = None,
    as_json: Json = False,
) -> None:
    """Have the parties make their shares of a model anew. Its owner may ask for it, and each party with its own key."""
    from mpcinfer.client.owner import ModelOwner

    with ModelOwner.connect(cluster, identity) as asking:
        count, parties = asking.refresh(name, version, timeout=timeout), asking.parties
    if as_json:
        print_json({"refreshed": count, "confirmed_by": parties})
    else:
        print(f"refreshed {count} version{'' if count == 1 else 's'} of {name}, confirmed by all {parties} parties")
