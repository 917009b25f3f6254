"""What each operator makes of intervals, and what it asks of them: the counterpart of the rules in `nn`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.nn import functional

from mpcinfer.graph.intervals import RULES, TRUNCATED, Evaluation, Function, Interval
from mpcinfer.nn.elementwise import encode, fraction
from mpcinfer.nn.registry import supported
from mpcinfer.nn.shape import moves

# means are multiplied at this scale, whatever frac_bits (see nn.elementwise.divide)
_MEAN_BITS = 48
F = TypeVar("F", bound=Function)


def bounds(*names: str) -> Callable[[F], F]:
    """Register what operators of these names make of intervals."""

    def register(rule: F) -> F:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def aten(op: str) -> Function:
    _, packet, overload = op.split(".")
    function: Function = getattr(getattr(torch.ops.aten, packet), overload)
    return function


def _monotone(op: str, rounding: float = 0.0) -> Function:
    """torch's own operator at both ends, of its operand or of a list of operands; its constants were rounded."""
    function = aten(op)

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
    bounds(_name)(_monotone(_name))
for _name in """
    relu.default relu6.default max_pool1d.default max_pool2d.default adaptive_max_pool1d.default
    adaptive_max_pool2d.default upsample_nearest1d.vec upsample_nearest2d.vec amax.default amin.default max.default
    min.default sum.default sum.dim_IntList cat.default concat.default stack.default
""".split():
    bounds(f"aten.{_name}")(_monotone(f"aten.{_name}"))
for _name in """
    hardtanh.default clamp.default clamp_min.default clamp_max.default constant_pad_nd.default pad.default
""".split():
    bounds(f"aten.{_name}")(_monotone(f"aten.{_name}", 0.5))


# sums and products


def scaled(run: Evaluation, x: Interval, factor: float) -> Interval:
    n, d = fraction(factor)
    return run.truncated(x.times(n / 2**d), d)


def _total(run: Evaluation, x: Any, y: Any, factor: float) -> Any:
    """x + factor y."""
    if not isinstance(x, Interval) and not isinstance(y, Interval):
        return x + factor * y
    if isinstance(y, Interval):
        y, factor = scaled(run, y, factor), 1
        if isinstance(x, Interval):
            return x + y
        x, y = y, x
    constant = encode(y * factor, run.frac_bits) / 2**run.frac_bits
    return x.map(lambda t: t + constant)


@bounds("aten.add.Tensor", "aten.add.Scalar", "_operator.add")
def _add(run: Evaluation, x: Any, y: Any, alpha: float = 1) -> Any:
    return _total(run, x, y, alpha)


@bounds("aten.sub.Tensor", "aten.sub.Scalar", "_operator.sub")
def _sub(run: Evaluation, x: Any, y: Any, alpha: float = 1) -> Any:
    return _total(run, x, y, -alpha)


@bounds("aten.rsub.Scalar", "aten.rsub.Tensor")
def _rsub(run: Evaluation, x: Any, y: Any, alpha: float = 1) -> Any:
    return _total(run, y, x, -alpha)


@bounds("aten.neg.default", "_operator.neg")
def _neg(run: Evaluation, x: Any) -> Any:
    return x.times(-1) if isinstance(x, Interval) else -x


@bounds("aten.mul.Tensor", "aten.mul.Scalar", "_operator.mul")
def _mul(run: Evaluation, x: Any, y: Any) -> Any:
    if not isinstance(x, Interval):
        x, y = y, x
    if isinstance(x, Interval):
        return bilinear(run, torch.mul, x, y) if isinstance(y, Interval) else scaled(run, x, y)
    return x * y


@bounds("_operator.floordiv")
def _floordiv(run: Evaluation, x: int, y: int) -> int:
    return x // y


def bilinear(
    run: Evaluation, op: Function, x: Interval, y: Interval, bias: Interval | None = None, bits: int | None = None
) -> Interval:
    """op(x, y) + bias: what op makes of the centres, and around it what it makes of the distances from them.

    bits: the fraction bits of y, if not the model's.
    """
    if x.point and y.point:
        z = Interval.of(op(x.low, y.low))
    elif x is y:  # a square
        z = turning(x, torch.square, 0.0)
    else:
        (a, da), (b, db) = (((t.low + t.high) / 2, (t.high - t.low) / 2) for t in (x, y))
        centre, distance = op(a, b), op(da, b.abs() + db) + (0.0 if y.point else op(a.abs(), db))
        z = Interval(centre - distance, centre + distance)
    if bias is not None:
        z = z + bias
    return run.truncated(z, run.frac_bits if bits is None else bits, 2 - x.known - y.known)


@bounds("mpc.linear", "aten.matmul.default", "aten.mm.default", "aten.bmm.default")
def _matmul(run: Evaluation, x: Interval, w: Interval, bias: Interval | None = None) -> Interval:
    return bilinear(run, torch.matmul, x, w, bias)


@bounds("aten.linear.default")
def _linear(run: Evaluation, x: Interval, w: Interval, bias: Interval | None = None) -> Interval:
    return bilinear(run, functional.linear, x, w, bias)


@bounds("mpc.tied_linear")
def _tied_linear(run: Evaluation, x: Interval, w: Interval, bias: Interval | None = None) -> Interval:
    return _linear(run, x, w, bias)


@bounds("mpc.append")
def _append(run: Evaluation, cache: Interval, rows: Interval) -> Interval:
    low = torch.cat([cache.low, rows.low], -2)
    return Interval(low, low if rows.point else torch.cat([cache.high, rows.high], -2))


@bounds("mpc.affine")
def _affine(run: Evaluation, x: Interval, w: Interval, bias: Interval) -> Interval:
    return bilinear(run, torch.mul, x, w, bias)


def _conv(op: str, dims: int) -> Function:
    def rule(run: Evaluation, x: Interval, w: Interval, bias: Interval | None = None, *rest: Any) -> Interval:
        column = None if bias is None else bias.map(lambda t: t.reshape(-1, *([1] * dims)))
        return bilinear(run, lambda a, b: aten(op)(a, b, None, *rest), x, w, column)

    return rule


for _dims in (1, 2):
    for _name in (f"aten.conv{_dims}d.default", f"aten.conv{_dims}d.padding"):
        bounds(_name)(_conv(_name, _dims))
for _dims, _name in (1, "aten.conv_transpose1d.default"), (2, "aten.conv_transpose2d.input"):
    bounds(_name)(_conv(_name, _dims))


# means


def _mean(run: Evaluation, means: Interval, counts: int, uniform: bool = True, least: int = 4) -> Interval:
    """Means of at most `counts` numbers, all of so many if `uniform`, else of that over `least` or more."""
    run.need(means.times(counts), run.frac_bits, TRUNCATED)
    if uniform and counts & (counts - 1) == 0:
        return run.rounded(means)
    run.need(means, _MEAN_BITS, TRUNCATED)
    # the factor has a relative error of 2^-25
    units = 1 + least * 2.0 ** (run.frac_bits - 23) + means.magnitude() * 2.0 ** (run.frac_bits - 25)
    return run.rounded(means, units)


@bounds("aten.mean.dim", "aten.mean.default")
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
        uniform = bool(divisor_override) or (not ceil_mode and (count_include_pad or not padded))
        # windows at a padded edge hold a quarter of the others' numbers, or more; with ceil_mode one number may be left
        return _mean(run, y, counts, uniform, counts if ceil_mode else 4)

    return rule


bounds("aten.avg_pool1d.default")(_avg_pool(functional.avg_pool1d, 1))
bounds("aten.avg_pool2d.default")(_avg_pool(functional.avg_pool2d, 2))


@bounds(
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


def turning(x: Interval, function: Function, at: float) -> Interval:
    """A function that is monotone on either side of a number, where it may jump: its values there and at both ends."""
    if x.point:
        return Interval.of(function(x.low))
    turn = torch.minimum(torch.maximum(torch.full_like(x.low, at), x.low), x.high)
    values = torch.stack([function(x.low), function(x.high), function(turn)])
    return Interval(values.amin(0), values.amax(0))


@bounds("aten.abs.default")
def _abs(run: Evaluation, x: Interval) -> Interval:
    return turning(x, torch.abs, 0.0)


@bounds("aten.threshold.default")
def _threshold(run: Evaluation, x: Interval, limit: float, value: float) -> Interval:
    y = turning(x, lambda t: functional.threshold(t, limit, value), limit)
    if not x.point:  # just above the limit it is the limit
        y = Interval(torch.where(x.high > limit, y.low.clamp(max=limit), y.low), y.high)
    return run.rounded(y, 0.5)


@bounds("aten.leaky_relu.default")
def _leaky_relu(run: Evaluation, x: Interval, negative_slope: float = 0.01) -> Interval:
    positive, negative = x.map(torch.relu), x.map(lambda t: t.clamp(max=0))
    y: Interval = positive + scaled(run, negative, negative_slope)
    return y


@bounds("mpc.softmax", "aten.softmax.int", "aten._softmax.default")
def _softmax(run: Evaluation, x: Interval, dim: int = -1, *rest: Any, **options: Any) -> Interval:
    run.reach(x)
    if x.point:
        return Interval.of(torch.softmax(x.low, dim))
    return run.rounded(Interval(torch.zeros_like(x.low), torch.ones_like(x.low)))


# indices and sizes


def _indices(like: torch.Tensor, size: int) -> Interval:
    return Interval(torch.zeros_like(like, dtype=torch.float64), torch.full_like(like, size - 1, dtype=torch.float64))


@bounds("aten.argmax.default", "aten.argmin.default")
def _argmax(run: Evaluation, x: Interval, dim: int | None = None, keepdim: bool = False) -> Interval:
    size = x.low.numel() if dim is None else x.low.shape[dim]
    return _indices(torch.argmax(x.low, dim, keepdim), size)


@bounds("mpc.argmax")
def _argmax_of_last(run: Evaluation, x: Interval) -> Interval:
    return _indices(torch.argmax(x.low, -1), x.low.shape[-1])


@bounds("mpc.top_k")
def _top_k(run: Evaluation, x: Interval, k: int) -> Interval:
    return _indices(x.low[..., :k], x.low.shape[-1])


@bounds("aten.sym_size.int")
def _sym_size(run: Evaluation, x: Interval, dim: int) -> int:
    return int(x.low.shape[dim])


@bounds("_operator.getitem")
def _getitem(run: Evaluation, values: list[Any], index: int) -> Any:
    return values[index]


# look-ups


@bounds("aten.embedding.default")
def _embedding(run: Evaluation, table: Interval, index: Interval, *rest: Any) -> Interval:
    """The rows looked up; those of any index where it is not known."""
    if index.point:
        rows = index.low.long()
        return table.apply(lambda t: t[rows])
    shape = (*index.low.shape, table.low.shape[-1])
    return Interval(table.low.amin(0).expand(shape), table.high.amax(0).expand(shape))


@bounds("aten.index.Tensor")
def _index(run: Evaluation, x: Interval, indices: list[Interval | None]) -> Interval:
    at = [None if i is None else i.low.bool() if i.truth else i.low.long() for i in indices]
    indexed: Interval = x.map(lambda t: torch.ops.aten.index.Tensor(t, at))
    return indexed


@bounds("aten.index_select.default")
def _index_select(run: Evaluation, x: Interval, dim: int, index: Interval) -> Interval:
    selected: Interval = x.map(lambda t: t.index_select(dim, index.low.long()))
    return selected


@bounds("aten.gather.default")
def _gather(run: Evaluation, x: Interval, dim: int, index: Interval, *rest: Any) -> Interval:
    gathered: Interval = x.map(lambda t: t.gather(dim, index.low.long()))
    return gathered


@bounds("mpc.number")
def _number(run: Evaluation, x: Interval, frac_bits: int) -> Interval:
    return x
