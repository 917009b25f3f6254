"""Smooth functions as asymptotes plus piecewise cubics: GELU, SiLU, sigmoid, tanh, erf and the like."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from math import comb
from typing import NamedTuple, TypeVar

import torch

from mpcinfer.protocol.compare import (
    below,
    below_near,
    block_masks,
    digit_tables,
    digit_values,
    near_masks,
    near_tables,
    near_values,
)
from mpcinfer.protocol.context import Context, together
from mpcinfer.protocol.correlation import Correlation, Field, FixedMasks, Kind, Tensors, kind
from mpcinfer.protocol.select import bit_number, bit_product
from mpcinfer.protocol.truncate import (
    logical_shift,
    offset,
    truncate,
    truncated_parts,
    unopened_bits,
    without_low_bits,
)
from mpcinfer.protocol.types import Masked, Shared, SharedBits
from mpcinfer.ring import spline as kernel
from mpcinfer.ring.domain import BIT, Z64, Ring

# of the argument, whatever the scale of x: the cube of one has 48 fraction bits
ARGUMENT_BITS = 16
# comparisons that must see all of a number: with the outer knots, and with the one where asymptotes change
_WIDE = 3
# with more thresholds, of more numbers, the cubic that is chosen is opened: a round and 24 bytes more, 30 T - 100 bytes
# fewer dealt
_FEW_THRESHOLDS, _FEW = 6, 4096
# of wider rows, those of larger models, the bytes that are sent online weigh more, however many rows there are
_WIDEST = 2048
T = TypeVar("T")


@dataclass(frozen=True)
class Spline:
    """A function: T thresholds, T steps from a piece's cubic to the next one's, asymptotes that change at one knot.

    Below threshold k the residual's cubic gains `steps[k]`; above the last it is zero. `frac_bits`: of the residual.
    `switch`: the number of that knot, not an outer one. Outer knots are less than 2^23 from it, in units of 2^-16.
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
    """A mask r of x; of y = x / 2^d (d = 0: of x) what T comparisons and cubics chosen by them take; a mask s of those.

    m = r >> d masks y, or m - 2^(64 - d) msb(r), as the opened number says (`wraps`: what takes powers of m to those
    of the other one, divided by 2^(64 - d)). Three comparisons are of `width`, T - 3 near. beta masks [y is between the
    outer knots] and then T - 2 outcomes, which choose cubics: `bits` are beta m^j, j = 0..3. `inside` is the first
    beta: times s >> cut and msb(s), it makes a product of a bit and of what is truncated.

    `coefficients`, with d > 0: of the outcomes only beta is dealt, the switch's times m, and masks q of three
    coefficients of the cubic that is chosen, times m, m^2 and m^3.
    """

    shape: tuple[int, ...]
    width: int
    thresholds: int
    cut: int
    d: int = 0
    coefficients: bool = False

    def __post_init__(self) -> None:
        if self.thresholds < _WIDE:
            raise ValueError("a spline has outer knots, and one where its asymptotes change")
        if self.coefficients and not self.d:
            raise ValueError("coefficients are opened where a product is truncated")

    def _many(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The shapes of wide comparisons, of near ones, and of outcomes that choose cubics."""
        return tuple((self.thresholds - k, *self.shape) for k in (self.thresholds - _WIDE, _WIDE, 2))  # type: ignore[return-value]

    def free(self) -> dict[str, Field]:
        """r; the block masks; beta; s; q."""
        wide, near, chosen = self._many()
        opened = {"q": Field((3, *self.shape), Z64)} if self.coefficients else {}
        return opened | {
            "r": Field(self.shape, Z64),
            **block_masks(wide, self.width),
            **(near_masks(near) if near[0] else {}),
            "beta": Field((chosen[0] + 1, *self.shape), BIT),
            "s": Field(self.shape, Ring(64 - unopened_bits(self.cut))),
        }

    def derived(self) -> dict[str, Field]:
        """Tables and products; powers of m and beta m^j, for both m; inside; s >> cut and msb(s), alone and inside."""
        wide, near, chosen = self._many()
        fields = {
            **digit_tables(self.shape, wide, self.width),
            **(near_tables(self.shape, near) if near[0] else {}),
            "powers": Field((3 if self.d else 2, *self.shape), Z64),
            "bits": Field((1 if self.coefficients else 4, *chosen), Z64),
            "inside": Field(self.shape, Z64),
            "high": Field((2, *self.shape), Z64),
            "wrap": Field((2, *self.shape), Ring(self.cut)),
        }
        if self.d:
            fields["wraps"] = Field((3, *self.shape), Ring(self.d))
        if self.coefficients:
            fields |= {
                "bit_m": Field(self.shape, Z64),
                "bit_wrap": Field(self.shape, Ring(self.d)),
                "q_powers": fields["powers"],
                "q_wraps": fields["wraps"],
            }
        elif self.d:
            fields["bit_wraps"] = Field((3, *chosen), Ring(self.d))
        return fields

    def truncated(self, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is left of the mask of the residual, and its top bit."""
        low = unopened_bits(self.cut)
        return logical_shift(s, self.cut - low), logical_shift(s, 63 - low)

    def derive(self, free: Tensors, fixed: FixedMasks) -> Tensors:
        """See `derived`."""
        m = logical_shift(free["r"], self.d) if self.d else free["r"]
        inside, *betas = free["beta"].to(torch.int64)
        beta, (high, wrap) = torch.stack(betas), self.truncated(free["s"])
        powers = torch.stack([m, m * m, m * m * m])
        values = {
            **digit_values(m, free, self.width),
            **(near_values(m, free) if self.thresholds > _WIDE else {}),
            "powers": powers if self.d else powers[1:],
            "inside": inside,
            "high": torch.stack([high, inside * high]),
            "wrap": torch.stack([wrap, inside * wrap]),
        }
        if self.coefficients:
            values |= {"bits": beta.unsqueeze(0), "bit_m": beta[0] * m, "q_powers": free["q"] * powers}
        else:
            values["bits"] = torch.cat([beta.unsqueeze(0), beta * powers.unsqueeze(1)])
        if self.d:
            other = m - (logical_shift(free["r"], 63) << (64 - self.d))
            wraps = logical_shift(torch.stack([other, other * other, other * other * other]) - powers, 64 - self.d)
            values["wraps"] = wraps
            if self.coefficients:
                values |= {"bit_wrap": beta[0] * wraps[0], "q_wraps": free["q"] * wraps}
            else:
                values["bit_wraps"] = beta * wraps.unsqueeze(1)
        return values


async def piecewise(
    ctx: Context,
    x: Shared,
    spline: Spline,
    width: int = 64,
    *,
    frac_bits: int | None = None,
    widest: float = _WIDEST,
) -> Shared:
    """Shares of a fitted function of x, at x's scale or with `frac_bits` fraction bits.

    Input: -2^(width-2) <= x < 2^(width-2) in units of its last place or of 2^-16, whichever is smaller. Output: error
    below the fit's (splines.json; measured in the tests) plus 1.5 units in the last place. Beyond the outer knots the
    value is the asymptote, exactly. With 32 fraction bits, those of a product, -2^62 <= x < 2^62 and the opening
    truncates x to 16 (an error of 1.2 * 2^-16); with any other number above 16 a truncation does so before (one more
    round); with fewer the result is truncated (one more round).
    How: x opened once serves T comparisons, the asymptotes (bit * value at x's scale) and the residual, which is zero
    outside the knots and a cubic between them, evaluated mod 2^64 at a high scale. Only three comparisons, with the
    outer knots and where asymptotes change, are of x's whole width; the others are of its low bits. Where x is too far
    away for these, the residual is any number; it is truncated and multiplied by [x is between the outer knots] at
    once, by one opening: a bit that is masked by a known bit is public but for dealt products.
    Of many numbers with 32 fraction bits the cubic that is chosen is opened under masks, too (see `_evaluated`).
    Opened: x + r (x + 2^62 + r) over Z_2^64; the words of `below` and `below_near`; outcome bits xor beta; the
    residual + 2^62 + s, whatever number it is, over Z_2^64, or without its low bits over Z_2^32 where `unopened_bits`
    says so; of more than 4,096 numbers with 32 fraction bits, in rows of `widest` at most, coefficients.
    Rounds 5; online 12 + 4.375 * 3 + 1.625 (T - 3) bytes per element and peer (33.1 for GELU, T = 8; 36.4 for SiLU,
    T = 10), for width 48 and from 32 fraction bits 3.4 less; offline about 50 + 34 T bytes, from 32 fraction bits
    33 + 40 T; with coefficients rounds 6, online 24 bytes more, offline about 133 + 10 T; correlation `Pieces`.
    Source: splines on masked values by the binomial theorem as in `polynomial`; the split into an asymptote, which no
    scale can make wrap around, and a bounded residual, and comparisons of low bits only, are our own.
    """
    if x.frac_bits == 2 * ARGUMENT_BITS:
        d, width, frac_bits = ARGUMENT_BITS, 64 - ARGUMENT_BITS, ARGUMENT_BITS if frac_bits is None else frac_bits
        opened = offset(ctx, x)
    else:
        d, frac_bits = 0, x.frac_bits if frac_bits is None else frac_bits
        x = await truncate(ctx, x, max(0, x.frac_bits - ARGUMENT_BITS))
        opened = x = x.rescaled(ARGUMENT_BITS)
    out_bits = max(frac_bits, ARGUMENT_BITS)
    cut = spline.frac_bits - out_bits
    by_coefficients = d > 0 and max(x.shape[-1:], default=1) <= widest and _opens_coefficients(x, spline)
    correlation = ctx.correlation(Pieces(x.shape, width, len(spline.thresholds), cut, d, by_coefficients))
    at = await _evaluated(ctx, opened, spline, correlation, width, d)
    low = unopened_bits(cut)
    residual = await ctx.open(without_low_bits(offset(ctx, at.residual), low), correlation.mask("s"))
    c, wrapped = truncated_parts(residual.value, cut, low)
    high, inside_high = correlation["high"] - wrapped * correlation["wrap"]
    inside = Shared(bit_product(ctx.first, at.e[0], correlation["inside"], c, high, inside_high), out_bits)

    # the asymptotes: of y = c - m, and of the bit that says which
    (slope, constant), (right, last) = spline.left, spline.right
    y = ((at.c if ctx.first else 0) - at.m) * right + ((last << ARGUMENT_BITS) if ctx.first else 0)
    if slope != right:
        y = y + (slope - right) * bit_product(ctx.first, at.e[1], at.bit, at.c, at.m, at.bit_m)
    if constant != last:
        y = y + ((constant - last) << ARGUMENT_BITS) * bit_number(ctx.first, at.e[1], at.bit)
    return await truncate(ctx, Shared(y, ARGUMENT_BITS).rescaled(out_bits) + inside, out_bits - frac_bits)


class _Evaluated(NamedTuple):
    """Of y = c - m what is opened and what a party has shares of.

    wrapped: empty if d = 0, else which of its two values m has, 0 or 2^(64 - d).
    e: uint8 [T - 1, *S], outcomes xor beta, of [y is between the outer knots] and [y < the switch] first. m, the
    switch's beta as `bit`, and `bit_m`: shares, int64 [*S]. residual: a share of what is to be truncated, right between
    the outer knots and any number elsewhere.
    """

    c: torch.Tensor
    wrapped: torch.Tensor
    m: torch.Tensor
    e: torch.Tensor
    bit: torch.Tensor
    bit_m: torch.Tensor
    residual: Shared


async def _evaluated(
    ctx: Context, opened: Shared, spline: Spline, correlation: Correlation, width: int, d: int
) -> _Evaluated:
    """The spline at y = x / 2^d, where `opened` is x, or with d > 0 x + 2^62.

    Rounds 4, the first of `piecewise`; 5 where coefficients are opened: those of the cubic that is chosen, in powers of
    c - y, of which the first needs no product: three numbers + q over Z_2^64, 24 bytes per element and peer.
    """
    c = (await ctx.open(opened, correlation.mask("r"))).value
    bits = correlation["bits"]
    by_coefficients = len(bits) == 1
    m, bit_m = correlation["r"], correlation["bit_m"] if by_coefficients else bits[1, 0]
    if d:
        c, wrapped = truncated_parts(c, d)
        powers, wraps = correlation["powers"], correlation["wraps"]
        m = powers[0] + wrapped * wraps[0]
        bit_m = bit_m + wrapped * (correlation["bit_wrap"] if by_coefficients else correlation["bit_wraps"][0, 0])
    else:
        wrapped = wraps = c.new_empty(0)
        powers = torch.cat([m.unsqueeze(0), correlation["powers"]])
    e = (await ctx.open(await _outcomes(ctx, c, spline, correlation, width), correlation.mask("beta"))).value
    base, steps = spline.steps[-1], _chosen(spline, spline.steps)
    if by_coefficients:
        q = kernel.coefficients(c, e[1:], bits[0], base, steps, ctx.first)
        others = (await ctx.open(Shared(q[1:]), correlation.mask("q"))).value
        residual = kernel.polynomial(
            q[0], wrapped, others, powers, wraps, correlation["q_powers"], correlation["q_wraps"]
        )
    else:
        bit_wraps = correlation["bit_wraps"] if d else wraps
        residual = kernel.spline(c, wrapped, e[1:], powers, wraps, bits, bit_wraps, base, steps, ctx.first)
    return _Evaluated(c, wrapped, m, e, bits[0, 0], bit_m, Shared(residual, spline.frac_bits))


def _opens_coefficients(x: Shared, spline: Spline) -> bool:
    """Whether that is cheaper in all."""
    return len(spline.thresholds) > _FEW_THRESHOLDS and x.share.numel() > _FEW


async def _outcomes(ctx: Context, c: torch.Tensor, spline: Spline, correlation: Correlation, width: int) -> SharedBits:
    """[y is between the outer knots], and [y < t] for the knots between, that of the asymptotes first."""
    low, *_, high = spline.thresholds
    switch, *others = _chosen(spline, spline.thresholds)
    wide = below(ctx, Masked(c), (low, switch, high), correlation, width)
    if others:
        far, near = await together(wide, below_near(ctx, Masked(c), tuple(others), correlation))
        between = [near.share]
    else:
        far, between = await wide, []
    # who is below the lower one is below the upper one
    return SharedBits(torch.cat([far.share[:1] ^ far.share[2:], far.share[1:2], *between]), BIT)


def _chosen(spline: Spline, of_knots: tuple[T, ...]) -> tuple[T, ...]:
    """What belongs to the knots between the outer ones: that of the asymptotes first."""
    k = spline.switch
    return (of_knots[k], *of_knots[1:k], *of_knots[k + 1 : -1])
