"""log(x) of positive numbers over many octaves."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from fractions import Fraction
from functools import cache

from mpcinfer.protocol.context import Context
from mpcinfer.protocol.octaves import (
    CUT_BITS,
    VALUE_BITS,
    Table,
    interpolated,
    near_one,
    normalise,
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
def _tables(bits: int) -> tuple[Table, Table]:
    """-log(gain), and at scale VALUE_BITS what rounding it has left over."""

    def rounded(gain: Fraction, bits: int) -> int:
        return round(-_exact(gain) * (1 << bits))

    def left(gain: Fraction, more: int) -> int:
        return rounded(gain, more) - (rounded(gain, bits) << (more - bits))

    return Table(rounded, bits, None), Table(left, VALUE_BITS, None)


async def log(ctx: Context, x: Shared, *, low: int = -16, high: int = 20, frac_bits: int = 16) -> Shared:
    """Shares of log(x) for 2^low <= x <= 2^high, with `frac_bits` fraction bits whatever x's scale.

    Input: as for `rsqrt`; below 2^low, zero and negative numbers included, the result is log(2^low), above 2^high
    log(2^high). ValueError for a range that 64 bits don't hold.
    Output: absolute error below 1.5e-5, plus one unit in the last place.
    How: `octaves`; the table has -log(gain), the polynomial is log(1 - h); their sum is the result. What rounding the
    table's entries has left over is added to the polynomial's value, which is truncated: in all below 2^62.
    Opened: those of `octaves.normalise`, of `polynomial` and `truncate`.
    Rounds 2 more than `octaves.normalise`: 5 for up to 4,096 elements, 10 for more; online 16 bytes per element and
    peer more; correlations those of the protocols named. Source: as `reciprocal`.
    """
    if not -x.frac_bits <= low < high <= 62 - CUT_BITS - x.frac_bits or not 2 <= frac_bits <= 48:
        raise ValueError(f"no logarithms over 2^{low} to 2^{high} from {x.frac_bits} to {frac_bits} fraction bits")
    x = spread(x, high)
    h, (entry, left) = await normalise(ctx, x, low, high, _tables(frac_bits))
    near = left + await near_one(ctx, h, 0, -1, _tail())
    return entry + await truncate(ctx, near, VALUE_BITS - frac_bits)
