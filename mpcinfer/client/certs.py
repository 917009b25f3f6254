"""Certificates as files: make a CA, request a certificate, sign it, write the cluster file.

Files are never overwritten and keys are readable by their owner only. Next to each other lie, for "party/0",
`party-0.key` (stays on its host), `party-0.csr` (goes to the CA) and `party-0.pem` (comes back).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from mpcinfer.config import Cluster, Endpoint
from mpcinfer.config.reading import check_role
from mpcinfer.errors import ConfigError, ConflictError, IdentityError
from mpcinfer.wire.identity import claimed_role, create_ca, create_request, key_pin, sign_request

AnyPath = str | os.PathLike[str]


def file_stem(role: str) -> str:
    """The name, without suffix, of the files of `role`: "party-0" for "party/0"."""
    return check_role(role).replace("/", "-")


def init_ca(directory: AnyPath, cluster_name: str, *, days: int = 3650) -> tuple[Path, Path]:
    """Make a CA for a cluster: (path of ca.key, path of ca.pem). ConflictError if there is one already."""
    key_path, cert_path = Path(directory, "ca.key"), Path(directory, "ca.pem")
    _refuse_existing(key_path, cert_path)
    key, certificate = create_ca(cluster_name, days)
    _write_new(key_path, key, secret=True)
    _write_new(cert_path, certificate)
    return key_path, cert_path


def request(directory: AnyPath, cluster_name: str, role: str) -> tuple[Path, Path]:
    """Make a key for `role` and the request to send to the CA: (key path, csr path)."""
    key_path, csr_path = (Path(directory, f"{file_stem(role)}{suffix}") for suffix in (".key", ".csr"))
    _refuse_existing(key_path, csr_path)
    key, csr = create_request(cluster_name, role)
    _write_new(key_path, key, secret=True)
    _write_new(csr_path, csr)
    return key_path, csr_path


def sign(ca_directory: AnyPath, csr_path: AnyPath, role: str, out: AnyPath, *, days: int = 365) -> Path:
    """Sign the request in `csr_path` as `role` with the CA in `ca_directory`: the path `out` of the certificate.

    IdentityError if the request asks for another role or another cluster; ConflictError if `out` exists.
    """
    ca, target = Path(ca_directory), Path(out)
    _refuse_existing(target)
    certificate = sign_request(
        _read(ca / "ca.key"), _read(ca / "ca.pem"), _read(Path(csr_path)), role=check_role(role), days=days
    )
    _write_new(target, certificate)
    return target


def write_cluster_file(
    path: AnyPath,
    name: str,
    ca_path: AnyPath,
    *,
    parties: Sequence[tuple[str, AnyPath]],
    dealer: tuple[str, AnyPath],
    witnesses: Mapping[int, tuple[str, AnyPath]] = MappingProxyType({}),
) -> Path:
    """Write the cluster file that pins everybody's key.

    `parties`, in order, `dealer` and `witnesses`, by the party that they are of, are pairs (address "host:port", path
    of the certificate or request). The CA's
    certificate is referred to by its path relative to the cluster file. IdentityError if a file is not of the role it
    is given for, ConfigError if the cluster would be invalid (fewer than 2 parties, a key or address used twice).
    """
    target = Path(path)
    _refuse_existing(target)
    # A Cluster checks itself, so that nothing invalid is ever written.
    cluster = Cluster(
        name=name,
        ca_pem=_read(Path(ca_path)),
        parties=tuple(_endpoint(name, f"party/{i}", *entry) for i, entry in enumerate(parties)),
        dealer=_endpoint(name, "dealer", *dealer),
        witnesses=tuple(_endpoint(name, f"witness/{i}", *entry) for i, entry in sorted(witnesses.items())),
    )
    ca = Path(os.path.relpath(ca_path, target.parent)).as_posix()
    lines = [f"name = {_quote(name)}", f"ca = {_quote(ca)}"]
    for endpoint in cluster.members:
        kind = endpoint.role.partition("/")[0]
        lines += ["", "[dealer]" if kind == "dealer" else f"[[{kind}]]"]
        lines += [f"of = {endpoint.index}"] if kind == "witness" else []
        lines += [f"address = {_quote(endpoint.address)}", f"key = {_quote(endpoint.key_pin)}"]
    _write_new(target, "\n".join([*lines, ""]).encode())
    return target


def _endpoint(cluster_name: str, role: str, address: str, path: AnyPath) -> Endpoint:
    pem = _read(Path(path))
    if claimed_role(pem) != (cluster_name, role):
        cluster, claimed = claimed_role(pem)
        raise IdentityError(f"{path} is of {claimed} in cluster {cluster!r}, not of {role} in {cluster_name!r}")
    return Endpoint(role, address, key_pin(pem))


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a JSON string without control characters is a TOML string


def _refuse_existing(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            raise ConflictError(f"{path} exists already and is not overwritten; move it away or use another directory")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _write_new(path: Path, content: bytes, *, secret: bool = False) -> None:
    """Create a file with exactly this content; a secret one is closed to others from its first moment."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    except FileExistsError:
        raise ConflictError(f"{path} exists already and is not overwritten") from None
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
