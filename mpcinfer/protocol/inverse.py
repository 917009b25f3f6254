"""1/x of positive numbers over many octaves."""

from __future__ import annotations

from collections.abc import Coroutine
from fractions import Fraction
from functools import cache
from typing import Any

from mpcinfer.protocol.context import Context, together
from mpcinfer.protocol.multiply import multiply
from mpcinfer.protocol.octaves import BOUND, CUT_BITS, DEGREE, VALUE_BITS, Table, near_one, normalise, spread, tail_of
from mpcinfer.protocol.truncate import truncate
from mpcinfer.protocol.truncated_product import product_of_truncated, truncated_product
from mpcinfer.protocol.types import Shared

# of a range: beyond it too few bits are left for 1/(1 - h), and the error grows (to 1e-3 at 44, 0.2 at 52)
MAX_OCTAVES = 37
# of `divided`: more fraction bits of y than the quotient has, of its product with the gain, and of what that is
# multiplied by; and the octaves from which on there is room for fewer of the first
_MORE_BITS, _PRODUCT_BITS, _FACTOR_BITS, _ROOMY_OCTAVES = 8, 6, 22, 15


def inverse_polynomial(degree: int, bound: Fraction) -> list[Fraction]:
    """The polynomial P that minimises max abs(1 - (1 - h) P(h)) for abs(h) <= bound, in closed form.

    The residual is T(h / bound) / T(1 / bound), T the Chebyshev polynomial of degree + 1: it is 1 at h = 1, so 1 minus
    it has the factor 1 - h.
    """
    before, t = [Fraction(1)], [Fraction(0), Fraction(1)]
    for _ in range(degree):
        doubled = [Fraction(0), *(2 * a for a in t)]
        before, t = t, [a - b for a, b in zip(doubled, [*before, *[Fraction(0)] * 2], strict=True)]
    at_one = sum((a / bound**j for j, a in enumerate(t)), Fraction(0))
    found, total = [], Fraction(1)
    for j, a in enumerate(t[:-1]):
        total -= a / bound**j / at_one
        found.append(total)
    return found


@cache
def _tail() -> tuple[int, ...]:
    return tail_of(inverse_polynomial(DEGREE, BOUND), Fraction(1))


@cache
def _gains(high: int) -> Table:
    """The gains themselves, which are multiples of the last one's last place."""
    return Table(lambda gain, bits: int(gain * Fraction(2) ** bits), high - 1 + CUT_BITS, Fraction(1))


async def reciprocal(
    ctx: Context, x: Shared, sign: Shared | None = None, /, *, low: int = -8, high: int = 20, frac_bits: int = 30
) -> Shared:
    """Shares of 1/x for 2^low <= x <= 2^high, with `frac_bits` fraction bits whatever x's scale; of sign / x, if given.

    Input: as `wide_reciprocal`; ValueError for frac_bits above 60 + low, too. Output: relative error below 4.5e-5
    (3.5e-5 over at most 34 octaves), plus one unit in the last place of the output.
    Rounds 6 for up to 4,096 elements, 11 for more; online 8 bytes per element and peer more than `wide_reciprocal`:
    132.6 (104.5) for the default range; openings and correlations as `wide_reciprocal` and `truncate`.
    """
    if frac_bits > 60 + low:
        raise ValueError(f"no reciprocals down to 2^{low} with {frac_bits} fraction bits")
    y = await wide_reciprocal(ctx, x, sign, low=low, high=high)
    return await truncate(ctx, y, y.frac_bits - frac_bits)


async def wide_reciprocal(ctx: Context, x: Shared, sign: Shared | None = None, /, *, low: int, high: int) -> Shared:
    """Shares of 1/x for 2^low <= x <= 2^high with 60 + low fraction bits: whoever multiplies by it truncates it first.

    Input: any x from -2^(62 - s) to 2^(62 - s) (in units of its last place), s = max(0, 9 - high - x.frac_bits), which
    is 0 for all but small ranges; below 2^low, zero and negative numbers included, the result is that of 2^low, above
    2^high that of 2^high. ValueError if x's last place is above 2^low, if high - low > 37, or if 64 bits don't hold
    what lies between: 2^(high + 7) at x's scale below 2^63. sign: 1 or -1, an integer, which the result is multiplied
    by.
    Output: relative error below 4.5e-5 (3.5e-5 over at most 34 octaves); below 2^62.
    How: `octaves`: a shared gain and h with 1/x = gain / (1 - h), abs(h) <= 11/64; 1/(1 - h) by a polynomial of degree
    4, the minimax one; times gain.
    Opened: those of `octaves.normalise`, then of `polynomial`, `multiply` if there is a sign, `truncated_product`.
    Rounds 2 more than `octaves.normalise`: 5 for up to 4,096 elements, 10 for more; online 24 bytes per element and
    peer more, and 16 for a sign; correlations those of the protocols named.
    Source: normalisation by the leading bit as in Catrina and Saxena 2010. DESIGN's cubic on a whole octave with a
    Newton step has half the thresholds and two more rounds: rows, not elements, need this function most.
    """
    # gain < 2^(high - low + 7) and 1/(1 - h) < 1.21 keep the product below 2^62, whose scale is then 2^(60 + low)
    bits = 61 - CUT_BITS - (high - low)
    if not -x.frac_bits <= low < high <= 62 - CUT_BITS - x.frac_bits or high - low > MAX_OCTAVES:
        raise ValueError(f"no reciprocals over 2^{low} to 2^{high} from {x.frac_bits} fraction bits")
    x = spread(x, high)
    h, (gain,) = await normalise(ctx, x, low, high, (_gains(high),))
    # 1/(1 - h) - 1 is at most 0.21: below 2^61 with 63 fraction bits, as is h
    polynomial = near_one(ctx, h, 0, 1, _tail())
    if sign is None:
        rest = await polynomial
    else:
        rest, gain = await together(polynomial, multiply(ctx, gain, sign))
    return Shared(gain.share << bits, gain.frac_bits + bits) + await truncated_product(
        ctx, rest, VALUE_BITS - bits, gain
    )


async def divided(
    ctx: Context, y: Coroutine[Any, Any, Shared], x: Shared, *, low: int, high: int, frac_bits: int
) -> Shared:
    """Shares of y / x with `frac_bits` fraction bits, with broadcasting; y is what a protocol yields, run here.

    Input: x as `wide_reciprocal`; y in [-2^62, 2^62) with more than frac_bits + 8 - low fraction bits, and abs(y / x) <
    2^(32 - frac_bits). ValueError for other scales or ranges. Output: relative error below 4.5e-5, plus 1.1 units in
    the last place; for ranges of more than 15 octaves 2^(high - low - 23) units more.
    How: y / x = (y gain) (1 + rest), where gain is known a round before rest: y is multiplied by it meanwhile. Each
    product truncates what it is of.
    Opened: those of `octaves.normalise`, of `truncated_product` and `polynomial`, `product_of_truncated`, `truncate`.
    Rounds 3 more than `octaves.normalise` (6 for up to 4,096 elements of x, 11 for more) if y takes no more than that;
    online 24 bytes per element of y and peer, and 24 of x beside those of `octaves.normalise` and of y; correlations
    those of the protocols named. Source: as `wide_reciprocal`.
    """
    if not -x.frac_bits <= low < high <= 62 - CUT_BITS - x.frac_bits or high - low > MAX_OCTAVES:
        y.close()
        raise ValueError(f"no quotients over 2^{low} to 2^{high} from {x.frac_bits} fraction bits")
    x = spread(x, high)
    (h, (gain,)), top = await together(normalise(ctx.scope("octaves"), x, low, high, (_gains(high),)), y)
    kept = frac_bits + _MORE_BITS - low - max(0, high - low - _ROOMY_OCTAVES)
    if top.frac_bits <= kept:
        raise ValueError(f"no quotients of numbers with {top.frac_bits} fraction bits")
    # 1/(1 - h) - 1 is at most 0.21: below 2^61 with 63 fraction bits, as is h; y gain, y / x but for that, below 2^61.3
    rest, near = await together(
        near_one(ctx.scope("rest"), h, 0, 1, _tail()),
        truncated_product(ctx.scope("near"), top, top.frac_bits - kept, gain),
    )
    e = near.frac_bits - frac_bits - _PRODUCT_BITS
    z = await product_of_truncated(ctx, rest, VALUE_BITS - _FACTOR_BITS, near, e, 1 << _FACTOR_BITS)
    return await truncate(ctx, z, z.frac_bits - frac_bits)
