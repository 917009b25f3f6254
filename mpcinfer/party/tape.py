"""A tape: the correlations of one request, fetched from the dealer and expanded, each drawn once."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping

import grpc
import torch

from mpcinfer.errors import AbortedError, NotFoundError, ProtocolError
from mpcinfer.party.epoch import Epoch
from mpcinfer.party.sacrifice import Dealt
from mpcinfer.protocol.cache import CacheUse
from mpcinfer.protocol.correlation import Kind, Tensors
from mpcinfer.protocol.evidence import KeptMasks
from mpcinfer.protocol.tracing import Plan
from mpcinfer.protocol.types import Weight
from mpcinfer.trust.signing import Signed
from mpcinfer.wire import channel
from mpcinfer.wire.frames import GRPC_HEADER
from mpcinfer.wire.v1 import dealer_pb2

_Received = tuple[bytearray, int, Signed | None]


class Tape:
    """The `Source` of one run. Everything is expanded, and prepared for the weights at hand, before the run begins."""

    def __init__(
        self,
        id_: bytes,
        shares: dict[str, tuple[Kind, Tensors]],
        dealer_bytes: int,
        kept: KeptMasks,
        evidence: Dealt | None = None,
    ) -> None:
        """kept: its masks that outlive it. evidence: what an audit needs, if there may be one."""
        self.id = id_
        self._shares = shares
        self.dealer_bytes = dealer_bytes
        self.kept = kept
        self.evidence = evidence

    def draw(self, name: str, item: Kind) -> Tensors:
        """As `Source.draw`; ProtocolError for what the plan did not foresee or was drawn before."""
        try:
            planned, shares = self._shares.pop(name)
        except KeyError:
            raise ProtocolError(f"correlation {name} is not on this tape, or was drawn before") from None
        if planned != item:
            raise ProtocolError(f"correlation {name} is not of the kind that was planned")
        return shares

    def runs(self, times: int) -> list[Tape]:
        """The tapes of the runs of a plan that was dealt so often on one."""
        if times == 1:
            return [self]
        parts: list[dict[str, tuple[Kind, Tensors]]] = [{} for _ in range(times)]
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


def fetch(
    epoch: Epoch,
    tape: bytes,
    plan: Plan,
    digest: bytes,
    weights: Mapping[str, Weight],
    timeout: float,
    use: CacheUse | None = None,
) -> Tape:
    """Name the plan to the dealer, wait until all parties have, receive the corrections (the last party), expand.

    use: the rows that products with caches are of, and how often the plan is to be run: then see `Tape.runs`.

    Raises what the dealer or the connection to it raises, as our errors; the tape is burnt then, and the epoch must
    end: the two ends' key chains need not be at the same place any more.
    """
    parties, index = epoch.mesh.parties, epoch.mesh.index
    last = index == parties - 1
    whole = plan if use is None else plan.repeated(use.times)
    size = whole.correction_bytes() if last else 0
    correction, dealer_bytes, statement = _corrections(epoch, tape, plan, digest, size, timeout, use)
    bound = use.digest(digest) if use is not None else digest
    keys = epoch.key.next(tape, bound)
    evidence = None
    if _signed(epoch, plan):
        if whole is not plan:
            raise ProtocolError("a tape of several runs cannot be audited")
        evidence = Dealt(tape, bound, plan, keys, correction, weights, use, statement)
        evidence.check(epoch)
    shares: dict[str, tuple[Kind, Tensors]] = {}
    rest = memoryview(correction)

    def opened(weight: str) -> torch.Tensor:
        return weights[weight].masked

    for batch in whole.batches:
        size = batch.correction_bytes if last else 0
        expanded = batch.expand(keys.of(batch.item.kept), last=last, correction=rest[:size], opened=opened)
        for name, member in zip(batch.names, expanded, strict=True):
            shares[name] = batch.item, member
        rest = rest[size:]
    return Tape(tape, shares, dealer_bytes, KeptMasks(keys, plan), evidence)


def _signed(epoch: Epoch, plan: Plan) -> bool:
    """Whether the tape may be audited: nothing can be wrong with one that consists of the parties' own seeds."""
    return epoch.audit_rate > 0 and plan.correction_bytes() > 0


def _corrections(
    epoch: Epoch, tape: bytes, plan: Plan, digest: bytes, size: int, timeout: float, use: CacheUse | None
) -> _Received:
    """The corrections, `size` bytes, the frame bytes in which they came, and the dealer's word on them, if any."""
    if epoch.passed is not None:
        return epoch.passed(tape, size, timeout), 0, None
    request = dealer_pb2.DealRequest(
        session=epoch.id, index=epoch.mesh.index, tape=tape, plan_digest=digest, signed=_signed(epoch, plan)
    )
    if use is not None:
        numbers = [number for run in use.runs for number in run]
        request.caches.CopyFrom(dealer_pb2.CacheUse(slot=use.slot, runs=numbers, count=use.count, times=use.times))
    if digest in epoch.plans_told:
        try:
            return _receive(epoch, request, size, timeout)
        except NotFoundError:  # the dealer keeps the plans used lately; this says so before the tape is touched
            epoch.plans_told.discard(digest)
    request.plan = plan.to_bytes()
    received = _receive(epoch, request, size, timeout)
    epoch.plans_told.add(digest)
    return received


def _receive(epoch: Epoch, request: dealer_pb2.DealRequest, size: int, timeout: float) -> _Received:
    received, at, frames, statement = bytearray(size), 0, 0, None
    account, began = epoch.mesh.account, time.perf_counter()
    call, passing = epoch.dealer.Deal(request, timeout=timeout), None
    try:
        with epoch.cancelling(call):
            for part in call:
                chunk = part.chunk
                if at + len(chunk) > size:
                    call.cancel()
                    raise ProtocolError("the dealer sent more than the plan asks for")
                # begun only now: a plan that the dealer did not know is asked for again
                passing = passing or epoch.passing(request.tape)
                passing.add(chunk)
                received[at : at + len(chunk)] = chunk
                at += len(chunk)
                frames += part.ByteSize() + GRPC_HEADER
                if part.HasField("statement"):
                    statement = Signed.of(part.statement)
    except grpc.RpcError as error:
        if epoch.mesh.broken:
            raise AbortedError(
                "a party or the dealer left while randomness was dealt; send the request again"
            ) from error
        raise channel.from_rpc_error(error, "dealer") from error
    finally:
        if passing is not None:
            passing.end()
        account.dealer_seconds += time.perf_counter() - began
        account.dealer_bytes += frames
    if at != size:
        raise ProtocolError("the dealer sent another amount than the plan asks for")
    return received, frames, statement
