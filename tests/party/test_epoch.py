"""Parties and dealer find each other, agree on who they are, and begin anew when anything breaks."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from mpcinfer.config import PROTOCOL_VERSION, Cluster, Limits
from mpcinfer.errors import AbortedError, AgreementError, ForbiddenError, UnavailableError
from mpcinfer.party.server import Party
from mpcinfer.wire import channel, mesh
from mpcinfer.wire.v1 import mesh_pb2, mesh_pb2_grpc
from tests.inprocess import InProcess, Keys, free_ports, mlp, plain, random_weights, reveal, wait_for


@pytest.fixture(params=[2, 3], ids="n={}".format)
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[InProcess]:
    with InProcess(tmp_path, request.param) as running:
        yield running


def keys_of(cluster: InProcess) -> list[bytes]:
    epochs = [cluster.parties[i].former.current for i in range(cluster.n)]
    return [epoch.key._key for epoch in epochs if epoch is not None]


def test_an_epoch_has_keys_that_each_party_shares_with_the_dealer_alone(cluster: InProcess) -> None:
    assert cluster.dealer is not None and cluster.dealer._session is not None
    assert keys_of(cluster) == [chain._key for chain in cluster.dealer._session.keys]
    assert len(set(keys_of(cluster))) == cluster.n
    epochs = [cluster.parties[i].former.current for i in range(cluster.n)]
    assert len({e.id for e in epochs if e}) == 1
    assert all(e and sorted(e.mesh.links) == [j for j in range(cluster.n) if j != i] for i, e in enumerate(epochs))


def test_every_restart_begins_a_new_epoch_with_other_keys_by_itself(cluster: InProcess) -> None:
    """Nobody asks for anything in between, and nobody else is restarted."""
    seen = set(keys_of(cluster))
    for step in ("dealer", *range(cluster.n)):
        wait = cluster.new_epoch()
        if step == "dealer":
            cluster.stop_dealer()
            wait_for(lambda: all(p.lane.state == "connecting" for p in cluster.parties.values()))
            wait_for(lambda: all("dealer" in p.lane.detail for p in [cluster.parties[0]]))
            cluster.start_dealer()
        else:
            assert isinstance(step, int)
            cluster.crash(step)
            wait_for(lambda: all(p.lane.state == "connecting" for p in cluster.parties.values()))
            cluster.start_party(step)
        wait()
        new = set(keys_of(cluster))
        assert len(new) == cluster.n and not new & seen
        seen |= new


def test_a_party_that_is_down_is_named(tmp_path: Path) -> None:
    keys = Keys(tmp_path, 2, Limits(connect_timeout_s=1))
    party = Party(keys.node("party/0"))
    party.start()
    try:
        wait_for(lambda: "refuses connections" in party.lane.detail)
        assert party.lane.state == "connecting"
        with pytest.raises(UnavailableError, match="party 0 is not connected to all others"):
            party.lane.wait_ready(0.01)
    finally:
        party.stop()


def test_a_higher_party_waits_for_party_0(tmp_path: Path) -> None:
    keys = Keys(tmp_path, 2, Limits(connect_timeout_s=1))
    party = Party(keys.node("party/1"))
    party.start()
    party.stop()
    with pytest.raises(UnavailableError):
        party.lane.wait_ready(0.01)


def other_file(keys: Keys) -> Cluster:
    """The same keys and addresses but for the dealer's."""
    endpoint = replace(keys.cluster.dealer, address=f"127.0.0.1:{free_ports(1)[0]}")
    return replace(keys.cluster, dealer=endpoint)


def test_parties_with_different_cluster_files_say_so(tmp_path: Path) -> None:
    cluster = InProcess(tmp_path, 2, Limits(connect_timeout_s=3))
    try:
        cluster.start_dealer()
        cluster.start_party(0)
        cluster.parties[1] = Party(cluster.keys.node("party/1", other_file(cluster.keys)))
        cluster.parties[1].start()
        wait_for(lambda: "different cluster files" in cluster.parties[0].lane.detail)
        assert [p.lane.state for p in cluster.parties.values()] == ["connecting"] * 2
    finally:
        cluster.stop()


def test_a_dealer_with_another_cluster_file_says_so(tmp_path: Path) -> None:
    cluster = InProcess(tmp_path, 2, Limits(connect_timeout_s=3))
    other = replace(
        cluster.keys.cluster,
        parties=(
            cluster.keys.cluster.parties[0],
            replace(cluster.keys.cluster.parties[1], address=f"127.0.0.1:{free_ports(1)[0]}"),
        ),
    )
    try:
        node = cluster.keys.node("dealer", other)
        cluster.keys.node, kept = (lambda role: node if role == "dealer" else kept(role)), cluster.keys.node  # type: ignore[method-assign,assignment]
        cluster.start_dealer()
        for i in range(2):
            cluster.start_party(i)
        for i in range(2):
            wait_for(lambda i=i: "have different cluster files" in cluster.parties[i].lane.detail)  # type: ignore[misc]
    finally:
        cluster.stop()


# --- what a stream must begin with -------------------------------------------------------------------------------


@pytest.fixture
def dialled(tmp_path: Path) -> Iterator[Any]:
    """dialled(role): a raw stream to party 1, which waits for party 0."""
    keys = Keys(tmp_path, 3, Limits(connect_timeout_s=5))
    party = Party(keys.node("party/1"))
    party.start()
    opened: list[grpc.Channel] = []

    def dial(role: str) -> mesh.Link:
        opened.append(channel.connect(keys.cluster.parties[1], keys.cluster, keys.identity(role), timeout=20))
        return mesh.dial(1, opened[-1], lambda: None)

    dial.keys, dial.party = keys, party  # type: ignore[attr-defined]
    yield dial
    for one in opened:
        one.close()
    party.stop()


def hello(keys: Keys, **changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "cluster_digest": keys.cluster.digest(),
        "index": 0,
        "session": secrets.token_bytes(16),
        "nonce": secrets.token_bytes(32),
    }
    return mesh_pb2.Hello(**{**fields, **changes}).SerializeToString()


@pytest.mark.parametrize(
    "changes",
    [
        {"protocol_version": PROTOCOL_VERSION + 1},
        {"cluster_digest": b"x" * 32},
        {"index": 2},
        {"session": b"short"},
        {"nonce": b"short"},
    ],
    ids=lambda c: next(iter(c)),
)
def test_an_introduction_that_does_not_fit_ends_the_stream(dialled: Any, changes: dict[str, Any]) -> None:
    link = dialled("party/0")
    link.send(mesh.HELLO, hello(dialled.keys, **changes))
    with pytest.raises(AgreementError, match="party 1: "):
        link.receive(mesh.HELLO)
    assert not dialled.party.former.invited()


def test_a_good_introduction_makes_the_party_look_for_the_others(dialled: Any) -> None:
    link = dialled("party/0")
    link.send(mesh.HELLO, hello(dialled.keys))
    wait_for(lambda: "refuses connections" in dialled.party.lane.detail)
    with pytest.raises(AbortedError):  # nobody else is there
        link.receive(mesh.HELLO)
    wait_for(lambda: not dialled.party.former.invited())


@pytest.mark.parametrize("role", ["client/bob", "owner/alice", "dealer", "party/2", "party/1"])
def test_only_lower_parties_may_dial(dialled: Any, role: str) -> None:
    opened = channel.connect(
        dialled.keys.cluster.parties[1], dialled.keys.cluster, dialled.keys.identity(role), timeout=20
    )
    try:
        call = mesh_pb2_grpc.MeshServiceStub(opened).Connect(iter(()), timeout=20)
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        assert type(channel.from_rpc_error(caught.value, "party/1")) is ForbiddenError
    finally:
        opened.close()


def test_party_0_beginning_anew_replaces_what_stands(tmp_path: Path) -> None:
    """Party 0 restarts so fast that its old connections still look alive."""
    program = mlp()
    weights = random_weights(program)
    with InProcess(tmp_path, 2, Limits(connect_timeout_s=3)) as cluster:
        caller = cluster.caller()
        caller.deploy(program, weights)
        old = cluster.parties[1].former.current
        wait = cluster.new_epoch()
        party = cluster.parties[0]
        epoch = party.former.current
        assert old is not None and epoch is not None
        fresh = party.former.form()  # as another process of party 0 would
        wait_for(lambda: old.mesh.broken)
        fresh.close()
        wait()
        x = torch.randn(1, 4)
        assert (reveal(caller.infer(x)) - plain(weights, x)).abs().max() < 1e-3


# --- how openings travel ------------------------------------------------------------------------------------------


def with_transport(keys: Keys, role: str, transport: str) -> Party:
    return Party(replace(keys.node(role), peer_transport=transport))


@pytest.mark.parametrize(
    "transports", [("tls", "tls"), ("grpc", "tls"), ("tls", "grpc"), ("grpc", "grpc")], ids="-".join
)
def test_openings_go_direct_if_both_ends_want_it(tmp_path: Path, transports: tuple[str, str]) -> None:
    cluster = InProcess(tmp_path, 2)
    try:
        cluster.start_dealer()
        for i, transport in enumerate(transports):
            cluster.parties[i] = with_transport(cluster.keys, f"party/{i}", transport)
            cluster.parties[i].start()
        wait_for(lambda: all(p.lane.state == "ready" for p in cluster.parties.values()))
        links = [p.former.current.mesh.links[1 - i] for i, p in cluster.parties.items() if p.former.current]
        assert [link._direct is not None for link in links] == [transports == ("tls", "tls")] * 2
        program = mlp([4, 3])
        weights, x = random_weights(program), torch.ones(1, 4, dtype=torch.float64)
        caller = cluster.caller()
        caller.deploy(program, weights)
        assert (reveal(caller.infer(x)) - plain(weights, x)).abs().max() < 1e-3
    finally:
        cluster.stop()


def test_a_port_that_cannot_be_reached_leaves_grpc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreachable(*_: Any) -> None:
        raise UnavailableError("party/1 cannot be reached on port 1 (TimeoutError)")

    monkeypatch.setattr("mpcinfer.party.epoch.dial", unreachable)
    with InProcess(tmp_path, 2) as cluster:
        epoch = cluster.parties[0].former.current
        assert epoch is not None and epoch.mesh.links[1]._direct is None
        assert "openings go through gRPC" in caplog.text


def test_others_dial_the_advertised_port(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # where nobody listens any more
    cluster = InProcess(tmp_path, 2)
    try:
        cluster.start_dealer()
        cluster.parties[0] = Party(cluster.keys.node("party/0"))
        cluster.parties[1] = Party(replace(cluster.keys.node("party/1"), peer_advertised_port=port))
        for party in cluster.parties.values():
            party.start()
        wait_for(lambda: all(p.lane.state == "ready" for p in cluster.parties.values()))
        assert f"cannot be reached on port {port}" in caplog.text
    finally:
        cluster.stop()
