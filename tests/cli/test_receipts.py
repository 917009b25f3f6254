"""Receipts and audit logs from the shell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpcinfer.party.audit import NAME, Audit
from mpcinfer.trust.chain import Head
from mpcinfer.wire.v1 import party_pb2
from tests.cli.conftest import Shell
from tests.client.fakes import FakeCluster, running

ROWS = np.ones((2, 3), dtype=np.float32)


@pytest.fixture
def inferred(shell: Shell, world: FakeCluster) -> FakeCluster:
    """One inference, with its receipt and its salts in receipt.json, and the messages that went."""
    np.save("x.npy", ROWS)
    done = shell("infer", "same", "x.npy", "--receipt", "receipt.json", "--receipt-salts", "--identity", "client/a")
    assert done.code == 0, done.err
    for party in world.parties:
        Path(f"request-{party.index}").write_bytes(party.inferences[-1].SerializeToString())
        outputs = world._answers[party.inferences[-1].request_id][party.index]
        Path(f"response-{party.index}").write_bytes(party_pb2.InferResponse(outputs=outputs).SerializeToString())
    return world


def test_a_receipt_is_verified(inferred: FakeCluster, shell: Shell) -> None:
    done = shell("verify-receipt", "receipt.json")
    assert done.code == 0 and done.out.startswith("valid: signed by all 2 parties\n") and "client/a" in done.out
    said = shell("verify-receipt", "receipt.json", "--json").json
    assert said["valid"] and said["model"] == "same" and len(said["parties"]) == 2
    Path("receipt.json").write_bytes(Path("receipt.json").read_bytes().replace(b'"version', b'"Version', 1))
    assert shell("verify-receipt", "receipt.json").code == 1
    assert shell("verify-receipt", "none.json").code == 2


def test_and_which_shares_it_is_about(inferred: FakeCluster, shell: Shell) -> None:
    given = [f"--{what}={i}:{what}-{i}" for what in ("request", "response") for i in range(2)]
    assert shell("verify-receipt", "receipt.json", *given).code == 0
    swapped = shell("verify-receipt", "receipt.json", "--request", "0:request-1")
    assert swapped.code == 1 and "other shares of the request" in swapped.err
    swapped = shell("verify-receipt", "receipt.json", "--response", "0:response-1")
    assert swapped.code == 1 and "other shares of the answer" in swapped.err
    for wrong in ("request-0", "x:request-0", "0:none", "9:request-0", "0:x.npy"):
        assert shell("verify-receipt", "receipt.json", "--request", wrong).code == 2
    np.save("x.npy", ROWS)
    shell("infer", "same", "x.npy", "--receipt", "bare.json", "--identity", "client/a")
    assert "salts" not in Path("bare.json").read_text()
    bare = shell("verify-receipt", "bare.json", "--request", "0:request-0")
    assert bare.code == 1 and "without its salts" in bare.err


def test_a_receipt_outlives_the_keys_it_was_signed_with(inferred: FakeCluster, shell: Shell, tmp_path: Path) -> None:
    who = ("--identity", "client/a")
    assert shell("pin", *who).code == 0
    shell("infer", "same", "x.npy", "--receipt", "old.json", *who)
    for other in running(2):  # other keys everywhere, under another CA
        for file in ("client-a.key", "client-a.pem"):
            Path(file).unlink()
        other.write(tmp_path, "client/a")
        kept = shell("verify-receipt", "old.json")  # as it is pinned; the cluster file is another already
        assert kept.code == 0 and kept.out.startswith("valid: signed by all 2 parties\n")
        pinned = Path("manifest.pin").read_bytes()
        assert shell("pin", *who).code == 0
        again = shell("verify-receipt", "old.json")
        assert again.code == 0 and "parties as they were pinned until 20" in again.out
        assert shell("verify-receipt", "old.json", "--json").json["pinned_until"] > 1.7e9
        # who has pinned these parties alone has never accepted the others' keys
        Path("manifest.pin").unlink()
        assert shell("pin", *who).code == 0
        refused = shell("verify-receipt", "old.json")
        assert refused.code == 1 and "was not issued by the CA" in refused.err
        Path("manifest.pin").write_bytes(pinned)
        assert shell("verify-receipt", "old.json").code == 0


def logs(directory: Path) -> tuple[Path, Path]:
    """Those of two parties, the second of which has seen the first one's."""
    made = []
    heads: dict[str, Head] = {}
    for role in ("party/0", "party/1"):
        where = directory / role.replace("/", "-")
        where.mkdir()
        log = Audit(where, role, bytes(32))
        log.write("infer", outcome="ok", who="client/a", model="m", version=1, request="ab" * 16)
        log.met("epoch", dict(heads))
        heads[role] = log.head
        log.close()
        made.append(where / NAME)
    return made[0], made[1]


def test_a_log_is_shown_and_verified(shell: Shell, tmp_path: Path) -> None:
    first, second = logs(tmp_path)
    done = shell("audit", "verify", first, "--against", second)
    assert done.code == 0 and "3 lines of party/0" in done.out and "1 lines of these logs" in done.out
    assert shell("audit", "verify", first, "--against", second, "--json").json["seen"] == 1
    shown = shell("audit", "show", first).out.splitlines()
    assert shown[0].split()[0] == "TIME" and "client/a" in shown[2] and len(shown) == 4
    assert len(shell("audit", "show", first, "--json").json["entries"]) == 3


def test_a_log_that_was_changed_is_not(shell: Shell, tmp_path: Path) -> None:
    first, second = logs(tmp_path)
    whole = first.read_bytes()
    first.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    done = shell("audit", "verify", first, "--against", second)
    assert done.code == 1 and "was rewritten" in done.err
    assert shell("audit", "verify", first).code == 0  # by itself it is a log
    first.write_bytes(whole.replace(b"client/a", b"client/b"))
    assert shell("audit", "verify", first).code == shell("audit", "show", first).code == 1


def test_a_receipt_names_the_line_of_a_log(inferred: FakeCluster, shell: Shell, tmp_path: Path) -> None:
    first, _ = logs(tmp_path)  # another log, which has no such line
    done = shell("verify-receipt", "receipt.json", "--log", first)
    assert done.code == 1 and "which the receipt has seen" in done.err
