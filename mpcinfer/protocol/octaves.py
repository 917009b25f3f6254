"""Numbers over many octaves, brought to one small interval: what 1/x, 1/sqrt(x), sqrt(x) and log(x) have in common.

Thresholds at half octaves find the piece that x is in, which gives shares of a gain with gain x = 1 - h and
abs(h) <= 11/64: h is linear in x on each piece and so exact. Then f(x) is a table's entry for the piece, combined with
a polynomial of h that serves all pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import isqrt

import torch

from mpcinfer.protocol.compare import (
    below,
    below_flat,
    block_masks,
    digit_tables,
    digit_values,
    flat_masks,
    flat_tables,
    flat_values,
)
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.correlation import Field, FixedMasks, Kind, Tensors, kind
from mpcinfer.protocol.polynomial import polynomial
from mpcinfer.protocol.truncate import logical_shift, offset, truncated_parts
from mpcinfer.protocol.types import Masked, Shared
from mpcinfer.ring.domain import BIT, Z64, Ring

# an octave [1, 2) is cut at sqrt(2); cut and centres' inverses are multiples of 2^-7
CUT_BITS = 7
_CUTS = (1 << CUT_BITS, isqrt(2 << (2 * CUT_BITS)), 2 << CUT_BITS)
_CENTRES = tuple(round(Fraction(2 << (2 * CUT_BITS), a + b)) for a, b in zip(_CUTS, _CUTS[1:], strict=False))
# the largest abs(h)
BOUND = max(
    abs(1 - Fraction(centre * edge, 1 << (2 * CUT_BITS)))
    for i, centre in enumerate(_CENTRES)
    for edge in _CUTS[i : i + 2]
)
DEGREE = 4
# up to so many numbers (rows, as a rule) are compared in one round, and twice as much is dealt for each
FEW = 1 << 12
# the polynomial is linear in h, plus a tail into which h enters with so many bits; the sum has so many fraction bits
ARGUMENT_BITS = 14
VALUE_BITS = 63


@dataclass(frozen=True)
class Octaves:
    """T thresholds cut the numbers into T + 1 pieces; on each h = slope x + offset, and gain x = 1 - h."""

    thresholds: tuple[int, ...]
    slopes: tuple[int, ...]
    offsets: tuple[int, ...]
    gains: tuple[int, ...]
    frac_bits: int  # of h
    gain_bits: int  # of the gains; negative for small ranges of small numbers

    def real(self, piece: int) -> Fraction:
        """A piece's gain."""
        return self.gains[piece] / Fraction(2) ** self.gain_bits


@cache
def octaves(frac_bits: int, low: int, high: int) -> Octaves:
    """Half octaves from 2^low to 2^high, and a constant piece at either end, for x with so many fraction bits."""
    one = 1 << (frac_bits + high - 1 + CUT_BITS)
    thresholds, slopes, offsets, gains = [], [], [], []
    for octave in range(low, high):
        for cut, centre in zip(_CUTS, _CENTRES, strict=False):
            at = cut << (frac_bits + octave)
            thresholds.append(-(-at >> CUT_BITS))
            gains.append(centre << (high - 1 - octave))
            slopes.append(-gains[-1])
            offsets.append(one)
    first, last = one - (gains[0] << (frac_bits + low)), one - (gains[-1] << (frac_bits + high))
    return Octaves(
        (*thresholds, 1 << (frac_bits + high)),
        (0, *slopes, 0),
        (first, *offsets, last),
        (gains[0], *gains, gains[-1]),
        frac_bits + high - 1 + CUT_BITS,
        high - 1 + CUT_BITS,
    )


def spread(x: Shared, high: int) -> Shared:
    """x with the fraction bits that h needs to be truncated to ARGUMENT_BITS, which small ranges alone don't give."""
    return x.rescaled(max(x.frac_bits, ARGUMENT_BITS + 2 - high - CUT_BITS))


def _steps(values: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Going down from a piece to the one before it: [T, 1, ...], to be multiplied with [x < t] and summed."""
    return _differences(values).reshape(-1, *([1] * (like.dim() - 1))).to(like.device)


@cache
def _differences(values: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([a - b for a, b in zip(values, values[1:], strict=False)], dtype=torch.int64)


@kind
@dataclass(frozen=True)
class TruncatedComparison(Kind):
    """Comparisons of x / 2^d with T thresholds, and the products of their outcomes with x / 2^d.

    m = r >> d masks what is compared; tables are of the digits of 2^d m, `flat` or not (see `below_flat`). Times
    2^(64 - d) goes msb(r), of d bits; without d there is nothing of it.
    """

    shape: tuple[int, ...]
    thresholds: int
    d: int
    flat: bool = False

    def _many(self) -> tuple[int, ...]:
        return (self.thresholds, *self.shape)

    def free(self) -> dict[str, Field]:
        """r; the block masks; beta."""
        many = self._many()
        masks = flat_masks(many) if self.flat else block_masks(many, 64)
        return {"r": Field(self.shape, Z64), **masks, "beta": Field(many, BIT)}

    def derived(self) -> dict[str, Field]:
        """lt tables and sign of 2^d m; block products; beta as a number; m and msb(r); both times beta."""
        many = self._many()
        tables = flat_tables(self.shape, many) if self.flat else digit_tables(self.shape, many, 64)
        fields = {**tables, "bit": Field(many, Z64), "bit_high": Field(many, Z64)}
        if not self.d:
            return fields
        wrap = Ring(self.d)
        return {
            **fields,
            "high": Field(self.shape, Z64),
            "wrap": Field(self.shape, wrap),
            "bit_wrap": Field(many, wrap),
        }

    def derive(self, free: Tensors, fixed: FixedMasks) -> Tensors:
        """See `derived`."""
        r, bit = free["r"], free["beta"].to(torch.int64)
        high = logical_shift(r, self.d) if self.d else r
        compared = high << self.d
        tables = flat_values(compared, free) if self.flat else digit_values(compared, free, 64)
        values = {**tables, "bit": bit, "bit_high": bit * high}
        if not self.d:
            return values
        wrap = logical_shift(r, 63)
        return {**values, "high": high, "wrap": wrap, "bit_wrap": bit * wrap}


async def normalise(
    ctx: Context, x: Shared, pieces: Octaves, table: tuple[int, ...], d: int = 0
) -> tuple[Shared, Shared]:
    """Shares of h and of the table's entry for the piece of x / 2^d (at scale 1); exact but for the truncation.

    Input: -2^62 <= x < 2^62 if d > 0; x / 2^d is floor(x / 2^d) or one more, as `truncate` has it.
    Opened: x + r (x + 2^62 + r) over Z_2^64; the words of `below_flat` for up to FEW elements, of `below` for more, T
    times; outcome bits xor beta.
    Rounds 3 (4); online 8 + 1.625 T (8 + 4.375 T) bytes per element and peer; offline 448 + 38.1 T (30 + 29 T) and d
    bits of wraps; correlation `TruncatedComparison`.
    """
    flat = x.share.numel() <= FEW
    correlation = ctx.correlation(TruncatedComparison(x.shape, len(pieces.thresholds), d, flat))
    if d:
        c = (await ctx.open(offset(ctx, x), correlation.mask("r"))).value
        # x / 2^d = public - m; times 2^d it is a multiple of 2^d, which compares like any number
        public, wrapped = truncated_parts(c, d)
        m = correlation["high"] - wrapped * correlation["wrap"]
        bit_m = correlation["bit_high"] - wrapped * correlation["bit_wrap"]
    else:
        public = (await ctx.open(x, correlation.mask("r"))).value
        m, bit_m = correlation["r"], correlation["bit_high"]
    compared, thresholds = Masked(public << d, Z64), tuple(t << d for t in pieces.thresholds)
    if flat:
        bits = await below_flat(ctx, compared, thresholds, correlation)
    else:
        bits = await below(ctx, compared, thresholds, correlation, 64)
    flip = (await ctx.open(bits, correlation.mask("beta"))).value.to(torch.int64)
    # b = flip xor beta as a number, and b times (public - m)
    bit, sign = correlation["bit"], 1 - 2 * flip
    number = sign * bit + flip if ctx.first else sign * bit
    product = sign * (bit * public - bit_m) + flip * ((public if ctx.first else 0) - m)
    h = (_steps(pieces.slopes, bit) * product + _steps(pieces.offsets, bit) * number).sum(0)
    entry = (_steps(table, bit) * number).sum(0)
    if ctx.first:
        h, entry = h + pieces.offsets[-1], entry + table[-1]
    return Shared(h, pieces.frac_bits), Shared(entry, 0)


async def near_one(ctx: Context, h: Shared, slope_bits: int, sign: int, tail: tuple[int, ...]) -> Shared:
    """Shares of sign h / 2^slope_bits + tail(h), with VALUE_BITS fraction bits: f(1 - h) - f(1) for one of our f.

    tail: integer coefficients at scale VALUE_BITS for h with ARGUMENT_BITS. Opening and cost: that of `polynomial`.
    """
    rest = await polynomial(ctx, h, h.frac_bits - ARGUMENT_BITS, tail, VALUE_BITS)
    return Shared(sign * h.share, h.frac_bits + slope_bits).rescaled(VALUE_BITS) + rest


def tail_of(polynomial_: Sequence[Fraction], slope: Fraction) -> tuple[int, ...]:
    """The integer coefficients of P(h) - P_linear(h) for `near_one`, where P_linear = f(1) + slope h, f(1) in 0, 1."""
    exact = list(polynomial_)
    exact[0] -= round(exact[0])
    exact[1] -= slope
    return tuple(round(a * (1 << (VALUE_BITS - j * ARGUMENT_BITS))) for j, a in enumerate(exact))


def interpolated(function: Callable[[Fraction], Fraction]) -> list[Fraction]:
    """The polynomial of DEGREE in h that meets function(h) at Chebyshev's nodes of [-BOUND, BOUND], in exact numbers.

    Its error is that of the best one but for a few per cent. No host computes another one.
    """
    # cos(pi (2 k + 1) / 10): any numbers near by would do as well
    nodes = [BOUND * Fraction(c, 1_000_000) for c in (-951_057, -587_785, 0, 587_785, 951_057)]
    total = [Fraction(0)] * len(nodes)
    for i, at in enumerate(nodes):
        term = [function(at)]
        for j, other in enumerate(nodes):
            if j != i:  # times (h - other) / (at - other)
                shifted = [Fraction(0), *term]
                term = [(a - other * b) / (at - other) for a, b in zip(shifted, [*term, Fraction(0)], strict=True)]
        total = [a + b for a, b in zip(total, term, strict=True)]
    return total
