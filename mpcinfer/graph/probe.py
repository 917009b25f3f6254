"""Tracing a Program for a few sizes: what would fail at run time is refused, and its outputs' shapes are found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mpcinfer.errors import UnsupportedError
from mpcinfer.graph.plan import Planner
from mpcinfer.graph.program import Program
from mpcinfer.graph.sizes import Size, filled
from mpcinfer.graph.step import CHUNK, capacity
from mpcinfer.nn.sampling import Choice


def with_output_shapes(draft: Program) -> Program:
    """The program with its outputs' shapes, found by tracing it for its smallest and for large sizes.

    Of a program with caches, by tracing steps of one token and of many. Raises what `Planner` raises.
    """
    planner = Planner(draft, parties=2)
    if draft.caches:
        return _stepped(draft, planner)
    probes = _probes(draft.sizes)
    traced = [planner.inference([filled(v.shape, at) for v in draft.inputs])[2] for at in probes]
    pairs = list(zip(*probes, strict=True))

    def declared(output: int, axis: int) -> int:
        small, large = (shapes[output][axis] for shapes in traced)
        return -1 - pairs.index((small, large)) if (small, large) in pairs else small if small == large else 0

    outputs = tuple(
        replace(value, shape=tuple(declared(i, axis) for axis in range(len(traced[0][i]))))
        for i, value in enumerate(draft.outputs)
    )
    return replace(draft, outputs=outputs)


def _stepped(draft: Program, planner: Planner) -> Program:
    steps = ((1, 1), (min(CHUNK, draft.context), draft.context))
    shapes = {planner.step(new, capacity(rows), Choice())[2] for new, rows in steps}
    if len(shapes) > 1 or any(len(shape) != 2 or shape[0] != 1 for shape in shapes):
        raise UnsupportedError("a model with caches yields the logits of the next token only, [1, vocabulary]")
    return replace(draft, outputs=(replace(draft.outputs[0], shape=shapes.pop()),))


def _probes(sizes: Sequence[Size]) -> list[tuple[int, ...]]:
    """Two values of every free size, the smallest and the largest if it has one, that no other size has both."""
    small = tuple(size.low for size in sizes)
    large: list[int] = []
    for size in sizes:
        value = size.high or size.low + 6
        while value in large and value > size.low:
            value += -1 if size.high else 1
        large.append(value)
    return [small, tuple(large)]
