"""How large inputs may be: whatever a program makes of them must stay inside the domains of the protocols.

A product that leaves its domain wraps around, and parties who see only shares cannot notice. So the model owner, who
has the weights, works out at deploy below which power of two every input must stay, and the client refuses the rest.

Started from all that inputs below a limit can be, an evaluation over intervals shows that nothing leaves its domain:
the limit is *proven*. Networks are deep, and so many layers of worst cases may leave no useful limit. Then the
evaluation starts from the example inputs, scaled up to the limit, and every value must stay below a quarter of its
domain (a sixteenth for products of two secrets): the limit is *calibrated*. A proof is for free sizes, such as lengths,
up to their ends; without an end, and in a calibration, they are as large as the examples'. Language models are
calibrated only.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from mpcinfer.errors import RangeError
from mpcinfer.graph import transfer, transfer_functions, transfer_rows  # noqa: F401  (they register what operators do)
from mpcinfer.graph.gate import merge_activations
from mpcinfer.graph.interpret import check_inputs
from mpcinfer.graph.intervals import Evaluation, Exceeded, Interval, Tensors
from mpcinfer.graph.postpone import postpone_truncations
from mpcinfer.graph.program import Input, Program
from mpcinfer.graph.sizes import filled
from mpcinfer.nn.softmax import MOST_SPAN
from mpcinfer.ring.codec import FixedPoint, check_indices

HEADROOM = 4.0


def with_limits(program: Program, weights: Tensors, examples: Sequence[torch.Tensor]) -> Program:
    """The program with a limit declared for each of its inputs: a power of two, all that is kept of the examples.

    weights: the encoded parameters, by name. A proven limit, the same for all inputs, is taken if the examples stay
    below a quarter of it; else the larger of it and the calibrated ones. Inputs of indices have their limit, the size
    of a table, already: a proof is for all indices, a calibration for those of the examples. RangeError naming the
    layer if neither admits the examples, and for examples that are not finite or no index of their table.
    """
    sizes = check_inputs(program, [tuple(x.shape) for x in examples])
    codec = FixedPoint(program.frac_bits)
    top = 62 - 2 * program.frac_bits  # the codec's own limit
    points = [_point(v, x, codec) for v, x in zip(program.inputs, examples, strict=True)]
    real = [x for v, x in zip(program.inputs, points, strict=True) if v.frac_bits]
    reach = [float(x.abs().max()) for x in real]

    above = [math.frexp(size)[1] for size in reach]  # of the smallest power of two above each input

    def grown(by: int) -> list[Interval]:
        """The examples, the numbers among them scaled up to such a power of two, and by another one."""
        scales = iter([2.0 ** (exponent + by) / (size or 1.0) for exponent, size in zip(above, reach, strict=True)])
        return [
            Interval.of(x * next(scales) if v.frac_bits else x) for v, x in zip(program.inputs, points, strict=True)
        ]

    # room for squares costs precision, so limits may not ask for more of it than the examples do
    roomy = Evaluation(program, weights, rounding=False, headroom=HEADROOM)
    fitting = _stays(roomy, grown(0))
    shift = max([0, *(chosen.get("shift", 0) for chosen in roomy.chosen.values())])
    # and scores beyond those that are compared coarsely cost rounds, so neither may they reach further
    coarse = all(chosen.get("reach", 0) <= MOST_SPAN for chosen in roomy.chosen.values())
    most_reach = MOST_SPAN if coarse else math.inf
    proof = Evaluation(program, weights, rounding=True, most_shift=shift, most_reach=most_reach)

    # a proof is for the largest sizes that are free, batches aside, whose rows have nothing to do with each other
    largest = [size.high or value for size, value in zip(program.sizes, sizes, strict=True)]

    def proves(exponent: int) -> bool:
        end = 2.0**exponent - 2.0**-program.frac_bits
        return _stays(
            proof,
            [
                _between(filled(v.shape, largest), *((-end, end) if v.frac_bits else (0.0, v.limit - 1)))
                for v in program.inputs
            ],
        )

    trial = Evaluation(program, weights, rounding=False, headroom=HEADROOM, most_shift=shift, most_reach=most_reach)
    if not real:
        if not program.caches and proves(0):
            return _declared(program, [], proof)
        if fitting:
            return _declared(program, [], roomy)
        raise _too_large(program, roomy)

    exponents = range(2 - program.frac_bits, top + 1)
    exponent = _last(proves, exponents)
    limit = 2.0**exponent if exponent in exponents else 0.0
    # examples that are all zero say nothing: a limit of 1 will do for them
    if limit >= 4 * (max(reach) or 0.25):
        proves(exponent)
        return _declared(program, [limit] * len(real), proof)
    if not any(reach):
        raise RangeError("the example inputs are all zero, which says nothing about real ones; pass some of those")

    def fits(by: int) -> bool:
        return _stays(trial, grown(by))

    by = _last(fits, range(top - max(above) + 1))
    if by >= 0 and 2.0 ** (max(above) + by) > limit:
        fits(by)
        return _declared(program, [2.0 ** (exponent + by) for exponent in above], trial)
    if limit > max(reach):
        proves(exponent)
        return _declared(program, [limit] * len(real), proof)
    raise _too_large(program, trial)  # where the examples themselves stopped, the last that was tried


def _between(shape: Sequence[int], low: float, high: float) -> Interval:
    bottom, top = (torch.full(tuple(shape), end, dtype=torch.float64) for end in (low, high))
    return Interval(bottom, top)


def _point(declared: Input, x: torch.Tensor, codec: FixedPoint) -> torch.Tensor:
    """An example as the parties have it, in float64."""
    what = f"example input {declared.name!r}"
    if declared.frac_bits:
        return codec.decode(codec.encode(x, what))
    return check_indices(x, declared.limit, what).double()


def _too_large(program: Program, trial: Evaluation) -> RangeError:
    node = trial.node
    return RangeError(
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


def _declared(program: Program, limits: Sequence[float], found: Evaluation) -> Program:
    """With these limits for the inputs of numbers, as an evaluation that has just come through found them to hold."""
    numbers = iter(limits)
    inputs = (
        replace(v, limit=next(numbers) if v.frac_bits else v.limit, proven=found.rounding) for v in program.inputs
    )
    nodes = (
        replace(node, kwargs=node.kwargs | found.chosen[node.name]) if node.name in found.chosen else node
        for node in program.nodes
    )
    merged = merge_activations(replace(program, inputs=tuple(inputs), nodes=tuple(nodes)))
    return postpone_truncations(merged, found.largest)
