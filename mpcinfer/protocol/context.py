"""What a protocol is written against: correlations, openings, and running things together.

A protocol is an `async def` of a `Context` and shared tensors. `await ctx.open(x, mask)` suspends it; whoever drives
it (one process per party, all parties in lock-step in one process, or a tracer) exchanges the batch of openings and
resumes it. This is a plain generator protocol, not asyncio: nothing here waits for time or threads, so a party is a
deterministic function of what it received.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator, Mapping
from typing import Any, Protocol, TypeVar

import torch

from mpcinfer.errors import ProtocolError
from mpcinfer.protocol.correlation import Correlation, Kind, Tensors
from mpcinfer.protocol.types import Mask, Masked, Sealed, Shared, SharedBits, Weight
from mpcinfer.ring.domain import Z64, Ring

T = TypeVar("T")


class Opening(Sealed):
    """One masked tensor to be opened: this party's share of it, and the ring it is opened over."""

    __slots__ = ("label", "masked", "ring")

    def __init__(self, masked: torch.Tensor, ring: Ring, label: str) -> None:
        self.masked = masked
        self.ring = ring
        self.label = label

    def __await__(self) -> Generator[list[Opening], list[torch.Tensor], torch.Tensor]:
        (value,) = yield [self]
        return value


class Source(Protocol):
    """Where a context's correlations come from."""

    def draw(self, name: str, item: Kind) -> Tensors:
        """This party's shares of the correlation `name`, which exists once."""
        ...


class Context:
    """One party's side of a running protocol."""

    def __init__(
        self,
        index: int,
        parties: int,
        source: Source,
        weights: Mapping[str, Weight] | None = None,
        path: str = "",
    ) -> None:
        self.index = index
        self.parties = parties
        self.weights: Mapping[str, Weight] = weights or {}
        self.path = path
        self._source = source
        self._ordinal = 0
        self._scopes: set[str] = set()

    @property
    def first(self) -> bool:
        """Whether this party is the one that adds public constants."""
        return self.index == 0

    def scope(self, name: str) -> Context:
        """A context whose correlations are named under `name`; a name is used once per context."""
        if "/" in name or "#" in name:
            raise ProtocolError(f"{name!r} cannot name a scope: / and # separate names")
        if name in self._scopes:
            raise ProtocolError(f"scope {name!r} is used twice in {self.path!r}")
        self._scopes.add(name)
        return Context(
            self.index, self.parties, self._source, self.weights, f"{self.path}/{name}" if self.path else name
        )

    def correlation(self, item: Kind) -> Correlation:
        """Fresh correlated randomness."""
        name = f"{self.path}#{self._ordinal}"
        self._ordinal += 1
        return Correlation(item, self._source.draw(name, item), f"{name}:{type(item).__name__}")

    async def open(self, x: Shared | SharedBits | torch.Tensor, mask: Mask) -> Masked:
        """Open x + r (x xor r) over the mask's ring; nothing can be opened in another way.

        A `Shared` opened over a narrower ring than 64 bits is reduced first. A bare tensor is this party's share over
        the mask's own ring.
        """
        ring = mask.ring
        if isinstance(x, SharedBits):
            share, over = x.share, x.ring
        elif isinstance(x, Shared):
            share, over = (x.share, Z64) if ring == Z64 else (ring.reduce(x.share), Ring(ring.bits))
        else:
            share, over = x, ring
        mask.spend(tuple(share.shape), over)
        return Masked(await Opening(ring.add(share, mask.share), ring, mask.label), ring)

    async def open_masked(self, masked: torch.Tensor, mask: Mask) -> Masked:
        """Open what a kernel has computed and masked in one pass: `masked` is this party's share of x + r already.

        The kernel must have added all of `mask.share`; the tests of openings run over every caller.
        """
        mask.spend(tuple(masked.shape), mask.ring)
        return Masked(await Opening(masked, mask.ring, mask.label), mask.ring)


class _Together:
    def __init__(self, protocols: tuple[Coroutine[Any, Any, Any], ...]) -> None:
        self.protocols = protocols

    def __await__(self) -> Generator[list[Opening], list[torch.Tensor], list[Any]]:
        results: list[Any] = [None] * len(self.protocols)
        waiting: dict[int, list[Opening]] = {}

        def resume(i: int, values: list[torch.Tensor] | None) -> None:
            try:
                waiting[i] = self.protocols[i].send(values)
            except StopIteration as done:
                waiting.pop(i, None)
                results[i] = done.value

        try:
            for i in range(len(self.protocols)):
                resume(i, None)
            while waiting:
                batch = dict(waiting)
                values = yield [opening for part in batch.values() for opening in part]
                at = 0
                for i, part in batch.items():
                    resume(i, values[at : at + len(part)])
                    at += len(part)
            return results
        finally:  # one that raised ends the others, also those that have not begun
            for protocol in self.protocols:
                protocol.close()


class Begun(Sealed):
    """What a protocol has come to before its last openings: `value`, and the `rest`, to be run beside what uses it.

    The rest opens something once, and whoever needs that in the value opens something else first: the two messages are
    one (see `graph.flow`).
    """

    __slots__ = ("rest", "value")

    def __init__(self, value: Any, rest: Coroutine[Any, Any, None]) -> None:
        self.value = value
        self.rest = rest


async def whole(found: Any) -> Any:
    """What a protocol has yielded, once there is no rest of it."""
    if not isinstance(found, Begun):
        return found
    await found.rest
    return found.value


async def together(*protocols: Coroutine[Any, Any, Any]) -> list[Any]:
    """Run protocols side by side: their openings of each step travel in one message. Results in order."""
    return await _Together(protocols)


def drive(steps: Coroutine[Any, Any, T], exchange: Callable[[list[Opening]], list[torch.Tensor]]) -> T:
    """Run a protocol to its end; `exchange` turns one batch of openings into the opened tensors."""
    values: list[torch.Tensor] | None = None
    try:
        while True:
            batch = steps.send(values)
            values = exchange(batch)
    except StopIteration as done:
        result: T = done.value
        return result
    finally:
        steps.close()
