"""What leaves, or is committed, only once all parties and witnesses vouch for all that was done before.

An answer that another step follows at once, as a token of a text, leaves with the votes of that step: what all vouch
for travels in their messages, so that nobody waits for one of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from mpcinfer.errors import MpcInferError
from mpcinfer.party.epoch import Epoch
from mpcinfer.party.inbox import Job
from mpcinfer.party.vouching import Vouching, count, subject
from mpcinfer.party.waiting import Ballot
from mpcinfer.trust.commitment import output_commitment
from mpcinfer.wire.v1 import tensor_pb2


@dataclass(frozen=True)
class Answer:
    """What is about to leave. number: of the answer, where a request has several. No outputs: something to commit."""

    job: Job
    step: dict[str, Any]
    outputs: Sequence[tensor_pb2.Tensor] = ()
    number: int = 0

    def commitment(self) -> bytes:
        """To the outputs."""
        return output_commitment(self.job.salt, self.outputs, self.number)

    def subject(self, commitment: bytes) -> dict[str, Any]:
        """What is stated of it."""
        return subject(self.job, self.step, self.number, commitment)


@dataclass(frozen=True)
class _Later:
    job: Job
    subject: dict[str, Any]
    leave: Callable[[], None]


class Releasing:
    """Of one party or witness; without `vouching` there are no witnesses and nothing is waited for."""

    def __init__(self, vouching: Vouching | None) -> None:
        self._vouching = vouching
        self._later: list[_Later] = []

    @property
    def needed(self) -> bool:
        """Whether anybody vouches."""
        return self._vouching is not None

    def later(self, answer: Answer, leave: Callable[[bytes], None]) -> None:
        """Let it leave with the votes of the next step; `leave` is told the commitment to it, where all vouch."""
        if self._vouching is None:
            leave(b"")
            return
        commitment = answer.commitment()
        self._later.append(_Later(answer.job, answer.subject(commitment), partial(leave, commitment)))

    def count(self, epoch: Epoch, ballots: list[Ballot]) -> list[dict[int, Any]]:
        """Everybody's answers to each ballot; what was put off leaves. TamperingError if anything differs."""
        if not self._later:
            return count(epoch, ballots)[0]
        assert self._vouching is not None
        with self._leaving() as subjects:
            own, signed = self._vouching.statement(epoch, subjects)
            found, told = count(epoch, ballots, signed)
            self._vouching.check(own, told)
        return found

    def now(self, epoch: Epoch, subjects: list[dict[str, Any]]) -> None:
        """All vouch for these and for what was put off, which leaves. TamperingError if anything differs."""
        assert self._vouching is not None
        with self._leaving() as later:
            self._vouching.exchange(epoch, [*later, *subjects])

    def end(self) -> None:
        """The epoch is over: what was put off never leaves."""
        self._later = []

    @contextmanager
    def _leaving(self) -> Iterator[list[dict[str, Any]]]:
        """The subjects of what was put off, which leaves if the block ends well."""
        later, self._later = self._later, []
        try:
            yield [each.subject for each in later]
        except MpcInferError as error:
            for each in later:
                each.job.fail(error)
            raise
        for each in later:
            each.leave()
