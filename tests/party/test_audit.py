"""A party's audit log: what is in it, and what becomes of it when the machine fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpcinfer.errors import BudgetError, StoreError, TamperingError
from mpcinfer.party.audit import NAME, Audit
from mpcinfer.trust.chain import Head, Log, compare, read
from mpcinfer.wire.v1 import party_pb2
from tests.inprocess import Caller, InProcess, kinds, mlp, random_weights, wait_for

PROGRAM = mlp()
WEIGHTS = random_weights(PROGRAM)
X = torch.linspace(-2, 2, 12).reshape(3, 4)


def opened(directory: Path) -> Audit:
    return Audit(directory, "party/0", b"\1" * 32)


def actions(path: Path) -> list[str]:
    return [entry["action"] for entry in read(path).entries]


# --- the file --------------------------------------------------------------------------------------------------------


def test_it_is_continued_where_it_ended(tmp_path: Path) -> None:
    for _ in range(2):
        log = opened(tmp_path)
        head = log.write("infer", who="client/bob", rounds=3)
        log.close()
        log.close()
    found = read(tmp_path / NAME)
    assert actions(tmp_path / NAME) == ["begin", "infer", "infer"] and found.head == head == Head(2, head.hash)
    assert found.party == "party/0" and (tmp_path / NAME).stat().st_mode & 0o777 == 0o600
    with pytest.raises(StoreError, match="stopping"):
        log.write("late")


@pytest.mark.parametrize("left", [0, 1, 20], ids="{} bytes".format)
def test_what_is_left_of_a_torn_line_is_removed_and_that_is_written_down(tmp_path: Path, left: int) -> None:
    log = opened(tmp_path)
    log.write("infer")
    log.close()
    whole = (tmp_path / NAME).read_bytes()
    torn = whole.splitlines(keepends=True)[-1][: left or 1]
    (tmp_path / NAME).write_bytes((whole if left else b"") + torn)
    with pytest.raises(StoreError):
        read(tmp_path / NAME)  # whoever looks at it before sees that it is torn
    again = opened(tmp_path)
    again.close()
    assert actions(tmp_path / NAME) == (["begin", "infer", "repair"] if left else ["begin", "repair"])
    assert read(tmp_path / NAME).entries[-1]["bytes"] == len(torn)


def test_a_last_line_that_was_changed_stops_the_party(tmp_path: Path) -> None:
    log = opened(tmp_path)
    log.write("infer", rounds=3)
    log.close()
    data = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(data.replace(b'"rounds":3', b'"rounds":4'))
    with pytest.raises(StoreError, match="damaged or was changed"):
        opened(tmp_path)


def test_what_cannot_be_written_is_not_done_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = opened(tmp_path)
    real = os.write

    def full(file: int, data: bytes) -> int:
        return real(file, data[:10])

    def failing(file: int, data: bytes) -> int:
        real(file, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    for fault in (full, failing):
        monkeypatch.setattr(os, "write", fault)
        with pytest.raises(StoreError, match="cannot be written"):
            log.write("infer")
        monkeypatch.undo()
    log.write("infer")
    log.close()
    assert actions(tmp_path / NAME) == ["begin", "infer"]


def test_what_cannot_be_brought_to_the_disk_is_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = opened(tmp_path)

    def failing(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", failing)
        log.write("infer")
        log._sync.join(20)
    assert not log._sync.is_alive()
    with pytest.raises(StoreError, match="brought to the disk, Input/output error.*restart"):
        log.write("infer")
    log.close()


def test_a_refusal_says_what_kind_of_error_and_nothing_of_what_the_caller_wrote(tmp_path: Path) -> None:
    log = opened(tmp_path)
    request = SimpleNamespace(model="m", request_id=b"\2" * 16)
    log.refused("infer", "client/bob", request, BudgetError("secret"))
    log.refused(
        "infer", "client/bob", SimpleNamespace(model="a prompt, by mistake", request_id=b"x" * 999), KeyError("s")
    )
    log.close()
    first, second = read(tmp_path / NAME).entries[1:]
    assert (first["outcome"], first["model"], first["request"]) == ("BudgetError", "m", "02" * 16)
    assert second["outcome"] == "failure" and "model" not in second and len(second["request"]) == 32
    assert "secret" not in (tmp_path / NAME).read_text() and "prompt" not in (tmp_path / NAME).read_text()


# --- a cluster's -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[InProcess]:
    with InProcess(tmp_path, 2) as running:
        yield running


def logs(cluster: InProcess) -> list[Log]:
    return [read(cluster.keys.path(f"party/{i}", "store") / NAME) for i in range(cluster.n)]


def told(log: Log) -> list[dict[str, Any]]:
    """What is in it about requests."""
    return [e for e in log.entries if e["action"] not in ("begin", "start", "stop", "epoch", "logs", "repair")]


def test_requests_refusals_and_changes_are_in_it_at_every_party(cluster: InProcess) -> None:
    caller: Caller = cluster.caller()
    caller.deploy(PROGRAM, WEIGHTS)
    caller.infer(X)
    assert set(kinds(caller.infer(X, name="none"))) == {"NotFoundError"}
    request = party_pb2.RemoveModelRequest(request_id=os.urandom(16), name="m")
    caller.at_all("RemoveModel", [request] * cluster.n)
    wait_for(lambda: all(len(told(log)) == 4 for log in logs(cluster)))
    for index, log in enumerate(logs(cluster)):
        found = told(log)
        assert log.party == f"party/{index}"
        assert [(e["action"], e["outcome"], e["who"], e["model"]) for e in found] == [
            ("deploy", "ok", "owner/alice", "m"),
            ("infer", "ok", "owner/alice", "m"),
            ("infer", "NotFoundError", "owner/alice", "none"),
            ("remove", "ok", "owner/alice", "m"),
        ]
        assert found[1]["deployment"] == found[0]["deployment"] and found[1]["bytes_in"] > 0


def test_parties_write_down_how_far_each_others_logs_are(cluster: InProcess) -> None:
    caller = cluster.caller()
    caller.deploy(PROGRAM, WEIGHTS)
    assert compare(*logs(cluster)) == 2  # at the beginning of the epoch
    for party in cluster.parties.values():
        for _ in range(64):
            party.audit.write("something")
    wait_for(lambda: all(log.entries[-1]["action"] == "logs" for log in logs(cluster)))
    first, second = logs(cluster)
    assert compare(first, second) == 4
    # whoever writes a log anew from some line on does not fit the other one any more
    path = first.path.with_name("anew")
    path.write_bytes(b"".join(first.path.read_bytes().splitlines(keepends=True)[:20]))
    with pytest.raises(TamperingError, match="was rewritten"):
        compare(read(path), second)


def test_what_cannot_be_written_down_is_not_answered(cluster: InProcess) -> None:
    caller = cluster.caller()
    caller.deploy(PROGRAM, WEIGHTS)
    assert kinds(caller.infer(X)) == ["InferResponse"] * 2
    audit = cluster.parties[1].audit
    real = audit.write

    def failing(action: str, **facts: Any) -> Head:
        raise StoreError("full")

    audit.write = failing  # type: ignore[method-assign]
    assert kinds(caller.infer(X)) == ["InferResponse", "StoreError"]
    audit.write = real  # type: ignore[method-assign]
    assert kinds(caller.infer(X)) == ["InferResponse"] * 2
