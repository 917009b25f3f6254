"""The connection to all parties: who is accepted, which error is raised, and what happens when a party goes away."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from mpcinfer.client import cluster as module
from mpcinfer.client.cluster import Connection
from mpcinfer.client.status import cluster_status, wait_until_ready
from mpcinfer.config import PROTOCOL_VERSION
from mpcinfer.errors import (
    AbortedError,
    AgreementError,
    BusyError,
    DeadlineError,
    ForbiddenError,
    IdentityError,
    MpcInferError,
    ShapeError,
    UnavailableError,
)
from mpcinfer.wire.v1 import party_pb2
from tests.client.fakes import FakeCluster, info


def connect(world: FakeCluster) -> Connection:
    return Connection(world.cluster, world.issue("client/a"), timeout=5)


def remove(connection: Connection, timeout: float = 5.0) -> list[Any]:
    """Some call."""
    request = party_pb2.RemoveModelRequest(request_id=bytes(16), name="m")
    return connection.call("RemoveModel", [request] * connection.cluster.n, timeout=timeout)


# --- connecting ------------------------------------------------------------------------------------------------------


def test_every_party_is_called(worlds: FakeCluster) -> None:
    with connect(worlds) as connection:
        assert [answer.removed for answer in remove(connection)] == [2] * worlds.n
    assert all(len(party.removals) == 1 for party in worlds.parties)


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (
            {"protocol_version": PROTOCOL_VERSION + 1},
            f"speaks protocol version {PROTOCOL_VERSION + 1}, this program version {PROTOCOL_VERSION}",
        ),
        ({"cluster_digest": bytes(32)}, "another cluster file"),
        ({"index": 0}, "says it is party/0 of 2"),
        ({"parties": 3}, "says it is party/1 of 3"),
    ],
)
def test_a_party_that_disagrees_is_not_worked_with(world: FakeCluster, says: dict[str, Any], message: str) -> None:
    world.parties[1].status = says
    with pytest.raises(AgreementError, match=f"party/1 at .*{message}"):
        connect(world)
    states = cluster_status(world.cluster, world.issue("client/a"))
    assert [s.state for s in states] == ["ready", "refused"] and message in states[1].detail
    with pytest.raises(IdentityError, match=message):
        wait_until_ready(world.cluster, world.issue("client/a"), timeout=30)


def test_the_parties_that_cannot_be_reached_are_named(worlds: FakeCluster) -> None:
    worlds.stop_party(0)
    with pytest.raises(UnavailableError, match=r"^party/0 at 127.0.0.1:\d+ refuses connections"):
        connect(worlds)
    for index in range(1, worlds.n):
        worlds.stop_party(index)
    with pytest.raises(UnavailableError) as caught:
        connect(worlds)
    assert all(f"party/{index} at" in str(caught.value) for index in range(worlds.n))


def test_a_party_that_is_another_is_not_worked_with(world: FakeCluster) -> None:
    world.stop_party(1)
    world.members[1] = world.issue("party/1")  # the CA signed it, the cluster file does not pin it
    world.start_party(1)
    with pytest.raises(IdentityError, match="party/1"):
        connect(world)


def test_an_identity_of_another_cluster_is_refused_before_anybody_is_called(world: FakeCluster) -> None:
    stranger = FakeCluster(2)
    stranger.close()
    with pytest.raises(IdentityError, match="not issued by the CA"):
        Connection(world.cluster, stranger.issue("client/a"))


# --- calling ---------------------------------------------------------------------------------------------------------


def failing(world: FakeCluster, errors: dict[int, tuple[float, MpcInferError]]) -> None:
    """Make party I fail RemoveModel after some seconds with an error; the others hang until they are cancelled."""

    def behave(index: int) -> Any:
        def before(method: str) -> None:
            if method != "RemoveModel":
                return
            if index not in errors:
                world.parties[index].cancelled.wait(5)
                raise AbortedError("too late")
            time.sleep(errors[index][0])
            raise errors[index][1]

        return before

    for party in world.parties:
        party.before = behave(party.index)


def test_the_first_error_ends_the_call_everywhere(worlds: FakeCluster) -> None:
    failing(worlds, {1: (0.3, BusyError("full"))})  # later, so that the others have begun
    started = time.monotonic()
    with connect(worlds) as connection:
        with pytest.raises(BusyError, match="party/1 at .*full"):
            remove(connection)
        assert time.monotonic() - started < 2
        assert worlds.parties[0].cancelled.wait(5)


@pytest.mark.parametrize("echo", [AbortedError, UnavailableError, DeadlineError])
def test_the_cause_is_preferred_to_its_echo(worlds: FakeCluster, echo: type[MpcInferError]) -> None:
    echoes = {index: (0.0, echo("another party failed")) for index in range(worlds.n - 1)}
    failing(worlds, {**echoes, worlds.n - 1: (0.1, ShapeError("the cause"))})
    with connect(worlds) as connection, pytest.raises(ShapeError, match=f"party/{worlds.n - 1} at .*the cause"):
        remove(connection)


def test_answers_of_a_party_that_is_far_ahead_are_not_taken_in(world: FakeCluster) -> None:
    others, sent, chunk = threading.Event(), 0, bytes(1 << 18)

    def ahead() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1
            yield chunk

    def slow() -> Iterator[bytes]:
        others.wait(30)
        yield from [chunk] * 30

    world.parties[0].says, world.parties[1].says = slow, ahead
    requests = [party_pb2.VocabularyRequest()] * 2
    with connect(world) as connection, connection.stream("Vocabulary", requests, timeout=60) as (answers, _):
        before = -1
        while sent < module._AHEAD or sent != before:  # until it waits
            before = sent
            time.sleep(0.5)
        assert sent < 300
        others.set()
        assert len(list(answers)) == 30


def test_an_echo_alone_is_raised_after_a_moment(world: FakeCluster) -> None:
    failing(world, {0: (0.0, AbortedError("party 1 failed"))})
    started = time.monotonic()
    with connect(world) as connection, pytest.raises(AbortedError, match="party 1 failed"):
        remove(connection)
    assert time.monotonic() - started < 2


def test_a_party_that_is_gone_is_nearer_to_the_cause_than_one_that_was_left(world: FakeCluster) -> None:
    failing(world, {0: (0.1, AbortedError("party 1 failed"))})
    with connect(world) as connection:
        threading.Timer(0.0, lambda: world.stop_party(1)).start()
        with pytest.raises(UnavailableError, match="party/1") as caught:
            remove(connection)
        assert type(caught.value) is UnavailableError


def test_one_deadline_for_all(world: FakeCluster) -> None:
    failing(world, {})
    started = time.monotonic()
    with connect(world) as connection, pytest.raises(DeadlineError, match="RemoveModel took longer than 0.4 s"):
        remove(connection, timeout=0.4)
    assert time.monotonic() - started < 2


def test_errors_keep_their_class(world: FakeCluster) -> None:
    failing(world, {1: (0.0, ForbiddenError("owners only"))})
    with connect(world) as connection, pytest.raises(ForbiddenError, match="owners only"):
        remove(connection)


def test_closing_ends_calls_in_flight(world: FakeCluster) -> None:
    failing(world, {})
    connection = connect(world)
    threading.Timer(0.2, connection.close).start()
    with pytest.raises(MpcInferError):
        remove(connection)
    with pytest.raises(UnavailableError, match="closed"):
        remove(connection)


# --- parties that go and come back -----------------------------------------------------------------------------------


def test_a_party_that_went_away_and_came_back_is_found_again(world: FakeCluster) -> None:
    with connect(world) as connection:
        world.stop_party(1)
        with pytest.raises(UnavailableError, match="party/1"):
            remove(connection)
        with pytest.raises(UnavailableError, match="refuses connections"):
            remove(connection)
        world.start_party(1)
        assert len(remove(connection)) == 2


def test_a_party_that_comes_back_as_another_is_not(world: FakeCluster) -> None:
    with connect(world) as connection:
        world.stop_party(1)
        genuine, world.members[1] = world.members[1], world.issue("party/1")
        world.start_party(1)
        for _ in range(2):
            with pytest.raises(MpcInferError, match="party/1"):
                remove(connection)
        assert not world.parties[1].removals
        world.stop_party(1)
        world.members[1] = genuine
        world.start_party(1)
        assert len(remove(connection)) == 2


def test_status_never_raises(world: FakeCluster) -> None:
    world.deploy(info("m", [], []))
    world.parties[0].status = {"state": "connecting", "detail": "party 1 is down", "requests_waiting": 3}
    world.stop_party(1)
    first, second = cluster_status(world.cluster, world.issue("owner/o"))
    assert (first.role, first.state, first.detail, first.requests_waiting) == (
        "party/0",
        "connecting",
        "party 1 is down",
        3,
    )
    assert [model.name for model in first.models] == ["m"]
    assert second.state == "unreachable" and "refuses connections" in second.detail


def test_waiting_until_ready(world: FakeCluster) -> None:
    who = world.issue("client/a")
    world.parties[1].status = {"state": "connecting", "detail": "no dealer"}
    with pytest.raises(UnavailableError, match=r"not ready after 0.3 s: party/1 is connecting \(no dealer\)"):
        wait_until_ready(world.cluster, who, timeout=0.3)
    threading.Timer(0.3, world.parties[1].status.clear).start()
    wait_until_ready(world.cluster, who, timeout=10)
    world.stop_party(0)
    with pytest.raises(BusyError):

        def check() -> None:
            raise BusyError("stop waiting")

        wait_until_ready(world.cluster, who, timeout=10, check=check)


def test_a_listing_in_the_middle_of_a_deploy_is_read_again(world: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GRACE", 0.05)
    world.parties[0].models = [info("m", [], [])]
    listed = threading.Event()

    def commit(method: str) -> None:
        if method == "ListModels":
            if listed.is_set():
                world.parties[1].models = world.parties[0].models
            listed.set()

    world.parties[1].before = commit
    with connect(world) as connection:
        assert [model.name for model in connection.models()] == ["m"]
