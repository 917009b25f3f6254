"""Sums and products, element by element, with broadcasting, of secrets and public numbers."""

from __future__ import annotations

import math
from typing import Any

import torch

from mpcinfer.errors import UnsupportedError
from mpcinfer.nn.registry import operator
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.linear import fixed_product
from mpcinfer.protocol.multiply import multiply, square
from mpcinfer.protocol.truncate import truncate
from mpcinfer.protocol.types import Public, Shared, Weight
from mpcinfer.ring.kernels import MUL

Number = bool | int | float


def encode(value: Number, frac_bits: int) -> int:
    """The integer nearest to value * 2^frac_bits; refuses what is not finite or does not fit."""
    if not math.isfinite(value):
        raise UnsupportedError("a constant is not a finite number")
    encoded = round(value * (1 << frac_bits))
    if abs(encoded) >= 1 << 61:
        raise UnsupportedError("a constant is too large for the fixed-point range")
    return encoded


def add_public(ctx: Context, x: Shared, constant: int | torch.Tensor) -> Shared:
    """x + constant, a public integer (tensor) at x's scale: one party adds it."""
    share = x.share + constant if ctx.first else x.share + torch.zeros_like(torch.as_tensor(constant))
    return Shared(share, x.frac_bits)


def factor_bits(frac_bits: int) -> int:
    """Fraction bits of a public factor: more than the secret has, so that small factors keep their precision, but
    products below 2^14 must stay below 2^62 with the secret's and the factor's fraction bits."""
    return min(frac_bits + 8, 48 - frac_bits)


async def scale(ctx: Context, x: Shared, factor: Number) -> Shared:
    """x times a public number; integers cost nothing, others one truncation."""
    if float(factor).is_integer() and abs(factor) < 1 << 20:
        return x.times(int(factor))
    bits = factor_bits(x.frac_bits)
    return await truncate(ctx, Shared(x.share * encode(factor, bits), x.frac_bits + bits), bits)


async def product(ctx: Context, x: Any, y: Any) -> Any:
    """x * y for any mixture of secret, weight and public operands."""
    if isinstance(y, Shared | Weight) and not isinstance(x, Shared):
        x, y = y, x
    if not isinstance(x, Shared):
        raise UnsupportedError("a product of two constants or weights should be computed before deploying")
    if isinstance(y, Weight):
        z = await fixed_product(ctx, x, y, MUL)
    elif isinstance(y, Shared):
        z = await (square(ctx, x) if y is x else multiply(ctx, x, y))
    elif isinstance(y, Public):
        z = Shared(x.share * y.value, x.frac_bits + y.frac_bits)
    else:
        return await scale(ctx, x, y)
    return await truncate(ctx, z, z.frac_bits - x.frac_bits)


async def total(ctx: Context, x: Any, y: Any, factor: Number) -> Any:
    """x + factor * y for any mixture of secret and public operands."""
    if isinstance(x, int | float) and isinstance(y, int | float):
        return x + factor * y
    if isinstance(y, Shared):
        y = y if factor == 1 else -y if factor == -1 else await scale(ctx, y, factor)
        if isinstance(x, Shared):
            return x + y
        x, y = y, x
        factor = 1
    if not isinstance(x, Shared):
        raise UnsupportedError("a sum of constants should be computed before deploying")
    if isinstance(y, Public):
        if not float(factor).is_integer():
            raise UnsupportedError("a public tensor times a fractional alpha")
        return add_public(ctx, x, (y.value << (x.frac_bits - y.frac_bits)) * int(factor))
    return add_public(ctx, x, encode(y * factor, x.frac_bits))


@operator("aten.add.Tensor", "aten.add.Scalar", "_operator.add")
async def add(ctx: Context, x: Any, y: Any, alpha: Number = 1) -> Any:
    """x + alpha y."""
    return await total(ctx, x, y, alpha)


@operator("aten.sub.Tensor", "aten.sub.Scalar", "_operator.sub")
async def sub(ctx: Context, x: Any, y: Any, alpha: Number = 1) -> Any:
    """x - alpha y."""
    return await total(ctx, x, y, -alpha)


@operator("aten.rsub.Scalar", "aten.rsub.Tensor")
async def rsub(ctx: Context, x: Any, y: Any, alpha: Number = 1) -> Any:
    """y - alpha x."""
    return await total(ctx, y, x, -alpha)


@operator("aten.neg.default", "_operator.neg")
async def neg(ctx: Context, x: Any) -> Any:
    """-x."""
    return -x


@operator("aten.mul.Tensor", "aten.mul.Scalar", "_operator.mul")
async def mul(ctx: Context, x: Any, y: Any) -> Any:
    """x * y."""
    if isinstance(x, int | float) and isinstance(y, int | float):
        return x * y
    return await product(ctx, x, y)


@operator("aten.div.Tensor", "aten.div.Scalar")
async def div(ctx: Context, x: Any, y: Any) -> Any:
    """x / y for a public number y."""
    if isinstance(x, Shared) and isinstance(y, int | float) and y != 0:
        return await scale(ctx, x, 1 / y)
    raise UnsupportedError("division is supported by a public non-zero number only")


@operator("aten.square.default", "aten.pow.Tensor_Scalar")
async def squared(ctx: Context, x: Shared, exponent: Number = 2) -> Shared:
    """x * x."""
    if exponent != 2:
        raise UnsupportedError("powers are supported for exponent 2 only")
    z: Shared = await product(ctx, x, x)
    return z


@operator("_operator.floordiv")
async def floordiv(ctx: Context, x: int, y: int) -> int:
    """Sizes only."""
    return x // y


@operator("aten.sum.dim_IntList", "aten.sum.default")
async def sum_along(ctx: Context, x: Shared, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Shared:
    """The sum over `dim` (all axes if None or empty): local."""
    axes = list(range(len(x.shape))) if dim is None or dim == [] else dim
    return x.map(lambda t: t.sum(axes, keepdim=keepdim))


@operator("aten.mean.dim", "aten.mean.default")
async def mean(ctx: Context, x: Shared, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Shared:
    """The mean over `dim`: one truncation."""
    total_ = await sum_along(ctx, x, dim, keepdim)
    count = math.prod(x.shape) // max(1, math.prod(total_.shape))
    return await scale(ctx, total_, 1 / count)
