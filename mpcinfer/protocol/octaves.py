"""Numbers over many octaves, brought to one small interval: what 1/x, 1/sqrt(x), sqrt(x) and log(x) have in common.

Thresholds at half octaves find the piece that x is in, which gives shares of a gain with gain x = 1 - h and
abs(h) <= 11/64: h is linear in x on each piece and so exact. Then f(x) is a table's entry for the piece, combined with
a polynomial of h that serves all pieces. Few numbers are compared with all thresholds at once, which takes the fewest
rounds; many first with those between groups of octaves, then within their group, which takes the fewest bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import isqrt

import torch

from mpcinfer.protocol.compare import below_flat, flat_masks, flat_tables, flat_values
from mpcinfer.protocol.context import Context, together
from mpcinfer.protocol.correlation import Field, FixedMasks, Kind, Tensors, kind
from mpcinfer.protocol.multiply import multiply
from mpcinfer.protocol.polynomial import polynomial
from mpcinfer.protocol.select import piecewise_linears, steps
from mpcinfer.protocol.truncate import logical_shift, offset, truncate, truncated_parts
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
# octaves of a group, which is even so that roots have exact powers of two, too; and the bits of it that are compared:
# numbers of its lowest octave count as 2^-10 more or less than they are
GROUP, _COMPARED_BITS = 6, 16
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


@dataclass(frozen=True)
class Table:
    """What a number has by its gain: `entry(gain, bits)`, an integer at scale 2^bits.

    The entry of 2^k gain is 2^(power k) times that of gain; with no power, those of 2^k and of gain added. `empty`: 0
    for what is below all octaves.
    """

    entry: Callable[[Fraction, int], int]
    bits: int
    power: Fraction | None
    empty: bool = False


@cache
def _entries(table: Table, pieces: Octaves) -> tuple[int, ...]:
    """Of all pieces."""
    first, *others = (table.entry(pieces.real(i), table.bits) for i in range(len(pieces.gains)))
    return (0 if table.empty else first, *others)


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

    m = r >> d masks what is compared; tables are of the large digits of 2^d m (see `below_flat`). Times 2^(64 - d) goes
    msb(r), of d bits; without d there is nothing of it.
    """

    shape: tuple[int, ...]
    thresholds: int
    d: int

    def _many(self) -> tuple[int, ...]:
        return (self.thresholds, *self.shape)

    def free(self) -> dict[str, Field]:
        """r; the mask words; beta."""
        many = self._many()
        return {"r": Field(self.shape, Z64), **flat_masks(many), "beta": Field(many, BIT)}

    def derived(self) -> dict[str, Field]:
        """lt tables and sign of 2^d m; products of mask words; beta as a number; m and msb(r); both times beta."""
        many = self._many()
        fields = {**flat_tables(self.shape, many), "bit": Field(many, Z64), "bit_high": Field(many, Z64)}
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
        values = {**flat_values(high << self.d, free), "bit": bit, "bit_high": bit * high}
        if not self.d:
            return values
        wrap = logical_shift(r, 63)
        return {**values, "high": high, "wrap": wrap, "bit_wrap": bit * wrap}


async def normalise(
    ctx: Context, x: Shared, low: int, high: int, tables: tuple[Table, ...], d: int = 0
) -> tuple[Shared, list[Shared]]:
    """Shares of h and of each table's entry for the gain of x / 2^d, from 2^low to 2^high.

    Input: -2^62 <= x < 2^62 if d > 0; x / 2^d is floor(x / 2^d) or one more, as `truncate` has it; all else is exact,
    and abs(h) <= BOUND, for more than FEW elements up to 2^-10 more. Beyond the range the nearer end counts.
    Openings and correlations: those of `_few`, in 3 rounds and 8 + 1.625 T bytes per element and peer, T = 2 (high -
    low) + 1; for more than FEW elements those of `_many`, in 8 rounds (9 if d > 0).
    """
    if x.share.numel() <= FEW:
        return await _few(ctx, x, octaves(x.frac_bits - d, low, high), tables, d)
    return await _many(ctx, await truncate(ctx, x, d), low, high, tables)


async def _few(
    ctx: Context, x: Shared, pieces: Octaves, tables: tuple[Table, ...], d: int
) -> tuple[Shared, list[Shared]]:
    """By all thresholds at once.

    Opened: x + r (x + 2^62 + r) over Z_2^64; the words of `below_flat`, T times; outcome bits xor beta.
    Rounds 3; online 8 + 1.625 T bytes per element and peer; offline 448 + 38.1 T, if d > 0 8 more and d (T + 1)
    bits; correlation `TruncatedComparison`.
    """
    correlation = ctx.correlation(TruncatedComparison(x.shape, len(pieces.thresholds), d))
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
    bits = await below_flat(ctx, compared, thresholds, correlation)
    flip = (await ctx.open(bits, correlation.mask("beta"))).value.to(torch.int64)
    # b = flip xor beta as a number, and b times (public - m)
    bit, sign = correlation["bit"], 1 - 2 * flip
    number = sign * bit + flip if ctx.first else sign * bit
    product = sign * (bit * public - bit_m) + flip * ((public if ctx.first else 0) - m)
    h = (_steps(pieces.slopes, bit) * product + _steps(pieces.offsets, bit) * number).sum(0)
    if ctx.first:
        h = h + pieces.offsets[-1]
    entries = []
    for table in tables:
        values = _entries(table, pieces)
        entry = (_steps(values, bit) * number).sum(0)
        entries.append(Shared(entry + values[-1] if ctx.first else entry, table.bits))
    return Shared(h, pieces.frac_bits), entries


async def _many(ctx: Context, x: Shared, low: int, high: int, tables: tuple[Table, ...]) -> tuple[Shared, list[Shared]]:
    """By G groups of up to 6 octaves, then by half octaves within the group, for which few bits need to be compared.

    How: x times its group's power of two is in the highest group (beyond an end of the range, that end is), so that 16
    bits of it tell the half octave. Products with what that finds: h = 1 - gain x, and the entries.
    Opened: those of `piecewise_linears`, G + 1 thresholds, of `steps`, up to 11 thresholds of width 17, of `multiply`.
    Rounds 8; online up to 34 + b / 8 + 4.4 (G + 1) bytes per element and peer, b = x.frac_bits + high + 1, and 16 for
    each table with a power (8 for that of the gains): 80.5 for 1/x over 28 octaves; offline 147 + 29 (G + 1), and 8
    for each such table; correlations `Comparison` with products and with numbers, `Triple`.
    """
    size = min(GROUP, high - low)
    pieces, shifts = octaves(x.frac_bits, high - size, high), _shifts(high - low, size)
    one = 1 << x.frac_bits + high  # the end of the highest group
    cuts = (one >> high - low, *(one >> shift for shift in shifts))
    slopes, ends = (0, *(1 << shift for shift in shifts), 0), (cuts[0] << shifts[0], *[0] * len(shifts), one)
    flat, factors = (0,) * len(slopes), [_of_groups(table, shifts) for table in tables]
    near, *others = await piecewise_linears(ctx, x, cuts, ((slopes, ends), *((flat, values) for values in factors)))

    within = [_within(table, pieces, shifts) for table in tables]
    # by what they are multiplied with
    products = {pieces.gains[1:-1]: [near.share]}
    for table, values, factor in zip(tables, within, others, strict=True):
        if table.power is not None:
            products.setdefault(values, []).append(factor.share)
    functions = tuple(dict.fromkeys([*products, *within]))
    d = max(0, (one.bit_length() - 1) - _COMPARED_BITS)
    found = await steps(ctx, near, tuple(t >> d for t in pieces.thresholds[1:-1]), functions, _COMPARED_BITS + 1, d)
    by = dict(zip(functions, found, strict=True))
    multiplied = await together(
        *(
            multiply(ctx, by[values].map(lambda t: t.unsqueeze(0)), Shared(torch.stack(factors)))
            for values, factors in products.items()
        )
    )
    results = {values: list(product.share) for values, product in zip(products, multiplied, strict=True)}
    h = -results[pieces.gains[1:-1]].pop(0)
    if ctx.first:
        h = h + (1 << pieces.frac_bits)
    entries = [
        Shared(by[values].share + factor.share if table.power is None else results[values].pop(0), table.bits)
        for table, values, factor in zip(tables, within, others, strict=True)
    ]
    return Shared(h, pieces.frac_bits), entries


def _shifts(count: int, size: int) -> tuple[int, ...]:
    """By which groups of so many octaves are below the highest one, from the lowest one on."""
    return tuple(range((count - 1) // size * size, -1, -size))


@cache
def _of_groups(table: Table, shifts: tuple[int, ...]) -> tuple[int, ...]:
    """What the groups' entries have in common, and what the ends have."""
    if table.power is None:
        values = [table.entry(Fraction(1 << shift), table.bits) for shift in shifts]
    else:
        values = [1 << int(table.power * shift) - _spare(table, shifts) for shift in shifts]
    return (0 if table.empty else values[0], *values, values[-1])


@cache
def _within(table: Table, pieces: Octaves, shifts: tuple[int, ...]) -> tuple[int, ...]:
    """The entries of the highest group without what groups have in common."""
    bits = table.bits if table.power is None else table.bits + _spare(table, shifts)
    return tuple(table.entry(pieces.real(i), bits) for i in range(1, len(pieces.gains) - 1))


def _spare(table: Table, shifts: tuple[int, ...]) -> int:
    """The power of two of the groups' smallest entries, if those are of the lowest group."""
    return min(0, int((table.power or 0) * shifts[0]))


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
