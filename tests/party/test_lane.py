"""Steps that all parties take together: what they agree on first, and what is spent when one of them breaks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import mpcinfer.graph.lifted as lifted
import mpcinfer.party.stepping as stepping
import mpcinfer.protocol.linear as linear_module
from mpcinfer.config import Limits
from mpcinfer.errors import AbortedError, MpcInferError, ProtocolError, StoreError, UnavailableError
from mpcinfer.party.lane import Lane
from mpcinfer.party.pool import READY
from mpcinfer.party.running import portions
from mpcinfer.party.stepping import Stepping
from mpcinfer.party.tape import Tape
from mpcinfer.protocol.types import Weight
from mpcinfer.wire.v1 import party_pb2
from tests.inprocess import Caller, InProcess, kinds, mlp, plain, random_weights, reveal, wait_for

PROGRAM = mlp()
WEIGHTS = random_weights(PROGRAM)
X = torch.linspace(-2, 2, 12).reshape(3, 4)


@pytest.fixture(params=[2, pytest.param(3, marks=pytest.mark.slow)], ids="n={}".format)
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[InProcess]:
    """A cluster of its own for each test: they break it."""
    with InProcess(tmp_path, request.param) as running:
        yield running


@pytest.fixture
def caller(cluster: InProcess) -> Caller:
    """The owner of a model "m" that is deployed."""
    caller = cluster.caller()
    assert [a.version for a in caller.deploy(PROGRAM, WEIGHTS)] == [1] * cluster.n
    return caller


def right(answers: list[Any], x: torch.Tensor = X, weights: dict[str, torch.Tensor] = WEIGHTS) -> bool:
    return bool((reveal(answers) - plain(weights, x)).abs().max() < 1e-3)


def dealt(cluster: InProcess) -> int:
    assert cluster.dealer is not None
    return cluster.dealer.tapes_dealt


def later(work: Callable[[], Any]) -> Future[Any]:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return future


class Gate:
    """Holds one lane at the beginning of a protocol's execution (or `before` another part of a step) until opened."""

    def __init__(self, lane: Lane, before: str = "execute", skip: int = 0) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        real, count = getattr(lane._by, before), [0]

        def held(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] > skip:
                self.reached.set()
                assert self.open.wait(60)
            return real(*args, **kwargs)

        setattr(lane._by, before, held)


# --- when all is well ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", [2, 3], indirect=True, ids="n={}".format)
def test_deploy_and_infer(cluster: InProcess) -> None:
    caller = cluster.caller()
    first = caller.deploy(PROGRAM, WEIGHTS)
    assert [(a.name, a.version) for a in first] == [("m", 1)] * cluster.n
    assert len({a.deployment_id for a in first}) == 1
    for batch in (1, 3, 1):
        x = torch.randn(batch, 4)
        answers = caller.infer(x)
        assert right(answers, x)
        plan, _ = cluster.parties[0].catalogue.find("m", 0).plan([(batch, 4)], cluster.n)
        *others, last = [a.offline.bytes_from_dealer for a in answers]
        assert not any(others) and 0 < last - plan.correction_bytes() <= 16  # one frame's headers
        assert {a.online.rounds for a in answers} == {9}
        assert all(0 < a.online.bytes_sent for a in answers)
    other = random_weights(PROGRAM, 1)
    assert [a.version for a in caller.deploy(PROGRAM, other)] == [2] * cluster.n
    assert right(caller.infer(X), X, other)
    assert right(caller.infer(X, version=1))
    assert [(m.name, m.version) for m in cluster.parties[0].catalogue.models()] == [("m", 1), ("m", 2)]


def test_requests_that_wait_share_rounds(cluster: InProcess, caller: Caller) -> None:
    assert right(caller.infer(X))
    gate = Gate(cluster.parties[1].lane)
    first = later(lambda: caller.infer(X))
    assert gate.reached.wait(60)
    inputs = [torch.randn(k, 4) for k in (1, 3, 3, 2)]
    waiting = [later(lambda x=x: cluster.caller("client/bob").infer(x)) for x in inputs]  # type: ignore[misc]
    wait_for(lambda: all(len(p.inbox) == 5 for p in cluster.parties.values()))
    mesh = cluster.parties[0].former.current.mesh  # type: ignore[union-attr]
    gate.open.set()
    assert right(first.result(60))
    before, sent = mesh.rounds, mesh.bytes_sent
    answers = [w.result(60) for w in waiting]
    assert all(right(a, x) for a, x in zip(answers, inputs, strict=True))
    assert mesh.rounds - before == 9  # what one request takes
    assert {a.online.rounds for each in answers for a in each} == {9}
    # each is told what it has cost, and nothing is told twice
    assert sum(a[0].online.bytes_sent + a[0].offline.bytes_sent for a in answers) <= mesh.bytes_sent - sent


def waiting_behind(cluster: InProcess, caller: Caller, requests: Sequence[Callable[[], Any]]) -> list[Future[Any]]:
    """A request, and others that wait for it at all parties and are then done in one step: the answers."""
    gate = Gate(cluster.parties[1].lane)
    first = later(lambda: caller.infer(X))
    assert gate.reached.wait(60)
    waiting = [later(request) for request in requests]
    wait_for(lambda: all(len(p.inbox) == 1 + len(requests) for p in cluster.parties.values()))
    gate.open.set()
    assert right(first.result(60))
    return waiting


@pytest.mark.parametrize(("count", "witnesses"), [(2, ()), (5, ()), (16, ()), (16, (0, 1))])
def test_requests_of_one_shape_are_one_run(tmp_path: Path, count: int, witnesses: tuple[int, ...]) -> None:
    """From sixteen on they are two, which take turns."""
    with InProcess(tmp_path, 2, Limits(pool_mb=0, max_batch=16), witnesses) as cluster:
        caller = cluster.caller()
        caller.deploy(PROGRAM, WEIGHTS)
        alone = caller.infer(X)
        inputs = [torch.randn(3, 4) for _ in range(count)]
        before = dealt(cluster)
        waiting = waiting_behind(
            cluster,
            caller,
            [lambda x=x: cluster.caller("client/bob").infer(x) for x in inputs],  # type: ignore[misc]
        )
        answers = [w.result(60) for w in waiting]
        assert all(right(a, x) for a, x in zip(answers, inputs, strict=True))
        assert dealt(cluster) - before == 1 + len(portions(count))
        assert {a.online.rounds for each in answers for a in each} == {alone[0].online.rounds}
        # what each is told that it has cost is its part
        for i in range(2):
            told = [a[i].online.bytes_sent for a in answers]
            assert sum(told) < count * alone[i].online.bytes_sent + 64 * count
            assert max(told) <= 1.2 * alone[i].online.bytes_sent
        plan, _ = cluster.parties[0].catalogue.find("m", 0).plan([(3, 4)], 2)
        assert sum(a[1].offline.bytes_from_dealer for a in answers) >= 0.9 * count * plan.correction_bytes()


def test_a_run_that_gives_one_request_what_is_another_s_is_noticed(
    cluster: InProcess, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: an operator that reaches along the axis of requests."""
    real = lifted._PREPARE["mpc.linear"]

    def mixed(args: Any, kwargs: Any) -> Any:
        (x, *rest), kwargs = real(args, kwargs) or ([], {})
        return [x.map(lambda t: t.roll(1, 0)), *rest], kwargs

    assert right(caller.infer(X))
    monkeypatch.setitem(lifted._PREPARE, "mpc.linear", mixed)
    inputs = [X, -X, X / 2]
    waiting = waiting_behind(cluster, caller, [lambda x=x: caller.infer(x) for x in inputs])  # type: ignore[misc]
    assert not any(right(w.result(60), x) for w, x in zip(waiting, inputs, strict=True))


def test_a_caller_that_goes_while_its_request_is_done_leaves_the_others_alone(
    cluster: InProcess, caller: Caller
) -> None:
    assert right(caller.infer(X))
    gate = Gate(cluster.parties[1].lane, skip=1)
    held = Gate(cluster.parties[1].lane)
    first = later(lambda: caller.infer(X))
    epoch = cluster.parties[0].former.current
    goes = cluster.caller("client/bob")
    assert held.reached.wait(60)
    good = [later(lambda: caller.infer(X)) for _ in range(2)]
    calls = [stub.Infer.future(r, timeout=60) for stub, r in zip(goes.stubs, goes.inferences(-X), strict=True)]
    wait_for(lambda: all(len(p.inbox) == 4 for p in cluster.parties.values()))
    held.open.set()
    assert gate.reached.wait(60)
    assert all(call.cancel() for call in calls)
    wait_for(lambda: all(len(p.inbox) == 2 for p in cluster.parties.values()))
    gate.open.set()
    assert all(right(each.result(60)) for each in (first, *good))
    assert cluster.parties[0].former.current is epoch and right(caller.infer(X))


def test_portions_are_few_and_of_few_sizes() -> None:
    assert all(sum(portions(n)) == n and len(portions(n)) <= 2 for n in range(1, 16))
    assert {size for n in range(1, 33) for size in portions(n)} == {1, 2, 3, 4, 6, 8, 12}
    assert portions(16) == [8, 8] and portions(15) == [12, 3] and portions(24) == [12, 12]


def test_a_request_that_is_refused_leaves_those_beside_it_alone(cluster: InProcess, caller: Caller) -> None:
    assert right(caller.infer(X))
    gate = Gate(cluster.parties[1].lane)
    first = later(lambda: caller.infer(X))
    assert gate.reached.wait(60)
    epoch = cluster.parties[0].former.current
    good = [later(lambda: caller.infer(X)) for _ in range(2)]
    wait_for(lambda: all(len(p.inbox) == 3 for p in cluster.parties.values()))
    requests = caller.inferences(X)
    other = caller.inferences(X[:1])[-1]
    other.request_id = requests[0].request_id
    bad = later(lambda: caller.at_all("Infer", [*requests[:-1], other]))
    wait_for(lambda: all(len(p.inbox) == 4 for p in cluster.parties.values()))
    gate.open.set()
    assert all(right(each.result(60)) for each in (first, *good))
    assert kinds(bad.result(60)) == ["AgreementError"] * cluster.n
    assert cluster.parties[0].former.current is epoch and right(caller.infer(X))


def test_as_many_as_there_is_memory_for(tmp_path: Path) -> None:
    with InProcess(tmp_path, 2, Limits(max_batch=2, pool_mb=0)) as cluster:
        caller = cluster.caller()
        caller.deploy(PROGRAM, WEIGHTS)
        mesh = cluster.parties[0].former.current.mesh  # type: ignore[union-attr]
        before = mesh.rounds
        assert right(caller.infer(X))
        alone = mesh.rounds - before
        for limit, steps in ((2, 3), (1, 5)):  # one request, then four that have waited for it
            for p in cluster.parties.values():
                p.lane._limits = Limits(max_batch=limit, pool_mb=0)
            before = mesh.rounds
            waiting = waiting_behind(cluster, caller, [lambda: caller.infer(X)] * 4)
            assert all(right(w.result(60)) for w in waiting) and mesh.rounds - before == steps * alone


def ready(cluster: InProcess, count: int = READY) -> bool:
    return all(len(p.lane.pool) == count for p in cluster.parties.values())


@pytest.mark.parametrize("cluster", [2, 3], indirect=True, ids="n={}".format)
def test_the_next_request_finds_its_randomness_ready(
    cluster: InProcess, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert right(caller.infer(X))
    wait_for(lambda: ready(cluster))
    with monkeypatch.context() as patch:
        patch.setattr(Stepping, "deal", lambda *_: pytest.fail("a tape was fetched"))
        answers = caller.infer(2 * X)
    assert right(answers, 2 * X)
    plan, _ = cluster.parties[0].catalogue.find("m", 0).plan([(3, 4)], cluster.n)
    *others, last = [a.offline.bytes_from_dealer for a in answers]
    assert not any(others) and 0 < last - plan.correction_bytes() <= 16 and {a.online.rounds for a in answers} == {9}
    wait_for(lambda: ready(cluster))  # it is filled again
    tapes = [[t for s in p.lane.pool.shelves().values() for t in s.tapes] for p in cluster.parties.values()]
    assert len({tuple(t.id for t in each) for each in tapes}) == 1


def test_who_finds_randomness_ready_does_not_wait_for_what_is_being_fetched(
    cluster: InProcess, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, begun, goes_on = stepping.fetch, threading.Event(), threading.Event()
    assert right(caller.infer(X[:1]), X[:1]) and right(caller.infer(X))
    wait_for(lambda: ready(cluster, 2 * READY))
    fills, filled = list[int](), cluster.parties[0].lane._filled

    def fetch(epoch: Any, *args: Any, **options: Any) -> Tape:
        if threading.current_thread().name == "ahead" and epoch.mesh.index == 1:
            begun.set()
            assert goes_on.wait(60)
        return real(epoch, *args, **options)

    monkeypatch.setattr(stepping, "fetch", fetch)
    try:
        assert right(caller.infer(X))
        assert begun.wait(60)
        assert right(later(lambda: caller.infer(X)).result(30))
        monkeypatch.setattr(cluster.parties[0].lane, "_filled", lambda *args: (fills.append(1), filled(*args)))
        wait_for(lambda: bool(fills))  # and beginning to fetch another one holds nobody up either
        assert right(later(lambda: caller.infer(X[:1])).result(30), X[:1]) and not ready(cluster, 2 * READY)
    finally:
        goes_on.set()
    wait_for(lambda: ready(cluster, 2 * READY))


def test_requests_that_come_together_find_their_randomness_ready_too(
    cluster: InProcess, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    def burst() -> None:
        """One request, then four that have waited for it and are one run."""
        assert all(right(each.result(60)) for each in waiting_behind(cluster, caller, [lambda: caller.infer(X)] * 4))

    assert right(caller.infer(X))
    burst()
    wait_for(lambda: ready(cluster, 2 * READY))
    assert sorted(s.count for s in cluster.parties[0].lane.pool.shelves().values()) == [1, 4]
    with monkeypatch.context() as patch:
        patch.setattr(Stepping, "deal", lambda *_: pytest.fail("a tape was fetched"))
        burst()
    wait_for(lambda: ready(cluster, 2 * READY))


@pytest.mark.parametrize("seconds", [0.0, 10.0])
def test_the_lane_waits_a_little_for_those_that_could_share_a_long_step(
    cluster: InProcess, caller: Caller, seconds: float
) -> None:
    assert right(caller.infer(X)) and right(caller.infer(X))
    lane, model = cluster.parties[0].lane, cluster.parties[0].catalogue.find("m", 0)
    model.step_seconds, together = seconds, list[int]()
    honest = lane._step

    def step(epoch: Any, step: dict[str, Any]) -> None:
        together.append(len(step["parts"]))
        if len(together) == 1:  # a step that takes as long as this one says
            wait_for(lambda: len(lane._inbox) == 2)
        honest(epoch, step)

    lane._step = step  # type: ignore[method-assign]
    first = later(lambda: caller.infer(X))
    if not seconds:
        wait_for(lambda: bool(together))
    second = later(lambda: caller.infer(X))
    assert right(first.result(60)) and right(second.result(60))
    assert together == ([2] if seconds else [1, 1])


def test_parties_that_take_different_tapes_burn_them(cluster: InProcess, caller: Caller) -> None:
    """The planted fault: the pools of two parties are not in the same order."""
    assert right(caller.infer(X))
    wait_for(lambda: ready(cluster))
    (shelf,) = cluster.parties[1].lane.pool.shelves().values()
    shelf.tapes.reverse()
    wait = cluster.new_epoch()
    assert not any(hasattr(a, "outputs") for a in caller.infer(X))
    wait()
    assert right(caller.infer(X))


def test_a_tape_that_fails_ahead_ends_the_epoch_before_anything_else_is_dealt(
    cluster: InProcess, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the key chains of a party and the dealer would stand at different places, and results be noise."""
    real, failed = stepping.fetch, threading.Event()

    def fetch(epoch: Any, *args: Any, **options: Any) -> Tape:
        if threading.current_thread().name == "ahead" and epoch.mesh.index == 1 and not failed.is_set():
            chain = epoch.key._key
            real(epoch, *args, **options)
            epoch.key._key = chain  # as if the last message of the dealer had been lost
            failed.set()
            raise UnavailableError("lost")
        return real(epoch, *args, **options)

    monkeypatch.setattr(stepping, "fetch", fetch)
    before = cluster.parties[0].former.current
    assert right(caller.infer(X))
    assert failed.wait(60)
    for _ in range(20):  # another shape, for which nothing is ready
        answers = caller.infer(X[:1])
        if all(hasattr(a, "outputs") for a in answers):
            break
    assert right(answers, X[:1]) and cluster.parties[0].former.current is not before


def test_a_tape_that_fails_while_nothing_is_done_ends_the_epoch(
    cluster: InProcess, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next request would be the one to fail. The last of what is fetched ahead does: nothing follows it."""
    real, begun, accounts = stepping.fetch, [0] * cluster.n, set[bool]()

    def fetch(epoch: Any, *args: Any, **options: Any) -> Tape:
        tape = real(epoch, *args, **options)
        if threading.current_thread().name == "ahead":
            index = epoch.mesh.index
            accounts.add(options["account"] is cluster.parties[index].lane._metrics.account("fill"))
            begun[index] += 1
            if begun[index] == READY:
                raise UnavailableError("lost")
        return tape

    monkeypatch.setattr(stepping, "fetch", fetch)
    wait = cluster.new_epoch()
    assert right(caller.infer(X))
    wait()
    assert begun == [READY] * cluster.n and accounts == {True}
    assert right(caller.infer(X))


def test_pools_are_burnt_with_their_epoch_and_model(cluster: InProcess, caller: Caller) -> None:
    assert right(caller.infer(X))
    wait_for(lambda: ready(cluster))
    request = party_pb2.RemoveModelRequest(request_id=b"0" * 16, name="m")
    assert [a.removed for a in caller.at_all("RemoveModel", [request] * cluster.n)] == [1] * cluster.n
    assert ready(cluster, 0)
    caller.deploy(PROGRAM, WEIGHTS)
    assert right(caller.infer(X))
    wait_for(lambda: ready(cluster))
    cluster.crash(1)
    cluster.start_party(1)
    cluster.wait_ready()
    assert ready(cluster, 0) and right(caller.infer(X))


def test_a_party_without_room_keeps_the_others_from_filling(cluster: InProcess, caller: Caller) -> None:
    cluster.parties[1].lane.pool._most = 0
    assert right(caller.infer(X))
    wait_for(lambda: any(s.full for s in cluster.parties[0].lane.pool.shelves().values()))
    assert ready(cluster, 0) and right(caller.infer(X))


def test_requests_of_several_clients_are_taken_in_turn(cluster: InProcess, caller: Caller) -> None:
    clients = [cluster.caller(role) for role in ("client/bob", "client/carol", "owner/alice")]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda i: clients[i % 3].infer(X), range(6)))
    assert all(map(right, answers))
    assert [p.lane.done for p in cluster.parties.values()] == [7] * cluster.n


def test_models_survive_the_restart_of_everybody(cluster: InProcess, caller: Caller) -> None:
    for i in range(cluster.n):
        cluster.crash(i)
    cluster.stop_dealer()
    cluster.start_dealer()
    for i in range(cluster.n):
        cluster.start_party(i)
    cluster.wait_ready()
    assert right(caller.infer(X))


def test_removing(cluster: InProcess, caller: Caller) -> None:
    caller.deploy(PROGRAM, WEIGHTS)

    def remove(version: int, who: Caller = caller, name: str = "m") -> list[Any]:
        request = party_pb2.RemoveModelRequest(request_id=(b"%016d" % dealt(cluster)), name=name, version=version)
        return who.at_all("RemoveModel", [request] * cluster.n)

    assert kinds(remove(0, cluster.caller("owner/eve"))) == ["NotFoundError"] * cluster.n
    assert kinds(remove(0, name="x")) == ["NotFoundError"] * cluster.n
    assert [a.removed for a in remove(1)] == [1] * cluster.n
    assert kinds(caller.infer(X, version=1)) == ["NotFoundError"] * cluster.n
    assert right(caller.infer(X))
    assert [a.removed for a in remove(0)] == [1] * cluster.n
    assert kinds(remove(0)) == ["NotFoundError"] * cluster.n
    assert not [f for f in cluster.files() if f.endswith((".mpc", ".new", ".part"))]


# --- refusals: the request has its answer, nothing is spent, the epoch goes on ---------------------------------------


def test_different_requests_under_one_id_are_refused_before_anything_is_spent(
    cluster: InProcess, caller: Caller
) -> None:
    spent, epoch = dealt(cluster), cluster.parties[0].former.current
    requests = caller.inferences(X)
    other = caller.inferences(X[:1])[-1]
    other.request_id = requests[0].request_id
    assert kinds(caller.at_all("Infer", [*requests[:-1], other])) == ["AgreementError"] * cluster.n
    versions = caller.inferences(X)
    versions[0].version = 1
    assert kinds(caller.at_all("Infer", versions)) == ["AgreementError"] * cluster.n
    assert dealt(cluster) == spent and cluster.parties[0].former.current is epoch
    assert right(caller.infer(X))


def test_two_clients_who_use_one_id_get_nothing_of_each_other(cluster: InProcess, caller: Caller) -> None:
    spent = dealt(cluster)
    requests = caller.inferences(X)
    eve = cluster.caller("client/carol")
    mine = later(lambda: caller.at_all("Infer", [*requests[:-1], None]))
    hers = eve.at_all("Infer", [*[None] * (cluster.n - 1), requests[-1]])
    assert kinds(mine.result(60)[:-1]) == ["AgreementError"] * (cluster.n - 1)
    assert kinds(hers)[-1] == "AgreementError"
    assert dealt(cluster) == spent


def test_a_request_that_does_not_reach_all_parties_is_refused(cluster: InProcess, caller: Caller) -> None:
    spent = dealt(cluster)
    requests = caller.inferences(X)
    answers = caller.at_all("Infer", [*requests[:-1], None], timeout=30)
    assert kinds(answers[:-1]) == ["UnavailableError"] * (cluster.n - 1)
    assert all("not reached all parties" in str(a) for a in answers[:-1])
    assert dealt(cluster) == spent and right(caller.infer(X))


def test_a_request_that_has_not_come_is_waited_for_once(
    cluster: InProcess, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it is only looked for: whoever sends to one party alone holds nobody up."""
    inbox, waits = cluster.parties[cluster.n - 1].inbox, list[float]()
    real = inbox.match
    monkeypatch.setattr(inbox, "match", lambda id_, digest, wait: (waits.append(wait), real(id_, digest, wait))[1])
    caller.at_all("Infer", [*caller.inferences(X)[:-1], None], timeout=30)
    assert waits[0] > 0 and len(waits) > 2 and not any(waits[1:])


@pytest.mark.parametrize("where", [0, 1])
def test_an_unforeseen_failure_before_anything_is_spent_is_an_incident(
    cluster: InProcess, caller: Caller, where: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spent, epoch = dealt(cluster), cluster.parties[0].former.current
    model = cluster.parties[where].catalogue.find("m", 0)

    def broken(*_: object) -> None:
        raise RuntimeError("canary value")

    monkeypatch.setattr(model, "plan", broken)
    answers = caller.infer(X)
    assert kinds(answers) == ["ProtocolError"] * cluster.n
    assert "incident" in str(answers[0]) and "canary" not in str(answers) + caplog.text
    monkeypatch.undo()
    assert dealt(cluster) == spent and cluster.parties[0].former.current is epoch
    assert right(caller.infer(X))


def test_a_store_file_that_breaks_while_running_is_named_and_others_are_served(
    cluster: InProcess, caller: Caller
) -> None:
    caller.deploy(PROGRAM, WEIGHTS, "other")
    wait = cluster.new_epoch()
    cluster.crash(1)
    cluster.start_party(1)
    wait()
    broken = cluster.parties[1].catalogue.find("m", 0)
    (path,) = cluster.keys.path("party/1", "store").rglob(f"{broken.id.hex()}.mpc")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    epoch = cluster.parties[0].former.current
    answers = caller.infer(X)
    assert kinds(answers) == ["StoreError"] * cluster.n
    assert "remove the model and deploy it again" in str(answers[0])
    assert cluster.parties[0].former.current is epoch
    assert right(caller.infer(X, "other"))


def test_a_damaged_store_file_is_found_at_start(cluster: InProcess, caller: Caller) -> None:
    caller.deploy(PROGRAM, WEIGHTS, "other")
    damaged = cluster.parties[1].catalogue.find("m", 0)
    wait = cluster.new_epoch()
    cluster.crash(1)
    (path,) = cluster.keys.path("party/1", "store").rglob(f"{damaged.id.hex()}.mpc")
    path.write_bytes(path.read_bytes()[:-1])
    cluster.start_party(1)
    wait()
    answers = caller.infer(X)
    assert kinds(answers) == ["StoreError"] * cluster.n
    assert "party 1 is damaged; remove it and deploy it again" in str(answers[0])
    assert right(caller.infer(X, "other"))
    request = party_pb2.RemoveModelRequest(request_id=b"i" * 16, name="m")
    assert [a.removed for a in caller.at_all("RemoveModel", [request] * cluster.n)] == [1] * cluster.n
    assert not path.exists()
    assert [a.version for a in caller.deploy(PROGRAM, WEIGHTS)] == [1] * cluster.n
    assert right(caller.infer(X))


# --- failures after something was spent: a new epoch, and the next request succeeds ----------------------------------


def test_a_party_that_dies_in_the_middle_of_a_request(cluster: InProcess, caller: Caller) -> None:
    gate = Gate(cluster.parties[1].lane)
    running = later(lambda: caller.infer(X))
    assert gate.reached.wait(30)
    wait = cluster.new_epoch()
    cluster.crash(1, gate.open.set)
    answers = running.result(60)
    assert all(isinstance(a, AbortedError | UnavailableError) for i, a in enumerate(answers) if i != 1), answers
    cluster.start_party(1)
    wait()
    assert right(caller.infer(X))


def test_a_dealer_that_dies_while_it_is_needed(cluster: InProcess, caller: Caller) -> None:
    gate = Gate(cluster.parties[0].lane, "deal")
    running = later(lambda: caller.infer(X))
    assert gate.reached.wait(30)
    wait = cluster.new_epoch()
    cluster.stop_dealer()
    gate.open.set()
    answers = running.result(60)
    assert all(isinstance(a, UnavailableError) for a in answers), answers
    cluster.start_dealer()
    wait()
    assert right(caller.infer(X))


def test_a_dealer_that_restarts_between_requests_goes_unnoticed(cluster: InProcess, caller: Caller) -> None:
    wait = cluster.new_epoch()
    cluster.stop_dealer()
    cluster.start_dealer()
    wait()
    assert right(caller.infer(X))


def test_who_waits_when_the_epoch_ends_is_answered_at_once(cluster: InProcess, caller: Caller) -> None:
    gate = Gate(cluster.parties[1].lane)
    running = later(lambda: caller.infer(X))
    assert gate.reached.wait(30)
    waiting = [later(lambda: caller.infer(X)) for _ in range(2)]
    wait_for(lambda: all(len(p.inbox) == 3 for p in cluster.parties.values()))
    wait = cluster.new_epoch()
    cluster.stop_dealer()
    gate.open.set()
    assert kinds(running.result(20)) == ["InferResponse"] * cluster.n
    assert [kinds(one.result(20)) for one in waiting] == [["AbortedError"] * cluster.n] * 2
    cluster.start_dealer()
    wait()
    assert right(caller.infer(X))


@pytest.mark.parametrize("where", [0, 1])
def test_a_failure_in_the_middle_of_a_protocol_ends_the_epoch(
    cluster: InProcess, caller: Caller, where: int, caplog: pytest.LogCaptureFixture
) -> None:
    by = cluster.parties[where].lane._by
    real = by.execute

    def broken(*_: Any, **__: Any) -> Any:
        by.execute = real  # type: ignore[method-assign]
        raise RuntimeError("canary value")

    by.execute = broken  # type: ignore[method-assign]
    wait = cluster.new_epoch()
    answers = caller.infer(X)
    assert isinstance(answers[where], ProtocolError)
    assert all(isinstance(a, AbortedError) for i, a in enumerate(answers) if i != where)
    assert "canary" not in str(answers) + caplog.text
    wait()
    assert right(caller.infer(X))


def test_a_party_that_hangs_is_given_up_on(tmp_path: Path) -> None:

    with InProcess(tmp_path, 2, Limits(step_timeout_s=2, connect_timeout_s=5)) as cluster:
        caller = cluster.caller()
        caller.deploy(PROGRAM, WEIGHTS)
        gate = Gate(cluster.parties[1].lane)
        wait = cluster.new_epoch()
        answers = caller.infer(X, timeout=6)
        assert isinstance(answers[0], AbortedError) and "2 s that party 0 allows" in str(answers[0])
        gate.open.set()
        wait()
        assert right(caller.infer(X))


def test_a_client_s_short_deadline_does_not_end_the_epoch(cluster: InProcess, caller: Caller) -> None:
    gate = Gate(cluster.parties[1].lane)
    epoch = cluster.parties[0].former.current
    answers = caller.infer(X, timeout=0.5)
    assert kinds(answers) == ["DeadlineError"] * cluster.n
    gate.open.set()
    assert right(caller.infer(X))
    assert cluster.parties[0].former.current is epoch


def test_stopping_lets_the_running_request_finish(cluster: InProcess, caller: Caller) -> None:
    gates = [Gate(cluster.parties[i].lane) for i in range(cluster.n)]
    running = later(lambda: caller.infer(X))
    assert all(gate.reached.wait(30) for gate in gates)
    waiting = later(lambda: caller.infer(X))
    wait_for(lambda: all(len(p.inbox) == 2 for p in cluster.parties.values()))
    stopping = [later(p.stop) for p in cluster.parties.values()]
    wait_for(lambda: all(p.lane._stopping.is_set() for p in cluster.parties.values()))
    for gate in gates:
        gate.open.set()
    assert right(running.result(30))
    assert all(isinstance(a, UnavailableError) for a in waiting.result(30))
    for one in stopping:
        one.result(30)
    cluster.parties.clear()


# --- deploys that break off ------------------------------------------------------------------------------------------


def masked_weights(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.Tensor]]:
    """Every F that any party opens from now on."""
    seen: list[tuple[str, torch.Tensor]] = []

    def noted(name: str, share: torch.Tensor, masked: torch.Tensor, frac_bits: int) -> Weight:
        if masked.device.type == "cpu":
            seen.append((name, masked.clone()))
        return Weight(name, share, masked, frac_bits)

    monkeypatch.setattr(linear_module, "Weight", noted)
    return seen


def test_a_deploy_killed_after_f_was_opened_and_repeated_uses_another_mask(
    cluster: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F' - F must not be W' - W, which it would be under one B."""
    caller, seen = cluster.caller(), masked_weights(monkeypatch)
    other = random_weights(PROGRAM, 1)
    gate = Gate(cluster.parties[1].lane, "vote", skip=6)  # the last vote, after F
    running = later(lambda: caller.deploy(PROGRAM, WEIGHTS))
    assert gate.reached.wait(30)
    first = {name: f for name, f in seen}
    assert set(first) == {"w0", "w1"}
    wait = cluster.new_epoch()
    cluster.crash(0)
    gate.open.set()
    assert not [a for a in running.result(60) if not isinstance(a, MpcInferError)]
    cluster.start_party(0)
    wait()
    seen.clear()
    again = caller.deploy(PROGRAM, other)
    assert len({a.version for a in again}) == 1
    second = {name: f for name, f in seen}
    for name in first:
        difference = (second[name] - first[name]) - (other[name] - WEIGHTS[name])
        assert (difference != 0).all()
        assert (second[name] != first[name]).all()
    assert right(caller.infer(X), X, other)


def test_f_is_opened_again_under_another_mask_in_every_epoch(
    cluster: InProcess, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = masked_weights(monkeypatch)
    values: list[torch.Tensor] = []
    for breaks in (lambda: cluster.crash(1), cluster.stop_dealer, lambda: None):
        caller.infer(X)
        caller.infer(X)
        opened = [f for name, f in seen if name == "w0"]
        seen.clear()
        if values:
            assert len(opened) == cluster.n  # once per party, for both requests
        if opened:
            assert all(torch.equal(f, opened[0]) for f in opened)
            values.append(opened[0])
        wait = cluster.new_epoch()
        breaks()
        if cluster.dealer is None:
            cluster.start_dealer()
        elif 1 not in cluster.parties:
            cluster.start_party(1)
        else:
            break
        wait()
    assert len(values) == 2
    words = [int(w) for f in values for w in f.reshape(-1)]
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("dies", [0, 1])
@pytest.mark.parametrize("skip", range(1, 7))
def test_a_deploy_that_breaks_off_anywhere_is_on_all_parties_or_on_none(
    cluster: InProcess, dies: int, skip: int
) -> None:
    """The party is killed before its vote number `skip` (from 0: the request, the version, nonces, commit, ...)."""
    caller = cluster.caller()
    gate = Gate(cluster.parties[dies].lane, "vote", skip=skip)
    running = later(lambda: caller.deploy(PROGRAM, WEIGHTS))
    assert gate.reached.wait(30)
    wait = cluster.new_epoch()
    cluster.crash(dies, gate.open.set)
    assert all(isinstance(a, MpcInferError) for a in running.result(60))
    cluster.start_party(dies)
    wait()
    held = [[m.id for m in cluster.parties[i].catalogue.models()] for i in range(cluster.n)]
    at_rest = [f.partition("/")[2].partition("/")[2] for f in cluster.files() if "deployments" in f or "staging" in f]
    assert all(h == held[0] for h in held)
    assert sorted(at_rest) == sorted([f"deployments/{i.hex()}.mpc" for i in held[0]] * cluster.n) or sorted(
        at_rest
    ) == sorted([f"{i.hex()}.mpc" for i in held[0]] * cluster.n)
    assert [a.version for a in caller.deploy(PROGRAM, WEIGHTS)] == [len(held[0]) + 1] * cluster.n
    assert right(caller.infer(X))


@pytest.mark.parametrize("unsure", [0, 1])
def test_a_party_that_could_not_confirm_a_deploy_does_so_in_the_next_epoch(cluster: InProcess, unsure: int) -> None:
    caller = cluster.caller()
    catalogue = cluster.parties[unsure].catalogue
    real = catalogue.confirm

    def failing(_: Any) -> None:
        catalogue.confirm = real  # type: ignore[method-assign]
        raise StoreError("the disk is full")

    catalogue.confirm = failing  # type: ignore[method-assign]
    wait = cluster.new_epoch()
    answers = caller.deploy(PROGRAM, WEIGHTS)
    assert isinstance(answers[unsure], StoreError)
    wait()
    assert right(caller.infer(X))
    assert not [f for f in cluster.files() if f.endswith(".new")]


# --- nothing is used twice -------------------------------------------------------------------------------------------


def test_no_mask_and_no_opening_ever_repeats(
    cluster: InProcess, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same model, same input, through restarts in the middle of requests: 64-bit words drawn and opened are all new."""
    drawn: dict[int, list[int]] = {}
    opened: list[int] = []
    real_draw, real_exchange = Tape.draw, stepping._exchange
    owner: dict[int, int] = {}

    def words(tensor: torch.Tensor) -> list[int]:
        return [int(w) for w in tensor.reshape(-1)] if tensor.dtype == torch.int64 else []

    def draw(tape: Tape, name: str, item: Any) -> Any:
        shares = real_draw(tape, name, item)
        index = owner[threading.get_ident()]
        for field, declared in item.free().items():
            if declared.ring.bits == 64:
                drawn.setdefault(index, []).extend(words(shares[field]))
        return shares

    def exchange(epoch: Any, batch: Any, sealed: Any) -> Any:
        answers = real_exchange(epoch, batch, sealed)

        def noted() -> list[torch.Tensor]:
            values = answers()
            if epoch.mesh.index == 0:
                for opening, value in zip(batch, values, strict=True):
                    if opening.ring.bits == 64:
                        opened.extend(words(value))
            return values

        return noted

    real_execute = Stepping.execute

    def execute(by: Stepping, *args: Any, **options: Any) -> Any:
        owner[threading.get_ident()] = by.index
        return real_execute(by, *args, **options)

    monkeypatch.setattr(Tape, "draw", draw)
    monkeypatch.setattr(stepping, "_exchange", exchange)
    monkeypatch.setattr(Stepping, "execute", execute)
    epochs = set()
    for breaks in ("party", "dealer", "nothing"):
        assert right(caller.infer(X))
        epoch = cluster.parties[0].former.current
        assert epoch is not None
        epochs.add(epoch.id)
        wait = cluster.new_epoch()
        if breaks == "nothing":
            break
        gate = Gate(cluster.parties[cluster.n - 1].lane)
        running = later(lambda: caller.infer(X))
        assert gate.reached.wait(30)
        if breaks == "party":
            cluster.crash(cluster.n - 1, gate.open.set)
            cluster.start_party(cluster.n - 1)
        else:
            gate.open.set()
            cluster.stop_dealer()
            cluster.start_dealer()
        running.result(60)
        wait()
    assert len(epochs) == 3 and len(drawn) == cluster.n
    everything = [w for index in drawn for w in drawn[index]] + opened
    assert len(everything) > 500
    assert len(set(everything)) == len(everything)


def test_what_is_spent_is_what_was_dealt(cluster: InProcess, caller: Caller) -> None:
    before = dealt(cluster)
    assert all(right(caller.infer(X)) for _ in range(3))
    # a tape is in the pool as soon as it is asked for
    wait_for(lambda: ready(cluster) and dealt(cluster) >= before + 3 + READY)
    assert dealt(cluster) == before + 3 + READY
    assert cluster.dealer is not None and cluster.dealer._session is not None
    assert not cluster.dealer._session.tapes
