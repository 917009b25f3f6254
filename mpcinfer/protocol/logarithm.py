"""log(x) of positive numbers over many octaves."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from fractions import Fraction
from functools import cache

from mpcinfer.protocol.context import Context
from mpcinfer.protocol.octaves import (
    CUT_BITS,
    VALUE_BITS,
    Octaves,
    interpolated,
    near_one,
    normalise,
    octaves,
    spread,
    tail_of,
)
from mpcinfer.protocol.truncate import truncate
from mpcinfer.protocol.types import Shared


def _exact(x: Fraction) -> Fraction:
    """log(x) to 40 digits, the same on every host."""
    with localcontext(prec=50, rounding=ROUND_HALF_EVEN):
        return Fraction(Decimal(x.numerator).ln() - Decimal(x.denominator).ln())


@cache
def _tail() -> tuple[int, ...]:
    """Of log(1 - h)."""
    return tail_of(interpolated(lambda h: _exact(1 - h)), Fraction(-1))


@cache
def _table(pieces: Octaves, bits: int) -> tuple[int, ...]:
    return tuple(round(-_exact(pieces.real(i)) * (1 << bits)) for i in range(len(pieces.gains)))


async def log(ctx: Context, x: Shared, *, low: int = -16, high: int = 20, frac_bits: int = 16) -> Shared:
    """Shares of log(x) for 2^low <= x <= 2^high, with `frac_bits` fraction bits whatever x's scale.

    Input: as for `rsqrt`; below 2^low, zero and negative numbers included, the result is log(2^low), above 2^high
    log(2^high). ValueError for a range that 64 bits don't hold.
    Output: absolute error below 1.5e-5, plus 1.5 units in the last place.
    How: `octaves`; the table has -log(gain), the polynomial is log(1 - h); their sum is the result.
    Opened: those of `octaves.normalise`, of `polynomial` and `truncate`.
    Rounds 5 for up to 4,096 elements, 6 for more; online 24 + 1.625 T (24 + 4.375 T) bytes per element and peer,
    T = 2 (high - low) + 1; correlations `TruncatedComparison`, `TruncatedPowers`, `Truncation`. Source: as
    `reciprocal`.
    """
    if not -x.frac_bits <= low < high <= 62 - CUT_BITS - x.frac_bits or not 2 <= frac_bits <= 48:
        raise ValueError(f"no logarithms over 2^{low} to 2^{high} from {x.frac_bits} to {frac_bits} fraction bits")
    x = spread(x, high)
    pieces = octaves(x.frac_bits, low, high)
    h, entry = await normalise(ctx, x, pieces, _table(pieces, frac_bits))
    near = await truncate(ctx, await near_one(ctx, h, 0, -1, _tail()), VALUE_BITS - frac_bits)
    return Shared(entry.share, frac_bits) + near
