"""One connection to all parties: pinned channels, one call made everywhere at once, one error if any of them fails."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import grpc

from mpcinfer.client.link import Calls, Link, at_once, open_link
from mpcinfer.client.locate import AnyPath, locate
from mpcinfer.client.manifest import Demands, ask, fresh_nonce
from mpcinfer.client.model import Model, agreed
from mpcinfer.client.proof import Proof
from mpcinfer.client.vouched import vouched, with_witnesses
from mpcinfer.config import Cluster
from mpcinfer.errors import AbortedError, AgreementError, DeadlineError, MpcInferError, UnavailableError
from mpcinfer.trust.manifest import Manifest, check
from mpcinfer.trust.signing import Signed
from mpcinfer.wire import channel
from mpcinfer.wire.identity import Identity
from mpcinfer.wire.v1 import party_pb2, tensor_pb2

CONNECT_TIMEOUT = 10.0
LIST_TIMEOUT = 10.0
# When one party fails, the others notice and fail too. An answer that only says so waits this long for the cause.
_GRACE = 0.3
_AHEAD = 8  # answers that a party may be ahead of the slowest: what more it sends waits at its side


class Connection:
    """Channels to all parties of a cluster, and their witnesses; calls may be made from several threads.

    A channel that breaks is opened anew before the next call, with the same checks as the first time. `manifest` is
    who the parties are and what they run, as they have signed it for this connection.
    """

    manifest: Manifest

    def __init__(
        self,
        cluster: Cluster,
        identity: Identity,
        *,
        timeout: float = CONNECT_TIMEOUT,
        demands: Demands | None = None,
    ) -> None:
        """Connect to all parties at once, within `timeout` seconds, and hold them to what is demanded.

        UnavailableError naming the parties that cannot be reached or are not connected to each other, IdentityError if
        one is not who it should be, AgreementError if one works with another cluster file or protocol version,
        SignatureError or ManifestError if what they sign does not hold, or is not what was pinned.
        """
        self.cluster = cluster
        self.identity = identity
        self.demands = demands or Demands()
        self._checked = False
        self.token: Callable[[], str] | None = None  # of a gateway: for whom the next call is made (a JWT)
        self._lock = threading.Lock()
        self._telling = Calls()
        self._links: list[Link | None] = [None] * len(cluster.holders)
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
        pin: AnyPath | None = None,
    ) -> Self:
        """Connect to the cluster a user names with the identity and pin a user names.

        See `locate.locate` and `manifest.Demands.find`.
        """
        return cls(*locate(cluster, identity, roles=roles), timeout=timeout, demands=Demands.find(cluster, pin))

    def call(self, method: str, requests: Sequence[Any], *, timeout: float) -> list[Any]:
        """Make one call of PartyService at all parties at once and wait for all answers.

        requests: one per party (for a streaming call: an iterator of messages, and one more per witness). A witness is
        sent what its party is. Returns the answers by party, once the witnesses have vouched for them. The first error
        ends the call everywhere; of errors that come together the one nearest to the cause is raised.
        """
        deadline, late = time.monotonic() + timeout, f"{method} took longer than {timeout:g} s; allow it more time"
        links, requests = self._open(min(timeout, CONNECT_TIMEOUT)), with_witnesses(self.cluster, requests)
        metadata = self._metadata()
        finished: queue.SimpleQueue[int] = queue.SimpleQueue()
        calls: list[Any] = []
        running = Calls()
        failures: list[MpcInferError] = []
        try:
            for index, (link, request) in enumerate(zip(links, requests, strict=True)):
                left = max(deadline - time.monotonic(), 0.001)
                call = getattr(link.stub, method).future(request, timeout=left, metadata=metadata)
                calls.append(running.add(call))
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
            running.end()
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
        metadata = self._metadata()
        calls: list[Any] = []
        running = Calls()
        arrived: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in links]
        room = [threading.Semaphore(_AHEAD) for _ in links]

        def pump(index: int) -> None:
            try:
                for answer in calls[index]:
                    room[index].acquire()
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
                for free in room:
                    free.release()
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
                calls.append(running.add(getattr(link.stub, method)(request, timeout=left, metadata=metadata)))
            for index in range(len(calls)):
                threading.Thread(target=pump, args=[index], name="answers", daemon=True).start()
            yield answers(), stop
        finally:
            running.end()
            for free in room:  # nobody waits for what has been cancelled
                free.release(_AHEAD)

    def proof(self, model: Model, requests: Sequence[Any], shares: Sequence[Sequence[tensor_pb2.Tensor]]) -> Proof:
        """What the parties are held to that are sent these requests."""
        role = self.identity.role if self.token is None else ""
        return Proof(self.cluster, role, model, requests, shares, lambda: self.manifest.digest)

    def forget_session(self, session: bytes) -> None:
        """Tell the parties, who would find out anyway, that a session is not needed any more; waits for nothing."""
        request = party_pb2.EndSessionRequest(session=session)
        try:
            metadata = self._metadata()
        except MpcInferError:  # no token is to be had any more
            return
        for link in self._links:
            if link is not None:
                self._telling.add(link.stub.EndSession.future(request, timeout=LIST_TIMEOUT, metadata=metadata))

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
        self._telling.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _metadata(self) -> tuple[tuple[str, str], ...] | None:
        return None if self.token is None else (("mpcinfer-token", self.token()),)

    def _open(self, timeout: float) -> list[Link]:
        """The links to all parties, those opened first that are missing; none before all parties have been checked."""
        deadline = time.monotonic() + timeout
        with self._lock:
            if self._closed:
                raise UnavailableError("this connection was closed; connect again")
            missing = [index for index, link in enumerate(self._links) if link is None]
            open_one = partial(open_link, self.cluster, self.identity, timeout)
            failures = []
            for index, result in zip(missing, at_once(open_one, missing), strict=True):
                if isinstance(result, MpcInferError):
                    failures.append(result)
                else:
                    self._links[index] = result
                    self._watch(index, result)
            if failures and all(type(error) is UnavailableError for error in failures):
                raise UnavailableError("; ".join(map(str, failures))) from failures[0]
            if failures:
                raise min(failures, key=_distance)
            links = [link for link in self._links if link is not None]
            if missing or not self._checked:
                self.manifest = self._check(links, deadline)
                self._checked = True
            return links

    def _check(self, links: list[Link], deadline: float) -> Manifest:
        """What all parties sign for a nonce drawn now, if it is what is demanded. The lock is held."""
        nonce, late = fresh_nonce(), "a party took too long to sign the manifest; try again"

        def ask_one(index: int) -> Signed:
            link, endpoint = links[index], self.cluster.holders[index]
            try:
                left = max(deadline - time.monotonic(), 0.001)
                return ask(link.stub, nonce, f"{endpoint.role} at {endpoint.address}", left)
            except grpc.RpcError as error:
                if _gone(error):
                    self._links[index] = None
                raise self._error(index, error, late) from error

        answers = at_once(ask_one, range(len(links)))
        failures = [answer for answer in answers if isinstance(answer, MpcInferError)]
        if failures:
            raise min(failures, key=_distance)
        statements = [answer for answer in answers if isinstance(answer, Signed)]
        return check(statements, self.cluster, nonce, self.demands.pin, self.demands.collateral)

    def _watch(self, index: int, link: Link) -> None:
        """Give up a channel that ends: gRPC would open it anew by itself, to a process that nobody has checked."""
        seen = threading.Event()

        def changed(state: grpc.ChannelConnectivity) -> None:
            seen.set()
            if state is not grpc.ChannelConnectivity.READY:
                link.channel.unsubscribe(changed)
                self._give_up(index, link)

        link.channel.subscribe(changed)
        seen.wait(1.0)  # a channel that is closed before gRPC watches it ends that thread with a traceback

    def _give_up(self, index: int, link: Link) -> None:
        with self._lock:
            if self._links[index] is link:
                self._links[index] = None
                self._checked = False

    def _failure(self, index: int, link: Link, call: Any, late: str) -> MpcInferError:
        """The error that a failed call stands for; a party that has gone is connected to anew before the next call."""
        if _gone(call):
            # It may come back with another certificate: what comes next is checked from scratch.
            self._give_up(index, link)
        return self._error(index, call, late)

    def _error(self, index: int, call: Any, late: str) -> MpcInferError:
        if call.details() == "Deadline Exceeded":  # gRPC's words: nobody at the party had an error
            return DeadlineError(late)
        endpoint = self.cluster.holders[index]
        error = channel.from_rpc_error(call, f"{endpoint.role} at {endpoint.address}")
        if call.code() is grpc.StatusCode.CANCELLED and not call.trailing_metadata():
            # not by us, who cancel only what we do not look at any more: its server ended in the middle of the call
            return UnavailableError(f"{endpoint.role} at {endpoint.address} has gone away; start it (again)")
        if _gone(call) and type(error) is UnavailableError:
            return UnavailableError(f"{endpoint.role} at {endpoint.address} has gone away; start it (again)")
        return error


def _gone(call: Any) -> bool:
    """Whether gRPC says that a party cannot be reached, not the party that it is not ready."""
    return call.code() is grpc.StatusCode.UNAVAILABLE and not call.trailing_metadata()


def _distance(error: MpcInferError) -> int:
    """How far an error is from the cause of a failure: 0 if it says what is wrong, more if it echoes another's."""
    if isinstance(error, AbortedError):
        return 3
    if isinstance(error, DeadlineError):
        return 2
    return 1 if isinstance(error, UnavailableError) else 0
