"""A local cluster: the files it makes, and real parties and a real dealer as processes that come and go."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import mpcinfer
from mpcinfer.client.local import LocalCluster
from mpcinfer.config import Node
from mpcinfer.errors import ConfigError, UnavailableError
from mpcinfer.wire.identity import Identity

# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parties", [2, 3])
def test_it_makes_what_each_process_needs(tmp_path: Path, parties: int) -> None:
    local = LocalCluster(tmp_path / "new", parties=parties, limits={"step_timeout_s": 5.0, "max_waiting_requests": 3})
    roles = [*(f"party/{i}" for i in range(parties)), "dealer"]
    for role in roles:
        node = Node.load(local.directory / f"{role.replace('/', '-')}.toml")
        assert (node.role, node.cluster.digest()) == (role, local.cluster.digest())
        assert (node.limits.step_timeout_s, node.limits.max_waiting_requests) == (5.0, 3)
        Identity.load(node.key_path, node.certificate_path).check(node.cluster)
        assert (node.store is None) == (role == "dealer")
    for role in ("owner/owner", "client/client"):
        stem = local.identity(role)
        Identity.load(f"{stem}.key", f"{stem}.pem").check(local.cluster)
    assert all(stat.S_IMODE(key.stat().st_mode) == 0o600 for key in local.directory.glob("*.key"))
    assert set(local.logs) == set(roles)


def test_it_uses_a_directory_again_and_adds_people(tmp_path: Path) -> None:
    first = LocalCluster(tmp_path, parties=3, clients=["a"])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    second = LocalCluster(tmp_path, clients=["a", "b"])
    assert second.cluster == first.cluster
    assert all(path.read_bytes() == content for path, content in before.items())
    assert (tmp_path / "client-b.pem").exists()
    with pytest.raises(ConfigError, match="a cluster of 3 parties, not 2"):
        LocalCluster(tmp_path, parties=2)


def test_ports(tmp_path: Path) -> None:
    chosen = LocalCluster(tmp_path / "a", base_port=7100).cluster
    assert [e.address for e in (*chosen.parties, chosen.dealer)] == [f"127.0.0.1:{7100 + i}" for i in range(3)]
    free = LocalCluster(tmp_path / "b", parties=5).cluster
    assert len({e.address for e in (*free.parties, free.dealer)}) == 6


def test_ports_of_something_in_between(tmp_path: Path) -> None:
    asked: dict[tuple[str, int], int] = {}

    def via(role: str, port: int) -> int:
        return asked.setdefault((role, port), 40_000 + len(asked))

    chosen = LocalCluster(tmp_path, via=via).cluster
    reached = {port: inner for inner, port in asked.items()}
    assert len(reached) == 5
    for endpoint in (*chosen.parties, chosen.dealer):
        node = Node.load(tmp_path / f"{endpoint.role.replace('/', '-')}.toml")
        role, inner = reached[int(endpoint.address.rpartition(":")[2])]
        assert (node.role, node.listen) == (role, f"127.0.0.1:{inner}") == (endpoint.role, node.listen)
        if role != "dealer":
            assert reached[node.peer_advertised_port] == (role, node.peer_port)
            assert node.peer_port != inner


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    with pytest.raises(ConfigError, match="not empty"):
        LocalCluster(tmp_path)
    with pytest.raises(ConfigError, match="unknown limits: patience"):
        LocalCluster(tmp_path / "new", limits={"patience": 1})


def test_a_temporary_directory_goes_when_it_stops() -> None:
    local = LocalCluster()
    assert local.cluster_path.exists() and stat.S_IMODE(local.directory.stat().st_mode) == 0o700
    assert local.stop() == {}
    assert not local.directory.exists()


# --- processes -------------------------------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    """Whether a process runs (one that has ended but was not waited for does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("cluster")) as started:
        yield started


@pytest.fixture(scope="module")
def model(local: LocalCluster) -> torch.nn.Module:
    """A small network, deployed as "mlp"."""
    network = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
    with mpcinfer.ModelOwner.connect(local.directory) as owner:
        assert owner.deploy(network, torch.zeros(1, 5), name="mlp").version == 1
    return network


def check_answers(local: LocalCluster, model: torch.nn.Module) -> None:
    x = torch.linspace(-3, 3, 20).reshape(4, 5)
    with mpcinfer.Client.connect(local.cluster_path) as client:
        answer = client.infer("mlp", x.numpy())
        cost = client.last_cost
    with torch.no_grad():
        assert np.abs(answer - model(x).numpy()).max() < 0.005
    assert cost is not None and cost["online"]["rounds"] > 0 and cost["offline"]["bytes_sent_by_dealer"] > 0


@pytest.mark.timeout(300)
def test_a_model_is_deployed_and_evaluated(local: LocalCluster, model: torch.nn.Module) -> None:
    check_answers(local, model)
    local.check()
    assert all(alive(local.pid(role)) for role in local.logs)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "role",
    [pytest.param(role, marks=pytest.mark.slow) for role in ("party/0", "party/1", "dealer")],
)
def test_what_was_killed_is_noticed_and_started_again(local: LocalCluster, model: torch.nn.Module, role: str) -> None:
    pid = local.pid(role)
    os.kill(pid, signal.SIGKILL)
    # Its threads end one after the other.
    with pytest.raises(UnavailableError, match=f"(?s){role} was ended by SIGKILL; its log .* ends with:.* listens on"):
        for _ in range(100):
            local.check()
            time.sleep(0.1)
    local.kill(role)
    local.check()  # what was meant to end is nothing to complain about
    local.restart(role)
    assert local.pid(role) != pid
    check_answers(local, model)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_processes_are_asked_to_stop_and_stop_by_themselves(tmp_path: Path) -> None:
    local = LocalCluster(tmp_path)
    local.start()
    pids = [local.pid(role) for role in local.logs]
    assert local.stop() == {"dealer": 0, "party/0": 0, "party/1": 0}
    assert not any(map(alive, pids))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_process_that_cannot_start_is_named_with_its_log(tmp_path: Path) -> None:
    local = LocalCluster(tmp_path)
    port = int(local.cluster.parties[1].address.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(
            UnavailableError, match=rf"(?s)party/1 ended with exit code 2.*cannot listen on 127.0.0.1:{port}"
        ):
            local.start()
    assert local.stop() == {}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_processes_do_not_outlive_whoever_started_them(tmp_path: Path) -> None:
    program = (
        "import sys, time; from mpcinfer.client.local import LocalCluster; local = LocalCluster(sys.argv[1]);"
        "local.start(); print(*(local.pid(role) for role in local.logs), flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(mpcinfer.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, env=environment, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 3
    deadline = time.monotonic() + 30
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))
