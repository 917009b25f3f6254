"""One channel to one party: opened, and checked to lead to whom and what the cluster file says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from mpcinfer.config import PROTOCOL_VERSION, Cluster, Endpoint
from mpcinfer.errors import AgreementError, MpcInferError
from mpcinfer.wire import channel
from mpcinfer.wire.identity import Identity
from mpcinfer.wire.v1 import party_pb2, party_pb2_grpc

_RELEASE_SECONDS = 5.0  # more than gRPC takes, unless the process is at its end already
_A = TypeVar("_A")
_B = TypeVar("_B")


@dataclass(frozen=True, eq=False)
class Link:
    """An open channel to one party, checked."""

    channel: grpc.Channel
    stub: Any  # the generated stub has no types


def open_link(cluster: Cluster, identity: Identity, timeout: float, index: int) -> Link:
    """A checked link to a party, by its index."""
    link, _ = open_and_ask(cluster, identity, timeout, cluster.holders[index])
    return link


def open_and_ask(
    cluster: Cluster, identity: Identity, timeout: float, endpoint: Endpoint
) -> tuple[Link, party_pb2.StatusResponse]:
    """A checked link to a party, and what it says about itself."""
    deadline = time.monotonic() + timeout
    opened = channel.connect(endpoint, cluster, identity, timeout=timeout)
    try:
        stub = party_pb2_grpc.PartyServiceStub(opened)
        left = max(deadline - time.monotonic(), 0.001)
        try:
            status: party_pb2.StatusResponse = stub.Status(party_pb2.StatusRequest(), timeout=left)
        except grpc.RpcError as error:
            raise channel.from_rpc_error(error, f"{endpoint.role} at {endpoint.address}") from error
        _check_agreement(status, endpoint, cluster)
    except BaseException:
        opened.close()
        raise
    return Link(opened, stub), status


def _check_agreement(status: party_pb2.StatusResponse, endpoint: Endpoint, cluster: Cluster) -> None:
    who = f"{endpoint.role} at {endpoint.address}"
    if status.protocol_version != PROTOCOL_VERSION:
        raise AgreementError(
            f"{who} speaks protocol version {status.protocol_version}, this program version {PROTOCOL_VERSION}; "
            "install the same release of mpcinfer on both sides"
        )
    if status.cluster_digest != cluster.digest():
        raise AgreementError(
            f"{who} works with another cluster file than this program; compare name, CA, addresses and keys, "
            "and give everyone the same file"
        )
    if (status.index, status.parties) != (endpoint.index, cluster.n):
        raise AgreementError(
            f"{who} says it is party/{status.index} of {status.parties}, the cluster file has {cluster.n} parties"
        )


class Calls:
    """Calls of gRPC that are made from its own thread, as all are whose answers can be waited for together.

    A call that ends while the process does leaves a lock behind that this thread never gives back, and whoever tears
    the call down waits for it for ever: so they are over only once the thread has let go of them.
    """

    def __init__(self) -> None:
        self._left: set[Any] = set()  # gRPC cancels a call that nobody holds any more
        self._changed = threading.Condition()

    def add(self, call: Any) -> Any:
        """The call, from now on one of these."""
        with self._changed:
            self._left.add(call)
        call.add_done_callback(self._released)
        return call

    def end(self) -> None:
        """Cancel what has not ended yet, and wait until gRPC has done with all of them."""
        with self._changed:
            left = list(self._left)
        for call in left:
            call.cancel()
        with self._changed:
            self._changed.wait_for(lambda: not self._left, _RELEASE_SECONDS)

    def _released(self, call: Any) -> None:
        with self._changed:
            self._left.discard(call)
            self._changed.notify_all()


def at_once(work: Callable[[_A], _B], items: Sequence[_A]) -> list[_B | MpcInferError]:
    """`work` on all items at the same time, each in its thread: the results, or the errors they ended with."""

    def attempt(item: _A) -> _B | MpcInferError:
        try:
            return work(item)
        except MpcInferError as error:
            return error

    if not items:
        return []
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(attempt, items))
