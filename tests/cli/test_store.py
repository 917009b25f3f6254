"""`mpcinfer store`: only while the party is stopped."""

from __future__ import annotations

from pathlib import Path

from mpcinfer.party.store import Store
from tests.cli.conftest import Shell
from tests.test_config import CA, CLUSTER, NODE


def test_a_key_is_replaced_while_the_party_is_stopped(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(CA)
    (tmp_path / "cluster.toml").write_text(CLUSTER)
    node, key = tmp_path / "node.toml", tmp_path / "party-0-store.key"
    node.write_text(NODE)
    assert "is missing: restore it" in shell("store", "rotate-key", node).err
    with Store.open(tmp_path / "party-0-store", key):
        running = shell("store", "rotate-key", node)
    assert running.code == 1 and "in use by another process" in running.err
    before = key.read_text()
    done = shell("store", "rotate-key", node)
    assert done.code == 0 and done.out == f"0 deployments under the new key in {key}\n"
    assert shell("store", "rotate-key", node, "--json").json == {"deployments": 0, "store_key": str(key)}
    assert before not in (done.out, key.read_text())
    node.write_text(NODE.replace("party/0", "dealer").split("store =")[0])
    assert "keeps nothing at rest" in shell("store", "rotate-key", node).err
