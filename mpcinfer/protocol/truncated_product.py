"""Products of two secrets one of which is truncated first, both by one opening each."""

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
