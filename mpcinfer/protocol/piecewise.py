"""Smooth functions as asymptotes plus piecewise cubics: GELU, SiLU, sigmoid, tanh, erf and the like."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from math import comb

import torch

from mpcinfer.protocol.compare import Comparison, below
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.correlation import Field, FixedMasks, Kind, Tensors, kind
from mpcinfer.protocol.select import bit_number, bit_product
from mpcinfer.protocol.truncate import truncate
from mpcinfer.protocol.types import Shared
from mpcinfer.ring import spline as kernel
from mpcinfer.ring.domain import Z64

# of the argument, whatever the scale of x: the cube of one has 48 fraction bits
ARGUMENT_BITS = 16


@dataclass(frozen=True)
class Spline:
    """A function: T thresholds, T steps from a piece's cubic to the next one's, asymptotes that change at one knot.

    Below threshold k the residual's cubic gains `steps[k]`; above the last it is zero. `frac_bits`: of the residual.
    """

    thresholds: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]
    frac_bits: int
    left: tuple[int, int]
    right: tuple[int, int]
    switch: int


@cache
def splines() -> dict[str, Spline]:
    """All fitted functions by name, from splines.json, which scripts/splines makes."""
    raw = json.loads(resources.files("mpcinfer.protocol").joinpath("splines.json").read_text(encoding="utf-8"))
    return {name: _spline(**fitted) for name, fitted in raw.items()}


def _spline(
    frac_bits: int,
    knots: list[int],
    left: list[int],
    right: list[int],
    switch: int,
    middles: list[int],
    coefficients: list[list[int]],
) -> Spline:
    zero = [0] * kernel.COEFFICIENTS
    pieces = [zero, *(_expanded(m, a) for m, a in zip(middles, coefficients, strict=True)), zero]
    steps = tuple(
        tuple(_signed(a - b) for a, b in zip(p, q, strict=True)) for p, q in zip(pieces, pieces[1:], strict=False)
    )
    return Spline(tuple(knots), steps, frac_bits, (left[0], left[1]), (right[0], right[1]), switch)


def _expanded(middle: int, coefficients: list[int]) -> list[int]:
    """A polynomial in x - middle as one in x."""
    return [
        sum(a * comb(j, i) * (-middle) ** (j - i) for j, a in enumerate(coefficients) if j >= i)
        for i in range(len(coefficients))
    ]


def _signed(x: int) -> int:
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


@kind
@dataclass(frozen=True)
class Pieces(Kind):
    """A `Comparison` with products for T thresholds, and r^2, r^3, beta r^2, beta r^3."""

    shape: tuple[int, ...]
    width: int
    thresholds: int

    def _comparison(self) -> Comparison:
        return Comparison(self.shape, self.width, self.thresholds, products=True)

    def free(self) -> dict[str, Field]:
        """Those of the comparison."""
        return self._comparison().free()

    def derived(self) -> dict[str, Field]:
        """Those of the comparison; powers = r^2, r^3; bit_powers = beta r^2, beta r^3."""
        return self._comparison().derived() | {
            "powers": Field((2, *self.shape), Z64),
            "bit_powers": Field((2, self.thresholds, *self.shape), Z64),
        }

    def derive(self, free: Tensors, fixed: FixedMasks) -> Tensors:
        """See `derived`."""
        values = self._comparison().derive(free, fixed)
        r = free["r"]
        powers = torch.stack([r * r, r * r * r])
        return values | {"powers": powers, "bit_powers": values["bit"] * powers.unsqueeze(1)}


async def piecewise(ctx: Context, x: Shared, spline: Spline, width: int = 64) -> Shared:
    """Shares of a fitted function of x, at x's scale.

    Input: -2^(width-2) <= x < 2^(width-2) in units of its last place or of 2^-16, whichever is smaller. Output: error
    below the fit's (splines.json; measured in the tests) plus 1.5 units in the last place. Beyond the outer knots the
    value is the asymptote, exactly. With more than 16 fraction bits the argument is truncated to 16 first (one more
    round, and an error of 1.2 * 2^-16), with fewer the result is (one more round).
    How: x opened once serves T comparisons, the asymptotes (bit * value at x's scale) and the residual, which is zero
    outside the knots and a cubic between them, evaluated mod 2^64 at a high scale and truncated once.
    Opened: x + r over Z_2^64; the words of `below`; the outcome bits xor beta; then the opening of `truncate`.
    Rounds 5; online 16 + 4.375 T bytes per element and peer (51 for GELU, T = 8; 59.8 for SiLU, T = 10), 16 + 3.25 T
    for width 48 (42 and 48.5); offline 60 + 44.9 T bytes (419 and 509); correlations `Pieces`, `Truncation`.
    Source: splines on masked values by the binomial theorem as in `polynomial`; the split into an asymptote, which no
    scale can make wrap around, and a bounded residual is our own.
    """
    frac_bits = x.frac_bits
    x = await truncate(ctx, x, max(0, frac_bits - ARGUMENT_BITS))
    x = x.rescaled(ARGUMENT_BITS)
    correlation = ctx.correlation(Pieces(x.shape, width, len(spline.thresholds)))
    c = await ctx.open(x, correlation.mask("r"))
    bits = await below(ctx, c, spline.thresholds, correlation, width)
    e = (await ctx.open(bits, correlation.mask("beta"))).value
    bit, bit_r, r = correlation["bit"], correlation["bit_r"], correlation["r"]
    residual = kernel.spline(
        c.value, e, r, correlation["powers"], bit, bit_r, correlation["bit_powers"], spline.steps, ctx.first
    )
    k = spline.switch
    (slope, offset), (right, last) = spline.left, spline.right
    y = x.share * right + ((last << ARGUMENT_BITS) if ctx.first else 0)
    if slope != right:
        y = y + (slope - right) * bit_product(ctx.first, e[k], bit[k], c.value, r, bit_r[k])
    if offset != last:
        y = y + ((offset - last) << ARGUMENT_BITS) * bit_number(ctx.first, e[k], bit[k])
    out_bits = max(frac_bits, ARGUMENT_BITS)
    asymptote = Shared(y, ARGUMENT_BITS).rescaled(out_bits)
    value = asymptote + await truncate(ctx, Shared(residual, spline.frac_bits), spline.frac_bits - out_bits)
    return await truncate(ctx, value, out_bits - frac_bits)
