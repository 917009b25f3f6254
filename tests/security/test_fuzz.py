"""Malformed frames on every RPC, and on the connections of openings: no crash, no hang, no growth, typed errors.

A few seconds each here; MPCINFER_FUZZ_SECONDS each in the slow tier, by default more than ten minutes in all.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import grpc
import hypothesis
import pytest
import torch
from google.protobuf import message_factory
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

import mpcinfer.wire.direct as direct_module
from mpcinfer import errors
from mpcinfer.client.cluster import Connection
from mpcinfer.config import PROTOCOL_VERSION, Limits
from mpcinfer.errors import AbortedError, MpcInferError
from mpcinfer.wire import channel
from mpcinfer.wire.frames import HEADER
from mpcinfer.wire.identity import dns_name
from mpcinfer.wire.mesh import CONTROL, HELLO, OPENING, Link
from mpcinfer.wire.tls import tls_context
from mpcinfer.wire.v1 import dealer_pb2, mesh_pb2, party_pb2, trust_pb2
from tests.decoders_local import captured_decoder, tiny_decoder, token_ids
from tests.inprocess import Caller, InProcess, mlp, plain, random_weights, reveal, wait_for
from tests.party.test_generation import requests
from tests.security.mutations import Draw, disordered, malformed

pytestmark = pytest.mark.timeout(300)

PROGRAM = mlp()
WEIGHTS = random_weights(PROGRAM)
X = torch.linspace(-2, 2, 8).reshape(2, 4)
LIMITS = Limits(
    step_timeout_s=20, connect_timeout_s=5, stop_grace_s=2, max_waiting_requests=16, max_message_mb=8, max_upload_mb=8
)
CALL_SECONDS = 1.5
SLOW_SECONDS = float(os.environ.get("MPCINFER_FUZZ_SECONDS", "150"))
GROWTH = 96 << 20  # of a process in which three parties, a dealer, torch and hypothesis live

SERVICES = {
    service.full_name: service
    for module in (party_pb2, mesh_pb2, dealer_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
}
RPCS = [f"/{name}/{method.name}" for name, service in SERVICES.items() for method in service.methods]
CONNECT = "/mpcinfer.v1.MeshService/Connect"


@dataclass
class Target:
    """A running cluster with a model "m" and a language model "g", and what valid calls look like."""

    cluster: InProcess
    owner: Caller
    client: Connection  # as real ones, it gives up at all parties once one has failed
    templates: dict[str, list[Any]]

    def works(self) -> None:
        """Whether a right request is answered, right, and nothing is left of the others."""
        for left in (2, 1, 0):
            self.cluster.wait_ready(60)
            try:
                y = reveal(self.client.call("Infer", self.owner.inferences(X), timeout=30))
                break
            except errors.UnavailableError:  # an epoch has just ended: it may be sent again
                if not left:
                    raise
        assert float((y - plain(WEIGHTS, X)).abs().max()) < 1e-3
        wait_for(lambda: all(len(p.inbox) == 0 for p in self.cluster.parties.values()))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with InProcess(tmp_path_factory.mktemp("fuzzed"), 2, LIMITS) as cluster:
        owner = cluster.caller()
        assert [a.version for a in owner.deploy(PROGRAM, WEIGHTS)] == [1, 1]
        captured = captured_decoder(tiny_decoder(layers=1))
        assert [a.version for a in owner.deploy(captured.program, dict(captured.weights), "g")] == [1, 1]
        with Connection(cluster.keys.cluster, cluster.keys.identity("client/bob"), timeout=20) as client:
            found = Target(cluster, owner, client, {})
            found.works()
            found.templates = templates(cluster, owner)
            yield found
            found.works()


def templates(cluster: InProcess, owner: Caller) -> dict[str, list[Any]]:
    """A valid message, or those of a stream, for each RPC; an empty one where this test knows nothing of it."""
    epoch = cluster.parties[0].former.current
    assert epoch is not None
    generate = requests(2, token_ids(3), 2)[1]
    generate.model = "g"
    hello = mesh_pb2.Hello(
        protocol_version=PROTOCOL_VERSION,
        cluster_digest=cluster.keys.cluster.digest(),
        session=secrets.token_bytes(16),
        nonce=secrets.token_bytes(32),
    )
    frames = [
        mesh_pb2.Frame(sequence=i, kind=kind, payload=payload)  # type: ignore[arg-type]
        for i, (kind, payload) in enumerate(
            [(HELLO, hello.SerializeToString()), (CONTROL, b"{}"), (OPENING, bytes(64))]
        )
    ]
    caches = dealer_pb2.CacheUse(slot=bytes(16), runs=[0, 3], count=3)
    known: dict[str, list[Any]] = {
        "Infer": [owner.inferences(X)[1]],
        "Generate": [generate],
        "Deploy": owner.deploys(mlp((4, 3, 2)), WEIGHTS, "fuzz")[1],
        "RemoveModel": [party_pb2.RemoveModelRequest(request_id=bytes(16), name="none", version=1)],
        "EndSession": [party_pb2.EndSessionRequest(session=bytes(16))],
        "Vocabulary": [party_pb2.VocabularyRequest(model="g")],
        "Manifest": [party_pb2.ManifestRequest(nonce=bytes(32))],
        "SetGrant": [
            party_pb2.SetGrantRequest(request_id=bytes(16), name="none", grant=trust_pb2.Signed(payload=b"{}"))
        ],
        "RefreshModel": [party_pb2.RefreshModelRequest(request_id=bytes(16), name="none")],
        "Connect": [mesh_pb2.ConnectRequest(frame=frame) for frame in frames],
        "Join": [
            dealer_pb2.JoinRequest(
                session=epoch.id,
                nonce=bytes(32),
                public_key=bytes(range(32)),
                cluster_digest=cluster.keys.cluster.digest(),
                protocol_version=PROTOCOL_VERSION,
            )
        ],
        "Deal": [
            dealer_pb2.DealRequest(
                session=epoch.id, tape=bytes(16), plan_digest=bytes(32), plan=b'{"entries": []}', caches=caches
            )
        ],
        "Forget": [dealer_pb2.ForgetRequest(session=epoch.id, slots=[bytes(16)])],
    }
    return {
        f"/{name}/{method.name}": known.get(method.name) or [message_factory.GetMessageClass(method.input_type)()]
        for name, service in SERVICES.items()
        for method in service.methods
    }


# --- calls ---------------------------------------------------------------------------------------------------------


class Channels:
    """Raw calls, whatever they carry, to each process as each sort of caller."""

    def __init__(self, cluster: InProcess) -> None:
        self._cluster, keys = cluster, cluster.keys
        self._open = {
            (caller, endpoint.role): channel.connect(endpoint, keys.cluster, keys.identity(caller), timeout=20)
            for endpoint in (*keys.cluster.parties, keys.cluster.dealer)
            for caller in ("owner/alice", "owner/eve", "client/bob", "party/0", "dealer")
            if not (endpoint.role == "dealer" and caller == "dealer")
        }

    def close(self) -> None:
        for opened in self._open.values():
            opened.close()

    def call(self, rpc: str, caller: str, to: str, messages: Sequence[bytes]) -> str:
        """What became of a call: "answered", or the class of the error. AssertionError if it is no error of ours."""
        service, _, name = rpc[1:].partition("/")
        method = SERVICES[service].methods_by_name[name]
        opened = self._open.get((caller, to)) or self._open["party/0", to]
        kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
        multi = getattr(opened, kind)(rpc)
        sent = iter(messages) if method.client_streaming else messages[0]
        try:
            answer = multi(sent, timeout=CALL_SECONDS)
            if method.server_streaming:
                for _ in answer:
                    pass
        except grpc.RpcError as error:
            return typed(error)
        return "answered"


def typed(error: Any) -> str:
    """The class of our errors that a failed call names; or of gRPC's own, which refuse what never reaches us."""
    details = error.details() or ""
    assert "unexpected failure" not in details, details
    named = dict(error.trailing_metadata() or ()).get("mpcinfer-error")
    if named:
        assert issubclass(getattr(errors, str(named)), MpcInferError)
        return str(named)
    ours = (
        error.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
        or details.startswith(("Exception deserializing request", "Received message larger", "Too many pings"))
        or isinstance(channel.from_rpc_error(error, "it"), errors.UnavailableError)
    )
    assert ours, (error.code(), details)
    return str(error.code().name)


@pytest.fixture(scope="module")
def channels(target: Target) -> Iterator[Channels]:
    found = Channels(target.cluster)
    yield found
    found.close()


def attack(target: Target, channels: Channels, draw: Draw, rpcs: Sequence[str]) -> str:
    """One malformed call to one process, or the same to all parties at once, as a client's would be."""
    rpc = draw(st.sampled_from(list(rpcs)))
    valid = target.templates[rpc]
    party = "PartyService" in rpc
    # the models' owner would remove one by chance, as she may
    owner = "owner/eve" if rpc.endswith("/RemoveModel") else "owner/alice"
    callers = [owner, "client/bob"] if party else ["party/0"]
    caller = draw(st.sampled_from([*callers * 4, "party/0", "dealer", "client/bob"]))
    to = "dealer" if "DealerService" in rpc else "party/1"
    fresh = [type(m).FromString(m.SerializeToString()) for m in valid]
    identifier = bytes(draw(st.binary(min_size=16, max_size=16)))
    for message in fresh:
        if "request_id" in message.DESCRIPTOR.fields_by_name:
            message.request_id = identifier
    messages = disordered(draw, fresh) if len(fresh) > 1 else [malformed(draw, fresh[0])]
    if not (party and draw(st.booleans())):
        return channels.call(rpc, caller, to, messages)
    with ThreadPoolExecutor(2) as pool:
        return min(pool.map(lambda i: channels.call(rpc, caller, f"party/{i}", messages), range(2)))


def resident() -> int:
    """Bytes of memory of this process."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fuzz(one: Callable[[Draw], object], examples: int, seconds: float, seed: int = 0) -> int:
    """Run `one` on what hypothesis draws: `examples` times, again with other seeds until `seconds` are over."""
    end, runs = time.monotonic() + seconds, 0
    while not runs or time.monotonic() < end:

        @hypothesis.seed(seed + runs)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        )
        @hypothesis.given(st.data())
        def run(data: Any) -> None:
            one(data.draw)

        run()
        runs += 1
    return runs * examples


SLOW = pytest.param(40, SLOW_SECONDS, marks=[pytest.mark.slow, pytest.mark.timeout(SLOW_SECONDS * 2 + 300)])
FAST = pytest.param(40, 0.0)
# those that begin a session with valid contents end the epoch, which takes a second to form anew
CALLS = [rpc for rpc in RPCS if rpc != CONNECT]


def test_every_rpc_has_messages(target: Target) -> None:
    assert set(target.templates) == set(RPCS) and len(RPCS) >= 16
    for rpc, messages in target.templates.items():
        name, _, method = rpc[1:].partition("/")
        wanted = SERVICES[name].methods_by_name[method].input_type.full_name
        assert {m.DESCRIPTOR.full_name for m in messages} == {wanted}


@pytest.mark.parametrize(("examples", "seconds"), [FAST, SLOW])
def test_malformed_calls(
    target: Target, channels: Channels, examples: int, seconds: float, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes: list[str] = []

    def one(draw: Draw) -> None:
        outcomes.append(attack(target, channels, draw, CALLS))

    caplog.set_level(logging.CRITICAL, "grpc")  # says so of each message that it cannot read
    fuzz(one, 40, 0.0, seed=1000)  # warm
    target.works()
    before = resident()
    fuzz(one, examples, seconds)
    target.works()
    assert resident() - before < GROWTH
    assert len({o for o in outcomes if o.endswith("Error")}) >= 3, "nothing of this reached us"
    admitted = [p.server._executor._work_queue.qsize() for p in target.cluster.parties.values()]
    assert admitted == [0] * len(admitted)


@pytest.mark.parametrize(("examples", "seconds"), [pytest.param(25, 0.0), SLOW])
def test_malformed_streams_of_a_party(
    target: Target, channels: Channels, examples: int, seconds: float, caplog: pytest.LogCaptureFixture
) -> None:
    """As party 0, whose key somebody has: the epoch may end, and another begins."""
    caplog.set_level(logging.CRITICAL, "grpc")
    before = resident()
    fuzz(lambda draw: attack(target, channels, draw, [CONNECT]), examples, seconds, seed=7)
    target.works()
    assert resident() - before < GROWTH


# --- what a party sends in an epoch ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CONTROL, OPENING], ids=["control", "opening"])
@pytest.mark.parametrize(("examples", "seconds"), [pytest.param(5, 0.0), SLOW])
def test_a_party_that_sends_nonsense_in_a_step(
    target: Target, monkeypatch: pytest.MonkeyPatch, kind: int, examples: int, seconds: float
) -> None:
    """Party 0 sends something else, once in a request: it fails, with an error of ours, and the next one is right."""
    real, wrong = Link.send, list[bytes]()

    def send(self: Link, of: int, payload: bytes) -> None:
        if of == kind and self.peer == 1 and wrong and len(payload) > 2:
            payload = wrong.pop()
        real(self, of, payload)

    monkeypatch.setattr(Link, "send", send)
    json_like = st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["action", "parts", "id"]), inner),
        max_leaves=5,
    ).map(lambda value: json.dumps(value).encode())

    def one(draw: Draw) -> None:
        target.works()
        wrong[:] = [draw(st.binary(max_size=200) | json_like)]
        try:
            target.client.call("Infer", target.owner.inferences(X), timeout=30)
        except MpcInferError as error:
            assert not isinstance(error, errors.DeadlineError), error
        wrong.clear()

    before = resident()
    fuzz(one, examples, seconds, seed=3)
    target.works()
    assert resident() - before < GROWTH


class Ends:
    """A link over direct connections, whose other end writes what it likes."""

    def __init__(self, target: Target) -> None:
        keys = target.cluster.keys
        self.listener = direct_module.Listener("127.0.0.1:0", keys.cluster, keys.identity("party/1"))
        token = self.listener.offer("party/0")
        self.theirs = direct_module.dial(
            keys.cluster.parties[1], self.listener.port, token, keys.cluster, keys.identity("party/0")
        )
        outgoing: Any = SimpleQueue()
        self.link = Link(0, iter(()), outgoing, mesh_pb2.ConnectResponse, lambda: None)
        self.link.use(self.listener.take(token, 10))

    def write(self, raw: bytes) -> None:
        try:
            self.theirs._out.write(raw)
        except OSError:
            pass  # the other end has had enough

    def close(self) -> None:
        self.theirs.close()
        self.link.close()
        self.listener.close()


@pytest.mark.parametrize(("examples", "seconds"), [pytest.param(20, 0.0), SLOW])
def test_malformed_frames_of_openings(target: Target, examples: int, seconds: float) -> None:
    """Whatever comes over a direct connection, its reader gets a message or an error of ours, and soon."""
    frames = [
        mesh_pb2.ConnectRequest(frame=mesh_pb2.Frame(sequence=i, kind=OPENING, payload=bytes(40)))  # type: ignore[arg-type]
        for i in (1, 2, 3)
    ]

    def one(draw: Draw) -> None:
        ends = Ends(target)
        try:
            raw = b""
            for message in draw(st.lists(st.sampled_from(frames), min_size=1, max_size=4)):
                content = malformed(draw, message) if draw(st.booleans()) else message.SerializeToString()
                length = draw(st.sampled_from([len(content)] * 3 + [0, 1, 1 << 20, (1 << 20) + 65, (1 << 32) - 1]))
                raw += HEADER.pack(draw(st.sampled_from([0, 0, 0, 1, 255])), length) + content
            ends.write(raw)
            ends.theirs._shut()  # nothing more comes, so that a frame that announces more must end as well
            error: Exception | None = None
            while error is None:
                try:
                    ends.link.receive(OPENING, 40)
                except MpcInferError as caught:
                    error = caught
            assert isinstance(error, AbortedError | errors.ProtocolError)
        finally:
            ends.close()

    before, threads = resident(), threading.active_count()
    fuzz(one, examples, seconds, seed=5)
    wait_for(lambda: threading.active_count() <= threads + 2)
    assert resident() - before < GROWTH


def test_a_message_without_end_is_not_collected(target: Target) -> None:
    """Frames that say that more follow, for ever: the reader knows how long an opening is."""
    ends = Ends(target)

    def flood() -> None:
        for i in range(1, 200):
            frame = mesh_pb2.Frame(sequence=i, kind=OPENING, more=True, payload=bytes(1 << 20))  # type: ignore[arg-type]
            raw = mesh_pb2.ConnectRequest(frame=frame).SerializeToString()
            ends.write(HEADER.pack(0, len(raw)) + raw)

    before = resident()
    thread = threading.Thread(target=flood, daemon=True)
    thread.start()
    with pytest.raises(errors.ProtocolError, match="more than"):
        ends.link.receive(OPENING, 3 << 20)
    ends.close()
    thread.join(20)
    assert not thread.is_alive() and resident() - before < 64 << 20


def test_strangers_on_the_port_of_openings(target: Target) -> None:
    """No certificate, noise instead of TLS, a client's certificate, a party's without a token: all are hung up on."""
    keys, listener = target.cluster.keys, target.cluster.parties[1].former._listener
    assert listener is not None
    for noise in (b"", b"\0" * 7, b"GET / HTTP/1.1\r\n\r\n", os.urandom(4000), b"\x16\x03\x01\xff\xff" + bytes(90)):
        with socket.create_connection(("127.0.0.1", listener.port), timeout=10) as plain:
            with suppress(OSError):  # it may have hung up before all is said
                plain.sendall(noise)
                plain.shutdown(socket.SHUT_WR)
                while plain.recv(4096):
                    pass
    for role in ("client/bob", "owner/alice", "party/0", "dealer"):
        context = tls_context(keys.cluster, keys.identity(role))
        for said in (os.urandom(33), bytes(33)):
            with socket.create_connection(("127.0.0.1", listener.port), timeout=10) as plain:
                with suppress(OSError), context.wrap_socket(plain, server_hostname=dns_name("party/1")) as tls:
                    tls.sendall(said)
                    assert tls.recv(1) != b"\1"
    target.works()


# --- faults that this must catch --------------------------------------------------------------------------------------


def test_an_error_that_is_none_of_ours_is_noticed(
    target: Target, channels: Channels, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(shape: Sequence[int]) -> None:
        raise IndexError(shape[7])

    monkeypatch.setattr("mpcinfer.party.service.check_inputs", lambda program, shapes: careless(shapes))
    with pytest.raises(AssertionError, match="unexpected failure"):
        fuzz(lambda draw: attack(target, channels, draw, ["/mpcinfer.v1.PartyService/Infer"]), 20, 0.0)
