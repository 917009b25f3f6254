"""Softmax, its logarithm, and log-sum-exp."""

from __future__ import annotations

import torch

from mpcinfer.nn.elementwise import width
from mpcinfer.nn.registry import operator
from mpcinfer.nn.shape import rows
from mpcinfer.protocol import coarse
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.exponential import exp_nonpositive
from mpcinfer.protocol.inverse import wide_reciprocal
from mpcinfer.protocol.logarithm import log
from mpcinfer.protocol.powers import bounded_power
from mpcinfer.protocol.tournament import maximum_along
from mpcinfer.protocol.truncate import truncate
from mpcinfer.protocol.truncated_product import truncated_product
from mpcinfer.protocol.types import Shared
from mpcinfer.ring.digits import DIGIT_BITS
from mpcinfer.ring.domain import Z64

# exponentials keep this many fraction bits, so that a long row's sum does not gather their rounding errors
EXP_BITS = 24
# and no less than so many where values are so large that their sums have no room for all of them
LEAST_POWER_BITS = 20
_INVERSE_BITS = 30
# of numbers of which the largest is taken coarsely: they are below 2 to this power if there is room for it, and never
# above 2 to the other, which is what powers take; the bits that differences need above
USUAL_SPAN, MOST_SPAN, _SPARE_BITS = 11, 26, 3
# with less than this, numbers that no example shows would too easily be too large
_LEAST_SPAN = 8
# up to here words are short: two of them are 2^-5; fraction bits of numbers that lose some before they are words
_SHORT_SPAN = 12
_LEAST_BITS = {coarse.SHORT: 16, coarse.LONG: 24}


def count_bits(count: int) -> int:
    """Of powers of `coarse_powers`: 2 to this is above the sum of so many."""
    return (count * 33 // 32).bit_length()


def octaves_of_sum(count: int, *, about: bool = False) -> dict[str, int]:
    """The range of a sum of exponentials: from 1, the maximum's own, to their count; `about`: of `coarse_powers`.

    A rounding error beyond either end meets the function of that end.
    """
    return {"low": 0, "high": max(1, count_bits(count) if about else (count - 1).bit_length())}


def span(x: Shared, reach: int | None) -> int | None:
    """An s for `coarse_powers`, given that abs(x) < 2^reach; None if there is no room for one, or nothing is known."""
    found = 0 if reach is None else min(max(reach, USUAL_SPAN), Z64.bits - _SPARE_BITS - x.frac_bits)
    return found if reach is not None and max(reach, _LEAST_SPAN) <= found <= MOST_SPAN else None


def roomy_bits(reach: int) -> int:
    """The fraction bits up to which numbers below 2^reach have the usual `span`, or what they need."""
    return Z64.bits - _SPARE_BITS - max(reach, USUAL_SPAN)


async def coarse_powers(
    ctx: Context, x: Shared, span: int, groups: torch.Tensor | None = None, frac_bits: int = EXP_BITS
) -> Shared:
    """e^(x - m), with `frac_bits`, for an m of each row, or group, that is its largest number or less, by below 2^-5.

    Input: abs(x) < 2^span, or x = -2^(span + 1), whose power is 0 if there is another in its row; see `span`.
    Rows along the last axis, or groups as `tournament.maximum_of_groups` has them. The sum of a row is at least 1, and
    below 33/32 of their count.
    How: numbers are compared in words, of 2^(span - 18) or 2^(span - 33); m is one less than the largest of them.
    Rounds 3 ceil(log4 k) + 4, for span > 12 4 ceil(log4 k) + 4; online, for 35 fraction bits and span 11, 24.2 bytes
    per element and peer, offline about 160; openings: those of `coarse.largest` and `powers.bounded_power`.
    """
    width = coarse.SHORT if span <= _SHORT_SPAN else coarse.LONG
    x = x.rescaled(max(x.frac_bits, _LEAST_BITS[width]))
    drop = x.frac_bits + span - (width - _SPARE_BITS)
    if groups is None:
        top = (await coarse.maximum_along(ctx.scope("largest"), x, width, drop)).map(lambda t: t.unsqueeze(-1))
    else:
        found = await coarse.maximum_of_groups(ctx.scope("largest"), x, groups, width, drop)
        top = found.map(lambda t: t[groups.to(t.device)])
    below = x.share - (top.share << drop) + ((1 << drop) if ctx.first else 0)
    return await bounded_power(ctx, Shared(below, x.frac_bits), span + _SPARE_BITS - 1, frac_bits)


async def powers_below(ctx: Context, x: Shared, d: int = 0, frac_bits: int = EXP_BITS) -> Shared:
    """e^x of differences x <= 0 of a model's numbers, with `frac_bits` fraction bits; x is to lose d bits."""
    if d:
        return await exp_nonpositive(ctx, x, frac_bits, 64 - d, d)
    # a scale that is refined leaves less room above
    return await exp_nonpositive(ctx, x, frac_bits, 64 if x.frac_bits % DIGIT_BITS else width(x))


async def _powers(ctx: Context, x: Shared) -> tuple[Shared, Shared]:
    """e^(x - the row's largest) with EXP_BITS, and x minus the row's largest."""
    top = await maximum_along(ctx, x, width(x))
    below = x - top.map(lambda t: t.unsqueeze(-1))
    return await powers_below(ctx, below), below


@operator("mpc.softmax")
async def softmax(ctx: Context, x: Shared, *, reach: int | None = None) -> Shared:
    """Softmax over the last axis: [*S, k] -> [*S, k]. Error below 5e-5 plus one unit in the last place.

    A maximum, x minus it, e^x, the sum, one reciprocal a row, the product, a truncation. reach: 2 to this power is
    above all numbers, or None (see graph.bounds); then differences within a row must stay below 2^59 units in the last
    place.
    Rounds 3 ceil(log4 k) + 11 where the reach is 12 at most, 4 ceil(log4 k) + 11 up to 26 (of up to 256 rows k / 2 for
    k, if that is above 2); online 38 (46) bytes per element and peer, fewer for short rows, and 42 + 3.25 ceil(log2 k)
    per row. Of unknown reach 4 ceil(log4 k) + 12; online 34.9 per element, 14.5 for each but one of a row, the same per
    row; for many rows more rounds and fewer bytes, see `tournament.maximum_along` and `octaves.normalise`.
    Openings: those of the protocols named.
    """
    room = span(x, reach)
    powers = (await _powers(ctx, x))[0] if room is None else await coarse_powers(ctx, x, room)
    octaves = octaves_of_sum(x.shape[-1], about=room is not None)
    inverse = await wide_reciprocal(ctx, powers.map(lambda t: t.sum(-1, keepdim=True)), **octaves)
    y = await truncated_product(ctx, inverse, inverse.frac_bits - _INVERSE_BITS, powers)  # below 2^55
    return await truncate(ctx, y, y.frac_bits - x.frac_bits)


@operator("aten.softmax.int", "aten._softmax.default")
async def aten_softmax(ctx: Context, x: Shared, dim: int, dtype: object = None, *, reach: int | None = None) -> Shared:
    """torch.softmax over any axis; `dtype` (`half_to_float`) means nothing for shares."""
    y = await softmax(ctx, x.map(lambda t: t.movedim(dim, -1)), reach=reach)
    return y.map(lambda t: t.movedim(-1, dim))


@operator("aten.log_softmax.int", "aten._log_softmax.default")
async def log_softmax(ctx: Context, x: Shared, dim: int, dtype: object = None) -> Shared:
    """torch.log_softmax over any axis: x minus the row's largest, minus the logarithm of the sum of exponentials."""
    powers, below = await _powers(ctx, x.map(lambda t: t.movedim(dim, -1)))
    sums = powers.map(lambda t: t.sum(-1, keepdim=True))
    y = below - await log(ctx, sums, **octaves_of_sum(powers.shape[-1]), frac_bits=x.frac_bits)
    return y.map(lambda t: t.movedim(-1, dim))


@operator("aten.logsumexp.default")
async def logsumexp(ctx: Context, x: Shared, dim: list[int], keepdim: bool = False) -> Shared:
    """torch.logsumexp over the axes `dim`."""
    joined, place = rows(x, dim)
    top = await maximum_along(ctx, joined, width(x))
    powers = await powers_below(ctx, joined - top.map(lambda t: t.unsqueeze(-1)))
    sums = powers.map(lambda t: t.sum(-1))
    return place(top + await log(ctx, sums, **octaves_of_sum(joined.shape[-1]), frac_bits=x.frac_bits), keepdim)
