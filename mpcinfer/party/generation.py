"""Writing a text: each step takes in a part of the prompt, or chooses a token and has it taken in by the next step."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from mpcinfer.errors import AbortedError
from mpcinfer.nn.sampling import Seen
from mpcinfer.party.actions import found
from mpcinfer.party.catalogue import Catalogue
from mpcinfer.party.inbox import Job
from mpcinfer.party.messages import reveal
from mpcinfer.party.part import Part, Ran
from mpcinfer.party.releasing import Answer
from mpcinfer.party.running import Refused
from mpcinfer.party.session import Sessions
from mpcinfer.party.stepping import Stepping, tapes
from mpcinfer.party.turns import Turn, write
from mpcinfer.party.waiting import Joint
from mpcinfer.party.writing import Writing, Written, planned
from mpcinfer.protocol.types import Shared


async def generate(
    by: Stepping, catalogue: Catalogue, sessions: Sessions, part: Part, job: Job, announced: dict[str, Any]
) -> bool:
    """One step of a request; whether that was the last."""
    writing: Writing = job.content
    own_tape, mask_tape, next_tape = tapes(announced, 3)

    def prepare() -> Turn:
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
        turn = Turn(writing, session, new, choice, before, own_tape, next_tape, announced["pool_mb"])
        planned([turn.need], model, part.epoch.mesh.parties)
        admission.charge(model, job.caller, *writing.uses())
        return turn

    begun = writing.session is not None
    try:
        with by.policy.admission() as admission:
            turn: Turn = await by.agreed(part, prepare)
            await by.masked(part, turn.session.model, mask_tape)
    except Refused:
        if not begun and writing.session is not None:  # it began here, but not everywhere
            sessions.forget([job.id])
        raise
    session, taken, chosen = turn.session, turn.taken, turn.chosen
    ran: Ran = await Joint(part, turn.alike(), turn, partial(write, by), partial(turn.shareable, part.epoch))
    online, offline, done = await ran.compared(by, part), ran.offline, ran.found
    session.grow(done.caches, turn.new, ran.masks)
    session.token = done.token
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


def gone() -> AbortedError:
    """What the others are told of a request that has ended at one party."""
    return AbortedError("the caller has gone, or this request has ended here")
