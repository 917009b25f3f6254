"""The parts of a step, run side by side: what they have in common travels in one message, or is one run.

Two large runs take turns instead: while one's message is on its way the other one computes, and sends its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import torch

from mpcinfer.party.epoch import Epoch
from mpcinfer.party.releasing import Releasing
from mpcinfer.party.waiting import Ballot, Joint, Release, Round

Values = Callable[[], list[torch.Tensor]]
# Sends a round's message; then what it returns waits for those of the others, and says what was opened.
Exchange = Callable[[Epoch, list[Round]], Values]

_LARGE = 8  # requests of a run, from which on a second one does not share its rounds
UNDER_WAY = 2  # rounds at most whose messages were sent and not answered yet


class Refused(Exception):
    """Some party voted no: the request has its answer, the epoch goes on."""


class Late(Exception):
    """Some party does not have the request yet: party 0 will announce it again."""


def run(epoch: Epoch, parts: Sequence[Coroutine[Any, Any, Any]], exchange: Exchange, releasing: Releasing) -> list[Any]:
    """What each part yields, or Refused or Late. Any other error ends all of them.

    Whatever waits for votes goes first, in one message; then what can be done for several parts at once begins; once
    all wait for openings, these share a round, but for those of the second of two large runs.
    """
    steps = list(parts)
    outcomes: list[Any] = [None] * len(steps)
    waiting: dict[int, Ballot | Round | Release | Joint] = {}
    members: dict[int, list[int]] = {}  # of what is done for several: whose it is
    turns: dict[int, int] = {}  # of large runs: with which of the two they go
    under_way: deque[tuple[dict[int, Round], Values]] = deque()

    def resume(i: int, value: Any) -> None:
        try:
            waiting[i] = steps[i].send(value)
            return
        except StopIteration as done:
            found = done.value
        except (Refused, Late) as error:
            found = error
        waiting.pop(i, None)
        if i not in members:
            outcomes[i] = found
            return
        for member, own in zip(members.pop(i), found, strict=True):
            resume(member, own)

    def begun() -> bool:
        """Whether anything but rounds could go on."""
        ballots = {i: w for i, w in waiting.items() if isinstance(w, Ballot)}
        if ballots:
            votes = releasing.count(epoch, list(ballots.values()))
            for (i, _), said in zip(ballots.items(), votes, strict=True):
                resume(i, said)
            return True
        joints = {i: w for i, w in waiting.items() if isinstance(w, Joint)}
        for group in joined(joints):
            for i in group:
                del waiting[i]
            if len(group) >= _LARGE:
                turns[len(steps)] = len(turns) % UNDER_WAY
            members[len(steps)] = group
            steps.append(joints[group[0]].work([joints[i] for i in group]))
            resume(len(steps) - 1, None)
        if joints:
            return True
        releases = {i: w for i, w in waiting.items() if isinstance(w, Release)}
        if releases:
            releasing.now(epoch, [each.subject for each in releases.values()])
            for i in releases:
                resume(i, None)
            return True
        return False

    try:
        for i in range(len(steps)):
            resume(i, None)
        while waiting or under_way:
            others = not waiting or any(not isinstance(w, Round) for w in waiting.values())
            if under_way and (others or len(under_way) == UNDER_WAY):
                answered, answers = under_way.popleft()
                values, at = answers(), 0
                for i, each in answered.items():
                    resume(i, values[at : at + len(each.openings)])
                    at += len(each.openings)
                continue
            if others and begun():
                continue
            turn = min(turns.get(i, 0) for i in waiting)
            rounds = {i: w for i, w in waiting.items() if isinstance(w, Round) and turns.get(i, 0) == turn}
            for i in rounds:
                del waiting[i]
            under_way.append((rounds, exchange(epoch, list(rounds.values()))))
        return outcomes
    finally:
        for step in steps:
            step.close()


def joined(waiting: Mapping[int, Joint]) -> list[list[int]]:
    """Which of them are done at once: the same at all parties, if these have the same ones in the same order."""
    alike: dict[Any, list[int]] = {}
    for i, each in waiting.items():
        alike.setdefault(each.key, []).append(i)
    groups = []
    for members in alike.values():
        able = len(members) > 1 and waiting[members[0]].able()
        for size in portions(len(members)) if able else [1] * len(members):
            groups.append(members[:size])
            members = members[size:]
    return groups


def portions(count: int) -> list[int]:
    """So many in few parts of few sizes, each of which needs a plan: 2^k and 3 2^k; two halves if these are large."""
    if count >= 2 * _LARGE:
        return sorted(portions(count // 2) + portions(count - count // 2), reverse=True)
    sizes = []
    while count:
        power = 1 << (count.bit_length() - 1)
        sizes.append(power + power // 2 if power > 1 and count >= power + power // 2 else power)
        count -= sizes[-1]
    return sizes
