"""sqrt(x) and 1/sqrt(x) of positive numbers over many octaves."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from math import isqrt

from mpcinfer.protocol.context import Context
from mpcinfer.protocol.multiply import multiply
from mpcinfer.protocol.octaves import CUT_BITS, VALUE_BITS, interpolated, near_one, normalise, octaves, spread, tail_of
from mpcinfer.protocol.truncate import truncate
from mpcinfer.protocol.types import Shared

# the least significant bits that a table's entry has: with these, neither it nor the polynomial's value, which has the
# bits that the entries leave, is wrong by more than 2^-17
_ENTRY_BITS = 18
# of a range: beyond it too few bits are left for the polynomial's value
MAX_OCTAVES = 48


@cache
def _tail(sign: int) -> tuple[int, ...]:
    """Of (1 - h)^(sign / 2)."""

    def power(h: Fraction) -> Fraction:
        root = Fraction(isqrt((h.denominator - h.numerator) * h.denominator << 160), h.denominator << 80)
        return root if sign > 0 else 1 / root

    return tail_of(interpolated(power), Fraction(-sign, 2))


async def rsqrt(
    ctx: Context, x: Shared, *, low: int = -8, high: int = 20, frac_bits: int = 28, over: int = 1
) -> Shared:
    """Shares of 1/sqrt(x / over) for 2^low <= x <= 2^high, with `frac_bits` fraction bits whatever x's scale.

    Input: any x from -2^(62 - s) to 2^(62 - s) (in units of its last place), s as in `reciprocal`; below 2^low, zero
    and negative numbers included, the result is that of 2^low, above 2^high that of 2^high. over: a public number > 0,
    so that the mean of a sum needs no division. ValueError for a range that 64 bits don't hold.
    Output: relative error below 2.5e-5 (1.5e-5 over fewer than 40 octaves), plus one unit in the last place.
    How: `octaves`; the table has the roots of the gains, the polynomial is (1 - h)^(-1/2).
    Opened: as in `reciprocal`. Rounds 8; online 48 + 4.375 T bytes per element and peer, T = 2 (high - low) + 1;
    correlations `Comparison`, `TruncatedPowers`, `Truncation`, `Triple`. Source: as `reciprocal`.
    """
    return await _root(ctx, x, -1, low, high, frac_bits, over)


async def sqrt(ctx: Context, x: Shared, *, low: int = -16, high: int = 20, frac_bits: int = 16) -> Shared:
    """Shares of sqrt(x) for 2^low <= x <= 2^high, with `frac_bits` fraction bits; 0 below 2^low.

    As `rsqrt` in everything else: where x has no bits below 2^low, the result is 0 for x <= 0 and right above.
    """
    return await _root(ctx, x, 1, low, high, frac_bits, 1)


async def _root(ctx: Context, x: Shared, sign: int, low: int, high: int, frac_bits: int, over: int) -> Shared:
    """(x / over)^(sign / 2)."""
    ends = sorted(sign * exponent for exponent in (low, high))
    shift = over.bit_length() - 1 if sign < 0 else 0
    # entries reach from 2^((ends[0] + shift) / 2) to 2^((ends[1] + shift + 1) / 2); times the polynomial below 2^61
    entry_bits = _ENTRY_BITS - (ends[0] + shift) // 2
    bits = 60 - entry_bits - (ends[1] + shift + 2) // 2
    fits = -x.frac_bits <= low < high <= 61 - CUT_BITS - x.frac_bits and high - low <= MAX_OCTAVES
    if not fits or frac_bits > entry_bits + bits:
        raise ValueError(f"no roots over 2^{low} to 2^{high} from {x.frac_bits} to {frac_bits} fraction bits")
    x = spread(x, high)
    pieces = octaves(x.frac_bits, low, high)
    table = [_entry(pieces.real(i), sign, over, entry_bits) for i in range(len(pieces.gains))]
    if sign > 0:
        table[0] = 0
    h, entry = await normalise(ctx, x, pieces, table)
    # (1 - h)^(+-1/2) - 1 is at most 0.1: below 2^60 with 63 fraction bits, as is h / 2
    value = await truncate(ctx, await near_one(ctx, h, 1, -sign, _tail(sign)), VALUE_BITS - bits)
    if ctx.first:
        value = Shared(value.share + (1 << bits), bits)
    y = await multiply(ctx, Shared(entry.share, entry_bits), value)
    return await truncate(ctx, y, y.frac_bits - frac_bits)


def _entry(gain: Fraction, sign: int, over: int, bits: int) -> int:
    """round(sqrt(gain over) 2^bits), or with sign > 0 round(2^bits / sqrt(gain)), as exact integers have it."""
    square = 1 / gain if sign > 0 else gain * over
    return (isqrt((square.numerator << (2 * bits + 2)) // square.denominator) + 1) >> 1
