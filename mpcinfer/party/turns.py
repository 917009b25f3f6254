"""Steps of texts: one run for all that take in as many tokens at the same time and choose the next one alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from mpcinfer.errors import MpcInferError
from mpcinfer.graph.lifted import lifted
from mpcinfer.graph.step import Stepped, capacity, step, steps
from mpcinfer.nn.sampling import Choice, Seen
from mpcinfer.party.epoch import Epoch
from mpcinfer.party.part import Part, Phase, Ran
from mpcinfer.party.session import Run, Session, Supply, caches_of, use_of
from mpcinfer.party.stepping import Stepping
from mpcinfer.party.tape import Tape, large
from mpcinfer.party.waiting import Joint
from mpcinfer.party.writing import Need, Writing, planned
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.tracing import Plan
from mpcinfer.protocol.types import Shared
from mpcinfer.wire.memory import give_back

# so much as these take may be free in the heap: the next one's place, and what it does not fit into. More is given back
_FREE_TAPES = 2
_MOST_RUNS = 4  # of a text that are dealt at a time: what more would save is little, what it takes of memory is not
_LOW = 2  # once no more are left, the next ones are fetched


@dataclass(frozen=True, eq=False)
class Turn:
    """A step of one text that all parties have agreed to: the new tokens, how the next one is chosen, and the tokens
    before, for a penalty.

    tape, next_tape: the ids for this step and for what is fetched ahead. pool_mb: what that may take.
    """

    writing: Writing
    session: Session
    new: Shared = field(repr=False)
    choice: Choice | None
    before: Seen | None = field(repr=False)
    tape: bytes
    next_tape: bytes
    pool_mb: int

    @property
    def need(self) -> Need:
        """What it needs."""
        new = self.new.shape[1]
        return Need.of(self.session.length + new, self.session.counted, new, self.choice)

    @property
    def taken(self) -> int:
        """How much of the prompt is taken in after it."""
        return min(self.writing.taken + self.new.shape[1], self.writing.tokens.shape[1])

    @property
    def chosen(self) -> int:
        """How many tokens are chosen after it."""
        return self.writing.chosen + (self.choice is not None)

    def following(self, after: int) -> Need | None:
        """What the step needs that comes so many steps after the next one, if there is one."""
        if self.writing.over(self.taken, self.chosen + after):
            return None
        count, choice = self.writing.part(self.taken)
        rows = self.session.length + self.new.shape[1]
        counted = rows + after if after else self.session.counted if self.before is None else rows
        return Need.of(rows + after + count, counted, count, choice)

    def alike(self) -> tuple[object, ...]:
        """Equal for turns that can be one run."""
        return self.session.model.id, *self.need.alike()

    def shareable(self, epoch: Epoch) -> bool:
        """Whether a run can be for several texts: where no tape is audited, and the model's operators can do it."""
        try:
            return not epoch.audit_rate and bool(planned([self.need] * 2, self.session.model, epoch.mesh.parties))
        except MpcInferError:
            return False


async def write(by: Stepping, members: Sequence[Joint]) -> list[Ran]:
    """One run for turns that are alike, under the first one's tape: what each text's step yields."""
    turns: list[Turn] = [each.content for each in members]
    sessions, part = [turn.session for turn in turns], Part(members[0].part.epoch)
    model, first = sessions[0].model, turns[0]
    needs = [turn.need for turn in turns]
    plan, digest = planned(needs, model, part.epoch.mesh.parties)
    supply = Supply.of([session.slot for session in sessions])
    began, sent = time.perf_counter(), part.sent
    tape, seconds = await _tape(by, part, sessions, supply, first.tape, plan, digest)
    seconds, sent = seconds + time.perf_counter() - began, part.sent - sent
    # what the next steps need is known, unless several texts grow from the same rows in turn, or others join them
    alone = all(session.slot.last in (b"", session.id) for session in sessions)
    if supply.ahead is None and len(supply.ready) <= _LOW and alone and (len(turns) == 1 or supply.steps):
        _look_ahead(by, part, turns, supply)
    supply.steps += 1
    for session in sessions:
        session.slot.last = session.id
    room = max(capacity(need.rows) for need in needs)

    async def protocol(ctx: Context) -> list[Stepped]:
        program, holdings, choice = model.program, model.holdings(), first.choice
        if len(turns) == 1:
            return [await step(program, ctx, holdings, first.new, sessions[0].caches(room), choice, first.before)]
        tokens, caches = lifted([turn.new for turn in turns]), caches_of(sessions, room)
        return await steps(program, ctx, holdings, tokens, caches, choice, [turn.before for turn in turns])

    done, online = await by.execute(part, tape, model.weights, protocol, compare=False)
    offline = Phase(seconds + tape.waited, 0, sent, tape.dealer_bytes)
    return Ran.divided(done, online, offline, tape, part.transcript)


def _look_ahead(by: Stepping, part: Part, turns: Sequence[Turn], supply: Supply) -> None:
    """Begin to fetch what the steps need that come after this one and those that all is there for.

    Tokens of an answer are dealt for several at a time, as long as their plan is the same: twice as many as before,
    since nobody knows where the answer ends.
    """
    model, first = turns[0].session.model, turns[0]

    def wanted(after: int) -> tuple[Plan, bytes] | None:
        needs = [need for turn in turns if (need := turn.following(after)) is not None]
        if len(needs) < len(turns) or len({need.alike() for need in needs}) > 1:
            return None
        return planned(needs, model, part.epoch.mesh.parties)

    begun, times = len(supply.ready), 1
    if (found := wanted(begun)) is None:
        return
    plan, digest = found
    written = all(turn.taken == turn.writing.tokens.shape[1] for turn in turns)
    if not written and large(plan):  # of a prompt what is large is fetched while it is used
        return
    # a prompt's parts differ, and a tape that may be audited has one run
    if written and not part.epoch.audit_rate:
        # two tapes are there at a time, and as much again may be free between them
        room = (first.pool_mb << 20) // (5 * max(1, plan.expanded_bytes))
        while times < min(_MOST_RUNS, 2 * supply.pace, room) and wanted(begun + times) == found:
            times += 1
    supply.pace = times
    use = use_of([turn.session for turn in turns]).after(first.new.shape[1] + begun, times)
    rows, _ = first.writing.part(first.taken)
    supply.ahead = by.ahead(part, first.next_tape, plan, digest, model.weights, use, rows)


async def _tape(
    by: Stepping, part: Part, sessions: Sequence[Session], supply: Supply, tape: bytes, plan: Plan, digest: bytes
) -> tuple[Tape, float]:
    """The tape of a step, and the seconds it took beside other work, if it was fetched ahead."""
    waited = 0.0
    if not supply.ready and supply.ahead is not None:
        ahead, supply.ahead = supply.ahead, None
        fetched, beside = await by.taken(part, ahead, supply.slots[0])
        waited = ahead.seconds - beside  # part of what is divided among the runs, and of what the caller counts
        if fetched is None:  # it was audited
            supply.slots[0].skip(ahead.rows)
        else:
            count = len(ahead.digests)
            seconds, rows = ahead.seconds / count, ahead.rows // count
            runs = zip(fetched.runs(count), ahead.digests, strict=True)
            supply.ready.extend(Run(each, digest, rows, seconds) for each, digest in runs)
            give_back(unless=_FREE_TAPES * count * plan.expanded_bytes)
    if supply.ready:
        if supply.ready[0].digest == use_of(sessions).digest(digest):
            run = supply.ready.popleft()
            return run.tape, run.seconds - waited
        supply.drop()
    return await by.deal(part, tape, plan, digest, sessions[0].model.weights, sessions), 0.0
