"""Streams between parties over real gRPC servers on 127.0.0.1: order, chunks, ends, and honest counting."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from mpcinfer.errors import AbortedError, ProtocolError
from mpcinfer.wire import direct, mesh
from mpcinfer.wire.direct import Listener
from mpcinfer.wire.frames import HEADER
from mpcinfer.wire.mesh import CONTROL, HELLO, OPENING, Link, Mesh
from mpcinfer.wire.v1 import mesh_pb2, mesh_pb2_grpc
from tests.inprocess import Keys

MIB = 1 << 20
Pair = tuple[Link, Link]


class Acceptor(mesh_pb2_grpc.MeshServiceServicer):
    """Takes in streams; the first message says from whom."""

    def __init__(self) -> None:
        self.links: dict[int, Link] = {}
        self.ended = threading.Event()
        self.arrived = threading.Condition()

    def Connect(self, request_iterator: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        peer = int(dict(context.invocation_metadata()).get("peer", "0"))
        link, outgoing = mesh.accept(peer, request_iterator, context, self.ended.set)
        with self.arrived:
            self.links[peer] = link
            self.arrived.notify_all()
        yield from outgoing

    def link(self, peer: int) -> Link:
        with self.arrived:
            assert self.arrived.wait_for(lambda: peer in self.links, 20)
        return self.links[peer]


class Network:
    """Servers of parties 1 to n - 1, and the channels to them."""

    def __init__(self) -> None:
        self._servers: list[grpc.Server] = []
        self._channels: list[grpc.Channel] = []

    def acceptor(self) -> tuple[Acceptor, int, grpc.Server]:
        acceptor = Acceptor()
        server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
        mesh_pb2_grpc.add_MeshServiceServicer_to_server(acceptor, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        self._servers.append(server)
        return acceptor, port, server

    def dial(self, own: int, peer: int, port: int, on_end: Callable[[], None] = lambda: None) -> Link:
        def named(continuation: Any, details: Any, requests: Any) -> Any:
            return continuation(details._replace(metadata=(("peer", str(own)),)), requests)

        class Named(grpc.StreamStreamClientInterceptor):
            intercept_stream_stream = staticmethod(named)

        channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self._channels.append(channel)
        return mesh.dial(peer, grpc.intercept_channel(channel, Named()), on_end)

    def pair(self) -> Pair:
        acceptor, port, _ = self.acceptor()
        dialler = self.dial(0, 1, port)
        return dialler, acceptor.link(0)

    def go_direct(self, dialler: Link, acceptor: Link, keys: Keys) -> None:
        """Openings of this pair travel over direct connections from now on."""
        own, peer = acceptor.peer, dialler.peer
        listener = Listener("127.0.0.1:0", keys.cluster, keys.identity(f"party/{peer}"))
        token = listener.offer(f"party/{own}")
        identity = keys.identity(f"party/{own}")
        dialler.use(direct.dial(keys.cluster.parties[peer], listener.port, token, keys.cluster, identity))
        acceptor.use(listener.take(token, 10))
        listener.close()

    def meshes(self, n: int) -> list[Mesh]:
        links: list[dict[int, Link]] = [{} for _ in range(n)]
        acceptors = [self.acceptor() for _ in range(n)]
        for low in range(n):
            for high in range(low + 1, n):
                links[low][high] = self.dial(low, high, acceptors[high][1])
                links[high][low] = acceptors[high][0].link(low)
        return [Mesh(i, links[i]) for i in range(n)]

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        for server in self._servers:
            server.stop(0).wait(10)


@pytest.fixture
def network() -> Iterator[Network]:
    made = Network()
    yield made
    made.close()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"), 5)


@pytest.fixture(params=["grpc dialler", "grpc acceptor", "direct dialler", "direct acceptor"])
def ends(request: pytest.FixtureRequest, network: Network, keys: Keys) -> Pair:
    """Two ends of a link; the first is the one that acts in the test, whichever way the stream was opened."""
    pair = network.pair()
    if "direct" in request.param:
        network.go_direct(*pair, keys)
    return pair if "dialler" in request.param else (pair[1], pair[0])


def at_once(*work: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result(60) for future in [pool.submit(w) for w in work]]


def test_messages_arrive_in_order_in_both_directions(ends: Pair) -> None:
    here, there = ends
    sent = [bytes([i % 251]) * (i * 37 % 900) for i in range(300)]
    for i, payload in enumerate(sent):
        here.send(CONTROL if i % 3 else OPENING, payload)
        there.send(OPENING, payload[::-1])
    assert [there.receive(CONTROL if i % 3 else OPENING) for i in range(300)] == sent
    assert [here.receive(OPENING) for _ in range(300)] == [p[::-1] for p in sent]


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, MIB + 1, 7 * MIB // 2])
def test_a_message_of_any_size_arrives_whole_in_frames_of_at_most_a_mebibyte(ends: Pair, size: int) -> None:
    here, there = ends
    payload = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    here.send(OPENING, payload)
    assert there.receive(OPENING) == payload
    here.send(OPENING, b"next")
    assert there.receive(OPENING) == b"next"
    frames = max(1, -(-size // MIB))
    first = int(here._openings is not here._grpc)
    assert here._openings.sent - first == frames + 1 == there._openings.received - first
    assert size < here.bytes_sent - 4 < size + 25 * (frames + 1)


def put(link: Link, sequence: int, kind: int = OPENING, **fields: Any) -> None:
    """A frame of any content, where openings travel."""
    message = link._wrap(frame=mesh_pb2.Frame(sequence=link._openings.sent + sequence, kind=kind, **fields))  # type: ignore[arg-type]
    if link._direct is None:
        link._outgoing.put(message)
    else:
        raw = message.SerializeToString()
        link._direct.put(HEADER.pack(0, len(raw)), raw)


@pytest.mark.parametrize(
    ("sequence", "kind"),
    [(1, OPENING), (2**40, OPENING), (0, CONTROL), (0, HELLO), (0, mesh_pb2.FRAME_KIND_UNSPECIFIED)],
    ids=["gap", "far", "control", "hello", "unspecified"],
)
def test_a_frame_out_of_order_ends_the_stream(ends: Pair, sequence: int, kind: int) -> None:
    here, there = ends
    put(here, sequence, kind, payload=b"secret-canary")
    with pytest.raises(ProtocolError) as caught:
        there.receive(OPENING)
    assert "canary" not in str(caught.value)
    with pytest.raises(AbortedError):
        here.receive(OPENING)
    assert here.broken.wait(10) and there.broken.wait(10)


def test_a_repeated_and_a_swapped_frame_end_the_stream(network: Network) -> None:
    for order in ((0, 0), (1, 0)):
        here, there = network.pair()
        for sequence in order:
            put(here, sequence)
        with pytest.raises(ProtocolError):
            there.receive(OPENING)
            there.receive(OPENING)


def test_another_kind_inside_a_message_ends_the_stream(ends: Pair) -> None:
    here, there = ends
    put(here, 0, more=True, payload=b"a")
    put(here, 1, CONTROL, payload=b"b")
    with pytest.raises(ProtocolError):
        there.receive(OPENING)


@pytest.mark.parametrize("who", ["own end", "other end"])
def test_close_wakes_whoever_waits(ends: Pair, who: str) -> None:
    here, there = ends
    threading.Timer(0.3, here.close).start()
    waiting = here if who == "own end" else there
    began = time.monotonic()
    with pytest.raises(AbortedError) as caught:
        waiting.receive(OPENING)
    assert time.monotonic() - began < 20
    assert f"party {waiting.peer}" in str(caught.value) and "again" in str(caught.value)
    here.close()
    with pytest.raises(AbortedError):
        there.receive(OPENING)


def test_the_end_of_a_stream_is_told_to_both_owners(network: Network) -> None:
    acceptor, port, server = network.acceptor()
    told = threading.Event()
    dialler = network.dial(0, 1, port, told.set)
    accepted = acceptor.link(0)
    assert not told.is_set() and not acceptor.ended.is_set()
    server.stop(0).wait(10)
    assert told.wait(20) and acceptor.ended.wait(20)
    assert dialler.broken.is_set() and accepted.broken.is_set()
    with pytest.raises(AbortedError):
        dialler.receive(OPENING)


def test_dialling_where_nobody_listens_is_an_end_like_any_other(network: Network) -> None:
    _, port, server = network.acceptor()
    server.stop(0).wait(10)
    link = network.dial(0, 1, port)
    with pytest.raises(AbortedError):
        link.receive(HELLO)


def test_finish_lets_what_was_sent_arrive(network: Network, ends: Pair) -> None:
    here, there = ends
    payload = bytes(6 * MIB)
    here.send(OPENING, payload)
    finishing = Mesh(0, {1: here})
    received, _ = at_once(lambda: there.receive(OPENING), lambda: finishing.finish(5))
    assert received == payload
    with pytest.raises(AbortedError):
        there.receive(OPENING)


@pytest.mark.parametrize("transport", ["grpc", "direct"])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_an_exchange_gives_everybody_everything_once(network: Network, keys: Keys, n: int, transport: str) -> None:
    meshes = network.meshes(n)
    if transport == "direct":
        for low in range(n):
            for high in range(low + 1, n):
                network.go_direct(meshes[low].links[high], meshes[high].links[low], keys)
    payloads = [bytes([i]) * (100 * i + 1) for i in range(n)]
    results = at_once(*(lambda m=m: m.exchange(payloads[m.index]) for m in meshes))
    for i, received in enumerate(results):
        assert received == {j: payloads[j] for j in range(n) if j != i}
    at_once(*(lambda m=m: m.exchange(b"vote", CONTROL) for m in meshes))
    for i, m in enumerate(meshes):
        assert (m.parties, m.rounds, m.broken) == (n, 1, False)
        assert 0 < m.bytes_sent - (n - 1) * (len(payloads[i]) + 4) <= (n - 1) * 2 * 20
    meshes[0].announce(b"step")
    assert [m.links[0].receive(CONTROL) for m in meshes[1:]] == [b"step"] * (n - 1)


def test_one_closed_mesh_breaks_the_round_for_all(network: Network) -> None:
    meshes = network.meshes(3)
    meshes[2].close()

    def attempt(m: Mesh) -> str:
        try:
            m.exchange(b"x")
            m.exchange(b"y")
        except AbortedError:
            m.close()
            return "aborted"
        return "finished"

    assert at_once(*(lambda m=m: attempt(m) for m in meshes[:2])) == ["aborted"] * 2
    assert all(m.broken for m in meshes)


def test_the_watchdog_ends_a_step_that_hangs_and_only_that(network: Network) -> None:
    meshes = network.meshes(2)
    meshes[0].limited(0.2).cancel()
    time.sleep(0.4)
    assert not meshes[0].broken
    meshes[0].limited(0.2)
    with pytest.raises(AbortedError):
        meshes[0].exchange(b"x")
        meshes[0].exchange(b"nobody answers")


COUNT = """
import fcntl, socket, struct, sys, tempfile
from concurrent import futures
from pathlib import Path

with socket.socket() as s:  # bring the loopback interface up
    request = struct.pack("16sh", b"lo", 0x1 | 0x40)
    fcntl.ioctl(s, 0x8914, request)

import grpc
from mpcinfer.wire import channel, mesh
from mpcinfer.wire.mesh import OPENING, Mesh
from mpcinfer.wire.v1 import mesh_pb2_grpc
from tests.inprocess import Keys
from tests.wire.test_mesh import Acceptor, at_once

keys = Keys(Path(tempfile.mkdtemp()), 2)
acceptor = Acceptor()
server = grpc.server(futures.ThreadPoolExecutor(4), options=channel.server_options())
mesh_pb2_grpc.add_MeshServiceServicer_to_server(acceptor, server)
endpoint = keys.cluster.parties[1]
channel.bind(server, endpoint.address, channel.server_credentials(keys.identity("party/1"), keys.cluster))
server.start()
opened = channel.connect(endpoint, keys.cluster, keys.identity("party/0"), timeout=20)
meshes = [Mesh(0, {1: mesh.dial(1, opened, lambda: None)}), Mesh(1, {0: acceptor.link(0)})]

def carried():
    line = next(x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])

def exchange(size):
    at_once(*(lambda m=m: m.exchange(bytes(size)) for m in meshes))

exchange(1)
for size in (1 << 16, 1 << 18, 1 << 20, 5 << 20):
    before, counted = carried(), sum(m.bytes_sent for m in meshes)
    for _ in range(max(4, (4 << 20) // size)):
        exchange(size)
    print(size, sum(m.bytes_sent for m in meshes) - counted, carried() - before)
opened.close()
server.stop(0).wait(10)
"""


def test_bytes_counted_are_those_on_the_wire() -> None:
    """In a network namespace of its own, where nobody else's bytes are counted."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rn", "true"], capture_output=True).returncode:
        pytest.skip("no network namespace of one's own here")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [unshare, "-rn", sys.executable, "-c", COUNT], cwd=root, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    lines = [list(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(lines) == 4
    for size, counted, carried in lines:
        assert abs(carried - counted) < 0.05 * carried, (size, counted, carried)
