"""What the values of a program can be: one evaluation in float64, over intervals, on the model owner's machine.

Started from all that the inputs may be, it encloses every value of every request, up to float64's own rounding; from
points, it is the plain forward pass. Either way each value is held against the domain of the protocol it goes through,
in units in the last place: 2^62 for what is truncated, 2^(62 - frac_bits), the codec's limit, for all else, so that any
two values can be compared, by `nn.elementwise.width` bits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mpcinfer.errors import UnsupportedError
from mpcinfer.graph.interpret import public_constant
from mpcinfer.graph.program import Node, Program, Ref
from mpcinfer.nn import public
from mpcinfer.protocol.types import Public
from mpcinfer.ring.codec import FixedPoint

TRUNCATED = 62
# by how many bits rows may be shifted before they are squared (see nn.normalise)
LEAST_SHIFT, MOST_SHIFT = -5, 10

Tensors = Mapping[str, torch.Tensor]
Function = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Interval:
    """Element by element all numbers from `low` to `high`; if both are one tensor, a point: just these numbers."""

    low: torch.Tensor
    high: torch.Tensor
    known: bool = False  # a parameter or a constant of the model
    truth: bool = False  # public truth values, as 0 and 1

    @staticmethod
    def of(x: torch.Tensor, known: bool = False) -> Interval:
        """A point."""
        return Interval(x, x, known)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of both ends."""
        return tuple(self.low.shape)

    @property
    def point(self) -> bool:
        """Whether it holds one number per element."""
        return self.low is self.high

    def map(self, function: Function) -> Any:
        """A non-decreasing function's values; a list of them where the function has several."""
        low = function(self.low)
        high = low if self.point else function(self.high)
        if isinstance(low, list | tuple):
            return [Interval(*ends) for ends in zip(low, high, strict=True)]
        return Interval(low, high)

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Interval:
        """As `map`, of a function with one value."""
        return Interval.of(function(self.low)) if self.point else Interval(function(self.low), function(self.high))

    def times(self, factor: float) -> Interval:
        """All of it times a number."""
        if factor < 0 and not self.point:
            return Interval(self.high * factor, self.low * factor)
        y: Interval = self.map(lambda t: t * factor)
        return y

    def __add__(self, other: Interval) -> Interval:
        low = self.low + other.low
        return Interval(low, low if self.point and other.point else self.high + other.high)

    def magnitude(self) -> float:
        """The largest absolute value."""
        return max((float(t.abs().max()) for t in (self.low, self.high) if t.numel()), default=0.0)


class Exceeded(Exception):
    """A value may leave its domain."""


# what operators make of intervals: see graph.transfer
RULES: dict[str, Function] = {}


class Evaluation:
    """One pass over a program at a time. `rounding`: with what truncation adds; `headroom`: demanded of every domain.

    `node` is the one it has come to, where it stopped if it stopped. `chosen`: arguments of nodes that depend on how
    large their operands are: by how many bits norms shift their rows, so that there is room for their squares, at most
    `most_shift` (fewer keep more precision); of softmax and attention below which power of two scores are, at most
    `most_reach` (smaller ones take fewer rounds), and of attention the bits of its factor and what room there is for
    sums of values. `largest`: of each node the largest absolute value, `headroom` times.
    """

    def __init__(
        self,
        program: Program,
        weights: Tensors,
        *,
        rounding: bool,
        headroom: float = 1.0,
        most_shift: int = MOST_SHIFT,
        most_reach: float = math.inf,
    ) -> None:
        self.frac_bits = program.frac_bits
        self.numbers = TRUNCATED - program.frac_bits  # the domain of a number between operators, as of an encoded one
        self.rounding = rounding
        self._program = program
        self._weights = weights
        self._unit = 2.0**-program.frac_bits if rounding else 0.0
        self._headroom = headroom
        self._most_shift = most_shift
        self._most_reach = most_reach
        self.chosen: dict[str, dict[str, int]] = {}
        self.largest: dict[str, float] = {}
        self.node: Node

    def run(self, inputs: Sequence[Interval]) -> list[Any]:
        """What the results can be; `Exceeded` if anything on the way may leave its domain."""
        values: dict[str, Any] = {v.name: x for v, x in zip(self._program.inputs, inputs, strict=True)}
        # a text from its beginning: its caches have no rows yet
        values |= {c.name: Interval.of(torch.zeros(c.shape, dtype=torch.float64)) for c in self._program.caches}
        results = [r.name for r in self._program.results]
        uses = Counter([name for node in self._program.nodes for name in node.references] + results)
        for node in self._program.nodes:
            self.node = node
            args = [self._resolved(x, values) for x in node.args]
            kwargs = {k: self._resolved(x, values) for k, x in node.kwargs.items()}
            values[node.name] = self._value(node.op, args, kwargs)
            found = values[node.name] if isinstance(values[node.name], list) else [values[node.name]]
            numbers = [x for x in found if isinstance(x, Interval)]
            for x in numbers:
                self.need(x, self.frac_bits, self.numbers)
            if numbers:
                self.largest[node.name] = self._headroom * max(x.magnitude() for x in numbers)
            for name in node.references:
                uses[name] -= 1
                if not uses[name]:
                    values.pop(name, None)
        return [values[name] for name in results]

    def _value(self, op: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if public.applies(op, args, Interval):
            return public.evaluate(op, args, kwargs, self.frac_bits)
        if op not in RULES:
            raise UnsupportedError(f"{op} has no bounds, so no limit of the inputs can be declared")
        return RULES[op](self, *map(_interval, args), **{k: _interval(v) for k, v in kwargs.items()})

    def need(self, x: Interval, scale: float, domain: int, secrets: int = 1) -> None:
        """x 2^scale must be below 2^domain."""
        if not x.magnitude() * self._headroom**secrets < 2.0 ** (domain - scale):
            raise Exceeded

    def squares(self, total: float) -> None:
        """A sum of squares of numbers that are shifted before: by as few bits as leave room for it."""
        room = TRUNCATED - 2 * self.frac_bits - 2 * math.log2(self._headroom)
        shift = max(LEAST_SHIFT, math.ceil((math.log2(max(total, 2.0**-40)) - room) / 2))
        if shift > self._most_shift:
            raise Exceeded
        self._choose(shift=shift)

    def _choose(self, **arguments: int) -> None:
        self.chosen[self.node.name] = self.chosen.get(self.node.name, {}) | arguments

    def scores(self, products: Interval) -> None:
        """Products of queries and keys, which a public factor multiplies: of as many bits as there is room for."""
        size = math.log2(max(products.magnitude(), 2.0**-20) * self._headroom**2)
        self._choose(factor_bits=math.floor(TRUNCATED - 2 * self.frac_bits - size))

    def reach(self, x: Interval, secrets: int = 1) -> None:
        """The power of two that numbers are below, where about the largest is looked for: at most `most_reach`."""
        found = max(0, math.frexp(x.magnitude() * self._headroom**secrets)[1])
        if found > self._most_reach:
            raise Exceeded
        self._choose(reach=found)

    def sums(self, values: Interval) -> None:
        """Values that powers weight: how many bits are left for the powers' fraction and for how many there are."""
        size = math.log2(max(values.magnitude(), 2.0**-20) * self._headroom)
        self._choose(sum_bits=math.floor(TRUNCATED - self.frac_bits - size))

    def rows(self, at: int, now: int) -> int:
        """How many rows the node's argument number `at`, which has `now`, may ever have: more if it is a cache."""
        grown = {cache.result: cache.rows for cache in self._program.caches}
        ref = self.node.args[at]
        return max(now, grown.get(ref.name, 0)) if isinstance(ref, Ref) else now

    def truncated(self, x: Interval, bits: int, secrets: int = 1) -> Interval:
        """x after it was computed with so many fraction bits more than it keeps."""
        if not bits:
            return x
        self.need(x, self.frac_bits + bits, TRUNCATED, secrets)
        return self.rounded(x)

    def rounded(self, x: Interval, units: float = 1.0) -> Interval:
        """x and what is that close to it."""
        error = units * self._unit
        return Interval(x.low - error, x.high + error) if error else x

    def _resolved(self, x: Any, values: Mapping[str, Any]) -> Any:
        if isinstance(x, Ref):
            return values[x.name] if x.name in values else self._known(x.name)
        return [self._resolved(item, values) for item in x] if isinstance(x, list | tuple) else x

    def _known(self, name: str) -> Interval | Public:
        """A parameter or constant as the parties have it. Decoded for each use, so that one is in memory at a time."""
        if name in self._weights:
            return Interval.of(FixedPoint(self.frac_bits).decode(self._weights[name]), known=True)
        return public_constant(next(c for c in self._program.constants if c.name == name))


def _interval(x: Any) -> Any:
    """Public numbers as points."""
    if isinstance(x, Public):
        point = public.tensors(x).double()
        return Interval(point, point, known=True, truth=x.value.dtype == torch.bool)
    return [_interval(item) for item in x] if isinstance(x, list | tuple) else x
