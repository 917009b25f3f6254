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

# of a public factor that is no integer
FACTOR_BITS = 24


def width(x: Shared) -> int:
    """How wide comparisons of a model's numbers must be: they and differences of two of them are below 2^(width - 1).

    Bounds hold every value of a program below the codec's limit, 2^(62 - frac_bits) in units of its last place.
    """
    return 48 if x.frac_bits >= 16 else 64


def reachable(x: Shared, value: Number) -> Number:
    """The public number nearest to value that a model's x can be compared with: no x lies beyond it."""
    end = 2.0 ** (min(width(x) - 2, 60) - x.frac_bits)
    return max(-end, min(end, value))


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
    constant = torch.as_tensor(constant).to(x.share.device)
    return Shared(x.share + (constant if ctx.first else torch.zeros_like(constant)), x.frac_bits)


def fraction(factor: Number) -> tuple[int, int]:
    """n and d, the smallest with n / 2^d = factor, rounded to 24 significant bits as float32 does; integers are exact.

    Below 2^-37, where d would exceed 61, fewer bits are significant.
    """
    if not math.isfinite(factor):
        raise UnsupportedError("a constant is not a finite number")
    if float(factor).is_integer():
        return int(factor), 0
    d = max(0, min(FACTOR_BITS - math.frexp(factor)[1], 61))
    n = round(math.ldexp(factor, d))
    spare = min(d, (n & -n).bit_length() - 1) if n else d
    return n >> spare, d - spare


async def scale(ctx: Context, x: Shared, factor: Number) -> Shared:
    """x times a public number: an integer exactly and at no cost, another with one truncation.

    Input: abs(x n) < 2^(62 - frac_bits) for the n of `fraction`, at most 2^24 where the factor is no integer, so that
    abs(x) < 2^(38 - frac_bits) will do. Output: error below 1 ULP plus a relative 2^-24.
    """
    n, d = fraction(factor)
    if abs(n) >= 1 << (62 - x.frac_bits):
        raise UnsupportedError("a constant is too large for the fixed-point range")
    return await truncate(ctx, Shared(x.share * n, x.frac_bits + d), d)


def coarse_bits(frac_bits: int, largest: int) -> int:
    """The bits that `divide` drops from sums of so many numbers before it multiplies."""
    return max(0, (largest - 1).bit_length() - (24 - frac_bits))


async def divide(ctx: Context, x: Shared, counts: int | torch.Tensor) -> Shared:
    """x / counts, the means of sums x, for public counts (a number or a tensor that broadcasts).

    Input: abs(x) < 2^(62 - frac_bits), and abs(x / counts) < 2^14 unless counts is a power of two. Output: error below
    1 ULP for powers of two; for others below 1 ULP plus a relative 2^-25, plus, where the largest count c is above
    2^(24 - frac_bits), 2^(frac_bits - 23) c / counts ULP.
    One truncation; none for 1; a second one, of the sum, before a multiplication that would leave no room for it.
    """
    if isinstance(counts, int) and counts & (counts - 1) == 0:
        y = await truncate(ctx, x, counts.bit_length() - 1)
        return Shared(y.share, x.frac_bits)
    exact = torch.as_tensor(counts, dtype=torch.int64)
    coarse, bits = coarse_bits(x.frac_bits, int(exact.max())), 48 - x.frac_bits
    reciprocal = ((1 << (coarse + bits)) + exact // 2) // exact  # integers only: the same at every party
    sums = await truncate(ctx, x, coarse)
    y = await truncate(ctx, Shared(sums.share * reciprocal.to(x.share.device), x.frac_bits + bits), bits)
    return Shared(y.share, x.frac_bits)


async def product(ctx: Context, x: Any, y: Any, *, wide: bool = False) -> Any:
    """x * y for any mixture of secret, weight and public operands, at x's scale unless `wide`."""
    if isinstance(y, Shared | Weight) and not isinstance(x, Shared):
        x, y = y, x
    if not isinstance(x, Shared):
        raise UnsupportedError("a product of two constants or weights should be computed before deploying")
    if isinstance(y, Weight):
        z = await fixed_product(ctx, x, y, MUL)
    elif isinstance(y, Shared):
        z = await (square(ctx, x) if y is x else multiply(ctx, x, y))
    elif isinstance(y, Public):
        z = Shared(x.share * y.value.to(x.share.device), x.frac_bits + y.frac_bits)
    else:
        return await scale(ctx, x, y)
    return z if wide else await truncate(ctx, z, z.frac_bits - x.frac_bits)


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
        return add_public(ctx, x, (y.value.to(torch.int64) << (x.frac_bits - y.frac_bits)) * int(factor))
    return add_public(ctx, x, encode(y * factor, x.frac_bits))


@operator("aten.add.Tensor", "aten.add.Scalar", "_operator.add")
async def add(ctx: Context, x: Any, y: Any, alpha: Number = 1, *, frac_bits: int | None = None) -> Any:
    """x + alpha y. frac_bits: what the sum is to have, if it has more (see `graph.postpone`)."""
    z = await total(ctx, x, y, alpha)
    return z if frac_bits is None else await truncate(ctx, z, z.frac_bits - frac_bits)


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
async def mul(ctx: Context, x: Any, y: Any, *, wide: bool = False) -> Any:
    """x * y. wide: it keeps the fraction bits of both (see `graph.postpone`)."""
    if isinstance(x, int | float) and isinstance(y, int | float):
        return x * y
    return await product(ctx, x, y, wide=wide)


@operator("mpc.narrow")
async def narrow(ctx: Context, x: Shared, frac_bits: int) -> Shared:
    """x with so many fraction bits, of which it has more."""
    return await truncate(ctx, x, x.frac_bits - frac_bits)


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
    """The mean over `dim`; see `divide`."""
    total_ = await sum_along(ctx, x, dim, keepdim)
    count = math.prod(x.shape) // max(1, math.prod(total_.shape))
    return await divide(ctx, total_, count)
