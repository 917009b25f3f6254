"""The networks of a benchmark: the loopback device as it is, or slowed down by a relay between the processes."""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mpcinfer.graph.explain import NETWORKS as SLOWER
from mpcinfer.graph.explain import Network

# what `mpcinfer explain` estimates seconds for, so that estimates can be compared
NETWORKS: dict[str, Network | None] = {"loopback": None, "lan": SLOWER["LAN"], "wan": SLOWER["WAN"]}
_PINGS, _PING_BYTES = 60, 64


class Relay:
    """A process that passes connections on as over `network`; see bench_relay.py. A context manager."""

    def __init__(self, network: Network) -> None:
        self.network = network
        arguments = [str(network.bandwidth), str(network.round_trip / 2)]
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("bench_relay.py")), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the benchmark, which still needs it to stop the others
        )

    def route(self, link: str, port: int, listen: int = 0) -> int:
        """The port by which `port` is reached over `link`: one pair of directions, which its other ports share."""
        found: int = self._ask({"link": link, "port": port, "listen": listen})
        return found

    def counted(self) -> dict[tuple[str, int], tuple[int, int]]:
        """Bytes that were passed on to and from each port, by link and port, in all."""
        return {(link, port): (to, back) for link, port, to, back in self._ask({"count": True})}

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def visited(names: Iterable[str], found: dict[str, dict[str, float] | None]) -> Iterator[tuple[str, Network | None]]:
    """Each of these networks; in `found` is then what it was measured to have, None for the loopback device."""
    for name in names:
        network = NETWORKS[name]
        found[name] = measured(network) if network else None
        yield name, network


def measured(network: Network, seconds: float = 0.5) -> dict[str, float]:
    """What a connection through a relay really has: `bandwidth` in bits per second; of round trips, in seconds, the
    median (`round_trip`) and what one in ten is faster than (`fast_round_trip`).

    `seconds`: for how long the connection is kept full. Both its ends are threads of this process, and other work on
    the machine delays them too.
    """
    size = int(network.bandwidth / 8 * seconds)
    with socket.create_server(("127.0.0.1", 0)) as server, Relay(network) as relay:
        threading.Thread(target=_echo, args=[server, size], daemon=True).start()
        port = relay.route("measured", server.getsockname()[1])
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            trips = []
            for _ in range(_PINGS):
                began = time.perf_counter()
                sock.sendall(bytes(_PING_BYTES))
                _receive(sock, _PING_BYTES)
                trips.append(time.perf_counter() - began)
            began = time.perf_counter()
            sock.sendall(bytes(size))
            _receive(sock, 1)
            took = time.perf_counter() - began - network.round_trip
    trips.sort()
    return {
        "round_trip": statistics.median(trips),
        "fast_round_trip": trips[len(trips) // 10],
        "bandwidth": 8 * size / took,
    }


def _echo(server: socket.socket, size: int) -> None:
    """Answers the pings, then takes `size` bytes and says that they are all there."""
    sock, _ = server.accept()
    with sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(_PINGS):
            sock.sendall(_receive(sock, _PING_BYTES))
        _receive(sock, size)
        sock.sendall(b"\1")


def _receive(sock: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        part = sock.recv(min(size - len(found), 1 << 18))
        if not part:
            raise ConnectionError("the other end has closed")
        found += part
    return bytes(found)
