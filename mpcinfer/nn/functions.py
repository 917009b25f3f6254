"""Exponentials, logarithms, roots, reciprocals, quotients and powers, element by element."""

from __future__ import annotations

from typing import Any

import torch

from mpcinfer.errors import UnsupportedError
from mpcinfer.nn.elementwise import Number, add_public, encode, product, scale, width
from mpcinfer.nn.registry import operator
from mpcinfer.nn.shape import common_shape
from mpcinfer.protocol import exponential, inverse, logarithm, root
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.multiply import multiply
from mpcinfer.protocol.select import sign_and_absolute
from mpcinfer.protocol.truncate import truncate
from mpcinfer.protocol.types import Public, Shared, Weight

# 1/x is carried with so many fraction bits until it has been multiplied
INVERSE_BITS = 28
# of log(x) on the way to a power
_LOG_BITS = 24


def encodable(frac_bits: int) -> int:
    """The exponent of the power of two that numbers of a model stay below (the codec's limit)."""
    return 62 - 2 * frac_bits


def highest_octave(frac_bits: int) -> int:
    """The exponent of the power of two up to which roots and logarithms are right: the codec's limit, at most 2^40."""
    return min(encodable(frac_bits), root.MAX_OCTAVES - frac_bits)


def compact(t: torch.Tensor) -> torch.Tensor:
    """The tensor with size 1 along axes that it was expanded along: what is worth computing."""
    index = tuple(
        slice(0, 1) if stride == 0 and size > 1 else slice(None)
        for size, stride in zip(t.shape, t.stride(), strict=True)
    )
    return t[index]


async def inverse_of(ctx: Context, x: Shared, frac_bits: int = INVERSE_BITS) -> Shared:
    """Shares of 1/x for x of either sign, with its own fraction bits, of the shape that `compact` leaves.

    1/x is right for abs(x) from 2^(2 - frac_bits) of x (at 16: 2^-14) up to 2^20, or what the encoding can hold if that
    is less; closer to zero it is that of the end, beyond it that of the other end. 1/0 counts as positive.
    """
    x = x.map(compact)
    high = min(20, encodable(x.frac_bits))
    low = max(2 - x.frac_bits, high - inverse.MAX_OCTAVES)
    negative, absolute = await sign_and_absolute(ctx, x, width(x))
    sign = add_public(ctx, negative.times(-2), 1)
    return await inverse.reciprocal(ctx, absolute, sign, low=low, high=high, frac_bits=frac_bits)


@operator("aten.reciprocal.default")
async def reciprocal(ctx: Context, x: Shared) -> Shared:
    """1/x; see `inverse_of` for what lies near zero and far from it."""
    y = await inverse_of(ctx, x, x.frac_bits)
    return y.map(lambda t: t.expand(x.shape))


@operator("aten.div.Tensor", "aten.div.Scalar")
async def div(ctx: Context, x: Any, y: Any) -> Any:
    """x / y. For a secret y see `inverse_of`; abs(x / y) must stay below 2^(34 - frac_bits)."""
    if isinstance(x, int | float) and isinstance(y, int | float):
        return x / y
    if isinstance(y, int | float) and y != 0:
        return await scale(ctx, x, 1 / y)
    if isinstance(y, Weight):
        y = Shared(y.share, y.frac_bits)
    if not isinstance(y, Shared):
        raise UnsupportedError("division by zero or by a public tensor")
    inverse_y = await inverse_of(ctx, y)
    if isinstance(x, Public):
        z = Shared(inverse_y.share * x.value.to(y.share.device), INVERSE_BITS + x.frac_bits)
    elif isinstance(x, Shared):
        z = await multiply(ctx, x, inverse_y)
    else:
        z = Shared(inverse_y.share * encode(x, y.frac_bits), INVERSE_BITS + y.frac_bits)
    shape = common_shape(y.shape, z.shape)
    return (await truncate(ctx, z, z.frac_bits - y.frac_bits)).map(lambda t: t.expand(shape))


@operator("aten.sqrt.default")
async def sqrt(ctx: Context, x: Shared) -> Shared:
    """sqrt(x), of negative numbers 0, of those beyond `highest_octave` that of its end."""
    return await root.sqrt(ctx, x, low=-x.frac_bits, high=highest_octave(x.frac_bits), frac_bits=x.frac_bits)


@operator("aten.rsqrt.default")
async def rsqrt(ctx: Context, x: Shared) -> Shared:
    """1/sqrt(x); for x <= 0 that of the smallest positive number, beyond `highest_octave` that of its end."""
    x, shape = x.map(compact), x.shape
    y = await root.rsqrt(ctx, x, low=-x.frac_bits, high=highest_octave(x.frac_bits), frac_bits=x.frac_bits)
    return y.map(lambda t: t.expand(shape))


@operator("aten.log.default")
async def log(ctx: Context, x: Shared) -> Shared:
    """log(x); for x <= 0 that of the smallest positive number, beyond `highest_octave` that of its end."""
    return await logarithm.log(ctx, x, low=-x.frac_bits, high=highest_octave(x.frac_bits), frac_bits=x.frac_bits)


@operator("aten.log1p.default")
async def log1p(ctx: Context, x: Shared) -> Shared:
    """log(1 + x)."""
    return await log(ctx, add_public(ctx, x, 1 << x.frac_bits))


@operator("aten.exp.default")
async def exp(ctx: Context, x: Shared) -> Shared:
    """e^x up to e^8, its ceiling."""
    return await exponential.exp(ctx, x)


@operator("aten.expm1.default")
async def expm1(ctx: Context, x: Shared) -> Shared:
    """e^x - 1."""
    return add_public(ctx, await exp(ctx, x), -1 << x.frac_bits)


@operator("aten.square.default", "aten.pow.Tensor_Scalar", "_operator.pow")
async def power(ctx: Context, x: Any, exponent: Number = 2) -> Any:
    """x^exponent for a public exponent.

    Integers by repeated squaring, halves with a square root; others as e^(exponent log(x)), for x > 0 and up to e^8.
    """
    if isinstance(x, int | float):
        return x**exponent
    if exponent < 0:
        if exponent == -0.5:
            return await rsqrt(ctx, x)
        return await reciprocal(ctx, await power(ctx, x, -exponent))
    if exponent == 0:
        return Shared(torch.full_like(x.share, (1 << x.frac_bits) if ctx.first else 0), x.frac_bits)
    whole, rest = divmod(exponent, 1)
    if rest not in (0, 0.5):
        y = await logarithm.log(ctx, x, low=-x.frac_bits, high=highest_octave(x.frac_bits), frac_bits=_LOG_BITS)
        y = await exponential.exp(ctx, await scale(ctx, y, exponent))
        return await truncate(ctx, y, _LOG_BITS - x.frac_bits)
    result = await sqrt(ctx, x) if rest else None
    base, left = x, int(whole)
    while left:
        if left & 1:
            result = base if result is None else await product(ctx, result, base)
        left >>= 1
        if left:
            base = await product(ctx, base, base)
    return result
