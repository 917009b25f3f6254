"""The networks of scripts/bench: a relay keeps what it promises, and everything a cluster says goes through it."""

from __future__ import annotations

import importlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpcinfer import Client, ModelOwner
from mpcinfer.client.local import LocalCluster
from mpcinfer.graph.explain import Network

ROOT = Path(__file__).parents[1]
FAST = Network(10e9, 0.0)
ATTEMPTS = 8  # other work on this machine delays everything, and nothing makes it faster


@pytest.fixture(scope="module")
def network() -> Iterator[Any]:
    """The module with the networks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield importlib.import_module("bench_network")


def connected(relay: Any, link: str = "link") -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection through the relay."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(("127.0.0.1", relay.route(link, server.getsockname()[1])), timeout=10)
        far, _ = server.accept()
        far.settimeout(10)
        return near, far


def everything(sock: socket.socket) -> bytes:
    """What comes until the other end closes."""
    return b"".join(iter(lambda: sock.recv(65536), b""))


@pytest.mark.slow  # it measures time
@pytest.mark.parametrize(("name", "seconds"), [("lan", 0.2), ("wan", 0.5)])
def test_delay_and_rate_are_those_of_the_network(network: Any, name: str, seconds: float) -> None:
    nominal = network.NETWORKS[name]
    trip, rate = float("inf"), 0.0
    for _ in range(ATTEMPTS):
        found = network.measured(nominal, seconds)
        trip, rate = min(trip, found["fast_round_trip"]), max(rate, found["bandwidth"])
        if trip <= 1.2 * nominal.round_trip and rate >= 0.8 * nominal.bandwidth:
            break
    assert 0.8 * nominal.round_trip <= trip <= 1.2 * nominal.round_trip
    assert 0.8 * nominal.bandwidth <= rate <= 1.2 * nominal.bandwidth


def test_connections_share_a_link_but_not_its_directions(network: Any) -> None:
    """0.1 s worth of bytes twice on one link, and back, and on another link: 0.2 s in all, not 0.4 or 0.1."""
    slow = Network(100e6, 0.0)
    content = os.urandom(1_250_000)
    took: list[float] = []
    with network.Relay(slow) as relay:
        pairs = [connected(relay, link) for link in ("a", "a", "b")]
        sends = [pairs[0][0], pairs[1][0], pairs[1][1], pairs[2][0]]
        receives = [pairs[0][1], pairs[1][1], pairs[1][0], pairs[2][1]]
        began = network.time.perf_counter()

        def receive(sock: socket.socket) -> None:
            assert everything(sock) == content
            took.append(network.time.perf_counter() - began)

        def send(sock: socket.socket) -> None:
            sock.sendall(content)
            sock.shutdown(socket.SHUT_WR)

        threads = [threading.Thread(target=receive, args=[s]) for s in receives]
        threads += [threading.Thread(target=send, args=[s]) for s in sends]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        for sock in (end for pair in pairs for end in pair):
            sock.close()
    assert len(took) == 4
    assert max(took) >= 0.19 and min(took) < 0.19


def test_bytes_arrive_whole_and_are_counted_and_ends_are_passed_on(network: Any) -> None:
    there, back = os.urandom(3_000_000), os.urandom(70_000)
    with network.Relay(Network(400e6, 0.01)) as relay:
        near, far = connected(relay)
        with near, far:
            writer = threading.Thread(target=lambda: (near.sendall(there), near.shutdown(socket.SHUT_WR)))
            writer.start()
            assert everything(far) == there  # and the other direction is still open
            writer.join()
            far.sendall(back)
            far.close()
            assert everything(near) == back
        (counted,) = relay.counted().values()
        assert counted == (len(there), len(back))


def test_a_broken_connection_breaks_at_the_other_end(network: Any) -> None:
    with network.Relay(FAST) as relay:
        near, far = connected(relay)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # closing resets
        far.close()
        with near:
            try:
                assert near.recv(1) == b""
            except ConnectionError:
                pass
        near, far = connected(relay)  # the relay goes on
        with near, far:
            near.sendall(b"x")
            assert far.recv(1) == b"x"


def test_nobody_listening_is_noticed(network: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with network.Relay(FAST) as relay:
        with socket.create_connection(("127.0.0.1", relay.route("link", port)), timeout=10) as near:
            assert everything(near) == b""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_all_that_a_cluster_sends_goes_through_the_relay(network: Any) -> None:
    """Openings to the byte, but for TLS: they are the only traffic on the parties' second ports."""
    x = torch.linspace(-1, 1, 20_000).reshape(1, -1)
    with network.Relay(network.NETWORKS["lan"]) as relay, LocalCluster(parties=3, via=relay.route) as cluster:
        path = cluster.cluster_path
        with ModelOwner.connect(path, cluster.identity("owner/owner")) as owner:
            owner.deploy(nn.ReLU().eval(), x, name="relu")
        with Client.connect(path, cluster.identity("client/client")) as client:
            client.infer("relu", x)
            before = relay.counted()
            client.infer("relu", x)
            cost, after = client.last_cost, relay.counted()
    assert cost is not None
    passed = {key: after[key][0] + after[key][1] - before[key][0] - before[key][1] for key in after}
    by_link: dict[str, list[int]] = {}
    for (link, _), size in passed.items():
        by_link.setdefault(link, []).append(size)
    sent, dealt = cost["online"]["bytes_sent_per_party"] * 3, cost["offline"]["bytes_sent_by_dealer"]
    # the first port that is routed is the second one of a party; nobody dials that of party 0
    openings = sum(by_link[f"party/{i}"][0] for i in range(3))
    assert by_link["party/0"][0] == 0
    assert sent < openings < 1.01 * sent + 1000
    assert dealt < by_link["dealer"][0] < 1.05 * dealt + 10_000
    assert all(min(by_link[f"party/{i}"][1:]) > 0 for i in range(3))
