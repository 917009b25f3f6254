"""One connection to all parties: pinned channels, one call made everywhere at once, one error if any of them fails."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeVar

import grpc

from mpcinfer.client.locate import AnyPath, locate
from mpcinfer.client.model import Model, agreed
from mpcinfer.client.vouched import vouched, with_witnesses
from mpcinfer.config import PROTOCOL_VERSION, Cluster, Endpoint
from mpcinfer.errors import (
    AbortedError,
    AgreementError,
    DeadlineError,
    IdentityError,
    MpcInferError,
    UnavailableError,
)
from mpcinfer.wire import channel
from mpcinfer.wire.identity import Identity
from mpcinfer.wire.v1 import party_pb2, party_pb2_grpc

CONNECT_TIMEOUT = 10.0
LIST_TIMEOUT = 10.0
# When one party fails, the others notice and fail too. An answer that only says so waits this long for the cause.
_GRACE = 0.3
_POLL = 0.1

_A = TypeVar("_A")
_B = TypeVar("_B")


@dataclass(frozen=True)
class PartyStatus:
    """How one party is doing.

    `state` is "ready", "connecting" or "stopping" as the party says, or else "unreachable", or "refused" if it is not
    who or what the cluster file says; `detail` says why it is not ready.
    """

    role: str
    address: str
    state: str
    detail: str = ""
    package_version: str = ""
    requests_done: int = 0
    requests_failed: int = 0
    requests_waiting: int = 0
    runs_ready: int = 0
    uptime_seconds: float = 0.0
    models: tuple[Model, ...] = ()


@dataclass(frozen=True, eq=False)
class _Link:
    """An open channel to one party, checked."""

    channel: grpc.Channel
    stub: Any  # the generated stub has no types


class Connection:
    """Channels to all parties of a cluster, and their witnesses; calls may be made from several threads.

    A channel that breaks is opened anew before the next call, with the same checks as the first time.
    """

    def __init__(self, cluster: Cluster, identity: Identity, *, timeout: float = CONNECT_TIMEOUT) -> None:
        """Connect to all parties at once, within `timeout` seconds.

        UnavailableError naming the parties that cannot be reached, IdentityError if one is not who it should be,
        AgreementError if one works with another cluster file or protocol version.
        """
        self.cluster = cluster
        self.identity = identity
        self._lock = threading.Lock()
        self._links: list[_Link | None] = [None] * len(cluster.holders)
        self._closed = False
        try:
            self._open(timeout)
        except BaseException:
            self.close()
            raise

    @classmethod
    def to(
        cls,
        cluster: AnyPath | Cluster,
        identity: AnyPath | Identity | None = None,
        *,
        roles: Sequence[str] = ("client", "owner"),
        timeout: float = CONNECT_TIMEOUT,
    ) -> Self:
        """Connect to the cluster a user names with the identity a user names; see `locate.locate`."""
        return cls(*locate(cluster, identity, roles=roles), timeout=timeout)

    def call(self, method: str, requests: Sequence[Any], *, timeout: float) -> list[Any]:
        """Make one call of PartyService at all parties at once and wait for all answers.

        requests: one per party (for a streaming call: an iterator of messages, and one more per witness). A witness is
        sent what its party is. Returns the answers by party, once the witnesses have vouched for them. The first error
        ends the call everywhere; of errors that come together the one nearest to the cause is raised.
        """
        deadline, late = time.monotonic() + timeout, f"{method} took longer than {timeout:g} s; allow it more time"
        links, requests = self._open(min(timeout, CONNECT_TIMEOUT)), with_witnesses(self.cluster, requests)
        finished: queue.SimpleQueue[int] = queue.SimpleQueue()
        calls: list[Any] = []
        failures: list[MpcInferError] = []
        try:
            for index, (link, request) in enumerate(zip(links, requests, strict=True)):
                left = max(deadline - time.monotonic(), 0.001)
                calls.append(getattr(link.stub, method).future(request, timeout=left))
                calls[index].add_done_callback(lambda _, index=index: finished.put(index))
            patience: float | None = None
            for _ in calls:
                try:
                    index = finished.get(timeout=patience and max(patience - time.monotonic(), 0))
                except queue.Empty:
                    break
                if calls[index].code() is grpc.StatusCode.OK:
                    continue
                failures.append(self._failure(index, links[index], calls[index], late))
                if _distance(failures[-1]) == 0:
                    break
                patience = patience or time.monotonic() + _GRACE
        finally:
            for started in calls:
                started.cancel()
        if failures:
            raise min(failures, key=_distance)
        return vouched(self.cluster, requests, [finished_call.result() for finished_call in calls])

    @contextmanager
    def stream(
        self, method: str, requests: Sequence[Any], *, timeout: float
    ) -> Iterator[tuple[Iterator[list[Any]], Callable[[], None]]]:
        """Make a call that has many answers at all parties: the answers, one of each party at a time, and how to stop.

        The first error ends it everywhere, as in `call`. Leaving stops it.
        """
        deadline, late = time.monotonic() + timeout, f"{method} took longer than {timeout:g} s; allow it more time"
        links, requests = self._open(max(0.001, min(timeout, CONNECT_TIMEOUT))), with_witnesses(self.cluster, requests)
        calls: list[Any] = []
        arrived: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in links]

        def pump(index: int) -> None:
            try:
                for answer in calls[index]:
                    arrived[index].put(answer)
                arrived[index].put(None)
            except grpc.RpcError:
                for inbox in arrived:  # whoever waits for another party learns of it too
                    inbox.put(index)

        def stop() -> None:
            for call in calls:
                call.cancel()

        def failed(index: int) -> MpcInferError:
            """The error nearest to the cause, of those that come together."""
            patience, failures = time.monotonic() + _GRACE, []
            for i, call in enumerate(calls):
                while not call.done() and i != index and time.monotonic() < patience:
                    time.sleep(0.01)
                if call.done() and call.code() is not grpc.StatusCode.OK:
                    failures.append(self._failure(i, links[i], call, late))
            return min(failures, key=_distance)

        def answers() -> Iterator[list[Any]]:
            number = 0
            while True:
                step = [inbox.get() for inbox in arrived]
                lost = [item for item in step if isinstance(item, int)]
                if lost:
                    raise failed(lost[0])
                if None in step:
                    return
                number += any(step[0].outputs) if hasattr(step[0], "outputs") else 0
                yield vouched(self.cluster, requests, step, number)

        try:
            for link, request in zip(links, requests, strict=True):
                left = max(deadline - time.monotonic(), 0.001)
                calls.append(getattr(link.stub, method)(request, timeout=left))
            for index in range(len(calls)):
                threading.Thread(target=pump, args=[index], name="answers", daemon=True).start()
            yield answers(), stop
        finally:
            stop()

    def forget_session(self, session: bytes) -> None:
        """Tell the parties, who would find out anyway, that a session is not needed any more; waits for nothing."""
        request = party_pb2.EndSessionRequest(session=session)
        for link in self._links:
            if link is not None:
                link.stub.EndSession.future(request, timeout=LIST_TIMEOUT)

    def models(self, name: str | None = None, *, timeout: float = LIST_TIMEOUT) -> list[Model]:
        """The deployed models (only those called `name`, if given), by name and version.

        Waits up to `timeout` seconds for parties that are still connecting to each other.
        AgreementError if parties hold different ones.
        """
        for last in (False, True):
            answers = self.call("ListModels", [party_pb2.ListModelsRequest()] * self.cluster.n, timeout=timeout)
            try:
                return agreed([[Model.parse(info) for info in answer.models] for answer in answers], name)
            except AgreementError:
                # A deploy or a removal becomes visible at one party a moment before the other.
                if last:
                    raise
            time.sleep(_GRACE)
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Close all channels; calls in flight fail."""
        with self._lock:
            self._closed = True
            links, self._links = self._links, [None] * len(self._links)
        for link in links:
            if link is not None:
                link.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, timeout: float) -> list[_Link]:
        """The links to all parties, those opened first that are missing."""
        with self._lock:
            if self._closed:
                raise UnavailableError("this connection was closed; connect again")
            missing = [index for index, link in enumerate(self._links) if link is None]
            open_one = partial(_open_link, self.cluster, self.identity, timeout)
            failures = []
            for index, result in zip(missing, at_once(open_one, missing), strict=True):
                if isinstance(result, MpcInferError):
                    failures.append(result)
                else:
                    self._links[index] = result
            if failures and all(type(error) is UnavailableError for error in failures):
                raise UnavailableError("; ".join(map(str, failures))) from failures[0]
            if failures:
                raise min(failures, key=_distance)
            return [link for link in self._links if link is not None]

    def _failure(self, index: int, link: _Link, call: Any, late: str) -> MpcInferError:
        if call.details() == "Deadline Exceeded":  # gRPC's words: nobody at the party had an error
            return DeadlineError(late)
        endpoint = self.cluster.holders[index]
        error = channel.from_rpc_error(call, f"{endpoint.role} at {endpoint.address}")
        if call.code() is grpc.StatusCode.CANCELLED and not call.trailing_metadata():
            # not by us, who cancel only what we do not look at any more: its server ended in the middle of the call
            return UnavailableError(f"{endpoint.role} at {endpoint.address} has gone away; start it (again)")
        if call.code() is grpc.StatusCode.UNAVAILABLE:
            if type(error) is UnavailableError and not call.trailing_metadata():  # gRPC speaks, not the party
                error = UnavailableError(f"{endpoint.role} at {endpoint.address} has gone away; start it (again)")
            # It may come back with another certificate: what comes next is checked from scratch.
            with self._lock:
                if self._links[index] is link:
                    self._links[index] = None
        return error


def _distance(error: MpcInferError) -> int:
    """How far an error is from the cause of a failure: 0 if it says what is wrong, more if it echoes another's."""
    if isinstance(error, AbortedError):
        return 3
    if isinstance(error, DeadlineError):
        return 2
    return 1 if isinstance(error, UnavailableError) else 0


def _open_link(cluster: Cluster, identity: Identity, timeout: float, index: int) -> _Link:
    link, _ = _open_and_ask(cluster, identity, timeout, cluster.holders[index])
    return link


def _open_and_ask(
    cluster: Cluster, identity: Identity, timeout: float, endpoint: Endpoint
) -> tuple[_Link, party_pb2.StatusResponse]:
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
    return _Link(opened, stub), status


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


def party_status(cluster: Cluster, identity: Identity, endpoint: Endpoint, *, timeout: float) -> PartyStatus:
    """How the party at `endpoint` is doing, asked over a new channel; never raises because of the party."""
    try:
        link, status = _open_and_ask(cluster, identity, timeout, endpoint)
    except MpcInferError as error:
        gone = isinstance(error, UnavailableError | DeadlineError)
        return PartyStatus(endpoint.role, endpoint.address, "unreachable" if gone else "refused", str(error))
    link.channel.close()
    return PartyStatus(
        role=endpoint.role,
        address=endpoint.address,
        state=status.state,
        detail=status.detail,
        package_version=status.package_version,
        requests_done=status.requests_done,
        requests_failed=status.requests_failed,
        requests_waiting=status.requests_waiting,
        runs_ready=status.runs_ready,
        uptime_seconds=status.uptime_seconds,
        models=tuple(Model.parse(info) for info in status.models),
    )


def cluster_status(cluster: Cluster, identity: Identity, *, timeout: float = CONNECT_TIMEOUT) -> list[PartyStatus]:
    """How every party is doing, by index, and then every witness."""
    results = at_once(lambda endpoint: party_status(cluster, identity, endpoint, timeout=timeout), cluster.holders)
    return [result for result in results if isinstance(result, PartyStatus)]


def wait_until_ready(
    cluster: Cluster, identity: Identity, *, timeout: float, check: Callable[[], object] = lambda: None
) -> None:
    """Return once every party says it is ready.

    `check` is called now and then; what it raises ends the wait. UnavailableError naming the parties that are not
    ready after `timeout` seconds, IdentityError at once if one is not what the cluster file says.
    """
    deadline = time.monotonic() + timeout
    while True:
        check()
        # Not less than a second, even at the end: what a party says is worth more than that it had no time to say it.
        patience = min(max(deadline - time.monotonic(), 1.0), CONNECT_TIMEOUT)
        waiting = [s for s in cluster_status(cluster, identity, timeout=patience) if s.state != "ready"]
        if not waiting:
            return
        refused = [s for s in waiting if s.state == "refused"]
        if refused:
            raise IdentityError(refused[0].detail)
        if time.monotonic() + _POLL >= deadline:
            states = "; ".join(f"{s.role} is {s.state}{f' ({s.detail})' if s.detail else ''}" for s in waiting)
            raise UnavailableError(f"not ready after {timeout:g} s: {states}")
        time.sleep(_POLL)


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
