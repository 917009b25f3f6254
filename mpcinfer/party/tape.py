"""A tape: the correlations of one request, fetched from the dealer and expanded, each drawn once.

A large one is expanded while it is drawn, a few portions ahead, and its corrections are taken from the dealer at that
pace: what it takes of memory is bounded. One that is fetched ahead has them all in memory before it is drawn. That it
fails on the way ends the epoch, as anything does that breaks.
"""

from __future__ import annotations

import hashlib
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence

import torch

from mpcinfer.errors import NotFoundError, ProtocolError
from mpcinfer.party.delivery import Delivery, Gathered, Held
from mpcinfer.party.epoch import Epoch
from mpcinfer.party.passing import Unwatched
from mpcinfer.party.sacrifice import Dealt
from mpcinfer.protocol.batch import PORTION_BYTES, Batch
from mpcinfer.protocol.cache import CacheUse
from mpcinfer.protocol.correlation import Kind, Tensors
from mpcinfer.protocol.evidence import KeptMasks
from mpcinfer.protocol.tracing import Plan
from mpcinfer.protocol.types import Weight
from mpcinfer.wire.mesh import Account
from mpcinfer.wire.v1 import dealer_pb2

# expanded: what has more is large. What has less is all there before a run, which then computes on its own.
HELD_BYTES = 512 << 20
AHEAD = 2  # portions of what is large that are there before they are drawn

_Shares = dict[str, tuple[Kind, Tensors]]
_Expand = Callable[[Sequence[Batch], Delivery], _Shares]


class Tape:
    """The `Source` of one run. What is on it is expanded, and prepared for the weights at hand, before it is drawn."""

    def __init__(
        self,
        id_: bytes,
        shares: _Shares,
        dealer_bytes: int,
        kept: KeptMasks,
        evidence: Dealt | None = None,
        rest: Rest | None = None,
    ) -> None:
        """kept: its masks that outlive it. evidence: what an audit needs, if there may be one. rest: what adds to the
        shares while they are drawn, if not all of them are there.

        dealer_bytes: those that have come; all, once it has ended.
        """
        self.id = id_
        self._shares = shares
        self.dealer_bytes = dealer_bytes
        self.kept = kept
        self.evidence = evidence
        self._rest = rest
        self.waited = 0.0  # seconds, for what was not there when it was drawn
        if rest is not None:
            weakref.finalize(self, rest.close)

    @property
    def large(self) -> bool:
        """Whether it is expanded while it is drawn."""
        return self._rest is not None

    @property
    def complete(self) -> bool:
        """Whether all of it has come."""
        return self._rest is None or self._rest.delivery.complete

    @property
    def beside(self) -> float:
        """Seconds for which it came after it was fetched, while nobody waited for it."""
        return max(0.0, self._rest.delivery.beside(self._rest.began) - self.waited) if self._rest is not None else 0.0

    def draw(self, name: str, item: Kind) -> Tensors:
        """As `Source.draw`; ProtocolError for what the plan did not foresee or was drawn before.

        Raises what has gone wrong with the portion that it is in.
        """
        if self._rest is not None:
            self.waited += self._rest.reach(name)
        try:
            planned, shares = self._shares.pop(name)
        except KeyError:
            raise ProtocolError(f"correlation {name} is not on this tape, or was drawn before") from None
        if planned != item:
            raise ProtocolError(f"correlation {name} is not of the kind that was planned")
        return shares

    def end(self) -> None:
        """All has been drawn; raises what is wrong with what has come since."""
        if self._rest is not None:
            self.waited += self._rest.end()
            self.dealer_bytes = self._rest.delivery.frame_bytes

    def runs(self, times: int) -> list[Tape]:
        """The tapes of the runs of a plan that was dealt so often on one."""
        if times == 1:
            return [self]
        parts: list[_Shares] = [{} for _ in range(times)]
        shares, self._shares = self._shares, {}  # from here on only the runs give them away
        for name, drawn in shares.items():
            run, _, own = name.partition("/")
            parts[int(run)][own] = drawn
        each, rest = divmod(self.dealer_bytes, times)
        return [
            Tape(run_id(self.id, i), part, each + (rest if i == 0 else 0), self.kept.of(i))
            for i, part in enumerate(parts)
        ]


def run_id(tape: bytes, run: int) -> bytes:
    """What names one run of a tape."""
    return hashlib.sha256(tape + run.to_bytes(4, "big")).digest()[:16]


class Rest:
    """The later portions of a tape: expanded in a thread, as far ahead of what is drawn as they may be."""

    def __init__(self, plan: Plan, there: int, shares: _Shares, delivery: Delivery, expand: _Expand) -> None:
        """there: how many portions are expanded already. shares: where the others' go."""
        self.delivery, self.began = delivery, time.perf_counter()
        self._places, self._portions = plan.places, plan.portions
        self._there, self._drawn = there, 0
        self._shares, self._expand = shares, expand
        self._failure: BaseException | None = None
        self._closed = self._ended = False
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="tape", daemon=True).start()

    def reach(self, name: str) -> float:
        """Wait until this is there, and let those come that are to follow: the seconds that it took."""
        place = self._places.get(name, 0)
        if place <= self._drawn and place < self._there:
            return 0.0
        began = time.perf_counter()
        with self._changed:
            self._drawn = max(self._drawn, place)
            self._changed.notify_all()
            self._changed.wait_for(lambda: place < self._there or self._failure is not None)
            if place >= self._there and self._failure is not None:
                raise self._failure
        return time.perf_counter() - began

    def end(self) -> float:
        """Wait until all has come: the seconds that it took. Raises what has gone wrong."""
        began = time.perf_counter()
        with self._changed:
            self._drawn = len(self._portions)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended or self._failure is not None)
            if self._failure is not None:
                raise self._failure
        return time.perf_counter() - began

    def close(self) -> None:
        """Nobody will draw any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            for place in range(self._there, len(self._portions)):
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or place <= self._drawn + AHEAD)  # noqa: B023
                    if self._closed:
                        return
                self._add(self._expand(self._portions[place], self.delivery))
            self.delivery.end()
        except BaseException as error:
            self._failure = error
        else:
            self._ended = True
        finally:
            self.delivery.close()
            with self._changed:
                self._changed.notify_all()

    def _add(self, shares: _Shares) -> None:
        with self._changed:
            if not self._closed:
                self._shares.update(shares)
            self._there += 1
            self._changed.notify_all()


def large(plan: Plan) -> bool:
    """Whether a tape of it is expanded while it is drawn."""
    return plan.expanded_bytes > HELD_BYTES


def held_bytes(plan: Plan) -> int:
    """What a tape of it takes of memory that was fetched ahead, at the party that takes most."""
    if not large(plan):
        return plan.expanded_bytes
    return plan.correction_bytes() + (AHEAD + 1) * PORTION_BYTES


def fetch(
    epoch: Epoch,
    tape: bytes,
    plan: Plan,
    digest: bytes,
    weights: Mapping[str, Weight],
    timeout: float,
    use: CacheUse | None = None,
    *,
    ahead: bool = False,
    account: Account | None = None,
) -> Tape:
    """Name the plan to the dealer, wait until all parties have, receive the corrections (the last party), expand.

    use: the rows that products with caches are of, and how often the plan is to be run: then see `Tape.runs`. What is
    large is expanded as it is drawn. Of a tape that may be audited, or that a witness takes part in, all corrections
    have come when this returns; of others those that come first, and the others as they are wanted, or (`ahead`) as
    soon as the dealer sends them. account: what it is counted for, if not for what is being done when it begins.

    Raises what the dealer or the connection to it raises, as our errors; the tape is burnt then, and the epoch must
    end: the two ends' key chains need not be at the same place any more.
    """
    last = epoch.mesh.index == epoch.mesh.parties - 1
    dealt = plan if use is None else plan.repeated(use.times)
    size = dealt.correction_bytes() if last else 0
    delivery = _delivery(epoch, tape, plan, digest, size, timeout, use, account or epoch.mesh.account)
    signed = _signed(epoch, plan)
    corrections = bytearray()
    if signed or epoch.passing is not Unwatched:
        taken = delivery.take(size)
        corrections = taken if isinstance(taken, bytearray) else bytearray(taken)
        delivery.end()
    bound = use.digest(digest) if use is not None else digest
    keys = epoch.key.next(tape, bound)
    evidence = None
    if signed:
        if dealt is not plan:
            raise ProtocolError("a tape of several runs cannot be audited")
        evidence = Dealt(tape, bound, plan, keys, corrections, weights, use, delivery.statement)
        evidence.check(epoch)
    if corrections:
        delivery = Held(corrections, delivery.frame_bytes)

    def opened(weight: str) -> torch.Tensor:
        return weights[weight].masked

    def expand(portion: Sequence[Batch], delivery: Delivery) -> _Shares:
        shares: _Shares = {}
        for batch in portion:
            correction = memoryview(delivery.take(batch.correction_bytes if last else 0))
            expanded = batch.expand(keys.of(batch.item.kept), last=last, correction=correction, opened=opened)
            batch.give(expanded, shares)
        return shares

    there = min(AHEAD, len(dealt.portions)) if large(dealt) else len(dealt.portions)
    if ahead and last and there < len(dealt.portions) and not delivery.complete:
        delivery = Gathered(delivery)
    shares: _Shares = {}
    for portion in dealt.portions[:there]:
        shares |= expand(portion, delivery)
    if not last or there == len(dealt.portions):
        delivery.end()
    rest = Rest(dealt, there, shares, delivery, expand) if there < len(dealt.portions) else None
    return Tape(tape, shares, delivery.frame_bytes, KeptMasks(keys, plan), evidence, rest)


def _signed(epoch: Epoch, plan: Plan) -> bool:
    """Whether the tape may be audited: nothing can be wrong with one that consists of the parties' own seeds."""
    return epoch.audit_rate > 0 and plan.correction_bytes() > 0


def _delivery(
    epoch: Epoch,
    tape: bytes,
    plan: Plan,
    digest: bytes,
    size: int,
    timeout: float,
    use: CacheUse | None,
    account: Account,
) -> Delivery:
    """The corrections, `size` bytes, from the dealer; a witness has them from its party."""
    if epoch.passed is not None:
        return Held(epoch.passed(tape, size, timeout))
    request = dealer_pb2.DealRequest(
        session=epoch.id, index=epoch.mesh.index, tape=tape, plan_digest=digest, signed=_signed(epoch, plan)
    )
    if use is not None:
        own, *beside = map(_message, use.all)
        request.caches.CopyFrom(own)
        request.beside.extend(beside)
    if digest in epoch.plans_told:
        try:
            return Delivery(epoch, request, timeout, account)
        except NotFoundError:  # the dealer keeps the plans used lately; this says so before the tape is touched
            epoch.plans_told.discard(digest)
    request.plan = plan.to_bytes()
    delivery = Delivery(epoch, request, timeout, account)
    epoch.plans_told.add(digest)
    return delivery


def _message(use: CacheUse) -> dealer_pb2.CacheUse:
    numbers = [number for run in use.runs for number in run]
    return dealer_pb2.CacheUse(slot=use.slot, runs=numbers, count=use.count, times=use.times)
