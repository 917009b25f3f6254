"""Refresh of shares where hosts have witnesses: both of a pair have the same new share, and who cheats is caught."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mpcinfer.party.server import Party
from mpcinfer.party.vouching import Vouching
from mpcinfer.ring.domain import Z64
from mpcinfer.ring.sharing import combine
from mpcinfer.wire.mesh import CONTROL
from tests.inprocess import Caller, InProcess, kinds, wait_for
from tests.party.test_lane import PROGRAM, WEIGHTS, Gate, X, later, right
from tests.party.test_refresh import refresh
from tests.security.test_witness import caught, restart

Patch = pytest.MonkeyPatch
Shares = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    """Two parties, each with a witness, and a model "m"."""
    with InProcess(tmp_path_factory.mktemp("refreshed"), 2, witnesses=(0, 1)) as running:
        assert kinds(running.caller().deploy(PROGRAM, WEIGHTS)) == ["DeployResponse"] * 4
        yield running


@pytest.fixture(scope="module")
def caller(cluster: InProcess) -> Caller:
    return cluster.caller()


def shares(cluster: InProcess) -> list[Shares]:
    """What is on the disks: of the parties, then of their witnesses."""
    found = []
    for host in cluster.holders:
        model = host.catalogue.find("m", 0)
        model.shares = None
        found.append({name: each.share.clone() for name, each in host.catalogue.load(model).items()})
    return found


def same(one: Shares, other: Shares) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def whole(cluster: InProcess) -> bool:
    """Whether a party and its witness have one share, all shares make up the model, and nothing waits."""
    held = shares(cluster)
    pairs = same(held[0], held[2]) and same(held[1], held[3])
    sums = all(torch.equal(combine([held[0][n], held[1][n]], Z64), WEIGHTS[n]) for n in WEIGHTS)
    return pairs and sums and not list(cluster.keys.directory.rglob("*.fresh"))


def test_a_witness_has_the_new_share_of_its_party(cluster: InProcess, caller: Caller) -> None:
    assert right(caller.infer(X))
    for _ in range(2):
        before = shares(cluster)
        assert [a.refreshed for a in refresh(caller)] == [1] * 4
        assert whole(cluster)
        assert not any(
            torch.equal(old[n], new[n]) for old, new in zip(before, shares(cluster), strict=True) for n in old
        )
        answers = caller.infer(X)
        assert right(answers) and [len(a.commitment) for a in answers] == [0, 0, 32, 32]
    restart(cluster)
    assert right(caller.infer(X))


@pytest.mark.parametrize("watched", [(1,), pytest.param((0, 2), marks=pytest.mark.slow)])
def test_where_some_parties_have_witnesses(tmp_path: Path, watched: tuple[int, ...]) -> None:
    with InProcess(tmp_path, max(watched) + 1, witnesses=watched) as running:
        asking = running.caller()
        asking.deploy(PROGRAM, WEIGHTS)
        for _ in range(2):
            assert kinds(refresh(asking)) == ["RefreshModelResponse"] * len(running.holders)
            assert right(asking.infer(X))


@pytest.mark.parametrize("who", ["party/1", "witness/0"])
@pytest.mark.parametrize("skip", [3, 4, 5])  # see tests/party/test_refresh.py
def test_a_refresh_that_breaks_off(cluster: InProcess, caller: Caller, who: str, skip: int) -> None:
    host = next(each for each in cluster.holders if each.role == who)
    gate, wait = Gate(host.lane, "vote", skip), cluster.new_epoch()
    try:
        running = later(lambda: refresh(caller))
        assert gate.reached.wait(30)
        assert host.former.current is not None
        host.former.current.close()
        gate.open.set()
        assert not any(a == "RefreshModelResponse" for a in kinds(running.result(60)))
        wait()
    finally:
        del host.lane._by.vote
    assert whole(cluster) and right(caller.infer(X))


def another_key_for_its_witness(patch: Patch, cluster: InProcess) -> None:
    """What party 0 adds is not what its witness will count on."""
    epoch = cluster.parties[0].lane._epoch
    assert epoch is not None
    original = epoch.mesh.confide

    def confide(secret: bytes) -> bytes:
        original(secrets.token_bytes(32))
        return secret

    patch.setattr(epoch.mesh, "confide", confide)


def another_key_for_the_other(patch: Patch, cluster: InProcess) -> None:
    """Party 0 announces one key to party 1, and says to its witness that it has announced another."""
    epoch = cluster.parties[0].lane._epoch
    assert epoch is not None
    send, own = epoch.mesh.links[1].send, cluster.parties[0].catalogue.find("m", 0).id.hex().encode()

    def lie(kind: int, payload: bytes) -> None:
        if kind == CONTROL and own + b" " in payload:
            key = payload.index(own + b" ") + len(own) + 1
            payload = payload[:key] + secrets.token_hex(32).encode() + payload[key + 64 :]
        send(kind, payload)

    patch.setattr(epoch.mesh.links[1], "send", lie)


def altered(host: Party) -> Callable[..., bytes]:
    """Its store's `refresh`, which adds 2^30 to a weight, and says that it has not."""
    original = host.store.refresh

    def refresh(deployment: bytes, generation: str, pieces: Iterator[bytes]) -> bytes:
        honest = list(pieces)
        digest = original(deployment, generation, honest)
        spoilt = Z64.unpack(honest[0], (len(honest[0]) // 8,)) + (1 << 30)
        original(deployment, generation, [bytes(Z64.pack(spoilt)), *honest[1:]])
        return digest

    return refresh


@pytest.mark.parametrize("attack", [another_key_for_its_witness, another_key_for_the_other])
def test_a_party_that_cheats_with_its_key(
    cluster: InProcess, caller: Caller, attack: Callable[[Patch, InProcess], None], monkeypatch: Patch
) -> None:
    before = shares(cluster)
    attack(monkeypatch, cluster)
    wait = cluster.new_epoch()
    assert caught(refresh(caller), 0)
    monkeypatch.undo()
    if attack is another_key_for_the_other:  # found where what was sent is compared, which ends the epoch
        wait()
    assert all(same(old, new) for old, new in zip(before, shares(cluster), strict=True))
    assert whole(cluster) and right(caller.infer(X))


def test_a_party_that_stores_another_share_is_caught_by_its_next_answer(tmp_path: Path) -> None:
    with InProcess(tmp_path, 2, witnesses=(0, 1)) as running:
        asking = running.caller()
        asking.deploy(PROGRAM, WEIGHTS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(running.parties[1].store, "refresh", altered(running.parties[1]))
            assert [a.refreshed for a in refresh(asking)] == [1] * 4
            patch.setattr(Vouching, "exchange", lambda *_: None)  # the planted fault: nobody compares
            assert not right(asking.infer(X))
        assert caught(asking.infer(X), 1)


def test_a_witness_that_gets_no_key_ends_the_epoch(cluster: InProcess, caller: Caller, monkeypatch: Patch) -> None:
    epoch = cluster.parties[0].lane._epoch
    assert epoch is not None
    original = epoch.mesh.confide
    monkeypatch.setattr(epoch.mesh, "confide", lambda secret: (original(secret[:5]), secret)[1])
    wait = cluster.new_epoch()
    answers = refresh(caller)
    assert "ProtocolError" in kinds(answers) and "RefreshModelResponse" not in kinds(answers)
    monkeypatch.undo()
    wait()
    assert whole(cluster) and right(caller.infer(X))


def test_a_party_and_its_witness_that_have_made_different_shares_put_none_in_place(
    cluster: InProcess, caller: Caller, monkeypatch: Patch
) -> None:
    """A fault rather than an attack: whoever holds another share says so, and the old ones stay."""
    before, original = shares(cluster), cluster.witnesses[1].store.refresh
    monkeypatch.setattr(
        cluster.witnesses[1].store, "refresh", lambda i, g, pieces: original(i, g, (bytes(len(p)) for p in pieces))
    )
    answers = refresh(caller)
    assert kinds(answers) == ["AgreementError"] * 4 and "different shares" in str(answers[0])
    assert all(same(old, new) for old, new in zip(before, shares(cluster), strict=True)) and whole(cluster)


def test_a_party_that_misquotes_its_witness_gets_no_epoch(cluster: InProcess, caller: Caller) -> None:
    """Else it could have some take a refresh for done that others take for broken off."""

    def misquoted(party: bytes, witness: bytes) -> bytes:
        said = json.loads(witness)
        for line in said["models"]["models"].values():
            line[5] = "00" * 32  # its generation
        return json.dumps({**json.loads(party), "witness": said}).encode()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpcinfer.party.lane.merged_inventories", misquoted)
        epoch = cluster.parties[0].lane._epoch
        assert epoch is not None
        epoch.close()
        wait_for(lambda: all("misquoted" in w.lane.detail for w in cluster.witnesses.values()))
        assert all(p.lane.state != "ready" for p in cluster.witnesses.values())
    cluster.wait_ready()
    assert right(caller.infer(X))
