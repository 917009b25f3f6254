"""Which cluster file and which key: what a user names when connecting, found on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mpcinfer.client.certs import file_stem
from mpcinfer.config import Cluster
from mpcinfer.errors import ConfigError
from mpcinfer.wire.identity import Identity

AnyPath = str | os.PathLike[str]

IDENTITY_VARIABLE = "MPCINFER_IDENTITY"


def locate(
    cluster: AnyPath | Cluster,
    identity: AnyPath | Identity | None = None,
    *,
    roles: Sequence[str] = ("client", "owner"),
) -> tuple[Cluster, Identity]:
    """The cluster and the identity to connect with.

    cluster: the path of a cluster file, of a directory that holds `cluster.toml`, or a Cluster.
    identity: "client/NAME", the path of a key pair (`dir/client-NAME`, with or without .key or .pem; also relative to
    the cluster file), a directory with one pair in it, or an Identity. By default the environment variable
    MPCINFER_IDENTITY, else the only `client-*` or `owner-*` pair beside the cluster file, the first of `roles` that
    has any. ConfigError if there is none or the choice is not clear; IdentityError if the pair cannot be used.
    """
    if isinstance(cluster, Cluster):
        loaded, beside = cluster, None
    else:
        path = cluster_file(cluster)
        loaded, beside = Cluster.load(path), path.parent
    if identity is None:
        identity = os.environ.get(IDENTITY_VARIABLE) or None
    if not isinstance(identity, Identity):
        stem = _only_pair(beside, roles) if identity is None else _named_pair(Path(identity), beside, roles)
        # By hand, because Path.with_suffix takes a dot in the name for a suffix.
        identity = Identity.load(f"{stem}.key", f"{stem}.pem")
    identity.check(loaded)
    return loaded, identity


def cluster_file(path: AnyPath) -> Path:
    """The cluster file that `path` means: itself, or `cluster.toml` in it if it is a directory."""
    return Path(path, "cluster.toml") if Path(path).is_dir() else Path(path)


def _named_pair(named: Path, beside: Path | None, roles: Sequence[str]) -> Path:
    """The path without suffix of the pair a user named."""
    places = [named] if beside is None else [named, beside / named]
    for place in places:
        if place.is_dir():
            return _only_pair(place, roles)
    text = named.as_posix()
    name = text.removesuffix(named.suffix) if named.suffix in (".key", ".pem") else text
    stems = [Path(name)] if beside is None else [Path(name), beside / name]
    if name.count("/") == 1 and name.startswith(("client/", "owner/")) and beside is not None:
        stems.append(beside / file_stem(name))
    for stem in stems:
        if Path(f"{stem}.key").exists():
            return stem
    raise ConfigError(
        f"no identity {text!r}: looked for {' and '.join(f'{stem}.key' for stem in stems)}; "
        "name a key made by `mpcinfer certs request`, or the directory it is in"
    )


def _only_pair(directory: Path | None, roles: Sequence[str]) -> Path:
    """The path without suffix of the only pair in a directory that belongs to the first role that has any."""
    remedy = f"name one with identity= (or --identity), or in {IDENTITY_VARIABLE}"
    if directory is None:
        raise ConfigError(f"whose key to connect with is not clear; {remedy}")
    for role in roles:
        stems = [key.parent / key.stem for key in sorted(directory.glob(f"{role}-*.key"))]
        stems = [stem for stem in stems if Path(f"{stem}.pem").exists()]
        if len(stems) > 1:
            raise ConfigError(f"{directory} holds several keys: {', '.join(stem.name for stem in stems)}; {remedy}")
        if stems:
            return stems[0]
    kinds = " or ".join(f"{role}-NAME.key with {role}-NAME.pem" for role in roles)
    raise ConfigError(f"{directory} holds no {kinds}; {remedy}")
