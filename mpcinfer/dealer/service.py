"""The dealer's gRPC face: no call takes a tensor, and only parties may call."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import grpc

from mpcinfer import __version__
from mpcinfer.config import PROTOCOL_VERSION, Cluster, Limits
from mpcinfer.dealer.ahead import ahead
from mpcinfer.dealer.dealing import Dealer
from mpcinfer.dealer.metrics import DealerMetrics
from mpcinfer.errors import AgreementError, ForbiddenError, InputError
from mpcinfer.protocol.cache import MOST_TIMES, CacheUse
from mpcinfer.trust.signing import Signed
from mpcinfer.wire import channel
from mpcinfer.wire.dealt import chunk
from mpcinfer.wire.frames import CHUNK, GRPC_HEADER, chunk_bytes
from mpcinfer.wire.identity import peer_of, require
from mpcinfer.wire.v1 import dealer_pb2, dealer_pb2_grpc

_AHEAD = 4  # corrections, each of a field of a batch, that are dealt while those before are sent


class DealerService(dealer_pb2_grpc.DealerServiceServicer):
    """Checks who calls, then lets the `Dealer` work."""

    def __init__(self, cluster: Cluster, dealer: Dealer, limits: Limits) -> None:
        self._cluster = cluster
        self._dealer = dealer
        self._limits = limits
        self.metrics = DealerMetrics(dealer)
        self._started = time.monotonic()

    def Join(self, request: dealer_pb2.JoinRequest, context: grpc.ServicerContext) -> dealer_pb2.JoinResponse:
        """See dealer.proto."""
        with self._answering("join", context):
            self._member(context, f"party/{request.index}")
            self._check(request)
            nonce, public_key, nonces = self._dealer.join(
                request.session, request.index, request.nonce, request.public_key, self._limits.connect_timeout_s
            )
            return dealer_pb2.JoinResponse(nonce=nonce, public_key=public_key, party_nonces=nonces)

    def Deal(
        self, request: dealer_pb2.DealRequest, context: grpc.ServicerContext
    ) -> Iterator[bytes | dealer_pb2.DealResponse]:
        """See dealer.proto; chunks are written already (see `Writing`)."""
        with self._answering("deal", context):
            self._member(context, f"party/{request.index}")
            context.add_callback(self._dealer.wake)
            parts = self._dealer.deal(
                request.session,
                request.index,
                request.tape,
                request.plan_digest,
                request.plan,
                self._limits.step_timeout_s,
                context.is_active,
                _uses(request) if request.HasField("caches") else None,
                request.signed,
            )
            statement = None
            # what there is of the next chunk
            pending: list[memoryview] = []
            room = CHUNK
            with closing(ahead(parts, _AHEAD)) as dealt:
                for part in dealt:
                    if isinstance(part, Signed):
                        statement = part.message()
                        continue
                    while len(part) >= room:
                        yield self._chunk([*pending, part[:room]])
                        part, pending, room = part[room:], [], CHUNK
                    if part:
                        pending.append(part)
                        room -= len(part)
            if pending:
                yield self._chunk(pending)
            if statement is not None:
                message = dealer_pb2.DealResponse(statement=statement)
                self.metrics.sent(message.ByteSize() + GRPC_HEADER)
                yield message

    def Forget(self, request: dealer_pb2.ForgetRequest, context: grpc.ServicerContext) -> dealer_pb2.ForgetResponse:
        """See dealer.proto."""
        with self._answering("forget", context):
            require(peer_of(context, self._cluster), "party/")
            self._dealer.forget(request.session, request.slots, request.deployment)
            return dealer_pb2.ForgetResponse()

    def Witness(self, request: dealer_pb2.WitnessRequest, context: grpc.ServicerContext) -> dealer_pb2.WitnessResponse:
        """See dealer.proto."""
        with self._answering("witness", context):
            self._member(context, f"witness/{request.index}")
            self._check(request)
            key, nonce, nonces = self._dealer.witness(request.session, request.index, self._limits.connect_timeout_s)
            return dealer_pb2.WitnessResponse(key=key, nonce=nonce, party_nonces=nonces)

    def Corrected(
        self, request: dealer_pb2.CorrectedRequest, context: grpc.ServicerContext
    ) -> dealer_pb2.CorrectedResponse:
        """See dealer.proto."""
        with self._answering("corrected", context):
            self._member(context, f"witness/{self._cluster.n - 1}")
            digest = self._dealer.corrected(request.session, request.tape, self._limits.step_timeout_s)
            return dealer_pb2.CorrectedResponse(digest=digest)

    def DealerStatus(
        self, request: dealer_pb2.DealerStatusRequest, context: grpc.ServicerContext
    ) -> dealer_pb2.DealerStatusResponse:
        """See dealer.proto."""
        try:
            peer_of(context, self._cluster)
        except Exception as error:
            channel.abort(context, error)
        return dealer_pb2.DealerStatusResponse(
            package_version=__version__,
            tapes=self._dealer.tapes_dealt,
            bytes_sent=self._dealer.bytes_sent,
            seconds_dealing=self._dealer.seconds_dealing,
            uptime_seconds=time.monotonic() - self._started,
            session_ready=self._dealer.ready,
        )

    @contextmanager
    def _answering(self, call: str, context: grpc.ServicerContext) -> Iterator[None]:
        """While this runs a party is being answered. Any error inside ends the RPC."""
        try:
            with self.metrics.call(call):
                yield
        except Exception as error:
            channel.abort(context, error)

    def _chunk(self, parts: list[memoryview]) -> bytes:
        size = sum(map(len, parts))
        self.metrics.sent(chunk_bytes(size))
        return chunk(parts, size)

    def _check(self, request: dealer_pb2.JoinRequest | dealer_pb2.WitnessRequest) -> None:
        if request.protocol_version != PROTOCOL_VERSION:
            raise AgreementError(
                f"the dealer speaks protocol version {PROTOCOL_VERSION}, party {request.index} speaks "
                f"{request.protocol_version}; run the same version everywhere"
            )
        if request.cluster_digest != self._cluster.digest():
            raise AgreementError(
                f"the dealer and party {request.index} have different cluster files; start both with the same one"
            )

    def _member(self, context: grpc.ServicerContext, role: str) -> None:
        peer = peer_of(context, self._cluster)
        require(peer, role.partition("/")[0] + "/")
        if peer.role != role:
            raise ForbiddenError(f"{peer.role} cannot speak for {role.replace('/', ' ')}")


def _uses(request: dealer_pb2.DealRequest) -> CacheUse:
    """Those of all texts; InputError unless they are run equally often."""
    use, beside = _use(request.caches), tuple(map(_use, request.beside))
    if any(other.times != use.times for other in beside):
        raise InputError("texts whose steps are dealt together, but not equally often")
    return replace(use, beside=beside)


def _use(message: dealer_pb2.CacheUse) -> CacheUse:
    numbers = list(message.runs)
    runs = tuple(zip(numbers[::2], numbers[1::2], strict=False))
    ascending = all(first < end <= message.count for first, end in runs)
    times = message.times or 1
    if len(message.slot) != 16 or len(numbers) % 2 or not ascending or times > MOST_TIMES:
        raise InputError("these are no rows of a cache")
    return CacheUse(message.slot, runs, message.count, times)
