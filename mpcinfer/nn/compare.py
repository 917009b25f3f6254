"""Comparisons of secrets, and what is chosen by them: booleans are integers 0 and 1 (frac_bits 0)."""

from __future__ import annotations

import math
from typing import Any

import torch

from mpcinfer.nn.elementwise import add_public, encode, reachable, width
from mpcinfer.nn.registry import operator
from mpcinfer.nn.shape import common_shape, rows
from mpcinfer.protocol import select
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.multiply import multiply
from mpcinfer.protocol.tournament import argmax_along, maximum_along, top_along
from mpcinfer.protocol.types import Public, Shared


def number(ctx: Context, x: Any, like: Shared) -> Shared:
    """An operand as shares at the scale of `like`: shares as they are, public numbers and tensors held by one party."""
    if isinstance(x, Shared):
        return x.rescaled(max(x.frac_bits, like.frac_bits))
    frac_bits = max(like.frac_bits, x.frac_bits if isinstance(x, Public) else 0)
    value = torch.as_tensor(public_at(x, frac_bits), dtype=torch.int64).to(like.share.device)
    return Shared(value if ctx.first else torch.zeros_like(value), frac_bits)


def public_at(x: Any, frac_bits: int) -> Any:
    """A public number or tensor as integers at a scale."""
    if isinstance(x, Public):
        return x.value.to(torch.int64) << (frac_bits - x.frac_bits)
    return encode(x, frac_bits)


def broadcast(*operands: Shared) -> list[Shared]:
    """The operands expanded to their common shape."""
    shape = common_shape(*(x.shape for x in operands))
    return [x.map(lambda t: t.expand(shape)) for x in operands]


async def _compared(ctx: Context, x: Any, y: Any, thresholds: tuple[int, ...], values: tuple[int, ...]) -> Shared:
    """A step function of x - y, in units of the last place; a number y may lie between two of them."""
    if isinstance(y, int | float) and not isinstance(y, bool):
        at = y * 2.0**x.frac_bits
        if math.isinf(at) or abs(y) > abs(reachable(x, y)):
            return number(ctx, values[-1] if at < 0 else values[0], Shared(x.share)).map(lambda t: t.expand(x.shape))
        exact = at.is_integer()
        floor = math.floor(at)
        if not exact:  # [x < y] and [x <= y] are both [x < floor + 1]
            ends = values[0], values[-1]
            return await select.step(ctx, x, (floor + 1,), ends, width(x))
        return await select.step(ctx, x, tuple(floor + t for t in thresholds), values, width(x))
    if not isinstance(x, Shared):
        x = number(ctx, x, y)
    return await select.step(ctx, x - number(ctx, y, x), thresholds, values, width(x))


_COMPARISONS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "lt": ((0,), (1, 0)),
    "le": ((1,), (1, 0)),
    "gt": ((1,), (0, 1)),
    "ge": ((0,), (0, 1)),
    "eq": ((0, 1), (0, 1, 0)),
    "ne": ((0, 1), (1, 0, 1)),
}


def _comparison(thresholds: tuple[int, ...], values: tuple[int, ...]) -> Any:
    async def rule(ctx: Context, x: Any, y: Any) -> Shared:
        return await _compared(ctx, x, y, thresholds, values)

    return rule


for _name, _steps in _COMPARISONS.items():
    operator(f"aten.{_name}.Tensor", f"aten.{_name}.Scalar", integer=True, takes_integers=True)(_comparison(*_steps))


@operator("aten.sign.default")
async def sign(ctx: Context, x: Shared) -> Shared:
    """-1, 0 or 1."""
    one = 1 << x.frac_bits
    return await select.piecewise_linear(ctx, x, (0, 1), (0, 0, 0), (-one, 0, one), width(x))


@operator("aten.logical_not.default", "aten.bitwise_not.default", takes_integers=True)
async def logical_not(ctx: Context, x: Shared) -> Shared:
    """1 - x."""
    return add_public(ctx, -x, 1)


@operator("aten.logical_and.default", "aten.bitwise_and.Tensor", "aten.__and__.Tensor", takes_integers=True)
async def logical_and(ctx: Context, x: Any, y: Any) -> Shared:
    """x y."""
    x, y = _aligned(ctx, x, y)
    return await multiply(ctx, x, y)


@operator("aten.logical_or.default", "aten.bitwise_or.Tensor", "aten.__or__.Tensor", takes_integers=True)
async def logical_or(ctx: Context, x: Any, y: Any) -> Shared:
    """x + y - x y."""
    a, b = _aligned(ctx, x, y)
    return a + b - await multiply(ctx, a, b)


@operator("aten.logical_xor.default", "aten.bitwise_xor.Tensor", "aten.__xor__.Tensor", takes_integers=True)
async def logical_xor(ctx: Context, x: Any, y: Any) -> Shared:
    """x + y - 2 x y."""
    a, b = _aligned(ctx, x, y)
    return a + b - (await multiply(ctx, a, b)).times(2)


def _aligned(ctx: Context, x: Any, y: Any) -> tuple[Shared, Shared]:
    """Both as shares, one of which is secret."""
    secret = x if isinstance(x, Shared) else y
    return number(ctx, x, secret), number(ctx, y, secret)


@operator(
    "aten.where.self", "aten.where.ScalarSelf", "aten.where.ScalarOther", "aten.where.Scalar", takes_integers=True
)
async def where(ctx: Context, condition: Any, x: Any, y: Any, frac_bits: int = 0) -> Shared:
    """x where the condition holds, else y; condition and values may be secret or public. One round, or none.

    frac_bits: at least that many has the result, which values that are all public or integers do not tell.
    """
    secret = next(v for v in (x, y, condition) if isinstance(v, Shared))
    like = Shared(secret.share, frac_bits)
    if isinstance(condition, Shared) and not isinstance(x, Shared) and not isinstance(y, Shared):
        both = [public_at(v, frac_bits) for v in (x, y)]
        step = torch.as_tensor(both[0] - both[1]).to(secret.share.device)
        return add_public(ctx, Shared(condition.share * step, frac_bits), both[1])
    chosen, other = number(ctx, x, like), number(ctx, y, like)
    if isinstance(condition, Public):
        mask = condition.value.to(secret.share.device) != 0
        scale = max(chosen.frac_bits, other.frac_bits)
        return Shared(torch.where(mask, chosen.rescaled(scale).share, other.rescaled(scale).share), scale)
    return other + await multiply(ctx, chosen - other, condition)


@operator("aten.masked_fill.Scalar", "aten.masked_fill.Tensor", takes_integers=True)
async def masked_fill(ctx: Context, x: Shared, mask: Any, value: Any) -> Shared:
    """x where the mask is 0, else the value."""
    return await where(ctx, mask, value, x, x.frac_bits)


@operator("aten.maximum.default", "aten.max.other", "aten.clamp_min.Tensor")
async def maximum(ctx: Context, x: Any, y: Any) -> Shared:
    """The larger one, element by element."""
    x, y = broadcast(*_aligned(ctx, x, y))
    return (await select.maximum(ctx, x, y, width=width(x)))[0]


@operator("aten.minimum.default", "aten.min.other", "aten.clamp_max.Tensor")
async def minimum(ctx: Context, x: Any, y: Any) -> Shared:
    """The smaller one, element by element: the sum minus the larger one."""
    a, b = broadcast(*_aligned(ctx, x, y))
    return a + b - (await select.maximum(ctx, a, b, width=width(a)))[0]


@operator("aten.clamp.Tensor")
async def clamp_tensor(ctx: Context, x: Shared, low: Any = None, high: Any = None) -> Shared:
    """x limited by tensors."""
    if low is not None:
        x = await maximum(ctx, x, low)
    return x if high is None else await minimum(ctx, x, high)


@operator("aten.amax.default", "aten.max.default")
async def amax(ctx: Context, x: Shared, dim: Any = None, keepdim: bool = False) -> Shared:
    """The largest entry along `dim` (all axes if None)."""
    joined, place = rows(x, dim)
    return place(await maximum_along(ctx, joined, width(x)), keepdim)


@operator("aten.amin.default", "aten.min.default")
async def amin(ctx: Context, x: Shared, dim: Any = None, keepdim: bool = False) -> Shared:
    """The smallest entry along `dim` (all axes if None)."""
    return -await amax(ctx, -x, dim, keepdim)


@operator("aten.max.dim")
async def max_dim(ctx: Context, x: Shared, dim: int, keepdim: bool = False) -> list[Shared]:
    """The largest entry and its index (the lowest among equals)."""
    joined, place = rows(x, dim)
    return [place(y, keepdim) for y in await argmax_along(ctx, joined, width(x))]


@operator("aten.min.dim")
async def min_dim(ctx: Context, x: Shared, dim: int, keepdim: bool = False) -> list[Shared]:
    """The smallest entry and its index (the lowest among equals)."""
    smallest, index = await max_dim(ctx, -x, dim, keepdim)
    return [-smallest, index]


@operator("aten.topk.default")
async def topk(
    ctx: Context, x: Shared, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> list[Shared]:
    """The k largest (or smallest) entries, in order, and their indices; the order among equals is unspecified."""
    last = x.map(lambda t: t.movedim(dim, -1))
    values, indices = await top_along(ctx, last if largest else -last, k, width(x))
    return [y.map(lambda t: t.movedim(-1, dim)) for y in (values if largest else -values, indices)]


@operator("aten.sort.default")
async def sort(ctx: Context, x: Shared, dim: int = -1, descending: bool = False) -> list[Shared]:
    """All entries in order, and their indices."""
    return await topk(ctx, x, x.shape[dim], dim, descending)
