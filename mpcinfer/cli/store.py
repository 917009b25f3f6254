"""`mpcinfer store`: what a party's operator does with its store while the party is stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpcinfer.cli.options import Json
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
