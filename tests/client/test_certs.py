"""Certificates as files: the operator's way from a CA to a cluster file."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mpcinfer.client import certs
from mpcinfer.config import Cluster
from mpcinfer.errors import ConfigError, ConflictError, IdentityError
from mpcinfer.wire.identity import Identity, key_pin


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A CA in ca/ and, in hosts/, what every member of a two-party cluster made for itself."""
    certs.init_ca(tmp_path / "ca", "local")
    for role in ("party/0", "party/1", "dealer"):
        certs.request(tmp_path / "hosts", "local", role)
    return tmp_path


def write(home: Path, path: Path, name: str = "local", order: tuple[int, int] = (0, 1), port: int = 7101) -> Path:
    return certs.write_cluster_file(
        path,
        name,
        home / "ca" / "ca.pem",
        parties=[
            ("127.0.0.1:7100", home / f"hosts/party-{order[0]}.csr"),
            (f"127.0.0.1:{port}", home / f"hosts/party-{order[1]}.csr"),
        ],
        dealer=("127.0.0.1:7109", home / "hosts/dealer.csr"),
    )


def test_from_ca_to_cluster(home: Path) -> None:
    cluster = Cluster.load(write(home, home / "cluster.toml"))
    for role in ("party/0", "party/1", "dealer"):
        stem = home / "hosts" / certs.file_stem(role)
        out = certs.sign(home / "ca", stem.with_suffix(".csr"), role, stem.with_suffix(".pem"))
        Identity.load(stem.with_suffix(".key"), out).check(cluster)
        assert cluster.endpoint(role).key_pin == key_pin(out.read_bytes())
    assert 'ca = "ca/ca.pem"' in (home / "cluster.toml").read_text()


def test_a_certificate_serves_as_well_as_a_request(home: Path) -> None:
    certs.sign(home / "ca", home / "hosts/dealer.csr", "dealer", home / "hosts/dealer.pem")
    from_csr = Cluster.load(write(home, home / "one.toml"))
    (home / "hosts/dealer.csr").write_bytes((home / "hosts/dealer.pem").read_bytes())
    assert Cluster.load(write(home, home / "two.toml")) == from_csr


def test_keys_are_closed_to_others_whatever_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        paths = [certs.init_ca(tmp_path, "local"), certs.request(tmp_path, "local", "owner/alice")]
    finally:
        os.umask(previous)
    for key, public in paths:
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert b"PRIVATE KEY" not in public.read_bytes()
    assert paths[1] == (tmp_path / "owner-alice.key", tmp_path / "owner-alice.csr")


def test_nothing_is_overwritten(home: Path) -> None:
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    with pytest.raises(ConflictError, match="ca.key exists already"):
        certs.init_ca(home / "ca", "local")
    with pytest.raises(ConflictError, match="dealer.key exists already"):
        certs.request(home / "hosts", "local", "dealer")
    with pytest.raises(ConflictError, match="ca.pem exists already"):
        certs.sign(home / "ca", home / "hosts/dealer.csr", "dealer", home / "ca/ca.pem")
    with pytest.raises(ConflictError, match="dealer.csr exists already"):
        write(home, home / "hosts/dealer.csr")
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == before


def test_a_half_present_pair_is_not_completed_with_another_key(home: Path) -> None:
    (home / "hosts/dealer.key").unlink()
    with pytest.raises(ConflictError, match="dealer.csr exists already"):
        certs.request(home / "hosts", "local", "dealer")
    assert not (home / "hosts/dealer.key").exists()


def test_refused_signatures_leave_no_file(home: Path) -> None:
    out = home / "out.pem"
    with pytest.raises(IdentityError, match="asks for"):
        certs.sign(home / "ca", home / "hosts/dealer.csr", "party/0", out)
    with pytest.raises(ConfigError, match="not a role"):
        certs.sign(home / "ca", home / "hosts/dealer.csr", "root", out)
    with pytest.raises(ConfigError, match="cannot read .*none.csr"):
        certs.sign(home / "ca", home / "none.csr", "dealer", out)
    with pytest.raises(ConfigError, match="not a role"):
        certs.request(home, "local", "../evil")
    assert not out.exists()


def test_refused_cluster_files_are_not_written(home: Path) -> None:
    path = home / "cluster.toml"
    with pytest.raises(IdentityError, match="is of party/1 in cluster 'local', not of party/0"):
        write(home, path, order=(1, 0))
    with pytest.raises(IdentityError, match="in 'elsewhere'"):
        write(home, path, name="elsewhere")
    with pytest.raises(ConfigError, match="its own address"):
        write(home, path, port=7100)
    with pytest.raises(ConfigError, match="private key"):
        certs.write_cluster_file(
            path,
            "local",
            home / "ca" / "ca.key",
            parties=[("127.0.0.1:1", home / "hosts/party-0.csr"), ("127.0.0.1:2", home / "hosts/party-1.csr")],
            dealer=("127.0.0.1:3", home / "hosts/dealer.csr"),
        )
    assert not path.exists()


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write"):
        certs.init_ca(tmp_path / "file" / "ca", "local")


def test_witnesses_are_pinned_like_parties(home: Path) -> None:
    _, request = certs.request(home / "hosts", "local", "witness/1")
    path = certs.write_cluster_file(
        home / "watched.toml",
        "local",
        home / "ca" / "ca.pem",
        parties=[(f"127.0.0.1:{7100 + i}", home / f"hosts/party-{i}.csr") for i in range(2)],
        dealer=("127.0.0.1:7109", home / "hosts/dealer.csr"),
        witnesses={1: ("127.0.0.1:7111", request)},
    )
    cluster = Cluster.load(path)
    assert [e.role for e in cluster.holders] == ["party/0", "party/1", "witness/1"]
    assert cluster.witness(0) is None and cluster.witness(1) == cluster.witnesses[0]
    assert cluster.witnesses[0].key_pin == key_pin(request.read_bytes())
    assert cluster.digest() != Cluster(cluster.name, cluster.ca_pem, cluster.parties, cluster.dealer).digest()
