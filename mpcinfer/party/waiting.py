"""What a part of a step waits for, and what it is given once all parts that run beside it wait too."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from mpcinfer.protocol.context import Opening

if TYPE_CHECKING:
    from mpcinfer.party.part import Part

Work = Coroutine[Any, Any, Sequence[Any]]


class Ballot:
    """The votes of all."""

    def __init__(self, part: Part, own: dict[str, Any]) -> None:
        self.part = part
        self.own = own

    def __await__(self) -> Generator[Ballot, dict[int, Any], dict[int, Any]]:
        return (yield self)


class Round:
    """Opened values, or (`seal`) what all have seen opened."""

    def __init__(self, part: Part, openings: Sequence[Opening] = (), seal: bytes = b"") -> None:
        self.part = part
        self.openings = openings
        self.seal = seal
        self.seals: dict[int, bytes] = {}  # those of the others, by index

    def __await__(self) -> Generator[Round, Any, None]:
        yield self


class Release:
    """That all have done what they must have done, before `subject` leaves or is committed."""

    def __init__(self, part: Part, subject: dict[str, Any]) -> None:
        self.part = part
        self.subject = subject

    def __await__(self) -> Generator[Release, None, None]:
        yield self


class Joint:
    """That what can be done for several parts of a step at once is done: then it is what this one gets of it.

    key: the same for all that may be done at once. work: does it for so many of them, what each gets in order. able:
    whether it is possible for several.
    """

    def __init__(
        self, part: Part, key: Any, content: Any, work: Callable[[Sequence[Joint]], Work], able: Callable[[], bool]
    ) -> None:
        self.part = part
        self.key = key
        self.content = content
        self.work = work
        self.able = able

    def __await__(self) -> Generator[Joint, Any, Any]:
        return (yield self)


class Metered:
    """A protocol as a part of a step: its openings say whose they are."""

    def __init__(self, part: Part, protocol: Coroutine[Any, Any, Any]) -> None:
        self._part, self._protocol = part, protocol

    def __await__(self) -> Generator[Round, list[torch.Tensor], Any]:
        values: list[torch.Tensor] | None = None
        try:
            while True:
                values = yield Round(self._part, self._protocol.send(values))
        except StopIteration as done:
            return done.value
        finally:
            self._protocol.close()
