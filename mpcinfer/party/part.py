"""One request's part of a step, and what it has cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mpcinfer.party.epoch import Epoch
from mpcinfer.party.tape import Tape
from mpcinfer.party.transcript import Evidence, Transcript
from mpcinfer.protocol.evidence import KeptMasks

if TYPE_CHECKING:
    from mpcinfer.party.stepping import Stepping


@dataclass(frozen=True)
class Phase:
    """What one phase of a request cost this party."""

    seconds: float
    rounds: int
    bytes_sent: int
    bytes_from_dealer: int = 0

    def part(self, i: int, count: int) -> Phase:
        """What one of so many is told that shared it: all of its time and rounds, its part of the bytes."""
        sent, dealt = (
            total // count + (total % count if i == 0 else 0) for total in (self.bytes_sent, self.bytes_from_dealer)
        )
        return Phase(self.seconds, self.rounds, sent, dealt)


@dataclass
class Part:
    """One request's part of a step, which several may share: what it has cost this party so far.

    `evidence` is of what has run last, and was found to be the same at all parties.
    """

    epoch: Epoch
    id: bytes = b""
    rounds: int = 0
    sent: int = 0
    transcript: Transcript = field(default_factory=Transcript, repr=False)
    evidence: Evidence | None = None


@dataclass(frozen=True)
class Ran:
    """What one part gets of a run that was for several: what it has yielded for it, its part of the costs, what all
    parties must have seen, and the masks of its new rows."""

    found: Any = field(repr=False)
    online: Phase
    offline: Phase
    tape: bytes
    transcript: Transcript = field(repr=False)
    masks: KeptMasks = field(repr=False)

    @staticmethod
    def divided(found: Sequence[Any], online: Phase, offline: Phase, tape: Tape, transcript: Transcript) -> list[Ran]:
        """Among as many as it has yielded something for; what it has cost is told once."""
        count = len(found)
        return [
            Ran(
                found[i],
                online.part(i, count),
                offline.part(i, count),
                tape.id,
                transcript,
                tape.kept if count == 1 else tape.kept.of_text(i),
            )
            for i in range(count)
        ]

    async def compared(self, by: Stepping, part: Part) -> Phase:
        """See `Stepping.compare`; what the run and this have cost the part."""
        began, rounds, sent = time.perf_counter(), part.rounds, part.sent
        part.transcript = self.transcript
        await by.compare(part, self.tape)
        seconds = self.online.seconds + time.perf_counter() - began
        return Phase(seconds, self.online.rounds + part.rounds - rounds, self.online.bytes_sent + part.sent - sent)
