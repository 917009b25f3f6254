"""What all steps are made of: votes, tapes, rounds. One party's part; the others do the same at the same time."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import torch

from mpcinfer import errors
from mpcinfer.config import Limits
from mpcinfer.errors import AbortedError, MpcInferError, ProtocolError
from mpcinfer.graph.plan import mask_weights
from mpcinfer.party.catalogue import Catalogue, Model
from mpcinfer.party.epoch import Epoch
from mpcinfer.party.tape import Tape, fetch
from mpcinfer.protocol.cache import CacheUse
from mpcinfer.protocol.context import Context, Opening, drive
from mpcinfer.protocol.tracing import Plan
from mpcinfer.protocol.types import Shared, Weight
from mpcinfer.wire import channel
from mpcinfer.wire.mesh import CONTROL


@dataclass(frozen=True)
class Phase:
    """What one phase of a request cost this party."""

    seconds: float
    rounds: int
    bytes_sent: int
    bytes_from_dealer: int = 0


class Refused(Exception):
    """Some party voted no: the request has its answer, the epoch goes on."""


class Late(Exception):
    """Some party does not have the request yet: party 0 will announce it again."""


class Stepping:
    """How this party takes part in steps."""

    def __init__(self, index: int, catalogue: Catalogue, limits: Limits) -> None:
        self.index = index
        self._catalogue = catalogue
        self._limits = limits

    def vote(
        self, epoch: Epoch, refusal: MpcInferError | None, note: str = "", *, late: bool = False
    ) -> dict[int, str]:
        """All parties say yes (with a note each), no, or "not here yet".

        Refused, caused by the error, if anybody says no; else Late if anybody has to wait.
        """
        own = {
            "error": type(refusal).__name__ if refusal else "",
            "text": str(refusal) if refusal else note,
            "late": late,
        }
        answers = {self.index: own} | {
            peer: json.loads(raw) for peer, raw in epoch.mesh.exchange(json.dumps(own).encode(), CONTROL).items()
        }
        if refusal is not None:
            raise Refused from refusal
        for peer, answer in sorted(answers.items()):
            if answer["error"]:
                kind = getattr(errors, answer["error"], None)
                if not (isinstance(kind, type) and issubclass(kind, MpcInferError)):
                    kind = AbortedError
                raise Refused from kind(f"party {peer}: {answer['text']}")
        if any(answer["late"] for answer in answers.values()):
            raise Late
        return {peer: answer["text"] for peer, answer in answers.items()}

    def agreed(self, epoch: Epoch, work: Callable[[], Any]) -> Any:
        """Do something that may fail here, and go on only if it succeeded everywhere."""
        value, refusal = None, None
        try:
            value = work()
        except MpcInferError as error:
            refusal = error
        except Exception as error:
            refusal = incident(error)
        self.vote(epoch, refusal)
        return value

    def execute(
        self,
        epoch: Epoch,
        tape: Tape,
        weights: dict[str, Weight],
        protocol: Callable[[Context], Coroutine[Any, Any, Any]],
    ) -> tuple[Any, Phase]:
        """Run a protocol with the other parties: its result here, and what it cost."""
        began, rounds, sent = time.perf_counter(), epoch.mesh.rounds, epoch.mesh.bytes_sent
        ctx = Context(self.index, epoch.mesh.parties, tape, weights)
        result = drive(protocol(ctx), lambda batch: _exchange(epoch, batch))
        return result, Phase(time.perf_counter() - began, epoch.mesh.rounds - rounds, epoch.mesh.bytes_sent - sent)

    def deal(
        self,
        epoch: Epoch,
        tape: bytes,
        plan: Plan,
        digest: bytes,
        weights: dict[str, Weight],
        use: CacheUse | None = None,
    ) -> Tape:
        """Fetch a tape at all parties. A failure ends the epoch: the dealer may have forgotten it, or burn the tape."""
        try:
            tape_here: Tape = self.agreed(
                epoch, lambda: fetch(epoch, tape, plan, digest, weights, self._limits.step_timeout_s, use)
            )
        except Refused as refused:
            raise refused.__cause__ or AbortedError("a party could not get its randomness") from None
        return tape_here

    def masked(self, epoch: Epoch, model: Model, tape: bytes) -> None:
        """Open the weights' masks, once per epoch."""
        if model.masked_in == epoch.id:
            return

        def prepare() -> tuple[Plan, dict[str, Shared]]:
            return model.mask_plan(epoch.mesh.parties), self._catalogue.load(model)

        plan, shares = self.agreed(epoch, prepare)
        masks = self.deal(epoch, tape, plan, plan.digest(), {})
        masked, _ = self.execute(epoch, masks, {}, lambda ctx: mask_weights(model.program, ctx, shares))
        model.weights = {w.name: w for w in masked}
        model.masked_in = epoch.id


def incident(error: BaseException | None) -> ProtocolError:
    """What a client may be told about a failure that nobody foresaw; the log says where it was."""
    return ProtocolError(channel.to_status(error or AssertionError())[1])


def tapes(step: dict[str, Any], count: int) -> list[bytes]:
    """Ids of the tapes of a step, from the one party 0 drew."""
    base = bytes.fromhex(step["tape"])
    return [hashlib.sha256(base + bytes([i])).digest()[:16] for i in range(count)]


def _exchange(epoch: Epoch, batch: list[Opening]) -> list[torch.Tensor]:
    """One round: all openings of a batch in one message to every peer."""
    packed = [opening.ring.pack(opening.masked) for opening in batch]
    received = epoch.mesh.exchange(b"".join(packed))
    values = [opening.masked for opening in batch]
    expected = sum(len(p) for p in packed)
    for peer, payload in received.items():
        if len(payload) != expected:
            raise ProtocolError(f"party {peer} sent {len(payload)} bytes in a round of {expected}")
        at = 0
        view = memoryview(payload)
        for i, opening in enumerate(batch):
            part = opening.ring.unpack(view[at : at + len(packed[i])], tuple(opening.masked.shape))
            values[i] = opening.ring.add(values[i], part)
            at += len(packed[i])
    return values
