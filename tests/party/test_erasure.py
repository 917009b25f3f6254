"""What is over leaves memory: a model that was removed, a request that was answered, a session that has ended.

Each is looked for with the garbage collector: among all tensors, and by weak references to what is known of it.
"""

from __future__ import annotations

import gc
import secrets
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcinfer.config import Limits
from mpcinfer.errors import StoreError
from mpcinfer.party.catalogue import Model
from mpcinfer.party.inbox import Job
from mpcinfer.wire.v1 import party_pb2
from tests.decoders_local import token_ids
from tests.inprocess import Caller, InProcess, wait_for
from tests.party import test_generation, test_lane
from tests.party.test_generation import CAPTURED
from tests.party.test_lane import PROGRAM, WEIGHTS, X

LIMITS = Limits(step_timeout_s=60, connect_timeout_s=10, stop_grace_s=5, max_waiting_requests=8)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[InProcess]:
    with InProcess(tmp_path, 2, LIMITS) as running:
        yield running


@pytest.fixture
def caller(cluster: InProcess) -> Caller:
    return cluster.caller()


def tensors() -> Counter[tuple[int, ...]]:
    """The shapes of all tensors there are in this process."""
    gc.collect()
    return Counter(tuple(o.shape) for o in gc.get_objects() if type(o) is torch.Tensor)


def traces(cluster: InProcess, name: str = "m") -> list[weakref.ref[Any]]:
    """Of a model at all parties: itself, its shares, what was opened of its weights and their masks, plans, tapes."""
    found: list[Any] = []
    for party in cluster.parties.values():
        model: Model = party.catalogue.find(name, 0)
        assert model.shares and model.weights and model.plans
        found += [model, *(s.share for s in model.shares.values()), *(w.masked for w in model.weights.values())]
        found += [*(plan for plan, _ in model.plans.values()), model.planner]
        found += [a for s in party.lane.pool.shelves().values() if s.model is model for a in s.tapes]
    return [weakref.ref(each) for each in found]


def alive(refs: list[weakref.ref[Any]]) -> list[str]:
    gc.collect()
    return sorted(type(ref()).__name__ for ref in refs if ref() is not None)


def remove(cluster: InProcess, caller: Caller) -> list[Any]:
    request = party_pb2.RemoveModelRequest(request_id=secrets.token_bytes(16), name="m")
    return caller.at_all("RemoveModel", [request] * cluster.n)


def test_a_removed_model_is_gone_from_disk_and_memory_of_all(cluster: InProcess, caller: Caller) -> None:
    caller.deploy(PROGRAM, WEIGHTS)
    assert test_lane.right(caller.infer(X))
    wait_for(lambda: test_lane.ready(cluster))
    refs = traces(cluster)
    assert len(refs) > 2 * (1 + 4 + 2 + 1 + 1 + 2) - 1 and len(alive(refs)) == len(refs)
    assert cluster.dealer is not None and cluster.dealer._session is not None and cluster.dealer._session.fixed
    assert [a.removed for a in remove(cluster, caller)] == [1, 1]
    assert not [f for f in cluster.files() if f.endswith((".mpc", ".new", ".part"))]
    wait_for(lambda: not alive(refs))
    assert not cluster.dealer._session.fixed


@pytest.mark.parametrize("planted", ["shares", "pool"])
def test_a_model_that_stays_somewhere_is_seen(
    cluster: InProcess, caller: Caller, planted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller.deploy(PROGRAM, WEIGHTS)
    assert test_lane.right(caller.infer(X))
    wait_for(lambda: test_lane.ready(cluster))
    refs, party = traces(cluster), cluster.parties[1]
    kept: Any = None
    if planted == "shares":
        kept = party.catalogue.find("m", 0).shares
    else:
        monkeypatch.setattr(party.lane.pool, "forget", lambda deployment: None)
    remove(cluster, caller)
    assert alive(refs).count("Tensor" if kept else "Ahead") >= 2


def grown(before: Counter[tuple[int, ...]]) -> Counter[tuple[int, ...]]:
    return tensors() - before


def infer(cluster: InProcess, caller: Caller, x: torch.Tensor) -> None:
    assert test_lane.right(caller.infer(x), x)
    wait_for(lambda: not any(len(p.inbox) or p.lane._busy for p in cluster.parties.values()))


def test_no_input_and_no_output_outlives_its_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with InProcess(tmp_path, 2, replace(LIMITS, pool_mb=0)) as cluster:  # nothing is dealt ahead
        caller, x = cluster.caller(), torch.randn(5, 4)
        caller.deploy(PROGRAM, WEIGHTS)
        infer(cluster, caller, x)  # plans and constants stay
        before = tensors()
        infer(cluster, caller, x)
        wait_for(lambda: not grown(before))
        kept: list[Any] = []
        real = Job.succeed
        monkeypatch.setattr(Job, "succeed", lambda job, value: (kept.append(job.content), real(job, value))[1])
        infer(cluster, caller, x)
        assert grown(before)[tuple(x.shape)] == 2  # the planted fault: each party has kept an input


def texts(cluster: InProcess, caller: Caller) -> list[test_generation.Streams]:
    """Two texts, the second one from the rows of the first."""
    first = test_generation.write(caller, token_ids(6), 4)
    assert first.rest()[-1] is None
    second = test_generation.write(caller, [7, 3], 2, first.session, 4)
    assert second.rest()[-1] is None
    return [first, second]


def end(cluster: InProcess, caller: Caller, streams: list[test_generation.Streams]) -> None:
    for stream in streams:
        caller.at_all("EndSession", [party_pb2.EndSessionRequest(session=stream.session)] * cluster.n)
    wait_for(lambda: not any(test_generation.held(cluster)))
    wait_for(lambda: not any(len(p.inbox) or p.lane._busy for p in cluster.parties.values()))


@pytest.mark.timeout(240)
def test_no_cache_input_or_output_outlives_its_session(cluster: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    caller = cluster.caller()
    caller.deploy(CAPTURED.program, dict(CAPTURED.weights))
    end(cluster, caller, texts(cluster, caller))  # plans and constants stay
    before = tensors()
    streams = texts(cluster, caller)
    assert grown(before)  # caches
    end(cluster, caller, streams)
    wait_for(lambda: not grown(before))
    streams, kept = texts(cluster, caller), []
    kept += cluster.parties[1].lane._sessions._sessions.values()
    end(cluster, caller, streams)
    assert grown(before)  # the planted fault
    del kept


def test_a_removed_model_takes_its_texts_along(cluster: InProcess, caller: Caller) -> None:
    caller.deploy(CAPTURED.program, dict(CAPTURED.weights))
    texts(cluster, caller)
    refs = [weakref.ref(s) for p in cluster.parties.values() for s in p.lane._sessions._sessions.values()]
    assert len(refs) == 4 and test_generation.slots(cluster)
    assert [a.removed for a in remove(cluster, caller)] == [1, 1]
    wait_for(lambda: not alive(refs))
    assert not any(test_generation.held(cluster)) and not test_generation.slots(cluster)


def test_a_party_that_cannot_delete_makes_all_say_so(
    cluster: InProcess, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller.deploy(PROGRAM, WEIGHTS)
    store = cluster.parties[1].store

    def full(_: bytes) -> None:
        monkeypatch.undo()
        raise StoreError("the disk is read-only")

    monkeypatch.setattr(store, "remove", full)
    assert all("the disk is read-only" in str(a) for a in remove(cluster, caller))
    assert [a.removed for a in remove(cluster, caller)] == [1, 1]
    assert not [f for f in cluster.files() if f.endswith((".mpc", ".new", ".part"))]
