"""How a witness takes part in an epoch: its party begins it, the dealer gives it the same key.

Everything above this is the code of a party: a witness holds the same share and goes through the same steps.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from mpcinfer.config import PROTOCOL_VERSION, Node
from mpcinfer.errors import AgreementError, TamperingError
from mpcinfer.party.epoch import Epoch, Former
from mpcinfer.party.passing import Deliveries
from mpcinfer.protocol.session import KeyChain, epoch_binding
from mpcinfer.wire import channel, mesh
from mpcinfer.wire.identity import Identity
from mpcinfer.wire.mesh import Link
from mpcinfer.wire.v1 import dealer_pb2, dealer_pb2_grpc, mesh_pb2
from mpcinfer.wire.witnessed import ShadowMesh

_log = logging.getLogger(__name__)


class ShadowFormer(Former):
    """Forms epochs for the witness of one party."""

    def __init__(self, node: Node, identity: Identity, wake: Callable[[], None]) -> None:
        super().__init__(node, identity, wake)
        self.inviter = self._index
        self._deliveries = Deliveries()

    def delivered(self, parts: Iterator[Any], context: grpc.ServicerContext) -> None:
        """Take in the corrections of a tape (an RPC handler's thread)."""
        if context.add_callback(self._deliveries.wake):
            self._deliveries.serve(parts, context.is_active)

    def _form(self, links: dict[int, Link], channels: list[grpc.Channel]) -> Epoch:
        cluster, limits = self._node.cluster, self._node.limits
        deadline = time.monotonic() + limits.connect_timeout_s
        arrival = self._take(self._index, None, deadline)
        link, session = arrival.link, arrival.hello.session
        links[self._index] = link
        answer = mesh_pb2.Hello(
            protocol_version=PROTOCOL_VERSION,
            cluster_digest=cluster.digest(),
            index=self._index,
            session=session,
            nonce=bytes(32),  # a witness adds nothing to what keys are made of
        )
        if self._listener is not None:
            answer.direct_port = self._node.peer_advertised_port or self._listener.port
            answer.direct_token = self._listener.offer(f"party/{self._index}")
        channels.append(self._connect("dealer", limits.connect_timeout_s))
        shadow = ShadowMesh(self._index, cluster.n, link)
        watchdog = shadow.limited(max(0.1, deadline - time.monotonic()))
        try:
            link.send(mesh.HELLO, answer.SerializeToString())
            if self._listener is not None:
                self._accept_direct(link, answer.direct_token)
        finally:
            watchdog.cancel()
        stub = dealer_pb2_grpc.DealerServiceStub(channels[0])
        request = dealer_pb2.WitnessRequest(
            session=session,
            index=self._index,
            cluster_digest=cluster.digest(),
            protocol_version=PROTOCOL_VERSION,
        )
        try:
            joined = stub.Witness(request, timeout=max(0.1, deadline - time.monotonic()) + 1)
        except grpc.RpcError as error:
            raise channel.from_rpc_error(error, "dealer") from error
        nonces = list(joined.party_nonces)
        if len(nonces) != cluster.n or nonces[self._index] != arrival.hello.nonce:
            raise AgreementError("the dealer and the party of this witness have different sessions")
        binding = epoch_binding(session, joined.nonce, nonces)
        _log.info("epoch %s: with party %d", binding.hex()[:8], self._index)
        epoch = Epoch(session, shadow, KeyChain(joined.key), stub, channels, threading.Event(), binding)
        epoch.cluster, epoch.audit_rate = cluster, limits.dealer_audit_rate
        epoch.passed = lambda tape, size, timeout: self._passed(epoch, tape, size, timeout)
        return epoch

    def _passed(self, epoch: Epoch, tape: bytes, size: int, timeout: float) -> bytearray:
        """What the dealer has sent the party for a tape, as the party passes it on and the dealer confirms."""
        if not size:
            return bytearray()
        received = self._deliveries.take(epoch.id, tape, size, timeout, lambda: not epoch.over)
        request = dealer_pb2.CorrectedRequest(session=epoch.id, index=self._index, tape=tape)
        try:
            dealt = epoch.dealer.Corrected(request, timeout=timeout).digest
        except grpc.RpcError as error:
            raise channel.from_rpc_error(error, "dealer") from error
        if not hmac.compare_digest(dealt, hashlib.sha256(received).digest()):
            raise TamperingError(
                f"party {self._index} passed on other corrections than the dealer sent it. Suspect: party {self._index}"
            )
        return received
