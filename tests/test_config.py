"""Cluster and node files: what they say, what is refused, and that the digest follows the content only."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpcinfer.config import Cluster, Endpoint, Limits, Node
from mpcinfer.config.reading import check_role, split_address
from mpcinfer.errors import ConfigError
from mpcinfer.wire.identity import create_ca

PINS = [f"sha256:{i:064x}" for i in range(4)]
CLUSTER = f"""
name = "local"
ca = "ca.pem"
[[party]]
address = "127.0.0.1:7100"
key = "{PINS[0]}"
[[party]]
address = "127.0.0.1:7101"
key = "{PINS[1]}"
[dealer]
address = "127.0.0.1:7109"
key = "{PINS[2]}"
"""
NODE = """
cluster = "cluster.toml"
role = "party/0"
key = "party-0.key"
certificate = "party-0.pem"
store = "party-0-store"
store_key = "party-0-store.key"
"""
CA_KEY, CA = create_ca("local")


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MPCINFER_LISTEN", "MPCINFER_STORE", "MPCINFER_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "ca.pem").write_bytes(CA)
    (tmp_path / "cluster.toml").write_text(CLUSTER)
    (tmp_path / "node.toml").write_text(NODE)
    return tmp_path


def load_cluster(directory: Path, text: str) -> Cluster:
    (directory / "cluster.toml").write_text(text)
    return Cluster.load(directory / "cluster.toml")


def load_node(directory: Path, text: str) -> Node:
    (directory / "node.toml").write_text(text)
    return Node.load(directory / "node.toml")


def test_cluster(directory: Path) -> None:
    cluster = Cluster.load(directory / "cluster.toml")
    assert (cluster.name, cluster.n, cluster.ca_pem) == ("local", 2, CA)
    assert cluster.parties[1] == cluster.endpoint("party/1") == Endpoint("party/1", "127.0.0.1:7101", PINS[1])
    assert cluster.endpoint("dealer").address == "127.0.0.1:7109"
    with pytest.raises(ConfigError, match="party/0 to party/1"):
        cluster.endpoint("party/2")


def test_digest_depends_on_content_not_on_layout(directory: Path) -> None:
    digest = Cluster.load(directory / "cluster.toml").digest()
    assert len(digest) == 32
    assert load_cluster(directory, "# a comment\n" + CLUSTER.replace(" = ", "=")).digest() == digest
    changed = [
        CLUSTER.replace("local", "other"),
        CLUSTER.replace("7101", "7102"),
        CLUSTER.replace(PINS[2], PINS[3]),
        CLUSTER.replace(PINS[0], "x").replace(PINS[1], PINS[0]).replace("x", PINS[1], 1),
    ]
    digests = {load_cluster(directory, text).digest() for text in changed}
    (directory / "ca.pem").write_bytes(create_ca("local")[1])
    digests.add(load_cluster(directory, CLUSTER).digest())
    assert len(digests | {digest}) == 6


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "local"', 'name = "local"\ntypo = 1', "unknown 'typo'"),
        ('name = "local"', 'name = "Not OK"', "cannot be a name"),
        ('name = "local"', "name = 3", "'name' must be of type str"),
        ('name = "local"', "", "'name' is missing"),
        ('name = "local"', "name =", "not valid TOML"),
        ('ca = "ca.pem"', 'ca = "none.pem"', "cannot read"),
        ("[dealer]", "[dealer]\nport = 1", "dealer: unknown 'port'"),
        ('address = "127.0.0.1:7101"', 'address = "127.0.0.1"', "not an address"),
        ('address = "127.0.0.1:7101"', 'address = "127.0.0.1:99999"', "not an address"),
        ('address = "127.0.0.1:7101"', 'address = "127.0.0.1:0"', "port 0"),
        ('address = "127.0.0.1:7101"', 'address = "127.0.0.1:7100"', "its own address"),
        ('address = "127.0.0.1:7109"', 'address = "127.0.0.1:7100"', "its own address"),
        (PINS[1], PINS[0], "its own key"),
        (PINS[2], PINS[0], "its own key"),
        (PINS[1], "sha256:12", "sha256:<64"),
        (f'[[party]]\naddress = "127.0.0.1:7101"\nkey = "{PINS[1]}"', "", "at least 2"),
        ("[[party]]\n", "[party]\n", "TOML"),
    ],
)
def test_wrong_cluster_files(directory: Path, old: str, new: str, message: str) -> None:
    assert old in CLUSTER
    with pytest.raises(ConfigError, match=message):
        load_cluster(directory, CLUSTER.replace(old, new))


WITNESS = f'''
[[witness]]
of = 1
address = "127.0.0.1:7111"
key = "{PINS[3]}"
'''


def test_witnesses(directory: Path) -> None:
    assert load_cluster(directory, CLUSTER).witnesses == ()
    cluster = load_cluster(directory, CLUSTER + WITNESS)
    assert [(e.role, e.index) for e in cluster.holders] == [("party/0", 0), ("party/1", 1), ("witness/1", 1)]
    assert cluster.endpoint("witness/1").key_pin == PINS[3]
    with pytest.raises(ConfigError, match="has no 'witness/0'; it has .* dealer, witness/1"):
        cluster.endpoint("witness/0")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("of = 1\n", "", "'of' is missing"),
        ("of = 1", "of = 2", "of one party each"),
        ("of = 1", "of = -1", "of one party each"),
        (PINS[3], PINS[1], "its own key"),
        ("7111", "7101", "its own address"),
        (WITNESS, WITNESS + WITNESS.replace("7111", "7112").replace(PINS[3], f"sha256:{9:064x}"), "of one party each"),
    ],
)
def test_wrong_witnesses(directory: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_cluster(directory, CLUSTER + WITNESS.replace(old, new))


def test_party_must_be_an_array_of_tables(directory: Path) -> None:
    with pytest.raises(ConfigError, match="expected a table"):
        load_cluster(
            directory, CLUSTER.split("[[party]]")[0] + "party = [1, 2]\n[dealer]" + CLUSTER.split("[dealer]")[1]
        )


@pytest.mark.parametrize(
    ("ca", "message"),
    [(CA + CA, "exactly one"), (b"nothing", "exactly one"), (CA + CA_KEY, "private key")],
)
def test_wrong_ca_files(directory: Path, ca: bytes, message: str) -> None:
    (directory / "ca.pem").write_bytes(ca)
    with pytest.raises(ConfigError, match=message) as caught:
        Cluster.load(directory / "cluster.toml")
    assert "BEGIN" not in str(caught.value)


def test_node_defaults_and_relative_paths(directory: Path) -> None:
    node = Node.load(directory / "node.toml")
    assert node.cluster == Cluster.load(directory / "cluster.toml")
    assert node.role == "party/0"
    assert node.listen == "127.0.0.1:7100"
    assert node.key_path == directory / "party-0.key"
    assert node.certificate_path == directory / "party-0.pem"
    assert node.store == directory / "party-0-store"
    assert node.store_key == directory / "party-0-store.key"
    assert node.limits == Limits()
    assert node.log_level == "info"


def test_dealer_node_and_limits(directory: Path) -> None:
    text = NODE.replace("party/0", "dealer").split("store =")[0]
    node = load_node(directory, text + 'listen = "[::]:0"\n[limits]\nstep_timeout_s = 3\nmax_message_mb = 8\n')
    assert (node.store, node.store_key, node.listen) == (None, None, "[::]:0")
    assert node.limits == Limits(step_timeout_s=3.0, max_message_mb=8)
    assert isinstance(node.limits.step_timeout_s, float)


@pytest.mark.parametrize(
    ("written", "address"),
    [
        ("", ""),
        ('metrics_listen = ""', ""),
        ("metrics_listen = 9464", "127.0.0.1:9464"),
        ('metrics_listen = "0.0.0.0:9464"', "0.0.0.0:9464"),
        ('metrics_listen = "[::1]:0"', "[::1]:0"),
    ],
)
def test_where_metrics_are_shown(directory: Path, written: str, address: str) -> None:
    """Nowhere unless asked for, and to this machine only unless an address says otherwise."""
    assert load_node(directory, f"{NODE}{written}\n").metrics_listen == address
    dealer = NODE.replace("party/0", "dealer").split("store =")[0]
    assert load_node(directory, f"{dealer}{written}\n").metrics_listen == address


def test_environment_overrides_the_node_file(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPCINFER_LISTEN", "0.0.0.0:9")
    monkeypatch.setenv("MPCINFER_STORE", "/elsewhere")
    monkeypatch.setenv("MPCINFER_LOG_LEVEL", "DEBUG")
    node = Node.load(directory / "node.toml")
    assert (node.listen, node.store, node.log_level) == ("0.0.0.0:9", Path("/elsewhere"), "debug")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("party/0", "party/2", "has no 'party/2'"),
        ("party/0", "owner/x", "has no 'owner/x'"),
        ("party/0", "dealer", "keeps nothing at rest"),
        ('store = "party-0-store"', "", "needs store"),
        ('store_key = "party-0-store.key"', "", "needs store"),
        ('store_key = "party-0-store.key"', 'store_key = "party-0-store/key"', "inside store"),
        ('role = "party/0"', 'role = "party/0"\nlisten = "7100"', "not an address"),
        ('role = "party/0"', 'role = "party/0"\nmetrics_listen = "9464"', "not an address"),
        ('role = "party/0"', 'role = "party/0"\nmetrics_listen = "http://127.0.0.1:9464"', "not an address"),
        ('role = "party/0"', 'role = "party/0"\nmetrics_listen = 65536', "not an address"),
        ('role = "party/0"', 'role = "party/0"\nmetrics_listen = -1', "not an address"),
        (
            'role = "party/0"',
            'role = "party/0"\nmetrics_listen = true',
            "'metrics_listen' must be of type str, not bool",
        ),
        ('role = "party/0"', 'role = "party/0"\nlog_level = "loud"', "debug, info"),
        ('role = "party/0"', 'role = "party/0"\nlimits = {max_message_mb = 4096}', "at most 2047"),
        ('role = "party/0"', 'role = "party/0"\nlimits = {max_message_mb = true}', "type int, not bool"),
        ('role = "party/0"', 'role = "party/0"\nlimits = {max_message_mb = 0}', "positive"),
        ('role = "party/0"', 'role = "party/0"\nlimits = {step_timeout_s = nan}', "positive and finite"),
        ('role = "party/0"', 'role = "party/0"\nlimits = {speed = 1}', "limits: unknown 'speed'"),
        ('role = "party/0"', 'role = "party/0"\npeer_port = 65536', "peer_port is 65536"),
        ('role = "party/0"', 'role = "party/0"\npeer_advertised_port = -1', "peer_advertised_port is -1"),
        ('role = "party/0"', 'role = "party/0"\nrolle = 1', "unknown 'rolle'"),
    ],
)
def test_wrong_node_files(directory: Path, old: str, new: str, message: str) -> None:
    assert old in NODE
    with pytest.raises(ConfigError, match=message):
        load_node(directory, NODE.replace(old, new))


def test_roles_and_addresses() -> None:
    for role in ("party/0", "party/12", "dealer", "owner/a", "client/hospital-7"):
        assert check_role(role) == role
    for role in ("party/01", "party/-1", "party/", "Dealer", "owner/", "owner/a/b", "client/A", "client/a\n", "admin"):
        with pytest.raises(ConfigError, match="is not a role"):
            check_role(role)
    assert split_address("[::1]:80") == ("::1", 80)
    assert split_address("party-0.example.org:0") == ("party-0.example.org", 0)
    for address in ("host", "host:", ":1", "host:1:2", "host:-1", "ho st:1", "host:65536"):
        with pytest.raises(ConfigError, match="is not an address"):
            split_address(address)
