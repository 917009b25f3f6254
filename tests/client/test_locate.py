"""Which cluster and whose key: what is found, and what is said when the choice is not clear."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpcinfer.client.locate import locate
from mpcinfer.errors import ConfigError, IdentityError
from tests.client.fakes import FakeCluster


@pytest.fixture(scope="module")
def cluster() -> FakeCluster:
    made = FakeCluster(2)
    made.close()
    return made


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPCINFER_IDENTITY", raising=False)


def test_the_only_pair_beside_the_cluster_file(cluster: FakeCluster, tmp_path: Path) -> None:
    path = cluster.write(tmp_path, "client/a", "party/0")
    for named in (path, str(path), tmp_path):
        found, identity = locate(named)
        assert found.digest() == cluster.cluster.digest() and identity.role == "client/a"


def test_each_side_takes_its_own_kind(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.write(tmp_path, "client/a", "owner/o")
    assert locate(tmp_path)[1].role == "client/a"
    assert locate(tmp_path, roles=("owner",))[1].role == "owner/o"


def test_an_owner_may_be_a_client_but_not_the_other_way_round(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.write(tmp_path, "owner/o")
    assert locate(tmp_path)[1].role == "owner/o"
    (tmp_path / "owner-o.key").unlink()
    cluster.write(tmp_path, "client/a")
    with pytest.raises(ConfigError, match="holds no owner-NAME.key"):
        locate(tmp_path, roles=("owner",))


@pytest.mark.parametrize("named", ["client/b", "client-b", "client-b.key", "client-b.pem"])
def test_a_name_beside_the_cluster_file(cluster: FakeCluster, tmp_path: Path, named: str) -> None:
    cluster.write(tmp_path, "client/a", "client/b")
    assert locate(tmp_path, named)[1].role == "client/b"


def test_a_path_elsewhere(cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.write(tmp_path)
    keys = tmp_path / "my.keys"
    keys.mkdir()
    cluster.write_pair(keys / "anything", cluster.issue("client/b"))
    cluster.write_pair(keys / "client-b", cluster.issue("client/b"))
    monkeypatch.chdir(keys)
    for named in (keys / "anything", keys / "anything.pem", "anything", keys, str(keys)):
        assert locate(tmp_path, named)[1].role == "client/b"


def test_the_variable_goes_before_the_default_and_the_argument_before_both(
    cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.write(tmp_path, "client/a", "owner/o", "owner/p")
    monkeypatch.setenv("MPCINFER_IDENTITY", str(tmp_path / "owner-o"))
    assert locate(tmp_path)[1].role == "owner/o"
    assert locate(tmp_path, "owner/p")[1].role == "owner/p"


def test_objects_are_taken_as_they_are(cluster: FakeCluster) -> None:
    who = cluster.issue("client/a")
    assert locate(cluster.cluster, who) == (cluster.cluster, who)
    with pytest.raises(ConfigError, match="whose key"):
        locate(cluster.cluster)


def test_what_is_not_clear_is_refused(cluster: FakeCluster, tmp_path: Path) -> None:
    path = cluster.write(tmp_path)
    with pytest.raises(ConfigError, match="holds no client-NAME.key.*identity=.*MPCINFER_IDENTITY"):
        locate(path)
    with pytest.raises(ConfigError, match="no identity 'client/x'"):
        locate(path, "client/x")
    cluster.write(tmp_path, "client/a", "client/b")
    with pytest.raises(ConfigError, match="several keys: client-a, client-b"):
        locate(path)
    with pytest.raises(ConfigError, match="cannot read"):
        locate(tmp_path / "missing.toml")


def test_an_identity_that_the_parties_would_refuse(cluster: FakeCluster, tmp_path: Path) -> None:
    path = cluster.write(tmp_path, "client/a")
    (tmp_path / "client-a.pem").write_bytes(cluster.issue("client/a").cert_pem)
    with pytest.raises(IdentityError, match="not the one"):
        locate(path)
    stranger = FakeCluster(2)
    stranger.close()
    with pytest.raises(IdentityError, match="not issued by the CA"):
        locate(path, stranger.issue("client/a"))
