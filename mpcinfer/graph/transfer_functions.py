"""What functions and comparisons make of intervals, and what they ask of them: more of `transfer`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from mpcinfer.graph.intervals import Evaluation, Function, Interval
from mpcinfer.graph.transfer import aten, bilinear, bounds, scaled, turning
from mpcinfer.nn.activation import SELU_ALPHA, SELU_SCALE
from mpcinfer.nn.functions import INVERSE_BITS, encodable, highest_octave
from mpcinfer.nn.shape import common_shape
from mpcinfer.protocol.exponential import CEILING

# of the fitted functions, besides a unit in the last place
_SPLINE_ERROR = 2e-4


def near(run: Evaluation, y: Interval, error: float = _SPLINE_ERROR, relative: float = 0.0) -> Interval:
    """What an approximation may make of it, besides two units in the last place."""
    if not run.rounding:
        return y
    down, up = (error + relative * t.abs() for t in (y.low, y.high))
    return run.rounded(Interval(y.low - down, y.high + up), 2)


def _decreasing(x: Interval, function: Function) -> Interval:
    low = function(x.high)
    return Interval.of(low) if x.point else Interval(low, function(x.low))


# smooth functions


def _smooth(op: str, lowest_at: float | None) -> Function:
    """torch's own function, increasing or with one minimum."""
    function = aten(op)

    def rule(run: Evaluation, x: Interval, *rest: Any, **kwargs: Any) -> Interval:
        def value(t: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = function(t, *rest, **kwargs)
            return y

        return near(run, x.apply(value) if lowest_at is None else turning(x, value, lowest_at))

    return rule


for _name, _at in {
    "gelu": -0.7518, "silu": -1.2785, "mish": -1.1924, "hardswish": -1.5, "sigmoid": None, "tanh": None, "erf": None,
}.items():  # fmt: skip
    bounds(f"aten.{_name}.default")(_smooth(f"aten.{_name}.default", _at))


@bounds("aten.hardsigmoid.default")
def _hardsigmoid(run: Evaluation, x: Interval) -> Interval:
    y: Interval = scaled(run, x, 1 / 6).map(lambda t: (t + 0.5).clamp(0, 1))
    return y


@bounds("aten.softplus.default")
def _softplus(run: Evaluation, x: Interval, beta: float = 1, threshold: float = 20) -> Interval:
    y = near(run, scaled(run, x, beta).map(lambda t: torch.logaddexp(t, torch.zeros_like(t))))
    return scaled(run, y, 1 / beta)


@bounds("aten.log_sigmoid.default")
def _log_sigmoid(run: Evaluation, x: Interval) -> Interval:
    return _softplus(run, x.times(-1)).times(-1)


@bounds("aten.elu.default")
def _elu(run: Evaluation, x: Interval, alpha: float = 1, factor: float = 1, input_scale: float = 1) -> Interval:
    negative = scaled(run, x.map(lambda t: t.clamp(max=0)), input_scale)
    exponential = near(run, negative.map(functional.elu))
    return scaled(run, x.map(torch.relu), factor) + scaled(run, exponential, factor * alpha)


@bounds("aten.selu.default")
def _selu(run: Evaluation, x: Interval) -> Interval:
    return _elu(run, x, SELU_ALPHA, SELU_SCALE)


@bounds("aten.celu.default")
def _celu(run: Evaluation, x: Interval, alpha: float = 1) -> Interval:
    return _elu(run, x, alpha, 1, 1 / alpha)


@bounds("aten.glu.default")
def _glu(run: Evaluation, x: Interval, dim: int = -1) -> Interval:
    value, gate = x.map(lambda t: t.chunk(2, dim))
    return bilinear(run, torch.mul, value, near(run, gate.map(torch.sigmoid)))


@bounds("aten.prelu.default")
def _prelu(run: Evaluation, x: Interval, weight: Interval) -> Interval:
    column = weight.apply(lambda t: t.reshape(-1, *([1] * max(0, x.low.dim() - 2))) if t.numel() > 1 else t)
    return x.apply(torch.relu) + bilinear(run, torch.mul, x.apply(lambda t: t.clamp(max=0)), column)


@bounds("aten.exp.default")
def _exp(run: Evaluation, x: Interval) -> Interval:
    return near(run, x.map(lambda t: t.clamp(max=CEILING + 0.125).exp()), 0, 1e-4)


@bounds("aten.expm1.default")
def _expm1(run: Evaluation, x: Interval) -> Interval:
    return _exp(run, x).apply(lambda t: t - 1)


def _positive(run: Evaluation, t: torch.Tensor, smallest: float | None = None) -> torch.Tensor:
    """The numbers that logarithms and roots are right for, and for others the end next to them."""
    highest = 2.0 ** highest_octave(run.frac_bits)
    return t.clamp(min=2.0**-run.frac_bits if smallest is None else smallest, max=highest)


@bounds("aten.log.default")
def _log(run: Evaluation, x: Interval) -> Interval:
    return near(run, x.apply(lambda t: _positive(run, t).log()))


@bounds("aten.log1p.default")
def _log1p(run: Evaluation, x: Interval) -> Interval:
    return _log(run, x.apply(lambda t: t + 1))


@bounds("aten.sqrt.default")
def _sqrt(run: Evaluation, x: Interval) -> Interval:
    return near(run, x.map(lambda t: _positive(run, t, 0).sqrt()), 0, 3e-5)


@bounds("aten.rsqrt.default")
def _rsqrt(run: Evaluation, x: Interval) -> Interval:
    return near(run, _decreasing(x, lambda t: _positive(run, t).rsqrt()), 0, 3e-5)


def _inverse(run: Evaluation, x: Interval) -> Interval:
    """1/x with the ends that `nn.functions.inverse_of` gives it."""
    largest, farthest = 2.0 ** (run.frac_bits - 2), 2.0 ** min(20, encodable(run.frac_bits))

    def value(t: torch.Tensor) -> torch.Tensor:
        return torch.where(t < 0, -1.0, 1.0) / t.abs().clamp(1 / largest, farthest)

    if x.point:
        return Interval.of(value(x.low))
    one_sign = (x.low > 0) | (x.high < 0)
    low = torch.where(one_sign, value(x.high), -largest)
    return Interval(low, torch.where(one_sign, value(x.low), largest))


@bounds("aten.reciprocal.default")
def _reciprocal(run: Evaluation, x: Interval) -> Interval:
    return near(run, _inverse(run, x), 0, 5e-5)


@bounds("aten.div.Tensor", "aten.div.Scalar")
def _div(run: Evaluation, x: Any, y: Any) -> Any:
    if not isinstance(y, Interval):
        return scaled(run, x, 1 / y) if isinstance(x, Interval) else x / y
    if not isinstance(x, Interval):
        x = Interval.of(torch.tensor(float(x), dtype=torch.float64), known=True)
    z = bilinear(run, torch.mul, x, _inverse(run, y), bits=INVERSE_BITS)
    return near(run, z, (2 + x.magnitude()) * 2.0 ** (1 - INVERSE_BITS) + 5e-5 * z.magnitude())


@bounds("aten.square.default", "aten.pow.Tensor_Scalar", "_operator.pow")
def _power(run: Evaluation, x: Any, exponent: float = 2) -> Any:
    if not isinstance(x, Interval):
        return x**exponent
    if exponent < 0:
        return _rsqrt(run, x) if exponent == -0.5 else _reciprocal(run, _power(run, x, -exponent))
    if exponent == 0:
        return Interval.of(torch.ones_like(x.low))
    if exponent == 1:
        return x
    whole, rest = divmod(exponent, 1)
    if rest not in (0, 0.5):
        ceiling = math.exp(CEILING + 0.125)
        y = x.map(lambda t: _positive(run, t).pow(exponent).clamp(max=ceiling))
        return near(run, y, 0, 1e-4 + 2e-5 * exponent)
    # step by step, as it is computed: rounding errors grow with the powers
    result = _sqrt(run, x) if rest else None
    base, left = x, int(whole)
    while left:
        if left & 1:
            result = base if result is None else bilinear(run, torch.mul, result, base)
        left >>= 1
        if left:
            base = bilinear(run, torch.mul, base, base)
    return result


# comparisons and choices


def _truth(run: Evaluation, shape: Sequence[int], value: torch.Tensor | None) -> Interval:
    if value is not None:
        return Interval.of(value.double().expand(tuple(shape)))
    return Interval(torch.zeros(tuple(shape), dtype=torch.float64), torch.ones(tuple(shape), dtype=torch.float64))


def _comparison(name: str) -> Function:
    function: Function = getattr(torch, name)

    def rule(run: Evaluation, x: Any, y: Any) -> Interval:
        ends = [v.low if isinstance(v, Interval) else torch.tensor(float(v), dtype=torch.float64) for v in (x, y)]
        points = all(v.point for v in (x, y) if isinstance(v, Interval))
        return _truth(run, common_shape(*(t.shape for t in ends)), function(*ends) if points else None)

    return rule


for _name in "lt le gt ge eq ne".split():
    bounds(f"aten.{_name}.Tensor", f"aten.{_name}.Scalar")(_comparison(_name))


def _logic(name: str) -> Function:
    function: Function = getattr(torch, name)

    def rule(run: Evaluation, *operands: Interval) -> Interval:
        points = all(x.point for x in operands)
        shape = common_shape(*(x.low.shape for x in operands))
        return _truth(run, shape, function(*(x.low != 0 for x in operands)) if points else None)

    return rule


bounds("aten.logical_not.default", "aten.bitwise_not.default")(_logic("logical_not"))
for _name in "and or xor".split():
    _names = f"aten.logical_{_name}.default", f"aten.bitwise_{_name}.Tensor", f"aten.__{_name}__.Tensor"
    bounds(*_names)(_logic(f"logical_{_name}"))


@bounds("aten.sign.default")
def _sign(run: Evaluation, x: Interval) -> Interval:
    y: Interval = x.apply(torch.sign)
    return y


def _operand(x: Any) -> Interval:
    if isinstance(x, Interval):
        return x
    return Interval.of(torch.tensor(float(x), dtype=torch.float64), known=True)


@bounds("aten.where.self", "aten.where.ScalarSelf", "aten.where.ScalarOther", "aten.where.Scalar")
def _where(run: Evaluation, condition: Interval, x: Any, y: Any, frac_bits: int = 0) -> Interval:
    x, y = (v if isinstance(v, Interval) else run.rounded(_operand(v), 0.5) for v in (x, y))  # numbers are encoded
    if condition.point:
        low = torch.where(condition.low != 0, x.low, y.low)
        return Interval(low, low if x.point and y.point else torch.where(condition.low != 0, x.high, y.high))
    shape = common_shape(condition.low.shape, x.low.shape, y.low.shape)
    return Interval(torch.minimum(x.low, y.low).expand(shape), torch.maximum(x.high, y.high).expand(shape))


@bounds("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def _masked_fill(run: Evaluation, x: Interval, mask: Interval, value: Any) -> Interval:
    return _where(run, mask, value, x)


def _both(function: Function) -> Function:
    def rule(run: Evaluation, x: Any, y: Any) -> Interval:
        x, y = _operand(x), _operand(y)
        low = function(x.low, y.low)
        return Interval(low, low if x.point and y.point else function(x.high, y.high))

    return rule


bounds("aten.maximum.default", "aten.max.other", "aten.clamp_min.Tensor")(_both(torch.maximum))
bounds("aten.minimum.default", "aten.min.other", "aten.clamp_max.Tensor")(_both(torch.minimum))


@bounds("aten.clamp.Tensor")
def _clamp(run: Evaluation, x: Interval, low: Any = None, high: Any = None) -> Interval:
    y = x if low is None else _both(torch.maximum)(run, x, low)
    return y if high is None else _both(torch.minimum)(run, y, high)


@bounds("aten.max.dim", "aten.min.dim")
def _extreme(run: Evaluation, x: Interval, dim: int, keepdim: bool = False) -> list[Interval]:
    function = torch.amax if run.node.op == "aten.max.dim" else torch.amin
    values: Interval = x.apply(lambda t: function(t, dim, keepdim))
    return [values, _places(values, x.low.shape[dim])]


@bounds("aten.topk.default")
def _topk(run: Evaluation, x: Interval, k: int, dim: int = -1, largest: bool = True, *rest: Any) -> list[Interval]:
    values: Interval = x.apply(lambda t: t.topk(k, dim, largest).values)
    return [values, _places(values, x.low.shape[dim])]


@bounds("aten.sort.default")
def _sort(run: Evaluation, x: Interval, dim: int = -1, descending: bool = False) -> list[Interval]:
    return _topk(run, x, x.low.shape[dim], dim, descending)


def _places(like: Interval, size: int) -> Interval:
    return Interval(torch.zeros_like(like.low), torch.full_like(like.low, size - 1))
