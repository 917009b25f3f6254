"""An epoch: all parties and the dealer connected, with fresh nonces from each and keys derived from them.

Anything that breaks ends the epoch for everybody: links close, keys are forgotten, tapes are burnt. Party 0 then
forms the next one. There is no repairing in place, so no mask can ever be met again under another value.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from mpcinfer.config import PROTOCOL_VERSION, Cluster, Endpoint, Node
from mpcinfer.errors import AbortedError, AgreementError, MpcInferError, ProtocolError, UnavailableError
from mpcinfer.party.passing import Passing, Unwatched
from mpcinfer.protocol.session import KeyChain, epoch_binding, session_keys
from mpcinfer.wire import channel, dealt, mesh
from mpcinfer.wire.direct import Direct, Listener, dial
from mpcinfer.wire.identity import Identity
from mpcinfer.wire.mesh import Link, Mesh
from mpcinfer.wire.v1 import dealer_pb2, mesh_pb2, mesh_pb2_grpc
from mpcinfer.wire.witnessed import WitnessedMesh

_log = logging.getLogger(__name__)
_FORGET_SECONDS = 10.0
_DIRECT_SECONDS = 5.0
_FAREWELL_SECONDS = 1.0


@dataclass
class Epoch:
    """What a party works with until something breaks."""

    id: bytes
    mesh: Mesh
    key: KeyChain = field(repr=False)
    dealer: Any
    channels: list[grpc.Channel] = field(repr=False)
    dealer_lost: threading.Event
    # of all nonces: what makes a statement one of this epoch
    binding: bytes = b""
    vouched: int = 0  # how often witnesses have compared
    manifest: bytes = b""  # the digest of what all holders of shares have signed of themselves
    plans_told: set[bytes] = field(default_factory=set)
    # what transcripts are compared under; the dealer does not have it
    secret: bytes = field(default=b"", repr=False)
    # corrections: what the last party passes on to its witness, and where a witness has them from
    passing: Callable[[bytes], Unwatched] = Unwatched
    passed: Callable[[bytes, int, float], bytearray] | None = None
    # whose signatures count, and what share of the dealer's tapes is audited
    cluster: Cluster | None = field(default=None, repr=False)
    audit_rate: float = 0.0
    _dealing: list[Any] = field(default_factory=list, repr=False)

    @property
    def over(self) -> bool:
        """Whether a party has left, or this one's witness, or (as far as this party watches it) the dealer."""
        return self.mesh.broken or self.mesh.alone or self.dealer_lost.is_set()

    @contextmanager
    def cancelling(self, call: grpc.Call) -> Iterator[None]:
        """While this runs, `call` to the dealer is cancelled as soon as the mesh is broken or the dealer lost."""
        self._dealing.append(call)
        try:
            if self.over:
                call.cancel()
            yield
        finally:
            self._dealing.remove(call)

    def check(self) -> None:
        """Cancel what is pointless by now; called when any link has ended or the dealer is lost."""
        if self.over:
            for call in self._dealing.copy():
                call.cancel()

    def forget(self, slots: list[bytes], deployment: str = "") -> None:
        """Tell the dealer that the masks of these caches, or of a deployment's weights, are not needed any more."""
        if slots or deployment:
            request = dealer_pb2.ForgetRequest(session=self.id, slots=slots, deployment=deployment)
            try:
                self.dealer.Forget(request, timeout=_FORGET_SECONDS)
            except grpc.RpcError as error:
                raise channel.from_rpc_error(error, "dealer") from error

    def close(self, flush_seconds: float = 0.0) -> None:
        """End it: for the others too, since their links to us end. What was sent may take `flush_seconds` to arrive."""
        if flush_seconds:
            self.mesh.finish(flush_seconds)
        self.mesh.close()
        for ch in self.channels:
            ch.close()


@dataclass
class _Arrival:
    """A stream that a party with a lower index has opened, with the Hello it began with."""

    link: Link
    hello: mesh_pb2.Hello


class Former:
    """Forms epochs for one party."""

    inviter = 0  # the party that begins them

    def __init__(self, node: Node, identity: Identity, wake: Callable[[], None]) -> None:
        self._node = node
        self._index = node.cluster.endpoint(node.role).index
        self._listener: Listener | None = None
        if node.peer_transport == "tls" and node.role != "party/0":  # nobody dials party 0
            host = node.listen.rpartition(":")[0]
            self._listener = Listener(f"{host}:{node.peer_port}", node.cluster, identity)
        self._identity = identity
        self._wake = wake
        self.current: Epoch | None = None
        self._arrivals: dict[int, _Arrival] = {}
        self._changed = threading.Condition()

    def accept(self, peer: int, incoming: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        """Take in a stream from a lower party (an RPC handler's thread); returns what the handler must yield."""
        link, outgoing = mesh.accept(peer, incoming, context, self._notify)
        hello = mesh.read_message(mesh_pb2.Hello, link.receive(mesh.HELLO), link.who)
        try:
            self._check(hello, peer)
        except MpcInferError as error:
            _log.warning("refused to connect: %s", error)
            raise
        with self._changed:
            before = self._arrivals.get(peer)
            self._arrivals[peer] = _Arrival(link, hello)
            self._changed.notify_all()
        if before is not None:
            before.link.close()
        if peer == self.inviter and self.current is not None:
            self.current.close()  # it begins anew: whatever the old links still look like, they are over
        self._wake()
        return outgoing

    def invited(self) -> bool:
        """Whether party 0 (or whose witness this is) is waiting with a new session."""
        with self._changed:
            arrival = self._arrivals.get(self.inviter)
            return arrival is not None and not arrival.link.broken.is_set()

    def close(self) -> None:
        """Accept no more connections of parties."""
        if self._listener is not None:
            self._listener.close()

    def form(self) -> Epoch:
        """One attempt; raises what went wrong, with nothing left open."""
        links: dict[int, Link] = {}
        channels: list[grpc.Channel] = []
        try:
            return self._form(links, channels)
        except BaseException:
            for link in links.values():
                link.close()
            for ch in channels:
                ch.close()
            raise
        finally:
            if self._listener is not None:
                self._listener.withdraw()

    def _form(self, links: dict[int, Link], channels: list[grpc.Channel]) -> Epoch:
        cluster, limits = self._node.cluster, self._node.limits
        deadline = time.monotonic() + limits.connect_timeout_s
        nonce = secrets.token_bytes(32)
        lower: dict[int, _Arrival] = {}
        if self._index == 0:
            session = secrets.token_bytes(16)
        else:
            lower[0] = self._take(0, None, deadline)
            links[0] = lower[0].link
            session = lower[0].hello.session
        hello = mesh_pb2.Hello(
            protocol_version=PROTOCOL_VERSION,
            cluster_digest=cluster.digest(),
            index=self._index,
            session=session,
            nonce=nonce,
        )
        higher = range(self._index + 1, cluster.n)
        watching = cluster.witness(self._index)
        roles = ["dealer", *(f"party/{peer}" for peer in higher), *([watching.role] if watching else [])]
        with ThreadPoolExecutor(len(roles)) as pool:
            failures: list[Exception] = []
            for future in [pool.submit(self._connect, role, limits.connect_timeout_s) for role in roles]:
                try:
                    channels.append(future.result())
                except Exception as error:
                    failures.append(error)
            if failures:
                raise failures[0]
        for peer, ch in zip(higher, channels[1:], strict=False):
            links[peer] = mesh.dial(peer, ch, self._notify)
            links[peer].send(mesh.HELLO, hello.SerializeToString())
        witness = None
        if watching is not None:
            witness = mesh.dial(self._index, channels[-1], self._unwatched)
            witness.who = watching.role
            witness.send(mesh.HELLO, hello.SerializeToString())
        nonces, offered = {self._index: nonce}, dict[int, bytes]()
        for peer in range(self._index):
            arrival = lower.get(peer) or self._take(peer, session, deadline)
            links[peer] = arrival.link
            nonces[peer] = arrival.hello.nonce
            offer = mesh_pb2.Hello()
            offer.CopyFrom(hello)
            if self._listener is not None:
                offer.direct_port = self._node.peer_advertised_port or self._listener.port
                offer.direct_token = self._listener.offer(f"party/{peer}")
                offered[peer] = offer.direct_token
            arrival.link.send(mesh.HELLO, offer.SerializeToString())
        epoch_mesh = WitnessedMesh(self._index, links, witness) if cluster.witnesses else Mesh(self._index, links)
        watchdog = epoch_mesh.limited(max(0.1, deadline - time.monotonic()))
        try:
            for peer in higher:
                nonces[peer] = self._greeted(links[peer], cluster.parties[peer], session)
            if witness is not None and watching is not None:
                self._greeted(witness, watching, session)
            for peer, token in offered.items():
                self._accept_direct(links[peer], token)
        finally:
            watchdog.cancel()
        stub = dealt.stub(channels[0])
        ordered = [nonces[i] for i in range(cluster.n)]
        key, dealer_nonce = self._join(stub, session, ordered, deadline)
        binding = epoch_binding(session, dealer_nonce, ordered)
        _log.info("epoch %s: all %d parties and the dealer are connected", binding.hex()[:8], cluster.n)
        epoch = Epoch(session, epoch_mesh, key, stub, channels, threading.Event(), binding)
        epoch.cluster, epoch.audit_rate = cluster, limits.dealer_audit_rate
        if watching is not None and self._index == cluster.n - 1:
            epoch.passing = partial(Passing, mesh_pb2_grpc.MeshServiceStub(channels[-1]), session)
        if self._index == 0:
            threading.Thread(target=self._watch_dealer, args=[epoch], name="dealer-watch", daemon=True).start()
        return epoch

    def _greeted(self, link: Link, endpoint: Endpoint, session: bytes) -> bytes:
        """Whom this party has dialled answers: its nonce."""
        answer = mesh.read_message(mesh_pb2.Hello, link.receive(mesh.HELLO), link.who)
        self._check(answer, endpoint.index)
        if answer.session != session:
            raise AbortedError(f"{link.who} is forming another session")
        if answer.direct_port:
            self._go_direct(link, answer, endpoint)
        return answer.nonce

    def _go_direct(self, link: Link, offer: mesh_pb2.Hello, endpoint: Endpoint) -> None:
        """Connect as a party with a higher index offers, and tell it whether that worked."""
        found: Direct | None = None
        if self._node.peer_transport == "tls":
            try:
                found = dial(endpoint, offer.direct_port, offer.direct_token, self._node.cluster, self._identity)
            except UnavailableError as error:
                _log.warning("%s; openings go through gRPC, which takes longer", error)
        link.send(mesh.HELLO, mesh_pb2.Direct(connected=found is not None).SerializeToString())
        if found is not None:
            link.use(found)

    def _accept_direct(self, link: Link, token: bytes) -> None:
        """What the other end made of an offer."""
        assert self._listener is not None
        if mesh.read_message(mesh_pb2.Direct, link.receive(mesh.HELLO), link.who).connected:
            link.use(self._listener.take(token, _DIRECT_SECONDS))

    def _watch_dealer(self, epoch: Epoch) -> None:
        """Party 0 sees when the dealer stops or restarts (and has forgotten everything), even if nobody needs it then.

        What is being computed goes on: it may have all it needs.
        """
        try:
            stub = health_pb2_grpc.HealthStub(epoch.channels[0])
            for answer in stub.Watch(health_pb2.HealthCheckRequest()):
                if answer.status != health_pb2.HealthCheckResponse.SERVING:
                    break
        except (grpc.RpcError, ValueError):  # it has gone, or this epoch is over and its channels closed
            pass
        epoch.dealer_lost.set()
        epoch.check()
        self._wake()

    def _join(self, stub: Any, session: bytes, nonces: list[bytes], deadline: float) -> tuple[KeyChain, bytes]:
        private = X25519PrivateKey.generate()
        cluster = self._node.cluster
        request = dealer_pb2.JoinRequest(
            session=session,
            index=self._index,
            nonce=nonces[self._index],
            public_key=private.public_key().public_bytes_raw(),
            cluster_digest=cluster.digest(),
            protocol_version=PROTOCOL_VERSION,
        )
        try:
            answer = stub.Join(request, timeout=max(0.1, deadline - time.monotonic()) + 1)
        except grpc.RpcError as error:
            raise channel.from_rpc_error(error, "dealer") from error
        if list(answer.party_nonces) != nonces:
            raise ProtocolError("the dealer and the parties saw different nonces for this session")
        if len(answer.nonce) != 32:
            raise ProtocolError("the dealer contributed no nonce")
        key = session_keys(
            private.exchange(X25519PublicKey.from_public_bytes(answer.public_key)),
            index=self._index,
            session=session,
            cluster=cluster.digest(),
            public_keys=(request.public_key, answer.public_key),
            party_nonces=nonces,
            dealer_nonce=answer.nonce,
        )
        return key, answer.nonce

    def _connect(self, role: str, timeout: float) -> grpc.Channel:
        limits = self._node.limits
        return channel.connect(
            self._node.cluster.endpoint(role),
            self._node.cluster,
            self._identity,
            timeout=timeout,
            max_message_mb=limits.max_message_mb,
        )

    def _check(self, hello: mesh_pb2.Hello, peer: int) -> None:
        if hello.protocol_version != PROTOCOL_VERSION:
            raise AgreementError(
                f"party {self._index} speaks protocol version {PROTOCOL_VERSION}, party {peer} speaks "
                f"{hello.protocol_version}; run the same version everywhere"
            )
        if hello.cluster_digest != self._node.cluster.digest():
            raise AgreementError(
                f"parties {self._index} and {peer} were started with different cluster files; give all the same one"
            )
        if hello.index != peer or len(hello.nonce) != 32 or len(hello.session) != 16:
            raise AgreementError(f"party {peer} introduced itself wrongly")

    def _take(self, peer: int, session: bytes | None, deadline: float) -> _Arrival:
        """Wait for the stream of a lower party (of this session, if given)."""
        with self._changed:
            while True:
                arrival = self._arrivals.get(peer)
                if arrival is not None and arrival.link.broken.is_set():
                    del self._arrivals[peer]
                    arrival = None
                if arrival is not None and session in (None, arrival.hello.session):
                    return self._arrivals.pop(peer)
                left = deadline - time.monotonic()
                if left <= 0:
                    raise UnavailableError(f"party {peer} did not connect; check that it runs and reaches us")
                self._changed.wait(left)

    def _unwatched(self) -> None:
        """The witness has gone: what was sent may still arrive, so that the others learn why; then all is over."""
        self._notify()
        epoch = self.current
        if epoch is not None:
            timer = threading.Timer(_FAREWELL_SECONDS, epoch.mesh.close)
            timer.daemon = True
            timer.start()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
        epoch = self.current
        if epoch is not None:
            epoch.check()
        self._wake()
