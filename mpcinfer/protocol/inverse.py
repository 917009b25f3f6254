"""1/x of positive numbers over many octaves: find the piece of the range x is in, then one polynomial serves all."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import isqrt

import torch

from mpcinfer.protocol.compare import Comparison, below
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.multiply import multiply
from mpcinfer.protocol.polynomial import polynomial
from mpcinfer.protocol.truncate import truncate
from mpcinfer.protocol.types import Shared

# an octave [1, 2) is cut at sqrt(2); cut and centres' inverses are multiples of 2^-7
_CUT_BITS = 7
_CUTS = (1 << _CUT_BITS, isqrt(2 << (2 * _CUT_BITS)), 2 << _CUT_BITS)
_CENTRES = tuple(round(Fraction(2 << (2 * _CUT_BITS), a + b)) for a, b in zip(_CUTS, _CUTS[1:], strict=False))
# 1/(1 - h) = 1 + h + tail(h): h enters the tail with _ARGUMENT_BITS, the sum has _VALUE_BITS fraction bits
_DEGREE = 4
_ARGUMENT_BITS = 14
_VALUE_BITS = 63
# of a range: beyond it too few bits are left for 1/(1 - h), and the error grows (to 1e-3 at 44, 0.2 at 52)
_MAX_OCTAVES = 37


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
    """The integer coefficients of tail(h) = P(h) - 1 - h."""
    bound = max(
        abs(1 - Fraction(centre * edge, 1 << (2 * _CUT_BITS)))
        for i, centre in enumerate(_CENTRES)
        for edge in _CUTS[i : i + 2]
    )
    exact = inverse_polynomial(_DEGREE, bound)
    exact[0] -= 1
    exact[1] -= 1
    return tuple(round(a * (1 << (_VALUE_BITS - j * _ARGUMENT_BITS))) for j, a in enumerate(exact))


@dataclass(frozen=True)
class _Pieces:
    """T thresholds cut the numbers into T + 1 pieces; on each h = slope x + offset, and the normaliser is gain."""

    thresholds: tuple[int, ...]
    slopes: tuple[int, ...]
    offsets: tuple[int, ...]
    gains: tuple[int, ...]
    frac_bits: int  # of h
    gain_bits: int  # 1/x = gain 2^-gain_bits / (1 - h)


@cache
def _pieces(frac_bits: int, low: int, high: int) -> _Pieces:
    """Half octaves from 2^low to 2^high, and a constant piece at either end."""
    one = 1 << (frac_bits + high - 1 + _CUT_BITS)
    thresholds, slopes, offsets, gains = [], [], [], []
    for octave in range(low, high):
        for cut, centre in zip(_CUTS, _CENTRES, strict=False):
            at = cut << (frac_bits + octave)
            thresholds.append(-(-at >> _CUT_BITS))
            gains.append(centre << (high - 1 - octave))
            slopes.append(-gains[-1])
            offsets.append(one)
    first, last = one - (gains[0] << (frac_bits + low)), one - (gains[-1] << (frac_bits + high))
    return _Pieces(
        (*thresholds, 1 << (frac_bits + high)),
        (0, *slopes, 0),
        (first, *offsets, last),
        (gains[0], *gains, gains[-1]),
        frac_bits + high - 1 + _CUT_BITS,
        high - 1 + _CUT_BITS,
    )


def _steps(values: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Going down from a piece to the one before it: [T, 1, ...], to be multiplied with [x < t] and summed."""
    steps = torch.tensor([a - b for a, b in zip(values, values[1:], strict=False)], dtype=torch.int64)
    return steps.reshape(-1, *([1] * (like.dim() - 1))).to(like.device)


async def _normalise(ctx: Context, x: Shared, pieces: _Pieces) -> tuple[Shared, Shared]:
    """Shares of h and of the gain; exact. Rounds 4; correlation `Comparison` with products."""
    correlation = ctx.correlation(Comparison(x.shape, 64, len(pieces.thresholds), products=True))
    c = await ctx.open(x, correlation.mask("r"))
    bits = await below(ctx, c, pieces.thresholds, correlation, 64)
    flip = (await ctx.open(bits, correlation.mask("beta"))).value.to(torch.int64)
    # b = flip xor beta as a number, and b x = b (c - r)
    bit, sign = correlation["bit"], 1 - 2 * flip
    whole = (c.value if ctx.first else 0) - correlation["r"]
    number = sign * bit + flip if ctx.first else sign * bit
    product = sign * (bit * c.value - correlation["bit_r"]) + flip * whole
    h = (_steps(pieces.slopes, bit) * product + _steps(pieces.offsets, bit) * number).sum(0)
    gain = (_steps(pieces.gains, bit) * number).sum(0)
    if ctx.first:
        h, gain = h + pieces.offsets[-1], gain + pieces.gains[-1]
    return Shared(h, pieces.frac_bits), Shared(gain, pieces.gain_bits)


async def reciprocal(ctx: Context, x: Shared, *, low: int = -8, high: int = 20, frac_bits: int = 30) -> Shared:
    """Shares of 1/x for 2^low <= x <= 2^high, with `frac_bits` fraction bits whatever x's scale.

    Input: any x from -2^(62 - s) to 2^(62 - s) (in units of its last place), s = max(0, 9 - high - x.frac_bits), which
    is 0 for all but small ranges; below 2^low, zero and negative numbers included, the result is that of 2^low, above
    2^high that of 2^high. ValueError if x's last place is above 2^low, if high - low > 37, or if 64 bits don't hold
    what lies between: 2^(high + 7) at x's scale below 2^63, 2^-low at the output's up to 2^60.
    Output: relative error below 4e-5, plus one unit in the last place of the output.
    How: thresholds at half octaves give a shared gain and h with 1/x = gain / (1 - h), abs(h) <= 11/64, h linear in x
    on each piece and so exact; 1/(1 - h) by a polynomial of degree 4, the minimax one; times gain.
    Opened: x + r over Z_2^64; the words of `below`, T = 2 (high - low) + 1 times; outcome bits xor beta; then the
    openings of `polynomial`, `truncate`, `multiply` and `truncate`.
    Rounds 8; online 48 + 4.375 T bytes per element and peer (297.4 for the default range, 57 thresholds);
    correlations `Comparison`, `TruncatedPowers`, `Truncation`, `Triple`.
    Source: normalisation by the leading bit as in Catrina and Saxena 2010. DESIGN's cubic on a whole octave with a
    Newton step has half the thresholds and two more rounds: rows, not elements, need this function most.
    """
    # gain < 2^(high - low + 7) and 1/(1 - h) < 1.21 keep the product below 2^62, whose scale is then 2^(60 + low)
    bits = 61 - _CUT_BITS - (high - low)
    fits = -x.frac_bits <= low < high <= 62 - _CUT_BITS - x.frac_bits and frac_bits <= 60 + low
    if not fits or high - low > _MAX_OCTAVES:
        raise ValueError(f"no reciprocals over 2^{low} to 2^{high} from {x.frac_bits} to {frac_bits} fraction bits")
    # the polynomial's argument is h truncated, so h needs more fraction bits, which small ranges alone don't give
    x = x.rescaled(max(x.frac_bits, _ARGUMENT_BITS + 2 - high - _CUT_BITS))
    pieces = _pieces(x.frac_bits, low, high)
    h, gain = await _normalise(ctx, x, pieces)
    # 1/(1 - h) - 1 is at most 0.21: below 2^61 with 63 fraction bits, as is h
    tail = await polynomial(ctx, h, h.frac_bits - _ARGUMENT_BITS, _tail(), _VALUE_BITS)
    rest = h.rescaled(_VALUE_BITS) + tail
    inverse = await truncate(ctx, rest, _VALUE_BITS - bits)
    if ctx.first:
        inverse = Shared(inverse.share + (1 << bits), bits)
    y = await multiply(ctx, gain, inverse)
    return await truncate(ctx, y, y.frac_bits - frac_bits)
