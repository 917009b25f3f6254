"""What each operator makes of intervals, and what it asks of them: the counterpart of the rules in `nn`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from mpcinfer.graph.intervals import RULES, SOFTMAX, TRUNCATED, Evaluation, Function, Interval
from mpcinfer.nn.elementwise import encode, fraction
from mpcinfer.nn.registry import supported
from mpcinfer.nn.shape import moves

# means are multiplied at this scale, whatever frac_bits (see nn.elementwise.divide)
_MEAN_BITS = 48


def _bounds(*names: str) -> Callable[[Function], Function]:
    def register(rule: Function) -> Function:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def _aten(op: str) -> Function:
    _, packet, overload = op.split(".")
    function: Function = getattr(getattr(torch.ops.aten, packet), overload)
    return function


def _monotone(op: str, rounding: float = 0.0) -> Function:
    """torch's own operator at both ends, of its operand or of a list of operands; its constants were rounded."""
    function = _aten(op)

    def end(t: torch.Tensor, *rest: Any, **kwargs: Any) -> Any:
        try:
            return function(t, *rest, **kwargs)
        except RuntimeError:  # a view of a layout that the model's tensor had and ours has not
            return function(t.contiguous(), *rest, **kwargs)

    def rule(run: Evaluation, x: Any, *rest: Any, **kwargs: Any) -> Any:
        if isinstance(x, list):
            low = function([item.low for item in x], *rest, **kwargs)
            same = all(item.point for item in x)
            return Interval(low, low if same else function([item.high for item in x], *rest, **kwargs))
        y = x.map(lambda t: end(t, *rest, **kwargs))
        return run.rounded(y, rounding) if rounding else y

    return rule


for _name in (name for name in supported() if moves(name) and name.startswith("aten.")):
    _bounds(_name)(_monotone(_name))
for _name in """
    relu.default relu6.default max_pool1d.default max_pool2d.default adaptive_max_pool1d.default
    adaptive_max_pool2d.default sum.default sum.dim_IntList cat.default concat.default stack.default
""".split():
    _bounds(f"aten.{_name}")(_monotone(f"aten.{_name}"))
for _name in "hardtanh.default clamp.default constant_pad_nd.default pad.default".split():
    _bounds(f"aten.{_name}")(_monotone(f"aten.{_name}", 0.5))


# sums and products


def _scaled(run: Evaluation, x: Interval, factor: float) -> Interval:
    n, d = fraction(factor)
    return run.truncated(x.times(n / 2**d), d)


def _total(run: Evaluation, x: Any, y: Any, factor: float) -> Any:
    """x + factor y."""
    if not isinstance(x, Interval) and not isinstance(y, Interval):
        return x + factor * y
    if isinstance(y, Interval):
        y, factor = _scaled(run, y, factor), 1
        if isinstance(x, Interval):
            return x + y
        x, y = y, x
    constant = encode(y * factor, run.frac_bits) / 2**run.frac_bits
    return x.map(lambda t: t + constant)


@_bounds("aten.add.Tensor", "aten.add.Scalar", "_operator.add")
def _add(run: Evaluation, x: Any, y: Any, alpha: float = 1) -> Any:
    return _total(run, x, y, alpha)


@_bounds("aten.sub.Tensor", "aten.sub.Scalar", "_operator.sub")
def _sub(run: Evaluation, x: Any, y: Any, alpha: float = 1) -> Any:
    return _total(run, x, y, -alpha)


@_bounds("aten.rsub.Scalar", "aten.rsub.Tensor")
def _rsub(run: Evaluation, x: Any, y: Any, alpha: float = 1) -> Any:
    return _total(run, y, x, -alpha)


@_bounds("aten.neg.default", "_operator.neg")
def _neg(run: Evaluation, x: Any) -> Any:
    return x.times(-1) if isinstance(x, Interval) else -x


@_bounds("aten.mul.Tensor", "aten.mul.Scalar", "_operator.mul")
def _mul(run: Evaluation, x: Any, y: Any) -> Any:
    if not isinstance(x, Interval):
        x, y = y, x
    if isinstance(x, Interval):
        return _bilinear(run, torch.mul, x, y) if isinstance(y, Interval) else _scaled(run, x, y)
    return x * y


@_bounds("aten.div.Tensor", "aten.div.Scalar")
def _div(run: Evaluation, x: Interval, y: float) -> Interval:
    return _scaled(run, x, 1 / y)


@_bounds("aten.square.default", "aten.pow.Tensor_Scalar")
def _square(run: Evaluation, x: Interval, exponent: float = 2) -> Interval:
    return _bilinear(run, torch.mul, x, x)


@_bounds("_operator.floordiv")
def _floordiv(run: Evaluation, x: int, y: int) -> int:
    return x // y


def _bilinear(run: Evaluation, op: Function, x: Interval, y: Interval, bias: Interval | None = None) -> Interval:
    """op(x, y) + bias: what op makes of the centres, and around it what it makes of the distances from them."""
    if x.point and y.point:
        z = Interval.of(op(x.low, y.low))
    elif x is y:  # a square
        z = _turning(x, torch.square, 0.0)
    else:
        (a, da), (b, db) = (((t.low + t.high) / 2, (t.high - t.low) / 2) for t in (x, y))
        centre, distance = op(a, b), op(da, b.abs() + db) + (0.0 if y.point else op(a.abs(), db))
        z = Interval(centre - distance, centre + distance)
    if bias is not None:
        z = z + bias
    return run.truncated(z, run.frac_bits, 2 - x.known - y.known)


@_bounds("mpc.linear", "aten.matmul.default", "aten.mm.default", "aten.bmm.default")
def _matmul(run: Evaluation, x: Interval, w: Interval, bias: Interval | None = None) -> Interval:
    return _bilinear(run, torch.matmul, x, w, bias)


@_bounds("aten.linear.default")
def _linear(run: Evaluation, x: Interval, w: Interval, bias: Interval | None = None) -> Interval:
    return _bilinear(run, functional.linear, x, w, bias)


@_bounds("mpc.affine")
def _affine(run: Evaluation, x: Interval, w: Interval, bias: Interval) -> Interval:
    return _bilinear(run, torch.mul, x, w, bias)


def _conv(op: str, dims: int) -> Function:
    def rule(run: Evaluation, x: Interval, w: Interval, bias: Interval | None = None, *rest: Any) -> Interval:
        column = None if bias is None else bias.map(lambda t: t.reshape(-1, *([1] * dims)))
        return _bilinear(run, lambda a, b: _aten(op)(a, b, None, *rest), x, w, column)

    return rule


for _dims in (1, 2):
    for _name in (f"aten.conv{_dims}d.default", f"aten.conv{_dims}d.padding"):
        _bounds(_name)(_conv(_name, _dims))


# means


def _mean(run: Evaluation, means: Interval, counts: int, uniform: bool = True) -> Interval:
    """Means of at most `counts` numbers, all of so many if `uniform`."""
    run.need(means.times(counts), run.frac_bits, TRUNCATED)
    if uniform and counts & (counts - 1) == 0:
        return run.rounded(means)
    run.need(means, _MEAN_BITS, TRUNCATED)
    # windows at the edge may hold a quarter of the others' numbers; the factor has a relative error of 2^-25
    units = 1 + 2.0 ** (run.frac_bits - 21) + means.magnitude() * 2.0 ** (run.frac_bits - 25)
    return run.rounded(means, units)


@_bounds("aten.mean.dim", "aten.mean.default")
def _mean_along(run: Evaluation, x: Interval, *rest: Any, **kwargs: Any) -> Interval:
    y = x.map(lambda t: t.mean(*rest, **kwargs))
    return _mean(run, y, x.low.numel() // max(1, y.low.numel()))


def _avg_pool(pool: Function, dims: int) -> Function:
    def rule(
        run: Evaluation,
        x: Interval,
        kernel: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Interval:
        kwargs = {"divisor_override": divisor_override} if divisor_override else {}
        y = x.map(lambda t: pool(t, kernel, stride or None, padding, ceil_mode, count_include_pad, **kwargs))
        sizes = [kernel] if isinstance(kernel, int) else kernel
        counts = divisor_override or math.prod(sizes * dims if len(sizes) == 1 else sizes)
        padded = padding if isinstance(padding, int) else any(padding)
        return _mean(run, y, counts, bool(divisor_override) or count_include_pad or not padded)

    return rule


_bounds("aten.avg_pool1d.default")(_avg_pool(functional.avg_pool1d, 1))
_bounds("aten.avg_pool2d.default")(_avg_pool(functional.avg_pool2d, 2))


@_bounds(
    "aten.adaptive_avg_pool1d.default",
    "aten.adaptive_avg_pool2d.default",
    "aten._adaptive_avg_pool2d.default",
)
def _adaptive_avg_pool(run: Evaluation, x: Interval, output_size: list[int]) -> Interval:
    dims = len(output_size)
    pool: Function = functional.adaptive_avg_pool1d if dims == 1 else functional.adaptive_avg_pool2d
    sizes = list(zip(x.low.shape[-dims:], output_size, strict=True))
    uniform = all(size % out == 0 for size, out in sizes)
    counts = math.prod(size // out if uniform else size // out + 2 for size, out in sizes)
    return _mean(run, x.map(lambda t: pool(t, output_size)), counts, uniform)


# functions that turn


def _turning(x: Interval, function: Function, at: float) -> Interval:
    """A function that is monotone on either side of a number, where it may jump: its values there and at both ends."""
    if x.point:
        return Interval.of(function(x.low))
    turn = torch.minimum(torch.maximum(torch.full_like(x.low, at), x.low), x.high)
    values = torch.stack([function(x.low), function(x.high), function(turn)])
    return Interval(values.amin(0), values.amax(0))


@_bounds("aten.abs.default")
def _abs(run: Evaluation, x: Interval) -> Interval:
    return _turning(x, torch.abs, 0.0)


@_bounds("aten.threshold.default")
def _threshold(run: Evaluation, x: Interval, limit: float, value: float) -> Interval:
    y = _turning(x, lambda t: functional.threshold(t, limit, value), limit)
    if not x.point:  # just above the limit it is the limit
        y = Interval(torch.where(x.high > limit, y.low.clamp(max=limit), y.low), y.high)
    return run.rounded(y, 0.5)


@_bounds("aten.leaky_relu.default")
def _leaky_relu(run: Evaluation, x: Interval, negative_slope: float = 0.01) -> Interval:
    positive, negative = x.map(torch.relu), x.map(lambda t: t.clamp(max=0))
    y: Interval = positive + _scaled(run, negative, negative_slope)
    return y


@_bounds("mpc.softmax", "aten.softmax.int", "aten._softmax.default")
def _softmax(run: Evaluation, x: Interval, dim: int = -1, *rest: Any) -> Interval:
    run.need(Interval.of(x.high.amax(dim) - x.low.amin(dim)), run.frac_bits, SOFTMAX)
    if x.point:
        return Interval.of(torch.softmax(x.low, dim))
    return run.rounded(Interval(torch.zeros_like(x.low), torch.ones_like(x.low)))


# indices and sizes


def _indices(like: torch.Tensor, size: int) -> Interval:
    return Interval(torch.zeros_like(like, dtype=torch.float64), torch.full_like(like, size - 1, dtype=torch.float64))


@_bounds("aten.argmax.default")
def _argmax(run: Evaluation, x: Interval, dim: int | None = None, keepdim: bool = False) -> Interval:
    size = x.low.numel() if dim is None else x.low.shape[dim]
    return _indices(torch.argmax(x.low, dim, keepdim), size)


@_bounds("mpc.argmax")
def _argmax_of_last(run: Evaluation, x: Interval) -> Interval:
    return _indices(torch.argmax(x.low, -1), x.low.shape[-1])


@_bounds("mpc.top_k")
def _top_k(run: Evaluation, x: Interval, k: int) -> Interval:
    return _indices(x.low[..., :k], x.low.shape[-1])


@_bounds("aten.sym_size.int")
def _sym_size(run: Evaluation, x: Interval, dim: int) -> int:
    return int(x.low.shape[dim])


@_bounds("_operator.getitem")
def _getitem(run: Evaluation, values: list[Any], index: int) -> Any:
    return values[index]


# look-ups


@_bounds("aten.embedding.default")
def _embedding(run: Evaluation, table: Interval, index: Interval, *rest: Any) -> Interval:
    """The rows looked up; those of any index where it is not known."""
    if index.point:
        rows = index.low.long()
        return table.map(lambda t: t[rows])
    shape = (*index.low.shape, table.low.shape[-1])
    return Interval(table.low.amin(0).expand(shape), table.high.amax(0).expand(shape))


@_bounds("aten.index.Tensor")
def _index(run: Evaluation, x: Interval, indices: list[Interval | None]) -> Interval:
    at = [None if i is None else i.low.bool() if i.truth else i.low.long() for i in indices]
    indexed: Interval = x.map(lambda t: torch.ops.aten.index.Tensor(t, at))
    return indexed


@_bounds("aten.index_select.default")
def _index_select(run: Evaluation, x: Interval, dim: int, index: Interval) -> Interval:
    selected: Interval = x.map(lambda t: t.index_select(dim, index.low.long()))
    return selected


@_bounds("aten.gather.default")
def _gather(run: Evaluation, x: Interval, dim: int, index: Interval, *rest: Any) -> Interval:
    gathered: Interval = x.map(lambda t: t.gather(dim, index.low.long()))
    return gathered


@_bounds("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def _masked_fill(run: Evaluation, x: Interval, mask: Interval, value: Any) -> Interval:
    filler = value.low if isinstance(value, Interval) else torch.tensor(value, dtype=torch.float64)
    filled: Interval = x.map(lambda t: torch.where(mask.low != 0, filler, t))
    return filled


@_bounds("mpc.number")
def _number(run: Evaluation, x: Interval, frac_bits: int) -> Interval:
    return x
