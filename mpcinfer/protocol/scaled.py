"""A secret that is truncated, its square, and its product with another secret, by one opening of each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpcinfer.protocol.context import Context, together
from mpcinfer.protocol.correlation import Field, FixedMasks, Kind, Tensors, kind
from mpcinfer.protocol.polynomial import TruncatedPowers
from mpcinfer.protocol.truncate import logical_shift, offset, truncated_parts
from mpcinfer.protocol.types import Shared
from mpcinfer.ring.domain import Z64, Ring


@kind
@dataclass(frozen=True)
class TruncatedScaling(Kind):
    """`TruncatedPowers` of degree 2 for x, a mask b of the factor, and r >> d and msb(r) times b.

    factor: its shape, which broadcasts to x's and has no more axes.
    """

    x: tuple[int, ...]
    factor: tuple[int, ...]
    d: int

    def __post_init__(self) -> None:
        if np.broadcast_shapes(self.x, self.factor) != tuple(self.x):
            raise ValueError("a factor has the shape of what it scales, or broadcasts to it")

    def _powers(self) -> TruncatedPowers:
        return TruncatedPowers(self.x, self.d, 2)

    def free(self) -> dict[str, Field]:
        """r masks x, b masks the factor."""
        return self._powers().free() | {"b": Field(self.factor, Z64)}

    def derived(self) -> dict[str, Field]:
        """Those of `TruncatedPowers`; high_b = (r >> d) b; wrap_b = msb(r) b, of d bits."""
        return self._powers().derived() | {"high_b": Field(self.x, Z64), "wrap_b": Field(self.x, Ring(self.d))}

    def derive(self, free: Tensors, fixed: FixedMasks) -> Tensors:
        """See `derived`."""
        r, b = free["r"], free["b"]
        return self._powers().derive(free, fixed) | {
            "high_b": logical_shift(r, self.d) * b,
            "wrap_b": logical_shift(r, 63) * b,
        }

    def batched(self, count: int) -> Kind:
        """Both with one more axis."""
        factor = (count, *[1] * (len(self.x) - len(self.factor)), *self.factor)
        return TruncatedScaling((count, *self.x), factor, self.d)


async def squared_and_scaled(ctx: Context, x: Shared, d: int, factor: Shared) -> tuple[Shared, Shared, Shared]:
    """Shares of y = x / 2^d, of y^2, and of y times a factor that broadcasts to x's shape.

    Input: -2^62 <= x < 2^62, 0 < d < 62; any factor. y = floor(x / 2^d) or one more, as `truncate` has it, the same in
    all three; they are exact mod 2^64. y has d fraction bits less than x; scales add up.
    Opened: x + 2^62 + r and factor + b over Z_2^64, r and b uniform there; both in one message.
    Rounds 1; online 8 bytes per element of x and of the factor and peer; offline 24 + 3 d / 8 bytes per element of x;
    correlation `TruncatedScaling`. Source: `polynomial` and `truncated_product`, of one opening.
    """
    correlation = ctx.correlation(TruncatedScaling(x.shape, factor.shape, d))
    opened, other = await together(
        ctx.open(offset(ctx, x), correlation.mask("r")), ctx.open(factor, correlation.mask("b"))
    )
    public, wrapped = truncated_parts(opened.value, d)
    m, square = correlation["powers"] + wrapped * correlation["wrap"]
    m_b = correlation["high_b"] - wrapped * correlation["wrap_b"]
    f = other.value
    y, yy, yf = -m, square - 2 * public * m, m_b - public * correlation["b"] - m * f
    if ctx.first:
        y, yy, yf = y + public, yy + public * public, yf + public * f
    bits = x.frac_bits - d
    return Shared(y, bits), Shared(yy, 2 * bits), Shared(yf, bits + factor.frac_bits)
