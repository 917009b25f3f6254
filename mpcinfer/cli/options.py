"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
