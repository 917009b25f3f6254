"""What norms, softmax and attention make of intervals, and what they ask of them: more of `transfer`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from mpcinfer.graph.intervals import TRUNCATED, Evaluation, Function, Interval
from mpcinfer.graph.transfer import bilinear, bounds
from mpcinfer.graph.transfer_functions import near
from mpcinfer.nn.attention import LEAST_FACTOR_BITS, QUERY_BITS
from mpcinfer.nn.elementwise import FACTOR_BITS, fraction
from mpcinfer.nn.normalise import room
from mpcinfer.nn.public import MASKED, MASKED_FROM
from mpcinfer.nn.shape import axes_of
from mpcinfer.nn.softmax import LEAST_POWER_BITS, count_bits

# norms


def _squares(run: Evaluation, x: Interval, axes: Sequence[int]) -> torch.Tensor:
    """Upper bounds of sums of squares, of numbers or of their distances from their mean; asks for room for them."""
    largest = x.low.abs() if x.point else torch.maximum(x.low.abs(), x.high.abs())
    total = largest.square().sum(tuple(axes), keepdim=True)
    run.squares(float(total.max()) if total.numel() else 0.0)
    return total


def _low(x: Interval | None) -> torch.Tensor | None:
    return None if x is None else x.low


def _normalised(
    run: Evaluation,
    x: Interval,
    axes: Sequence[int],
    exact: Function,
    gain: Interval | None,
    bias: Interval | None,
    down: int,
) -> Interval:
    _squares(run, x, axes)
    count = max(1, math.prod(x.low.shape[a] for a in axes))
    if x.point:
        return _result(run, exact(x.low), gain, bias, count).times(2.0**-down)
    largest = torch.full_like(x.low, math.sqrt(count))
    return _affine(run, Interval(-largest, largest), gain, bias, count).times(2.0**-down)


def _result(run: Evaluation, y: torch.Tensor, gain: Interval | None, bias: Interval | None, count: int) -> Interval:
    """What a norm of rows of `count` numbers yields, which must have room where it has a gain or a bias."""
    found = Interval.of(y)
    if gain is not None or bias is not None:
        run.need(found, room(count, run.frac_bits), TRUNCATED)
    return found


def _affine(run: Evaluation, y: Interval, gain: Interval | None, bias: Interval | None, count: int) -> Interval:
    """What norms make of standardised rows of `count` numbers: times the gain, plus the bias."""
    if gain is not None:
        y = bilinear(run, torch.mul, y, gain)
    for part in (y, y if bias is None else y + bias):
        run.need(part, room(count, run.frac_bits), TRUNCATED)
    return near(run, y if bias is None else y + bias, 1e-3, 1e-3)


@bounds("aten.layer_norm.default")
def _layer_norm(
    run: Evaluation,
    x: Interval,
    shape: Sequence[int],
    weight: Interval | None = None,
    bias: Interval | None = None,
    eps: float = 1e-5,
    *rest: Any,
    down: int = 0,
    **options: Any,
) -> Interval:
    def exact(t: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(t, list(shape), _low(weight), _low(bias), eps)

    return _normalised(run, x, range(-len(shape), 0), exact, weight, bias, down)


@bounds("aten.rms_norm.default")
def _rms_norm(
    run: Evaluation,
    x: Interval,
    shape: Sequence[int],
    weight: Interval | None = None,
    eps: float | None = None,
    *,
    down: int = 0,
    **options: Any,
) -> Interval:
    def exact(t: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(t, list(shape), _low(weight), 2.0**-23 if eps is None else eps)

    return _normalised(run, x, range(-len(shape), 0), exact, weight, None, down)


def _channels(x: Interval, parameter: Interval | None) -> Interval | None:
    return None if parameter is None else parameter.apply(lambda t: t.reshape(-1, *([1] * (x.low.dim() - 2))))


@bounds("aten.group_norm.default")
def _group_norm(
    run: Evaluation,
    x: Interval,
    groups: int,
    weight: Interval | None = None,
    bias: Interval | None = None,
    eps: float = 1e-5,
    *rest: Any,
    **options: Any,
) -> Interval:
    rows = x.apply(lambda t: t.reshape(t.shape[0], groups, -1))
    _squares(run, rows, [-1])
    count = rows.low.shape[-1]
    if x.point:
        y = functional.group_norm(x.low, groups, _low(weight), _low(bias), eps)
        return _result(run, y, weight, bias, count)
    largest = torch.full_like(x.low, math.sqrt(count))
    return _affine(run, Interval(-largest, largest), _channels(x, weight), _channels(x, bias), count)


@bounds("aten.instance_norm.default")
def _instance_norm(
    run: Evaluation,
    x: Interval,
    weight: Interval | None,
    bias: Interval | None,
    mean: Any,
    variance: Any,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    *rest: Any,
    **options: Any,
) -> Interval:
    return _group_norm(run, x, x.low.shape[1], weight, bias, eps)


@bounds("aten.linalg_vector_norm.default")
def _vector_norm(
    run: Evaluation, x: Interval, ord: float = 2, dim: Any = None, keepdim: bool = False, **options: Any
) -> Interval:
    axes = axes_of(dim, x.low.dim())
    total = _squares(run, x, axes)
    y = total.sqrt() if keepdim else total.sqrt().amax(axes)
    return Interval.of(y) if x.point else near(run, Interval(torch.zeros_like(y), y), 1e-4 * float(y.max()))


def _spread(function: Function, root: bool) -> Function:
    def rule(
        run: Evaluation, x: Interval, dim: Any = None, unbiased: Any = True, keepdim: bool = False, *,
        correction: Any = None, **options: Any,
    ) -> Interval:  # fmt: skip
        axes = axes_of(dim, x.low.dim())
        total = _squares(run, x, axes)
        less = int(unbiased) if correction is None else correction
        if root:  # which is divided by the root of the count, a factor of 24 bits, with 4 bits more than it keeps
            run.need(Interval.of(total.sqrt()), run.frac_bits + 4 + FACTOR_BITS, TRUNCATED)
        if x.point:
            return Interval.of(function(x.low, axes, correction=less, keepdim=keepdim))
        high = total / (math.prod(x.low.shape[a] for a in axes) - less)
        high = high.sqrt() if root else high
        high = high if keepdim else high.amax(axes)
        return near(run, Interval(torch.zeros_like(high), high), 1e-3 * float(high.max()))

    return rule


bounds("aten.var.dim", "aten.var.correction")(_spread(torch.var, False))
bounds("aten.std.dim", "aten.std.correction")(_spread(torch.std, True))


# softmax and attention


@bounds("aten.log_softmax.int", "aten._log_softmax.default")
def _log_softmax(run: Evaluation, x: Interval, dim: int, *rest: Any) -> Interval:
    if x.point:
        return Interval.of(x.low.log_softmax(dim))
    low = x.low - x.high.amax(dim, keepdim=True) - math.log(x.low.shape[dim])
    return near(run, Interval(low, torch.zeros_like(low)))


@bounds("aten.logsumexp.default")
def _logsumexp(run: Evaluation, x: Interval, dim: list[int], keepdim: bool = False) -> Interval:
    return near(run, x.apply(lambda t: torch.logsumexp(t, dim, keepdim)))


@bounds("aten.scaled_dot_product_attention.default")
def _attention(
    run: Evaluation,
    q: Interval,
    k: Interval,
    v: Interval,
    mask: Interval | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **options: Any,
) -> Interval:
    factor = 1 / math.sqrt(q.low.shape[-1]) if scale is None else scale
    if enable_gqa:
        k, v = (x.apply(lambda t: t.repeat_interleave(q.low.shape[-3] // t.shape[-3], -3)) for x in (k, v))
    scores = bilinear(run, torch.matmul, q, k.apply(lambda t: t.transpose(-1, -2)), bits=run.frac_bits + QUERY_BITS)
    run.scores(scores)
    scores = scores.times(factor)
    if run.chosen[run.node.name]["factor_bits"] < LEAST_FACTOR_BITS:  # then queries are scaled, with more bits
        n = abs(fraction(factor)[0])
        if n & (n - 1):
            run.need(q, run.frac_bits + QUERY_BITS + math.log2(n), TRUNCATED)
        run.need(scores, 2 * run.frac_bits + QUERY_BITS, TRUNCATED, 2)
    added = None if mask is None or mask.truth else mask
    run.reach(scores if added is None else scores + added, 2)
    if added is not None:
        scores = scores + added.apply(lambda t: t.clamp(min=MASKED))
    run.need(scores, run.frac_bits, run.numbers)
    # what they are divided by leaves this room; and their weighted sums are truncated, however long a text becomes
    run.need(v, run.frac_bits + max(30, LEAST_POWER_BITS + count_bits(run.rows(2, k.low.shape[-2]))), TRUNCATED)
    run.sums(v)
    if not (q.point and k.point and v.point and (mask is None or mask.point)):
        shape = (*scores.low.shape[:-1], v.low.shape[-1])
        low, high = v.low.amin(-2, keepdim=True).clamp(max=0), v.high.amax(-2, keepdim=True).clamp(min=0)
        return near(run, Interval(low.expand(shape), high.expand(shape)), 5e-5 * v.magnitude())
    keep = torch.ones(scores.low.shape, dtype=torch.bool)
    if causal:
        keep = keep.tril()
    elif mask is not None:
        keep = (mask.low != 0) if mask.truth else (mask.low > MASKED_FROM)
    weights = torch.softmax(scores.low.masked_fill(~keep, -math.inf), -1).nan_to_num(0.0)
    return Interval.of(weights @ v.low)
