"""Observing a Program: what its dealer must deal and what it costs, before any data is there."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mpcinfer.graph.interpret import (
    Holdings,
    check_inputs,
    evaluate,
    evaluated,
    public_constant,
    released,
    released_of_several,
)
from mpcinfer.graph.lifted import Each, Lifted
from mpcinfer.graph.program import Node, Program, Ref
from mpcinfer.graph.step import step, steps
from mpcinfer.nn.sampling import Choice, Seen
from mpcinfer.protocol.context import Begun, Context, together, whole
from mpcinfer.protocol.correlation import Kind
from mpcinfer.protocol.linear import mask_weight
from mpcinfer.protocol.tracing import Cost, Plan, trace
from mpcinfer.protocol.types import Cached, Public, Shared, Weight

_MASKED_AT_ONCE = 1 << 23


def _meta(shape: Sequence[int]) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=torch.int64, device="meta")


def constants(program: Program) -> dict[str, Public]:
    """The program's public tensors."""
    return {c.name: public_constant(c) for c in program.constants}


@dataclass(frozen=True)
class _Traced:
    """The plan and the cost of a node, under no name, what it yields, after how many rounds, and what it was given."""

    plan: Plan
    cost: Cost
    result: Any
    ready: int
    given: list[Any]


class Planner:
    """Traces a Program. What equal nodes ask for is traced once: the layers of a network are much the same."""

    def __init__(self, program: Program, *, parties: int, deployment: str = "") -> None:
        self.program = program
        self._parties = parties
        self._deployment = deployment
        self._known: dict[bytes, _Traced] = {}
        # public numbers decide what is computed: which pairs a mask lets through, which rows of a table
        self._holdings: dict[str, Shared | Weight | Public] = {**constants(program)}
        for p in program.parameters:
            share = _meta(p.shape)
            self._holdings[p.name] = (
                Weight(p.name, share, share, p.frac_bits) if p.weight else Shared(share, p.frac_bits)
            )

    def inference(self, shapes: Sequence[tuple[int, ...]], count: int = 1) -> tuple[Plan, Cost, list[tuple[int, ...]]]:
        """The plan of one request with inputs of these shapes, its online cost, and the outputs' shapes.

        count: of so many requests in one run (see `graph.lifted`); the shapes are those of one of them.

        Raises what the interpreter raises: UnsupportedError naming operator and module path, ShapeError.
        """
        program = self.program
        check_inputs(program, shapes)
        inputs: dict[str, Any] = {}
        for v, shape in zip(program.inputs, shapes, strict=True):
            whole_shape = shape if count == 1 else (count, *shape)
            x = Shared(_meta(whole_shape), v.frac_bits)
            inputs[v.name] = x if count == 1 else Lifted(x)
        run = _Run(self._known, self._parties)
        results = [r.name for r in program.results]
        leaving = released if count == 1 else partial(released_of_several, count=count)

        async def protocol(ctx: Context) -> list[tuple[int, ...]]:
            found = await evaluated(program, results, {**self._holdings, **inputs}, run.node(program.frac_bits))
            outputs = [leaving(ctx.scope(f"output{i}"), x) for i, x in enumerate(found)]
            return [x.shape for x in outputs]

        return self._finished(run, protocol)

    def step(
        self, tokens: int, room: int, choice: Choice | None, before: int = 0, count: int = 1
    ) -> tuple[Plan, Cost, tuple[int, ...]]:
        """The plan and the cost of a step over so many tokens of a session whose caches then have `room`, and the
        shape of the logits (see `graph.step`; () without a choice).

        before: how many tokens have not been counted then, if the choice depends on them. count: of so many texts in
        one run.
        """
        program = self.program
        run = _Run(self._known, self._parties)
        if count > 1:
            return self._steps(run, tokens, room, choice, before, count)
        caches = {}
        for cache in program.caches:
            rows = _meta([*cache.shape[:-2], room - tokens, cache.shape[-1]])
            caches[cache.name] = Cached(cache.name, rows, rows, room, cache.frac_bits)
        ids = Shared(_meta([1, tokens]))

        async def protocol(ctx: Context) -> tuple[int, ...]:
            seen = Seen(None, Shared(_meta([before]))) if choice is not None and choice.penalises else None
            done = await step(program, ctx, self._holdings, ids, caches, choice, seen, run.node(program.frac_bits))
            return done.logits

        return self._finished(run, protocol)

    def _steps(
        self, run: _Run, tokens: int, room: int, choice: Choice | None, before: int, count: int
    ) -> tuple[Plan, Cost, tuple[int, ...]]:
        """As `step`, of several texts; they have different lengths, as they may."""
        program = self.program
        lengths = (room - tokens, *[max(0, room - tokens - 1)] * (count - 1))
        caches = {}
        for cache in program.caches:
            rows = _meta([count, *cache.shape[:-2], room - tokens, cache.shape[-1]])
            caches[cache.name] = Lifted(Cached(cache.name, rows, rows, room, cache.frac_bits), lengths)
        ids = Lifted(Shared(_meta([count, 1, tokens])))

        async def protocol(ctx: Context) -> tuple[int, ...]:
            penalises = choice is not None and choice.penalises
            seen = [Seen(None, Shared(_meta([before]))) if penalises else None for _ in range(count)]
            done = await steps(program, ctx, self._holdings, ids, caches, choice, seen, run.node(program.frac_bits))
            return done[0].logits

        return self._finished(run, protocol)

    def _finished(self, run: _Run, protocol: Any) -> tuple[Plan, Cost, Any]:
        """The nodes' entries and cost, then those of what follows the nodes."""
        plan, cost, result = trace(protocol, parties=self._parties)
        run.add(plan, cost, len(run.cost.messages))
        return Plan(tuple(run.entries), self._deployment), run.cost, result


class _Run:
    """The entries and the cost of the nodes of one trace."""

    def __init__(self, known: dict[bytes, _Traced], parties: int) -> None:
        self.entries: list[tuple[str, Kind]] = []
        self.cost = Cost()
        self._known = known
        self._parties = parties
        self._ends: dict[str, int] = {}

    def add(self, plan: Plan, cost: Cost, start: int) -> None:
        """What begins after so many rounds, next to what is there."""
        self.entries += plan.entries
        self.cost.bytes_sent += cost.bytes_sent
        self.cost.openings += cost.openings
        end = start + len(cost.messages)
        self.cost.messages += [Counter() for _ in range(end - len(self.cost.messages))]
        for message, more in zip(self.cost.messages[start:end], cost.messages, strict=True):
            message.update(more)
        self.cost.rounds = len(self.cost.messages)

    def node(self, frac_bits: int) -> Any:
        """What evaluates a node, for `evaluated`."""

        async def rule(node: Node, values: Mapping[str, Any]) -> Any:
            given: list[Any] = []
            key = _key(node, values, given)
            if key not in self._known:

                async def both(ctx: Context) -> tuple[Any, bool]:
                    found = await evaluate(node, ctx, values, frac_bits)
                    return await whole(found), isinstance(found, Begun)

                plan, cost, (result, early) = trace(both, parties=self._parties)
                ready = cost.rounds - early  # the rest takes one round
                self._known[key] = _Traced(_renamed(plan, node.name, "", {}), cost, result, ready, given)
            known = self._known[key]
            names = {a.name: b.name for a, b in zip(known.given, given, strict=True) if isinstance(a, Weight | Cached)}
            messages = [Counter({node.name: message.total()}) for message in known.cost.messages]
            plan = _renamed(known.plan, "", node.name, names)
            start = max((self._ends.get(name, 0) for name in node.references), default=0)
            self.add(plan, dataclasses.replace(known.cost, messages=messages), start)
            self._ends[node.name] = start + known.ready
            return _anew(known.result, {id(a): b for a, b in zip(known.given, given, strict=True)}, names)

        return rule


def _renamed(plan: Plan, before: str, after: str, names: Mapping[str, str]) -> Plan:
    """The plan of a node for another one, whose weights and caches have other names."""
    entries = []
    for name, item in plan.entries:
        for attribute in ("weight", "cache"):
            own = getattr(item, attribute, None)
            if own is not None and names.get(own, own) != own:
                item = dataclasses.replace(item, **{attribute: names[own]})  # type: ignore[type-var]
        entries.append((after + name.removeprefix(before), item))
    return Plan(tuple(entries))


def _anew(result: Any, given: Mapping[int, Any], names: Mapping[str, str]) -> Any:
    """What a node yields, for another one: what it hands on is that one's, anything else is nobody else's.

    A number times itself is cheaper than two numbers' product, so it matters which values are one and the same.
    """
    if id(result) in given:
        return given[id(result)]
    if isinstance(result, list | tuple):
        return [_anew(item, given, names) for item in result]
    if isinstance(result, Lifted):
        return Lifted(_anew(result.value, given, names), result.lengths)
    if isinstance(result, Cached):
        name = names.get(result.name, result.name)
        return Cached(name, result.share, result.masked, result.capacity, result.frac_bits)
    return Shared(result.share, result.frac_bits) if isinstance(result, Shared) else result


def _key(node: Node, values: Mapping[str, Any], given: list[Any]) -> bytes:
    """A digest of all that the trace of a node depends on; `given` gains the values it is given, each once."""
    digest = hashlib.sha256()

    def place(x: Any) -> int:
        if not any(x is other for other in given):
            given.append(x)
        return next(i for i, other in enumerate(given) if x is other)

    def visit(x: Any) -> None:
        if isinstance(x, Ref):
            x = values[x.name]
        if isinstance(x, list | tuple):
            digest.update(b"[%d" % len(x))
            for item in x:
                visit(item)
        elif isinstance(x, Lifted):
            digest.update(repr(("lifted", x.lengths)).encode())
            visit(x.value)
        elif isinstance(x, Each):
            digest.update(b"each")
            visit(list(x.values))
        elif isinstance(x, dict):
            digest.update(b"{%d" % len(x))
            for name, item in sorted(x.items()):
                digest.update(repr(name).encode())
                visit(item)
        elif isinstance(x, Public):
            value = x.value.contiguous()
            digest.update(repr(("public", x.shape, x.frac_bits, str(value.dtype), place(x))).encode())
            digest.update(value.numpy().tobytes())
        elif isinstance(x, Shared):
            # of what was expanded only the parts that differ are worked on
            digest.update(repr(("shared", x.shape, x.share.stride(), x.frac_bits, place(x))).encode())
        elif isinstance(x, Weight | Cached):
            digest.update(repr((type(x).__name__, x.shape, x.frac_bits, place(x))).encode())
            digest.update(repr(getattr(x, "capacity", 0)).encode())
        else:
            digest.update(repr(x).encode() + b",")  # [1, 23] is not [12, 3]

    visit((node.op, node.args, node.kwargs))
    return digest.digest()


def plan_inference(
    program: Program, shapes: Sequence[tuple[int, ...]], *, parties: int, deployment: str = "", count: int = 1
) -> tuple[Plan, Cost, list[tuple[int, ...]]]:
    """See `Planner.inference`."""
    return Planner(program, parties=parties, deployment=deployment).inference(shapes, count)


async def mask_weights(program: Program, ctx: Context, shares: Holdings) -> list[Weight]:
    """Open every weight's F = W + B: what a deployment runs once per mesh session.

    As many in one message as have `_MASKED_AT_ONCE` elements: a message is in memory several times.
    """
    masked: list[Weight] = []
    for names in _batches(program):
        masked += await together(*(_mask(ctx.scope(name), name, shares[name]) for name in names))
    return masked


def _batches(program: Program) -> list[list[str]]:
    """The names of the weights, by message."""
    batches: list[list[str]] = []
    room = 0
    for p in program.parameters:
        if p.weight:
            count = math.prod(p.shape)
            if count > room:
                batches.append([])
                room = _MASKED_AT_ONCE
            batches[-1].append(p.name)
            room -= count
    return batches


async def _mask(ctx: Context, name: str, share: Shared | Weight | Public) -> Weight:
    if not isinstance(share, Shared):
        raise TypeError("a weight is masked once, from its share")
    return await mask_weight(ctx, name, share)


def plan_masks(program: Program, *, parties: int, deployment: str) -> tuple[Plan, Cost]:
    """The plan of `mask_weights`."""
    shares = {p.name: Shared(_meta(p.shape), p.frac_bits) for p in program.parameters}
    plan, cost, _ = trace(lambda ctx: mask_weights(program, ctx, shares), parties=parties, deployment=deployment)
    return plan, cost
