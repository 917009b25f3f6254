"""How large inputs may be: whatever a program makes of them must stay inside the domains of the protocols.

A product that leaves its domain wraps around, and parties who see only shares cannot notice. So the model owner, who
has the weights, works out at deploy below which power of two every input must stay, and the client refuses the rest.

Started from all that inputs below a limit can be, an evaluation over intervals shows that nothing leaves its domain:
the limit is *proven*. Networks are deep, and so many layers of worst cases may leave no useful limit. Then the
evaluation starts from the example inputs, scaled up to the limit, and every value must stay below a quarter of its
domain (a sixteenth for products of two secrets): the limit is *calibrated*. Batches are as large as the examples'.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from mpcinfer.errors import RangeError
from mpcinfer.graph import transfer  # noqa: F401  (registers what operators do)
from mpcinfer.graph.interpret import check_inputs
from mpcinfer.graph.intervals import Evaluation, Exceeded, Interval, Tensors
from mpcinfer.graph.program import Program
from mpcinfer.ring.codec import FixedPoint

HEADROOM = 4.0


def with_limits(program: Program, weights: Tensors, examples: Sequence[torch.Tensor]) -> Program:
    """The program with a limit declared for each of its inputs: a power of two, all that is kept of the examples.

    weights: the encoded parameters, by name. A proven limit, the same for all inputs, is taken if the examples stay
    below a quarter of it; else the larger of it and the calibrated ones. RangeError naming the layer if neither admits
    the examples, and for examples that are not finite.
    """
    check_inputs(program, [tuple(x.shape) for x in examples])
    codec = FixedPoint(program.frac_bits)
    top = 62 - 2 * program.frac_bits  # the codec's own limit
    encoded = [codec.encode(x, f"example input {v.name!r}") for v, x in zip(program.inputs, examples, strict=True)]
    points = [codec.decode(x) for x in encoded]
    reach = [float(x.abs().max()) for x in points]

    proof = Evaluation(program, weights, rounding=True)

    def proves(exponent: int) -> bool:
        ends = [torch.full_like(x, 2.0**exponent - 2.0**-program.frac_bits) for x in points]
        return _stays(proof, [Interval(-end, end) for end in ends])

    exponents = range(2 - program.frac_bits, top + 1)
    exponent = _last(proves, exponents)
    proven = 2.0**exponent if exponent in exponents else 0.0
    # examples that are all zero say nothing: a limit of 1 will do for them
    if proven >= 4 * (max(reach) or 0.25):
        return _declared(program, [proven] * len(points), proven=True)
    if not any(reach):
        raise RangeError("the example inputs are all zero, which says nothing about real ones; pass some of those")

    trial = Evaluation(program, weights, rounding=False, headroom=HEADROOM)
    above = [math.frexp(size)[1] for size in reach]  # of the smallest power of two above each input

    def fits(by: int) -> bool:
        scales = [2.0 ** (exponent + by) / (size or 1.0) for exponent, size in zip(above, reach, strict=True)]
        return _stays(trial, [Interval.of(x * scale) for x, scale in zip(points, scales, strict=True)])

    by = _last(fits, range(top - max(above) + 1))
    if by >= 0 and 2.0 ** (max(above) + by) > proven:
        return _declared(program, [2.0 ** (exponent + by) for exponent in above], proven=False)
    if proven > max(reach):
        return _declared(program, [proven] * len(points), proven=True)
    node = trial.node  # where the examples themselves stopped, the last that was tried
    raise RangeError(
        f"{node.op} at {node.path or node.name}: the example inputs make numbers too large for {program.frac_bits} "
        f"fraction bits with the {HEADROOM:g} times headroom that a deployment keeps; use fewer frac_bits, or scale "
        "the inputs down"
    )


def _stays(evaluation: Evaluation, inputs: Sequence[Interval]) -> bool:
    try:
        evaluation.run(inputs)
    except Exceeded:
        return False
    return True


def _last(holds: Callable[[int], bool], candidates: range) -> int:
    """The last candidate for which it holds, one less than the first if for none; it holds up to some and then not."""
    return candidates.start - 1 + bisect_left(candidates, True, key=lambda candidate: not holds(candidate))


def _declared(program: Program, limits: Sequence[float], *, proven: bool) -> Program:
    inputs = (replace(v, limit=limit, proven=proven) for v, limit in zip(program.inputs, limits, strict=True))
    return replace(program, inputs=tuple(inputs))
