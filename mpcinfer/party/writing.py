"""A request to write a text: what it brings, how far it has come, and what its steps need."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import dataclass, field

from mpcinfer.graph.step import CHUNK, capacity
from mpcinfer.nn.sampling import Choice
from mpcinfer.party.catalogue import Model
from mpcinfer.party.part import Phase
from mpcinfer.party.session import Session
from mpcinfer.party.transcript import Evidence
from mpcinfer.protocol.tracing import Plan
from mpcinfer.protocol.types import Shared
from mpcinfer.wire.v1 import tensor_pb2


@dataclass(frozen=True)
class Need:
    """What the plan of a step depends on: new tokens, how the next one is chosen, how many tokens a penalty has not
    counted yet, and how many rows the caches have afterwards."""

    new: int
    choice: Choice | None
    fresh: int
    rows: int

    @staticmethod
    def of(rows: int, counted: int, new: int, choice: Choice | None) -> Need:
        """counted: how many tokens a penalty has counted before, if there is one."""
        return Need(new, choice, rows - counted if choice is not None and choice.penalises else 0, rows)

    def alike(self) -> tuple[int, Choice | None, int, int]:
        """Equal for texts that can be written in one run: then each gets the room that the longest of them needs,
        which is less than twice its own."""
        return self.new, self.choice, self.fresh, capacity(self.rows).bit_length()


def planned(needs: Sequence[Need], model: Model, parties: int) -> tuple[Plan, bytes]:
    """The plan of one step of one text or of several alike."""
    first, room = needs[0], max(capacity(need.rows) for need in needs)
    return model.step_plan(first.new, room, first.choice, first.fresh, parties, len(needs))


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
        return planned([Need.of(length + count, counted, count, choice)], self.model, parties)

    def over(self, taken: int, chosen: int) -> bool:
        """Whether there is nothing left to do after so many tokens of the prompt and so many of the answer."""
        return taken == self.tokens.shape[1] and chosen >= self.most
