"""Writing a text: each step takes in a part of the prompt, or chooses a token and has it taken in by the next step."""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from mpcinfer.errors import AbortedError
from mpcinfer.graph.step import CHUNK, Stepped, capacity, step
from mpcinfer.nn.sampling import Choice, Seen
from mpcinfer.party.actions import found
from mpcinfer.party.catalogue import Catalogue, Model
from mpcinfer.party.inbox import Job
from mpcinfer.party.messages import reveal
from mpcinfer.party.releasing import Answer
from mpcinfer.party.running import Refused
from mpcinfer.party.session import Run, Session, Sessions
from mpcinfer.party.stepping import Part, Phase, Stepping, tapes
from mpcinfer.party.tape import AHEAD, Tape
from mpcinfer.party.transcript import Evidence
from mpcinfer.protocol.tracing import Plan
from mpcinfer.protocol.types import Shared
from mpcinfer.wire.v1 import tensor_pb2

_MOST_RUNS = 4  # of a text that are dealt at a time: what more would save is little, what it takes of memory is not
_LOW = 2  # once no more are left, the next ones are fetched


@dataclass(frozen=True)
class Written:
    """What one step has yielded: how much of the request is taken in, output shares if a token was chosen, costs.

    And the commitment to the outputs, where there are witnesses, and what the step leaves for the receipt.
    """

    taken: int
    outputs: list[tensor_pb2.Tensor]
    online: Phase
    offline: Phase
    commitment: bytes
    evidence: Evidence | None = None


@dataclass
class Writing:
    """What a request to generate brings, and how far it has come. `done` gets a Written for each step."""

    model: Model
    tokens: Shared
    parent: bytes
    keep: int
    most: int
    choice: Choice
    done: queue.SimpleQueue[Written | None] = field(default_factory=queue.SimpleQueue, repr=False)
    session: Session | None = field(default=None, repr=False)
    taken: int = 0
    chosen: int = 0

    def next_tokens(self) -> tuple[Shared, Choice | None]:
        """What goes in next, and how the token after it is chosen, if it is."""
        count, choice = self.part(self.taken)
        if self.taken < self.tokens.shape[1]:
            return self.tokens.map(lambda t: t[:, self.taken : self.taken + count]), choice
        assert self.session is not None and self.session.token is not None
        return self.session.token, choice

    def part(self, taken: int) -> tuple[int, Choice | None]:
        """How many tokens go in after so many of the prompt, and how the token after them is chosen, if it is."""
        count = min(CHUNK, self.tokens.shape[1] - taken)
        if not count:
            return 1, self.choice
        last = taken + count == self.tokens.shape[1]
        return count, self.choice if last and self.most else None

    def uses(self) -> tuple[int, int]:
        """Queries and tokens that the next step uses: each of the prompt once, and each of the answer once."""
        count, choice = self.part(self.taken)
        prompt = count if self.taken < self.tokens.shape[1] else 0
        return int(not self.taken), prompt + (choice is not None)

    def plan(self, parties: int) -> tuple[Plan, bytes]:
        """The plan of its next step, as far as it is known before that begins: without a parent's rows."""
        count, choice = self.part(self.taken)
        length, counted = (self.session.length, self.session.counted) if self.session is not None else (0, 0)
        return _planned(parties, self.model, length, counted, count, choice)

    def over(self, taken: int, chosen: int) -> bool:
        """Whether there is nothing left to do after so many tokens of the prompt and so many of the answer."""
        return taken == self.tokens.shape[1] and chosen >= self.most


async def generate(
    by: Stepping, catalogue: Catalogue, sessions: Sessions, part: Part, job: Job, announced: dict[str, Any]
) -> bool:
    """One step of a request; whether that was the last."""
    writing: Writing = job.content
    own_tape, mask_tape, next_tape = tapes(announced, 3)

    def prepare() -> tuple[Session, Shared, Choice | None, Plan, bytes, Seen | None]:
        model = found(catalogue, writing.model, job, announced)
        if writing.session is None:
            more = writing.tokens.shape[1] + max(0, writing.most - 1)
            writing.session = sessions.begin(job.id, job.caller, model, writing.parent, writing.keep, own_tape, more)
            writing.session.request = job.result
        session = sessions.find(job.id, job.caller, model)
        new, choice = writing.next_tokens()
        before = None
        if choice is not None and choice.penalises:
            uncounted = torch.cat([session.tokens[:, session.counted :], new.share], dim=1)[0]
            before = Seen(session.counts, Shared(uncounted))
        plan, digest = _planned(part.epoch.mesh.parties, model, session.length, session.counted, new.shape[1], choice)
        admission.charge(model, job.caller, *writing.uses())
        return session, new, choice, plan, digest, before

    begun = writing.session is not None
    try:
        with by.policy.admission() as admission:
            session, new, choice, plan, digest, before = await by.agreed(part, prepare)
    except Refused:
        if not begun and writing.session is not None:  # it began here, but not everywhere
            sessions.forget([job.id])
        raise
    model, slot = session.model, session.slot
    await by.masked(part, model, mask_tape)
    began, sent = time.perf_counter(), part.sent
    tape, seconds = await _tape(by, part, session, own_tape, plan, digest)
    seconds, sent = seconds + time.perf_counter() - began, part.sent - sent
    length, counted = session.length + new.shape[1], session.counted
    counted = counted if before is None else length
    taken, chosen = min(writing.taken + new.shape[1], writing.tokens.shape[1]), writing.chosen + (choice is not None)
    # what the next steps need is known, unless several texts grow from the same rows in turn
    if slot.ahead is None and len(slot.ready) <= _LOW and slot.last in (b"", session.id):
        _look_ahead(by, part, writing, next_tape, announced, length, counted, taken, chosen)
    slot.last = session.id
    holdings, caches = model.holdings(), session.caches(capacity(length))
    done: Stepped
    done, online = await by.execute(
        part,
        tape,
        model.weights,
        lambda ctx: step(model.program, ctx, holdings, new, caches, choice, before),
    )
    session.grow(done.caches, new, tape.kept)
    session.token = done.token
    offline = Phase(seconds + tape.waited, 0, sent, tape.dealer_bytes)
    if done.counts is not None:
        session.counts, session.counted = done.counts, session.length
    writing.taken, writing.chosen = taken, chosen
    answer = [reveal(x) for x in done.outputs]

    def written(commitment: bytes) -> None:
        writing.done.put(Written(taken, answer, online, offline, commitment, evidence))

    evidence, over = part.evidence, writing.over(taken, chosen)
    if not answer:  # a text that is only taken in releases nothing
        written(b"")
    elif over:
        written(await by.release(part, job, announced, answer, chosen))
    else:
        by.releasing.later(Answer(job, announced, answer, chosen), written)
    return over


def _planned(
    parties: int, model: Model, length: int, counted: int, new: int, choice: Choice | None
) -> tuple[Plan, bytes]:
    """The plan of a step that takes in `new` tokens after `length`, of which `counted` have been counted."""
    fresh = length + new - counted if choice is not None and choice.penalises else 0
    return model.step_plan(new, capacity(length + new), choice, fresh, parties)


def _look_ahead(
    by: Stepping,
    part: Part,
    writing: Writing,
    tape: bytes,
    announced: dict[str, Any],
    length: int,
    counted: int,
    taken: int,
    chosen: int,
) -> None:
    """Begin to fetch what the steps need that come after this one and those that all is there for.

    length, counted, taken, chosen: as they will be after this step. Tokens of an answer are dealt for several at a
    time, as long as their plan is the same: twice as many as before, since nobody knows where the answer ends.
    """
    session = writing.session
    assert session is not None
    model, slot = session.model, session.slot
    count, choice = writing.part(taken)

    def planned(step: int) -> tuple[Plan, bytes] | None:
        """What the step needs that comes so many steps after the next one, if there is one."""
        if writing.over(taken, chosen + step):
            return None
        seen = length + step if step else counted
        return _planned(part.epoch.mesh.parties, model, length + step, seen, count, choice)

    begun, times = len(slot.ready), 1
    if (wanted := planned(begun)) is None:
        return
    plan, digest = wanted
    written = taken == writing.tokens.shape[1]
    if not written and len(plan.portions) > AHEAD:  # of a prompt what is large is fetched while it is used
        return
    # a prompt's parts differ, and a tape that may be audited has one run
    if written and not part.epoch.audit_rate:
        room = (announced["pool_mb"] << 20) // (4 * max(1, plan.expanded_bytes))
        while times < min(_MOST_RUNS, 2 * slot.pace, room) and planned(begun + times) == wanted:
            times += 1
    slot.pace = times
    use = session.use().after(length - session.length + begun, times)
    slot.ahead = by.ahead(part, tape, plan, digest, model.weights, use, count)


async def _tape(
    by: Stepping, part: Part, session: Session, tape: bytes, plan: Plan, digest: bytes
) -> tuple[Tape, float]:
    """The tape of a step, and the seconds it took beside other work, if it was fetched ahead."""
    slot, waited = session.slot, 0.0
    if not slot.ready and slot.ahead is not None:
        ahead, slot.ahead = slot.ahead, None
        fetched, beside = await by.taken(part, ahead, slot)
        waited = ahead.seconds - beside  # part of what is divided among the runs, and of what the caller counts
        if fetched is None:  # it was audited
            slot.skip(ahead.rows)
        else:
            seconds = ahead.seconds / len(ahead.digests)
            runs = fetched.runs(len(ahead.digests))
            slot.ready.extend(Run(each, digest, seconds) for each, digest in zip(runs, ahead.digests, strict=True))
    if slot.ready:
        if slot.ready[0].digest == session.use().digest(digest):
            run = slot.ready.popleft()
            return run.tape, run.seconds - waited
        slot.drop()
    return await by.deal(part, tape, plan, digest, session.model.weights, session), 0.0


def gone() -> AbortedError:
    """What the others are told of a request that has ended at one party."""
    return AbortedError("the caller has gone, or this request has ended here")
