"""Parties and dealer as processes that stop, die, hang and are sent nonsense: clear errors, nothing half-done.

One cluster serves all tests. Each leaves it as it was: whole, idle, and with the same models.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from torch import nn

from mpcinfer import Client, ModelOwner
from mpcinfer.client import certs
from mpcinfer.client.local import LocalCluster
from mpcinfer.client.status import PartyStatus, cluster_status, party_status
from mpcinfer.errors import (
    AgreementError,
    BusyError,
    DeadlineError,
    DtypeError,
    ForbiddenError,
    IdentityError,
    InputError,
    NotFoundError,
    RangeError,
    ShapeError,
    StoreError,
    UnavailableError,
)
from mpcinfer.wire import channel
from mpcinfer.wire.identity import Identity
from mpcinfer.wire.v1 import mesh_pb2_grpc
from tests.inprocess import Caller, kinds, mlp, random_weights, wait_for

X = torch.linspace(-3, 3, 16).reshape(2, 8)
ERROR = 0.005
WAITING = 3  # requests admitted at a time

pytestmark = pytest.mark.timeout(300)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)).eval()


def big(seed: int) -> nn.Module:
    """One that takes a while to send."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 1200), nn.ReLU(), nn.Linear(1200, 1200), nn.ReLU(), nn.Linear(1200, 5)).eval()


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids=lambda n: f"n={n}")
def local(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A running cluster with the models "m" (version 1) and "other"."""
    cluster = LocalCluster(
        tmp_path_factory.mktemp("faults") / "local",
        parties=request.param,
        owners=["alice", "eve"],
        clients=["bob"],
        # nothing is dealt ahead: every request needs the dealer
        limits={"max_waiting_requests": WAITING, "connect_timeout_s": 5.0, "step_timeout_s": 60.0, "pool_mb": 0},
    )
    try:
        cluster.start()
        with owner(cluster) as alice:
            alice.deploy(network(1), X, name="m")
            alice.deploy(network(2), X, name="other")
        yield cluster
    finally:
        cluster.stop()


def owner(local: LocalCluster, name: str = "alice") -> ModelOwner:
    return ModelOwner.connect(local.cluster_path, f"owner/{name}")


def client(local: LocalCluster) -> Client:
    return Client.connect(local.cluster_path, "client/bob")


def identity(local: LocalCluster, role: str) -> Identity:
    stem = local.identity(role)
    return Identity.load(f"{stem}.key", f"{stem}.pem")


def raw(local: LocalCluster, role: str = "client/bob") -> Caller:
    return Caller(local.cluster, identity(local, role))


def works(local: LocalCluster, name: str = "m", seed: int = 1, version: int = 0) -> bool:
    with client(local) as bob, torch.no_grad():
        return bool((bob.infer(name, X, version=version) - network(seed)(X)).abs().max() < ERROR)


def files(local: LocalCluster) -> list[str]:
    """What the parties' stores hold."""
    found = (path for index in range(local.cluster.n) for path in store(local, index).rglob("*"))
    return sorted(str(path.relative_to(local.directory)) for path in found if path.is_file() and path.name != "lock")


def store(local: LocalCluster, index: int) -> Path:
    return local.directory / f"party-{index}-store"


def status(local: LocalCluster) -> list[PartyStatus]:
    with client(local) as bob:
        return bob.status()


@pytest.fixture
def cluster(local: LocalCluster) -> Iterator[LocalCluster]:
    """The cluster; after the test it must be as before it."""
    before = files(local)
    yield local
    for role in local.logs:
        local.check()
        os.kill(local.pid(role), signal.SIGCONT)
    wait_for(lambda: all((s.state, s.requests_waiting) == ("ready", 0) for s in status(local)))
    assert files(local) == before
    assert all([(m.name, m.version) for m in s.models] == [("m", 1), ("other", 1)] for s in status(local))
    assert works(local)


@contextmanager
def stopped(local: LocalCluster, role: str) -> Iterator[None]:
    """While the process of a role does not run (for less than the 15 s after which others give it up)."""
    os.kill(local.pid(role), signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(local.pid(role), signal.SIGCONT)


def later(work: Any, *args: Any) -> Future[Any]:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work, *args)
    pool.shutdown(wait=False)
    return future


def infer(local: LocalCluster, timeout: float) -> Any:
    with client(local) as bob:
        return bob.infer("m", X, timeout=timeout)


def wait_until_waiting(local: LocalCluster, count: int, parties: range) -> None:
    def waiting() -> bool:
        endpoints = [local.cluster.parties[index] for index in parties]  # the others may be unable to answer
        who = identity(local, "client/bob")
        return all(party_status(local.cluster, who, e, timeout=5).requests_waiting >= count for e in endpoints)

    wait_for(waiting)


# --- processes that stop, die and hang ---------------------------------------------------------------------------


@pytest.mark.slow
def test_graceful_stop_then_a_start_one_by_one(local: LocalCluster) -> None:
    """A running request is finished. Then: party down at start, dealer down at start, models from the store."""
    n = local.cluster.n
    assert works(local)
    with stopped(local, "dealer"):
        running = later(lambda: infer(local, 60))
        wait_until_waiting(local, 1, range(n))
        time.sleep(0.5)
        for index in range(n):
            os.kill(local.pid(f"party/{index}"), signal.SIGTERM)
        time.sleep(0.5)
        assert not running.done()
    with torch.no_grad():
        assert (running.result(60) - network(1)(X)).abs().max() < ERROR
    for index in range(n):
        process = local._processes[f"party/{index}"]
        assert process.wait(30) == 0
        local.kill(f"party/{index}")
    local.kill("dealer")

    local.restart("party/0", ready_timeout=None)
    with pytest.raises(UnavailableError, match="party/1"):
        wait_for(lambda: client(local))
    seen: list[PartyStatus] = []

    def detail(role: str) -> bool:
        seen[:] = cluster_status(local.cluster, identity(local, "client/bob"))
        return seen[0].state == "connecting" and role in seen[0].detail and "refuses connections" in seen[0].detail

    wait_for(lambda: detail("dealer") or detail("party/1"), 120)
    assert seen[1].state == "unreachable"
    for index in range(1, n):
        local.restart(f"party/{index}", ready_timeout=None)
    wait_for(lambda: detail("dealer") and all(s.state == "connecting" for s in seen), 120)
    # whoever connects is told, since the parties can show nobody what they run before they have seen each other
    with pytest.raises(UnavailableError, match="the dealer|dealer at .* refuses connections"), client(local) as bob:
        bob.infer("m", X, timeout=20)
    local.restart("dealer")
    assert works(local) and works(local, "other", 2)


def test_a_party_killed_in_the_middle_of_a_request(cluster: LocalCluster) -> None:
    pids = {role: cluster.pid(role) for role in cluster.logs}
    with client(cluster) as bob:
        bob.infer("m", X, version=1)  # so that it need not ask what "m" is
        os.kill(cluster.pid("party/1"), signal.SIGSTOP)
        began = time.monotonic()
        running = later(lambda: bob.infer("m", X, version=1, timeout=8))
        wait_until_waiting(cluster, 1, range(1))
        time.sleep(0.3)
        cluster.kill("party/1")
        with pytest.raises((UnavailableError, DeadlineError)):
            running.result(30)
        assert time.monotonic() - began < 20
        with pytest.raises(UnavailableError, match="party/1"):
            infer(cluster, 5)
        cluster.restart("party/1")
    assert works(cluster)
    assert {role for role in pids if cluster.pid(role) != pids[role]} == {"party/1"}


@pytest.mark.slow
def test_a_dealer_killed_in_the_middle_of_a_request(cluster: LocalCluster) -> None:
    pids = {role: cluster.pid(role) for role in cluster.logs}
    with stopped(cluster, "dealer"):
        running = later(lambda: infer(cluster, 8))
        wait_until_waiting(cluster, 1, range(1))
        time.sleep(0.3)
        cluster.kill("dealer")
        with pytest.raises((UnavailableError, DeadlineError)):
            running.result(30)
        with pytest.raises(UnavailableError, match="dealer"):
            infer(cluster, 7)
        cluster.restart("dealer")
    assert works(cluster)
    assert {role for role in pids if cluster.pid(role) != pids[role]} == {"dealer"}


@pytest.mark.slow
@pytest.mark.parametrize("role", ["party/1", "party/0"])
def test_a_party_killed_during_an_upload(cluster: LocalCluster, role: str) -> None:
    def progress(sent: int, total: int) -> None:
        assert total > 1 << 23
        if sent >= 1 << 20 and role in cluster._processes:
            cluster.kill(role)

    with owner(cluster) as alice:
        with pytest.raises(UnavailableError):
            alice.deploy(big(1), X, name="big", progress=progress, timeout=60)
        cluster.restart(role)
        wait_for(lambda: not [f for f in files(cluster) if f.endswith((".part", ".new"))])
        assert alice.deploy(big(1), X, name="big").version == 1
        with client(cluster) as bob, torch.no_grad():
            assert (bob.infer("big", X) - big(1)(X)).abs().max() < ERROR
        assert alice.remove("big") == 1


@pytest.mark.slow
def test_a_damaged_store_file(cluster: LocalCluster) -> None:
    with owner(cluster) as alice:
        damaged = alice.deploy(network(3), X, name="spoilt").deployment_id
        cluster.kill("party/1")
        path = store(cluster, 1) / "deployments" / f"{damaged}.mpc"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        cluster.restart("party/1")
        assert works(cluster) and works(cluster, "other", 2)
        answers = raw(cluster).infer(X, "spoilt")
        assert kinds(answers) == ["StoreError"] * cluster.cluster.n
        assert "party 1 is damaged; remove it and deploy it again" in str(answers[0])
        for version in (0, 1):
            with client(cluster) as bob, pytest.raises(StoreError, match="remove it and deploy it again"):
                bob.infer("spoilt", X, version=version)
        assert alice.remove("spoilt") == 1
        assert not path.exists()


@pytest.mark.slow
def test_a_port_in_use_and_a_store_in_use(cluster: LocalCluster) -> None:
    def start(role: str, **environment: str) -> str:
        kind, config = role.partition("/")[0], cluster.directory / f"{certs.file_stem(role)}.toml"
        done = subprocess.run(
            [sys.executable, "-P", "-m", "mpcinfer", kind, "--config", str(config)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2 or "store" in done.stderr and done.returncode == 1
        assert "Traceback" not in done.stderr
        return done.stderr

    with ThreadPoolExecutor(2) as pool:
        port, held = pool.map(start, ["dealer", "party/0"])
    assert f"cannot listen on {cluster.cluster.dealer.address}" in port and "another process" in port
    assert "in use by another process" in held


# --- limits ----------------------------------------------------------------------------------------------------------


def test_beyond_the_admission_limit(cluster: LocalCluster) -> None:
    with stopped(cluster, "dealer"):
        running = [later(lambda: infer(cluster, 60)) for _ in range(WAITING)]
        wait_until_waiting(cluster, WAITING, range(cluster.cluster.n))
        with client(cluster) as bob:
            with pytest.raises(BusyError, match="later"):
                bob.infer("m", X, timeout=5)
        for endpoint in cluster.cluster.parties:
            with channel.connect(endpoint, cluster.cluster, identity(cluster, "client/bob"), timeout=5) as opened:
                health = health_pb2_grpc.HealthStub(opened).Check(health_pb2.HealthCheckRequest(), timeout=5)
                assert health.status == health_pb2.HealthCheckResponse.SERVING
        assert all(s.state == "ready" for s in status(cluster))
    with torch.no_grad():
        assert all((one.result(60) - network(1)(X)).abs().max() < ERROR for one in running)


def test_a_deadline_that_is_too_short(cluster: LocalCluster) -> None:
    with client(cluster) as bob:
        assert bob.infer("m", X).shape == (2, 5)
        with stopped(cluster, "dealer"):
            began = time.monotonic()
            with pytest.raises(DeadlineError):
                bob.infer("m", X, timeout=1)
            assert time.monotonic() - began < 5
        with torch.no_grad():
            assert (bob.infer("m", X) - network(1)(X)).abs().max() < ERROR


# --- who -------------------------------------------------------------------------------------------------------------


def test_a_client_is_no_party_and_a_party_without_the_pinned_key_is_nobody(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    endpoint = cluster.cluster.parties[1]
    with channel.connect(endpoint, cluster.cluster, identity(cluster, "client/bob"), timeout=20) as opened:
        call = mesh_pb2_grpc.MeshServiceStub(opened).Connect(iter(()), timeout=20)
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        assert type(channel.from_rpc_error(caught.value, "party/1")) is ForbiddenError
    key, request = certs.request(tmp_path, "local", "party/0")
    signed = certs.sign(cluster.directory, request, "party/0", tmp_path / "party-0.pem")
    impostor = Identity.load(key, signed)
    with pytest.raises(IdentityError):
        channel.connect(endpoint, cluster.cluster, impostor, timeout=20)
    # one who does not check it as we do gets no further
    hidden = grpc.ssl_channel_credentials(cluster.cluster.ca_pem, impostor.key_pem, impostor.cert_pem)
    options = [("grpc.ssl_target_name_override", "party-1.mpcinfer")]
    with grpc.secure_channel(endpoint.address, hidden, options=options) as opened:
        call = mesh_pb2_grpc.MeshServiceStub(opened).Connect(iter(()), timeout=20)
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        assert type(channel.from_rpc_error(caught.value, "party/1")) is IdentityError
    # and without any certificate of this cluster nobody is talked to at all
    with socket.create_connection(("127.0.0.1", int(endpoint.address.partition(":")[2])), timeout=20) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
        plain.settimeout(20)
        assert b"HTTP" not in plain.recv(1000)


def test_another_cluster_file(cluster: LocalCluster) -> None:
    dealer = replace(cluster.cluster.dealer, address="127.0.0.1:1")
    with pytest.raises(AgreementError, match="another cluster file"):
        Client.connect(replace(cluster.cluster, dealer=dealer), identity(cluster, "client/bob"))


def test_versions_owners_and_removal(cluster: LocalCluster) -> None:
    with owner(cluster) as alice, owner(cluster, "eve") as eve:
        assert alice.deploy(network(4), X, name="m").version == 2
        assert works(cluster, "m", 4) and works(cluster, "m", 1, version=1) and works(cluster, "m", 4, version=2)
        with pytest.raises(NotFoundError):
            eve.remove("m")
        assert eve.deploy(network(5), X, name="m").version == 1
        assert works(cluster, "alice/m", 4) and works(cluster, "eve/m", 5)
        with pytest.raises(InputError, match="several owners"):
            works(cluster, "m", 4)
        assert eve.remove("m") == 1
        assert alice.remove("m", 2) == 1
        with pytest.raises(NotFoundError):
            alice.remove("m", 2)
        with pytest.raises(NotFoundError):
            works(cluster, "m", 4, version=2)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_inputs_that_cannot_be(cluster: LocalCluster) -> None:
    with client(cluster) as bob:
        for x, kind in [
            (torch.zeros(2, 9), ShapeError),
            (torch.zeros(8), ShapeError),
            (torch.zeros(0, 8), ShapeError),
            (torch.zeros(2, 8, dtype=torch.complex64), DtypeError),
            (np.array([["a"] * 8]), DtypeError),
            (torch.full((1, 8), torch.nan), RangeError),
            (torch.full((1, 8), torch.inf), RangeError),
            (torch.full((1, 8), 1e30), RangeError),
        ]:
            with pytest.raises(kind):
                bob.infer("m", x)
        for name, version in [("x", 0), ("m", 7)]:
            with pytest.raises(NotFoundError):
                bob.infer(name, X, version=version)
        with torch.no_grad():
            assert (bob.infer("m", X[:1]) - network(1)(X[:1])).abs().max() < ERROR


def test_messages_that_cannot_be(cluster: LocalCluster) -> None:
    caller, n = raw(cluster), cluster.cluster.n
    for change, kind in [
        ({"frac_bits": 15}, "InputError"),
        ({"ring_bits": 32}, "InputError"),
        ({"data": b"x"}, "InputError"),
        ({"seed": b"x"}, "InputError"),
    ]:
        requests = caller.inferences(X)
        for request in requests:
            for name, value in change.items():
                setattr(request.inputs[0], name, value)
        assert kinds(caller.at_all("Infer", requests)) == [kind] * n
    requests = caller.inferences(X)
    for request in requests:
        request.inputs[0].shape[:] = [0, 8]
    assert kinds(caller.at_all("Infer", requests)) == ["ShapeError"] * n
    requests = caller.inferences(X)
    other = caller.inferences(X[:1])
    other[0].request_id = requests[0].request_id
    assert kinds(caller.at_all("Infer", [other[0], *requests[1:]])) == ["AgreementError"] * n
    caller.close()


@pytest.mark.slow
def test_a_corrupted_and_a_truncated_upload(cluster: LocalCluster) -> None:
    caller, program = raw(cluster, "owner/alice"), mlp()
    for cut in (True, False):
        uploads = caller.deploys(program, random_weights(program), "bad")
        chunk = uploads[-1][1].chunk
        uploads[-1][1].chunk = chunk[:-1] if cut else bytes([chunk[0] ^ 1]) + chunk[1:]
        answers = caller.at_all("Deploy", [iter(u) for u in uploads], timeout=30)
        assert kinds(answers) == ["UnavailableError"] * (cluster.cluster.n - 1) + ["UploadError"]
        assert ("truncated" if cut else "corrupted") in str(answers[-1])
    caller.close()


def test_a_request_id_in_use(cluster: LocalCluster) -> None:
    caller = raw(cluster)
    requests = caller.inferences(X)
    with stopped(cluster, "dealer"):
        running = later(lambda: caller.at_all("Infer", requests))
        wait_until_waiting(cluster, 1, range(cluster.cluster.n))
        assert kinds(caller.at_all("Infer", requests)) == ["ConflictError"] * cluster.cluster.n
    assert kinds(running.result(60)) == ["InferResponse"] * cluster.cluster.n
    caller.close()
