"""sqrt(x) and 1/sqrt(x) of positive numbers over many octaves."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from math import isqrt

from mpcinfer.protocol.context import Context, together
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
from mpcinfer.protocol.truncated_product import product_of_truncated, truncated_product
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

    As `wide_rsqrt`, and then truncated: one unit in the last place more. ValueError if there are fewer fraction bits.
    Rounds 6 for up to 4,096 elements, 11 for more (12 where x loses bits first); online 8 bytes per element and peer
    more than that.
    """
    return await _narrowed(ctx, await wide_rsqrt(ctx, x, low=low, high=high, over=over), frac_bits)


async def sqrt(ctx: Context, x: Shared, *, low: int = -16, high: int = 20, frac_bits: int = 16, d: int = 0) -> Shared:
    """Shares of sqrt(x) for 2^low <= x <= 2^high, with `frac_bits` fraction bits; 0 below 2^low.

    As `rsqrt` in everything else, d as `over_root`: where x has no bits below 2^low, the result is 0 for x <= 0 and
    right above.
    """
    return await _narrowed(ctx, await _root(ctx, x, 1, low, high, 1, d), frac_bits)


async def wide_rsqrt(ctx: Context, x: Shared, *, low: int, high: int, over: int = 1) -> Shared:
    """Shares of 1/sqrt(x / over) for 2^low <= x <= 2^high: whoever multiplies by it truncates it first.

    Input: any x from -2^(62 - s) to 2^(62 - s) (in units of its last place), s as in `wide_reciprocal`; below 2^low,
    zero and negative numbers included, the result is that of 2^low, above 2^high that of 2^high. over: a public
    number > 0, so that the mean of a sum needs no division. ValueError for a range that 64 bits don't hold.
    Output: relative error below 2.5e-5 (1.5e-5 over fewer than 40 octaves); below 2^62, its fraction bits are what that
    leaves.
    How: `octaves`; the table has the roots of the gains, the polynomial is (1 - h)^(-1/2).
    Opened, costs, correlations and source: as `wide_reciprocal`.
    """
    return await _root(ctx, x, -1, low, high, over, 0)


async def over_root(
    ctx: Context, y: Shared, drop: int, x: Shared, *, low: int, high: int, over: int, d: int, kept: int, frac_bits: int
) -> Shared:
    """Shares of (y / 2^drop) / sqrt(x / over) with `frac_bits` fraction bits, with broadcasting: not yet truncated.

    Input: x, its range and over as `wide_rsqrt`; d: bits that x loses first, of up to 4,096 elements by the opening
    that it needs anyway; y in [-2^62, 2^62), any of it if drop is 0. The result must be below 2^(62 - frac_bits), and
    below 2^61 at y's scale less `drop` plus that of the table's entries, `entry_bits`, which frac_bits must reach but
    for one; kept is below that scale and frac_bits. ValueError if not.
    Output: relative error below 2.5e-5 + 2^(kept - frac_bits), plus 1.2 2^-kept.
    How: the entry is known a round before the polynomial's value: y is multiplied by it meanwhile. That keeps `kept`
    fraction bits, and the value the rest of frac_bits.
    Opened: those of `octaves.normalise`, of `truncated_product` and `polynomial`, `product_of_truncated`.
    Rounds 2 more than `octaves.normalise`: 5 for up to 4,096 elements of x, 10 for more (11 if d > 0); online 16
    bytes per element of y and peer, and 24 of x beside those of `octaves.normalise`; correlations those of the
    protocols named.
    Source: as `wide_reciprocal`.
    """
    h, entry = await _entries(ctx.scope("octaves"), x, -1, low, high, over, d)
    scale = y.frac_bits - drop + entry.frac_bits
    if not kept < min(scale, frac_bits) or frac_bits < scale - 1:
        raise ValueError(f"a quotient of {frac_bits} fraction bits cannot keep so many of {scale}")
    rest, near = await together(
        near_one(ctx.scope("rest"), h, 1, 1, _tail(-1)), truncated_product(ctx.scope("near"), y, drop, entry)
    )
    factor = frac_bits - kept
    return await product_of_truncated(ctx, rest, VALUE_BITS - factor, near, scale - kept, 1 << factor)


async def _root(ctx: Context, x: Shared, sign: int, low: int, high: int, over: int, d: int) -> Shared:
    """(x / over)^(sign / 2)."""
    h, entry = await _entries(ctx, x, sign, low, high, over, d)
    ends, shift = _ends(sign, low, high, over)
    bits = 60 - entry.frac_bits - (ends[1] + shift + 2) // 2
    # (1 - h)^(+-1/2) - 1 is at most 0.1: below 2^60 with 63 fraction bits, as is h / 2
    rest = await near_one(ctx, h, 1, -sign, _tail(sign))
    return entry.rescaled(entry.frac_bits + bits) + await truncated_product(ctx, rest, VALUE_BITS - bits, entry)


def _ends(sign: int, low: int, high: int, over: int) -> tuple[list[int], int]:
    """Twice the exponents of the smallest and the largest result but for `over`, and what that adds to either."""
    return sorted(sign * exponent for exponent in (low, high)), over.bit_length() - 1 if sign < 0 else 0


def entry_bits(sign: int, low: int, high: int, over: int) -> int:
    """The fraction bits of a table's entries.

    They reach from 2^((ends[0] + shift) / 2) to 2^((ends[1] + shift + 1) / 2); times the polynomial below 2^61.
    """
    ends, shift = _ends(sign, low, high, over)
    return _ENTRY_BITS - (ends[0] + shift) // 2


async def _entries(ctx: Context, x: Shared, sign: int, low: int, high: int, over: int, d: int) -> tuple[Shared, Shared]:
    """h, and the table's entry for x's piece."""
    scale = x.frac_bits - d
    if not -scale <= low < high <= 61 - CUT_BITS - scale or high - low > MAX_OCTAVES:
        raise ValueError(f"no roots over 2^{low} to 2^{high} from {scale} fraction bits")
    bits = entry_bits(sign, low, high, over)
    wider = spread(Shared(x.share, scale), high)
    # what a truncation is to leave with more bits is truncated by fewer, or not at all
    more = wider.frac_bits - scale
    x, d = Shared(x.share << max(0, more - d), 0), max(0, d - more)
    h, (entry,) = await normalise(ctx, Shared(x.share, wider.frac_bits + d), low, high, (_table(sign, over, bits),), d)
    return h, entry


async def _narrowed(ctx: Context, y: Shared, frac_bits: int) -> Shared:
    if frac_bits > y.frac_bits:
        raise ValueError(f"roots over this range have {y.frac_bits} fraction bits, not {frac_bits}")
    return await truncate(ctx, y, y.frac_bits - frac_bits)


@cache
def _table(sign: int, over: int, bits: int) -> Table:
    """Of a root 0 for what is below all octaves, which reaches down to 0."""
    return Table(lambda gain, bits: _entry(gain, sign, over, bits), bits, Fraction(-sign, 2), empty=sign > 0)


def _entry(gain: Fraction, sign: int, over: int, bits: int) -> int:
    """round(sqrt(gain over) 2^bits), or with sign > 0 round(2^bits / sqrt(gain)), as exact integers have it."""
    square = 1 / gain if sign > 0 else gain * over
    return (isqrt((square.numerator << (2 * bits + 2)) // square.denominator) + 1) >> 1
