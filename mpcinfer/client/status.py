"""How the parties are doing, asked of each by itself over a channel of its own: one that is down hides nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from mpcinfer.client.cluster import CONNECT_TIMEOUT
from mpcinfer.client.link import Link, at_once, open_and_ask
from mpcinfer.client.manifest import Demands, ask, fresh_nonce
from mpcinfer.client.model import Model
from mpcinfer.config import Cluster, Endpoint
from mpcinfer.errors import DeadlineError, IdentityError, MpcInferError, UnavailableError
from mpcinfer.trust.manifest import examined, opened
from mpcinfer.trust.pin import Member
from mpcinfer.wire import channel
from mpcinfer.wire.identity import Identity

_POLL = 0.1


@dataclass(frozen=True)
class PartyStatus:
    """How one party is doing.

    `state` is "ready", "connecting" or "stopping" as the party says, or else "unreachable", or "refused" if it is not
    who or what the cluster file and the pin say; `detail` says why it is not ready. A party that is ready also says who
    operates it, the digest of its code, and shows evidence, of which `evidence` says in words what it proves.
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
    operator: str = ""
    code: str = ""
    evidence: str = ""


def party_status(
    cluster: Cluster, identity: Identity, endpoint: Endpoint, *, timeout: float, demands: Demands | None = None
) -> PartyStatus:
    """How the party at `endpoint` is doing, asked over a new channel; never raises because of the party.

    demands: what it must show, if it is ready; None: it is not asked for anything.
    """
    deadline, member = time.monotonic() + timeout, None
    try:
        link, status = open_and_ask(cluster, identity, timeout, endpoint)
        try:
            if demands is not None and status.state == "ready":
                member = _shown(link, cluster, endpoint, demands, max(deadline - time.monotonic(), 0.001))
        finally:
            link.channel.close()
    except MpcInferError as error:
        gone = isinstance(error, UnavailableError | DeadlineError)
        return PartyStatus(endpoint.role, endpoint.address, "unreachable" if gone else "refused", str(error))
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
        operator=member.facts.operator if member else "",
        code=member.facts.code if member else "",
        evidence=member.evidence if member else "",
    )


def _shown(link: Link, cluster: Cluster, endpoint: Endpoint, demands: Demands, timeout: float) -> Member:
    """What a party shows for itself; whether the others know it as the same is seen only by a whole connection."""
    nonce, who = fresh_nonce(), f"{endpoint.role} at {endpoint.address}"
    try:
        signed = ask(link.stub, nonce, who, timeout)
    except grpc.RpcError as error:
        raise channel.from_rpc_error(error, who) from error
    return examined(opened(signed, cluster, endpoint.role, nonce), nonce, demands.pin, demands.collateral)


def cluster_status(
    cluster: Cluster, identity: Identity, *, timeout: float = CONNECT_TIMEOUT, demands: Demands | None = None
) -> list[PartyStatus]:
    """How every party is doing, by index, and then every witness; `demands` as in `party_status`."""

    def ask_one(endpoint: Endpoint) -> PartyStatus:
        return party_status(cluster, identity, endpoint, timeout=timeout, demands=demands)

    results = at_once(ask_one, cluster.holders)
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
