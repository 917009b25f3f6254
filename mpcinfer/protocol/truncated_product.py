"""Products of two secrets one or both of which are truncated first, both by one opening each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpcinfer.protocol.context import Context, together
from mpcinfer.protocol.correlation import Field, FixedMasks, Kind, Tensors, kind
from mpcinfer.protocol.multiply import multiply
from mpcinfer.protocol.truncate import OFFSET_BITS, logical_shift, offset, truncated_parts
from mpcinfer.protocol.types import Shared
from mpcinfer.ring.domain import Z64, Ring


@kind
@dataclass(frozen=True)
class TruncatedProduct(Kind):
    """A `Truncation` of x by d bits, a mask b of y, and (r >> d) b and msb(r) b."""

    x: tuple[int, ...]
    y: tuple[int, ...]
    d: int

    def free(self) -> dict[str, Field]:
        """r masks x, b masks y."""
        return {"r": Field(self.x, Z64), "b": Field(self.y, Z64)}

    def derived(self) -> dict[str, Field]:
        """high = r >> d; wrap = msb(r); both times b. What is multiplied by 2^(64 - d) has d bits."""
        both = np.broadcast_shapes(self.x, self.y)
        return {
            "high": Field(self.x, Z64),
            "wrap": Field(self.x, Ring(self.d)),
            "high_b": Field(both, Z64),
            "wrap_b": Field(both, Ring(self.d)),
        }

    def derive(self, free: Tensors, fixed: FixedMasks) -> Tensors:
        """See `derived`."""
        high, wrap = logical_shift(free["r"], self.d), logical_shift(free["r"], 63)
        return {"high": high, "wrap": wrap, "high_b": high * free["b"], "wrap_b": wrap * free["b"]}

    def batched(self, count: int) -> Kind:
        """Both with one more axis, which broadcasts."""
        rank = max(len(self.x), len(self.y))
        x, y = ((count, *[1] * (rank - len(shape)), *shape) for shape in (self.x, self.y))
        return TruncatedProduct(x, y, self.d)


async def truncated_product(ctx: Context, x: Shared, d: int, y: Shared) -> Shared:
    """Shares of (x / 2^d) y, element by element, with broadcasting.

    Input: -2^62 <= x < 2^62, 0 <= d < 62; any y. x / 2^d is floor(x / 2^d) or one more, as `truncate` has it; its
    product with y is exact mod 2^64. The scale is x's less d bits, plus y's.
    Opened: x + 2^62 + r and y + b over Z_2^64, r and b uniform there; both in one message.
    How: x / 2^d is a public number minus m, m = r >> d or that minus 2^(64 - d) msb(r), as the opened number's top bit
    says; the products of both with b are dealt, of the second d bits, as it is multiplied by 2^(64 - d).
    Rounds 1; online 8 bytes per element of x and of y and peer; offline 8 + d / 8 bytes per element of x and of the
    result; correlation `TruncatedProduct` (`Triple` for d = 0).
    Source: Beaver 1991 on a value whose truncation, with the wrap taken from the top bits as in EGK+20, costs no
    opening of its own; this is our own.
    """
    if d == 0:
        return await multiply(ctx, x, y)
    if not 0 < d < OFFSET_BITS:
        raise ValueError(f"cannot truncate by {d} bits")
    correlation = ctx.correlation(TruncatedProduct(x.shape, y.shape, d))
    opened, other = await together(ctx.open(offset(ctx, x), correlation.mask("r")), ctx.open(y, correlation.mask("b")))
    f = other.value
    public, wrapped = truncated_parts(opened.value, d)
    m = correlation["high"] - wrapped * correlation["wrap"]
    m_b = correlation["high_b"] - wrapped * correlation["wrap_b"]
    # (public - m) (f - b)
    z = m_b - public * correlation["b"] - m * f
    if ctx.first:
        z = z + public * f
    return Shared(z, x.frac_bits - d + y.frac_bits)


@kind
@dataclass(frozen=True)
class ProductOfTruncated(Kind):
    """A `Truncation` of x by d bits and one of y by e, and the products of both's dealt numbers that matter."""

    x: tuple[int, ...]
    y: tuple[int, ...]
    d: int
    e: int

    def __post_init__(self) -> None:
        if self.d + self.e > Z64.bits:
            raise ValueError("the product of both top bits would matter, too")

    def free(self) -> dict[str, Field]:
        """r masks x, b masks y."""
        return {"r": Field(self.x, Z64), "b": Field(self.y, Z64)}

    def derived(self) -> dict[str, Field]:
        """r >> d, b >> e, msb(r), msb(b); the product of the first two, and of either with the other's top bit."""
        both, of_x, of_y = np.broadcast_shapes(self.x, self.y), Ring(self.d), Ring(self.e)
        return {
            "high": Field(self.x, Z64),
            "wrap": Field(self.x, of_x),
            "high_y": Field(self.y, Z64),
            "wrap_y": Field(self.y, of_y),
            "high_high": Field(both, Z64),
            "wrap_high": Field(both, of_x),
            "high_wrap": Field(both, of_y),
        }

    def derive(self, free: Tensors, fixed: FixedMasks) -> Tensors:
        """See `derived`."""
        high, wrap = logical_shift(free["r"], self.d), logical_shift(free["r"], 63)
        high_y, wrap_y = logical_shift(free["b"], self.e), logical_shift(free["b"], 63)
        return {
            "high": high,
            "wrap": wrap,
            "high_y": high_y,
            "wrap_y": wrap_y,
            "high_high": high * high_y,
            "wrap_high": wrap * high_y,
            "high_wrap": high * wrap_y,
        }

    def batched(self, count: int) -> Kind:
        """As `TruncatedProduct`'s."""
        rank = max(len(self.x), len(self.y))
        x, y = ((count, *[1] * (rank - len(shape)), *shape) for shape in (self.x, self.y))
        return ProductOfTruncated(x, y, self.d, self.e)


async def product_of_truncated(ctx: Context, x: Shared, d: int, y: Shared, e: int, plus: int = 0) -> Shared:
    """Shares of (x / 2^d + plus) (y / 2^e), element by element, with broadcasting; plus is a public integer.

    Input: both in [-2^62, 2^62), 0 < d, e < 62, d + e <= 64. Both are their floor or one more, as `truncate` has it;
    the product of these is exact mod 2^64, and has the fraction bits that are left of both.
    Opened: x + 2^62 + r and y + 2^62 + b over Z_2^64, r and b uniform there; both in one message.
    How: as `truncated_product`, of two public numbers minus m and n. Of m n, the product of both top bits is multiplied
    by 2^(128 - d - e), which is 0.
    Rounds 1; online 8 bytes per element of x and of y and peer; offline 8 + d / 8 bytes per element of x, 8 + e / 8 of
    y, 8 + (d + e) / 8 of the result; correlation `ProductOfTruncated`. Source: as `truncated_product`.
    """
    if not (0 < d < OFFSET_BITS and 0 < e < OFFSET_BITS):
        raise ValueError(f"cannot truncate by {d} and {e} bits")
    correlation = ctx.correlation(ProductOfTruncated(x.shape, y.shape, d, e))
    opened, other = await together(
        ctx.open(offset(ctx, x), correlation.mask("r")), ctx.open(offset(ctx, y), correlation.mask("b"))
    )
    (p, p_wrap), (q, q_wrap) = truncated_parts(opened.value, d), truncated_parts(other.value, e)
    p = p + plus
    m = correlation["high"] - p_wrap * correlation["wrap"]
    n = correlation["high_y"] - q_wrap * correlation["wrap_y"]
    m_n = correlation["high_high"] - p_wrap * correlation["wrap_high"] - q_wrap * correlation["high_wrap"]
    # (p - m) (q - n)
    z = m_n - p * n - m * q
    if ctx.first:
        z = z + p * q
    return Shared(z, x.frac_bits - d + y.frac_bits - e)
