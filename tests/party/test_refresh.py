"""Stored shares are made anew: the model stays what it is, and what was taken before is of no use afterwards."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcinfer.errors import MpcInferError, StoreError
from mpcinfer.party.catalogue import Catalogue, Model
from mpcinfer.ring.domain import Z64
from mpcinfer.ring.sharing import combine
from mpcinfer.wire.v1 import party_pb2
from tests.decoders_local import token_ids
from tests.inprocess import LIMITS, Caller, InProcess, kinds, wait_for
from tests.party import test_generation
from tests.party.test_lane import PROGRAM, WEIGHTS, Gate, later, ready, right

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(params=[2, pytest.param(3, marks=pytest.mark.slow)], ids="n={}".format)
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[InProcess]:
    with InProcess(tmp_path, request.param, LIMITS) as running:
        yield running


@pytest.fixture
def caller(cluster: InProcess) -> Caller:
    caller = cluster.caller()
    assert kinds(caller.deploy(PROGRAM, WEIGHTS)) == ["DeployResponse"] * cluster.n
    return caller


def refresh(caller: Caller, name: str = "m", version: int = 0) -> list[Any]:
    request = party_pb2.RefreshModelRequest(request_id=secrets.token_bytes(16), name=name, version=version)
    return caller.at_all("RefreshModel", [request] * len(caller.stubs))


def held(cluster: InProcess) -> list[Model]:
    """The model at each party, its shares read from the disk."""
    models = [p.catalogue.find("m", 0) for p in cluster.parties.values()]
    for party, model in zip(cluster.parties.values(), models, strict=True):
        model.shares = None
        party.catalogue.load(model)
    return models


def shares(cluster: InProcess) -> list[dict[str, torch.Tensor]]:
    return [{name: s.share.clone() for name, s in (m.shares or {}).items()} for m in held(cluster)]


def generations(cluster: InProcess) -> set[str]:
    return {model.deployment.generation for model in held(cluster)}


def model_file(cluster: InProcess, index: int) -> Path:
    (path,) = (cluster.keys.path(f"party/{index}", "store") / "deployments").iterdir()
    return path


def weights(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: combine([each[name] for each in parts], Z64) for name in parts[0]}


@pytest.mark.parametrize("cluster", [2, 3], indirect=True, ids="n={}".format)
def test_every_share_is_another_one_and_the_model_is_the_same(cluster: InProcess, caller: Caller) -> None:
    assert right(caller.infer(torch.ones(3, 4)), torch.ones(3, 4))
    wait_for(lambda: ready(cluster))
    before, models = shares(cluster), held(cluster)
    ids = [(m.id, m.grant) for m in models]
    opened = {name: w.masked.clone() for name, w in models[0].weights.items()}
    files = [model_file(cluster, i).read_bytes() for i in range(cluster.n)]
    assert [a.refreshed for a in refresh(caller)] == [1] * cluster.n
    assert ready(cluster, 0) and not any(m.weights for m in models)
    assert cluster.dealer is not None and cluster.dealer._session is not None and not cluster.dealer._session.fixed
    after = shares(cluster)
    for old, new in zip(before, after, strict=True):
        assert not any(torch.equal(old[name], new[name]) for name in old)
    for name, weight in weights(after).items():
        assert torch.equal(weight, WEIGHTS[name]) and torch.equal(weight, weights(before)[name])
        stolen = [before[0][name], *(each[name] for each in after[1:])]
        assert not torch.equal(combine(stolen, Z64), weight)
    assert [(m.id, m.grant) for m in held(cluster)] == ids
    assert all(model_file(cluster, i).read_bytes() != file for i, file in enumerate(files))
    assert len(generations(cluster)) == 1 and generations(cluster) != {""}
    x = torch.randn(3, 4)
    assert right(caller.infer(x), x)
    assert all(not torch.equal(w.masked, opened[name]) for name, w in held(cluster)[0].weights.items())
    first = generations(cluster)
    assert [a.refreshed for a in refresh(caller)] == [1] * cluster.n and generations(cluster) != first
    for i in range(cluster.n):
        cluster.crash(i)
    for i in range(cluster.n):
        cluster.start_party(i)
    cluster.wait_ready()
    assert right(caller.infer(x), x)


# votes: the request, which models, the keys, whether all have staged, what they have staged, whether all have committed
@pytest.mark.parametrize("dies", [0, 1])
@pytest.mark.parametrize("skip", [pytest.param(2, marks=pytest.mark.slow), 3, 4, 5])
def test_a_refresh_that_breaks_off_leaves_one_generation(
    cluster: InProcess, caller: Caller, dies: int, skip: int
) -> None:
    gate = Gate(cluster.parties[dies].lane, "vote", skip=skip)
    running = later(lambda: refresh(caller))
    assert gate.reached.wait(30)
    wait = cluster.new_epoch()
    cluster.crash(dies, gate.open.set)
    assert all(isinstance(a, MpcInferError) for a in running.result(60))
    cluster.start_party(dies)
    wait()
    assert len(generations(cluster)) == 1
    assert not [f for f in cluster.files() if f.endswith((".fresh", ".part", ".new"))]
    x = torch.randn(3, 4)
    assert right(caller.infer(x), x)
    assert [a.refreshed for a in refresh(caller)] == [1] * cluster.n
    assert right(caller.infer(x), x)


@pytest.mark.parametrize("unsure", [0, 1])
@pytest.mark.parametrize("restarts", [False, True])
def test_a_party_that_has_not_committed_does_so_in_the_next_epoch(
    cluster: InProcess, caller: Caller, unsure: int, restarts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        if not restarts:
            monkeypatch.undo()
        raise StoreError("the disk is full")

    monkeypatch.setattr(cluster.parties[unsure].catalogue, "commit_refresh", failing)
    if restarts:  # it is killed before it can settle anything
        monkeypatch.setattr(cluster.parties[unsure].catalogue, "agree", failing)
    wait = cluster.new_epoch()
    assert isinstance(refresh(caller)[unsure], StoreError)
    if restarts:
        cluster.crash(unsure)
        assert len([f for f in cluster.files() if f.endswith(".fresh")]) == 1
        cluster.start_party(unsure)
    wait()
    assert len(generations(cluster)) == 1 and generations(cluster) != {""}
    assert not [f for f in cluster.files() if f.endswith(".fresh")]
    x = torch.randn(3, 4)
    assert right(caller.infer(x), x)


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "planted fault"])
def test_an_old_share_that_is_put_back_is_noticed(
    cluster: InProcess, caller: Caller, checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model_file(cluster, 1)
    backup = path.read_bytes()
    refresh(caller)
    wait = cluster.new_epoch()
    cluster.crash(1)
    newer, _ = path.read_bytes(), path.write_bytes(backup)
    if not checked:
        monkeypatch.setattr(Catalogue, "_one_generation", lambda *_: True)
    cluster.start_party(1)
    wait()
    x = torch.randn(3, 4)
    answers = caller.infer(x)
    if not checked:
        assert not right(answers, x)
        return
    assert kinds(answers) == ["StoreError"] * cluster.n and "different generations" in str(answers[0])
    wait = cluster.new_epoch()
    cluster.crash(1)
    path.write_bytes(newer)
    cluster.start_party(1)
    wait()
    assert right(caller.infer(x), x)


def test_a_party_that_cannot_stage_keeps_all_from_it(
    cluster: InProcess, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise StoreError("the disk is full")

    before = shares(cluster)
    monkeypatch.setattr(cluster.parties[1].store, "refresh", full)
    assert all("the disk is full" in str(a) for a in refresh(caller))
    assert all(torch.equal(old[n], new[n]) for old, new in zip(before, shares(cluster), strict=True) for n in old)
    assert not [f for f in cluster.files() if f.endswith((".fresh", ".part"))]


def test_a_party_that_announces_no_key(cluster: InProcess, caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a point of low order everybody would know what is agreed on."""
    before, vote = shares(cluster), cluster.parties[1].lane._by.vote

    def announce(part: Any, refusal: Any, note: str = "", **more: Any) -> Any:
        known, _, key = note.partition(" ")
        return vote(part, refusal, f"{known} {'00' * 32}" if len(key) == 64 else note, **more)

    monkeypatch.setattr(cluster.parties[1].lane._by, "vote", announce)
    answers = refresh(caller)
    assert not any(isinstance(a, party_pb2.RefreshModelResponse) for a in answers)
    assert "party 1 announced no key" in str(answers[0])
    monkeypatch.undo()
    assert all(torch.equal(old[n], new[n]) for old, new in zip(before, shares(cluster), strict=True) for n in old)
    assert right(caller.infer(torch.ones(1, 4)), torch.ones(1, 4))


def test_who_may_ask(cluster: InProcess, caller: Caller) -> None:
    assert kinds(refresh(cluster.caller("owner/eve"))) == ["NotFoundError"] * cluster.n
    assert kinds(refresh(cluster.caller("client/bob"))) == ["ForbiddenError"] * cluster.n
    assert kinds(refresh(cluster.caller("dealer"))) == ["ForbiddenError"] * cluster.n
    assert kinds(refresh(caller, "x")) == ["NotFoundError"] * cluster.n
    operator = cluster.caller("party/1")
    for name in ("m", "alice/m", ""):
        assert [a.refreshed for a in refresh(operator, name)] == [1] * cluster.n


def test_texts_begin_anew(cluster: InProcess) -> None:
    caller, captured = cluster.caller(), test_generation.CAPTURED
    caller.deploy(captured.program, dict(captured.weights))
    first = test_generation.write(caller, token_ids(6), 2)
    assert first.rest()[-1] is None and any(test_generation.held(cluster))
    assert [a.refreshed for a in refresh(caller)] == [1] * cluster.n
    assert not any(test_generation.held(cluster)) and not test_generation.slots(cluster)
    assert test_generation.write(caller, [7], 1, first.session, 4).rest() == [["NotFoundError"] * cluster.n]
    again = test_generation.write(caller, token_ids(6), 2).rest()
    assert test_generation.right(again[:-1], token_ids(6))
