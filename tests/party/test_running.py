"""Parts of a step side by side: who shares a round, who takes turns, and that nothing overtakes a round under way."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpcinfer.party import running
from mpcinfer.party.running import UNDER_WAY, run
from mpcinfer.party.waiting import Ballot, Joint, Release, Round
from mpcinfer.protocol.context import Opening
from mpcinfer.ring.domain import Z64

ROUNDS = 4
PART: Any = SimpleNamespace()
EPOCH: Any = SimpleNamespace()


def opening(value: int) -> Opening:
    return Opening(torch.tensor([value]), Z64, "a#0")


class Wire:
    """Notes what is sent ("send", names), what is answered ("answer", names), and votes; answers are what was sent."""

    def __init__(self) -> None:
        self.events: list[tuple[str, tuple[int, ...]]] = []
        self.out: list[tuple[int, ...]] = []

    def exchange(self, epoch: Any, rounds: list[Round]) -> Callable[[], list[torch.Tensor]]:
        values = [o.masked for each in rounds for o in each.openings]
        names = tuple(int(v) for v in values)
        self.events.append(("send", names))
        self.out.append(names)
        assert len(self.out) <= UNDER_WAY

        def answers() -> list[torch.Tensor]:
            assert self.out.pop(0) == names, "rounds end in the order in which they began"
            self.events.append(("answer", names))
            return values

        return answers

    def count(self, epoch: Any, ballots: list[Ballot]) -> list[dict[int, Any]]:
        assert not self.out, "votes overtake a round"
        self.events.append(("votes", (len(ballots),)))
        return [{0: each.own} for each in ballots]

    def now(self, epoch: Any, subjects: list[Any]) -> None:
        assert not self.out, "a release overtakes a round"
        self.events.append(("release", (len(subjects),)))

    def run(self, parts: Sequence[Any]) -> list[Any]:
        releasing: Any = self
        return run(EPOCH, parts, self.exchange, releasing)


class Opened:
    """A round in which one number is opened: what it is."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __await__(self) -> Generator[Any, Any, Any]:
        return (yield Round(PART, [opening(self.value)]))


async def opened(name: int, rounds: int = ROUNDS) -> list[int]:
    seen: list[int] = []
    for i in range(rounds):
        seen += [int(v) for v in await Opened(100 * i + name)]
    return seen


async def several(members: Sequence[Joint], rounds: int = ROUNDS) -> list[Any]:
    """One run for all members: each gets its content and what was opened."""
    seen = await opened(int(members[0].content), rounds)
    return [(each.content, seen) for each in members]


async def request(content: int) -> Any:
    await Ballot(PART, {"at": content})
    found = await Joint(PART, "same", content, several, lambda: True)
    await Ballot(PART, {"after": content})
    await Release(PART, {})
    return found


@pytest.mark.parametrize("count", [1, 8, 15, 16, 24, 35])
def test_every_request_gets_its_own(count: int) -> None:
    wire = Wire()
    found = wire.run([request(i) for i in range(count)])
    assert [content for content, _ in found] == list(range(count)) and not wire.out
    leaders = {content: seen[0] for content, seen in found}
    assert sorted(set(leaders.values())) == sorted({leaders[i] for i in range(count)})
    for content, seen in found:
        assert seen == [100 * i + leaders[content] for i in range(ROUNDS)]


def turns(wire: Wire) -> list[tuple[str, tuple[int, ...]]]:
    return [(what, tuple(n % 100 for n in names)) for what, names in wire.events if what in ("send", "answer")]


def test_two_large_runs_take_turns() -> None:
    wire = Wire()
    wire.run([request(i) for i in range(16)])
    a, b = (0,), (8,)
    both = [("answer", a), ("send", a), ("answer", b), ("send", b)]
    assert turns(wire) == [("send", a), ("send", b), *(ROUNDS - 1) * both, ("answer", a), ("answer", b)]


def test_smaller_ones_share_their_rounds() -> None:
    for count in (2, 8, 15):
        wire = Wire()
        wire.run([request(i) for i in range(count)])
        assert [what for what, _ in turns(wire)] == ROUNDS * ["send", "answer"]


def test_one_that_is_done_earlier_waits_with_its_votes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two runs has more rounds: when the first one votes nothing is under way."""

    async def uneven(members: Sequence[Joint]) -> list[Any]:
        return await several(members, 2 if members[0].content == 0 else 5)

    async def other(content: int) -> Any:
        found = await Joint(PART, "same", content, uneven, lambda: True)
        await Ballot(PART, {})
        return found

    wire = Wire()
    assert len(wire.run([other(i) for i in range(16)])) == 16
    names = [what for what, _ in wire.events]
    assert names.count("votes") == 2 and names.index("votes") < len(names) - names[::-1].index("send")


def test_what_overtakes_a_round_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: votes that do not wait for what is under way."""

    class Hasty(Wire):
        def exchange(self, epoch: Any, rounds: list[Round]) -> Callable[[], list[torch.Tensor]]:
            answers = super().exchange(epoch, rounds)
            self.count(epoch, [])
            return answers

    with pytest.raises(AssertionError, match="overtake"):
        Hasty().run([request(0)])


def test_a_failure_ends_all_parts() -> None:
    ended: list[int] = []

    class Part:
        def __init__(self, i: int) -> None:
            self.i = i

        def __await__(self) -> Generator[Any, Any, None]:
            try:
                while True:
                    yield Round(PART, [opening(self.i)])
            finally:
                ended.append(self.i)

    async def forever(i: int) -> None:
        await Part(i)

    def broken(epoch: Any, rounds: list[Round]) -> Callable[[], list[torch.Tensor]]:
        raise OSError("gone")

    releasing: Any = Wire()
    with pytest.raises(OSError, match="gone"):
        running.run(EPOCH, [forever(i) for i in range(3)], broken, releasing)
    assert sorted(ended) == [0, 1, 2]
