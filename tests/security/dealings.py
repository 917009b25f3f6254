"""A real dealer and the parties' ends of its tapes in one process, without servers: for whoever audits or cheats."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

from mpcinfer.dealer.dealing import Dealer
from mpcinfer.dealer.service import _use
from mpcinfer.errors import MpcInferError
from mpcinfer.party.epoch import Epoch
from mpcinfer.party.sacrifice import RowMasks, audit
from mpcinfer.party.tape import Tape, fetch
from mpcinfer.protocol.cache import CacheUse
from mpcinfer.protocol.correlation import Kind
from mpcinfer.protocol.tracing import Plan
from mpcinfer.protocol.types import Weight
from mpcinfer.trust.signing import Signed, Signer
from mpcinfer.wire.mesh import Link, Mesh
from mpcinfer.wire.v1 import dealer_pb2, mesh_pb2
from tests.dealer.test_dealing import CLUSTER, Session
from tests.inprocess import Keys


def meshes(n: int) -> tuple[list[Mesh], list[tuple[int, int, bytes]]]:
    """Parties linked by queues; and all that they send each other, as (from, to, payload), as it grows."""
    queues = {(i, j): SimpleQueue[Any]() for i in range(n) for j in range(n) if i != j}
    sent: list[tuple[int, int, bytes]] = []

    class Noted(SimpleQueue[Any]):
        def __init__(self, i: int, j: int) -> None:
            self.ends = i, j

        def put(self, item: Any, *_: Any, **__: Any) -> None:
            if item is not None:
                sent.append((*self.ends, item.frame.payload))
            queues[self.ends].put(item)

    return [
        Mesh(
            i,
            {
                j: Link(j, iter(queues[j, i].get, None), Noted(i, j), mesh_pb2.ConnectRequest, lambda: None)
                for j in range(n)
                if j != i
            },
        )
        for i in range(n)
    ], sent


class _Stub:
    """The dealer as a party's stub shows it."""

    def __init__(self, dealer: Dealer) -> None:
        self._dealer = dealer

    def Deal(self, request: dealer_pb2.DealRequest, timeout: float) -> Any:
        r = request
        use = _use(r.caches) if r.HasField("caches") else None
        parts = self._dealer.deal(r.session, r.index, r.tape, r.plan_digest, r.plan, 20, use=use, signed=r.signed)

        def answers() -> Iterator[dealer_pb2.DealResponse]:
            for part in parts:
                if isinstance(part, Signed):
                    yield dealer_pb2.DealResponse(statement=part.message())
                else:
                    yield dealer_pb2.DealResponse(chunk=bytes(part))

        return _Call(answers())


class _Call:
    def __init__(self, answers: Iterator[Any]) -> None:
        self._answers = answers

    def __iter__(self) -> Iterator[Any]:
        return self._answers

    def cancel(self) -> None:
        """Nothing waits for long here."""


class Table:
    """A session of n parties and a dealer who signs."""

    def __init__(self, keys: Keys, n: int) -> None:
        self.n = n
        self.dealer = Dealer(n, CLUSTER, Signer(keys.identity("dealer")))
        session = Session(self.dealer).join()
        found, self.sent = meshes(n)
        self.epochs = [
            Epoch(session.id, mesh, chain, _Stub(self.dealer), [], threading.Event())
            for mesh, chain in zip(found, session.chains, strict=True)
        ]
        for epoch in self.epochs:
            epoch.cluster, epoch.audit_rate = keys.cluster, 0.5

    def each(self, work: Callable[[int], Any]) -> list[Any]:
        """What it yields for each party, or our error."""

        def one(index: int) -> Any:
            try:
                return work(index)
            except MpcInferError as error:
                return error

        with ThreadPoolExecutor(self.n) as pool:
            return list(pool.map(one, range(self.n)))

    def fetched(
        self, plan: Plan, use: CacheUse | None = None, weights: Sequence[dict[str, Weight]] | None = None
    ) -> list[Tape | MpcInferError]:
        """A tape at all parties."""
        tape, digest = secrets.token_bytes(16), plan.digest()
        held = weights or [{}] * self.n
        return self.each(lambda i: fetch(self.epochs[i], tape, plan, digest, held[i], 20, use))

    def audited(self, tapes: Sequence[Any], rows: Sequence[RowMasks] | None = None) -> list[MpcInferError | None]:
        """What each party finds."""
        return self.each(lambda i: audit(self.epochs[i], tapes[i].evidence, rows[i] if rows else None))

    def cheat(self, target: Kind) -> None:
        """From now on the dealer deals this kind wrongly: one bit of it."""
        honest = self.dealer._dealt

        def dealt(batch: Any, keys: Any, fixed: Any) -> list[memoryview]:
            parts = list(honest(batch, keys, fixed))
            return [flipped(parts[0]), *parts[1:]] if batch.item == target else parts

        self.dealer._dealt = dealt  # type: ignore[method-assign]


def flipped(data: bytes | memoryview) -> memoryview:
    """The same but for one bit."""
    changed = bytearray(data)
    changed[0] ^= 1
    return memoryview(changed)
