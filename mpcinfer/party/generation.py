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
from mpcinfer.party.epoch import Epoch
from mpcinfer.party.inbox import Job
from mpcinfer.party.session import Session, Sessions
from mpcinfer.party.stepping import Phase, Refused, Stepping, tapes
from mpcinfer.protocol.tracing import Plan
from mpcinfer.protocol.types import Shared


@dataclass(frozen=True)
class Written:
    """What one step has yielded: how much of the request is taken in, output shares if a token was chosen, costs."""

    taken: int
    outputs: tuple[Shared, ...]
    online: Phase
    offline: Phase


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

    @property
    def over(self) -> bool:
        """Whether there is nothing left to do."""
        return self.taken == self.tokens.shape[1] and self.chosen >= self.most

    def next_tokens(self) -> tuple[Shared, Choice | None]:
        """What goes in next, and how the token after it is chosen, if it is."""
        length = self.tokens.shape[1]
        if self.taken < length:
            new = self.tokens.map(lambda t: t[:, self.taken : self.taken + CHUNK])
            last = self.taken + new.shape[1] == length
            return new, self.choice if last and self.most else None
        assert self.session is not None and self.session.token is not None
        return self.session.token, self.choice


def generate(
    by: Stepping, catalogue: Catalogue, sessions: Sessions, epoch: Epoch, job: Job, announced: dict[str, Any]
) -> bool:
    """One step of a request; whether that was the last."""
    writing: Writing = job.content
    own_tape, mask_tape = tapes(announced, 2)

    def prepare() -> tuple[Session, Shared, Choice | None, Plan, bytes, Seen | None]:
        model = found(catalogue, writing.model, announced)
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
        room, fresh = capacity(session.length + new.shape[1]), 0 if before is None else before.fresh.shape[0]
        plan, digest = model.step_plan(new.shape[1], room, choice, fresh, epoch.mesh.parties)
        return session, new, choice, plan, digest, before

    begun = writing.session is not None
    try:
        session, new, choice, plan, digest, before = by.agreed(epoch, prepare)
    except Refused:
        if not begun and writing.session is not None:  # it began here, but not everywhere
            sessions.forget([job.id])
        raise
    model = session.model
    by.masked(epoch, model, mask_tape)
    began, sent = time.perf_counter(), epoch.mesh.bytes_sent
    use = session.use()
    tape = by.deal(epoch, own_tape, plan, digest, model.weights, use)
    offline = Phase(time.perf_counter() - began, 0, epoch.mesh.bytes_sent - sent, tape.dealer_bytes)
    holdings, caches = model.holdings(), session.caches(capacity(session.length + new.shape[1]))
    done: Stepped
    done, online = by.execute(
        epoch,
        tape,
        model.weights,
        lambda ctx: step(model.program, ctx, holdings, new, caches, choice, before),
    )
    session.grow(done.caches, new)
    session.token = done.token
    if done.counts is not None:
        session.counts, session.counted = done.counts, session.length
    writing.taken = min(writing.taken + new.shape[1], writing.tokens.shape[1])
    writing.chosen += choice is not None
    writing.done.put(Written(writing.taken, done.outputs, online, offline))
    return writing.over


def gone() -> AbortedError:
    """What the others are told of a request that has ended at one party."""
    return AbortedError("the caller has gone, or this request has ended here")
