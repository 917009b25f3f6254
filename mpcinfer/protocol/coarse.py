"""A maximum of numbers of which only the leading bits count: each is cut to these once, and then compared in few bits.

What softmax subtracts from a row need not be its largest number, but one near it: all that matters is that no power is
too large. Words of 21 bits take one step to compare, not two, and a fifth of what 64 bits take; words of 36 bits half.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpcinfer.protocol.compare import (
    below,
    below_short,
    block_masks,
    digit_tables,
    digit_values,
    short_masks,
    short_tables,
    short_values,
)
from mpcinfer.protocol.contest import MOST, count_of_pairs, pair_differences, picked, products_of_outcomes, winning
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.correlation import Field, FixedMasks, Kind, Tensors, kind
from mpcinfer.protocol.tournament import Contest, knock_out, knock_out_of_groups
from mpcinfer.protocol.truncate import logical_shift
from mpcinfer.protocol.types import Masked, Shared, SharedBits
from mpcinfer.ring import short
from mpcinfer.ring.domain import BIT, Ring

# of words that are compared; differences of two must have one bit less
SHORT, LONG = short.BITS + 1, 36
# the last of so many or fewer rows meet in one contest if no more are left in each: 4 kB are dealt for it, and a level
# of rounds is saved
_LAST, _FEW = 8, 256


@kind
@dataclass(frozen=True)
class CoarseContest(Kind):
    """What comparing all pairs of `size` words takes, and picking the largest; all of it modulo 2^width.

    With drop > 0 the words are what is left of numbers that lose so many bits: r masks each of them modulo
    2^(width + drop), and m = r >> drop its word. Else r masks differences from the first word, whose m is 0.
    m_i - m_j masks a pair's difference: tables of its digits, block masks, a bit beta. For each word but the first the
    products of the betas of its pairs, by subset, as numbers and times m_i - m_0.
    """

    shape: tuple[int, ...]
    size: int
    width: int
    drop: int = 0

    def __post_init__(self) -> None:
        if self.width not in (SHORT, LONG):
            raise ValueError(f"words are of {SHORT} or {LONG} bits")
        if not (1 if self.drop else 2) <= self.size <= _LAST or not 0 <= self.drop <= 64 - self.width:
            raise ValueError("a contest is of two to eight words, or of one to eight numbers of at most 64 bits")

    def _pairs(self) -> tuple[int, ...]:
        return (count_of_pairs(self.size), *self.shape)

    def free(self) -> dict[str, Field]:
        """r; the block masks; beta."""
        many, pairs = self.size if self.drop else self.size - 1, self._pairs()
        fields = {"r": Field((many, *self.shape), Ring(self.width + self.drop))}
        if self.size > 1:
            masks = short_masks(pairs) if self.width == SHORT else block_masks((1, *pairs), self.width)
            fields |= {**masks, "beta": Field(pairs, BIT)}
        return fields

    def derived(self) -> dict[str, Field]:
        """m; lt tables and sign of each m_i - m_j; block products; products of betas, and these times m_i - m_0."""
        word, pairs = Ring(self.width), self._pairs()
        fields = {"words": Field((self.size, *self.shape), word)} if self.drop else {}
        if self.size > 1:
            tables = short_tables(pairs) if self.width == SHORT else digit_tables(pairs, (1, *pairs), self.width)
            subsets = Field((self.size - 1, (1 << (self.size - 1)) - 1, *self.shape), word)
            fields |= {**tables, "bits": subsets, "bits_m": subsets}
        return fields

    def derive(self, free: Tensors, fixed: FixedMasks) -> Tensors:
        """See `derived`."""
        r = free["r"]
        m = logical_shift(r, self.drop) if self.drop else torch.cat([torch.zeros_like(r[:1]), r])
        values = {"words": m} if self.drop else {}
        if self.size > 1:
            between = pair_differences(m)
            bits = products_of_outcomes(free["beta"].to(torch.int64), self.size)
            values |= {
                **(short_values(between, free) if self.width == SHORT else digit_values(between, free, self.width)),
                "bits": bits,
                "bits_m": bits * (m[1:] - m[0]).unsqueeze(1),
            }
        return values


async def largest(ctx: Context, x: Shared, width: int, drop: int = 0) -> Shared:
    """The largest word of each one to eight: [*S, k] -> [*S], shares modulo 2^width, whatever is above. Exact.

    Input: words, with drop = 0, whose differences are below 2^(width - 1); or numbers x modulo 2^(width + drop), whose
    word is floor(x / 2^drop) or one more, which the opening decides. width: SHORT or LONG.
    Opened: with drop all x_i + r_i over Z_2^(width + drop), else x_i - x_0 + r_i over Z_2^width for i > 0; for every
    pair what `below_short` or `below` opens of the words' difference, whose mask is m_i - m_j; all outcomes xor beta.
    The rest as `contest.largest`, in the smaller ring.
    Rounds 3, or 4 for long words (1 for one number, none for one word); online 13.1 (28.5) bytes per peer and four
    words, 7.9 (16.5) for three, 3.5 (7) for two, 42.9 (101.5) for eight; of numbers (width + drop) / 8 each and 0.9
    (2.5) per pair; correlation `CoarseContest`.
    Source: as `contest.largest`; that one opening cuts numbers and masks the comparisons of what is left is our own.
    """
    size = x.shape[-1]
    if size == 1 and not drop:
        return x.map(lambda t: t[..., 0])
    correlation = ctx.correlation(CoarseContest(x.shape[:-1], size, width, drop))
    numbers = x.map(lambda t: (t if drop else t[..., 1:] - t[..., :1]).movedim(-1, 0))
    c = (await ctx.open(numbers, correlation.mask("r"))).value
    if drop:
        c, m = logical_shift(c, drop), correlation["words"]
        least = (c[0] if ctx.first else 0) - m[0]
        c, m = c - c[:1], m - m[:1]
    else:
        none, least = torch.zeros_like(c[:1]), x.share[..., 0]
        c, m = torch.cat([none, c]), torch.cat([none, correlation["r"]])
    if size == 1:
        return Shared(least)
    between = Masked(pair_differences(c), Ring(width))
    if width == SHORT:
        outcomes = await below_short(ctx, between, correlation)
    else:
        found = await below(ctx, between, (0,), correlation, width)
        outcomes = SharedBits(found.share[0], BIT)
    e = (await ctx.open(outcomes, correlation.mask("beta"))).value
    more = picked(ctx.first, winning(e, size), correlation["bits"], c[1:], m[1:], correlation["bits_m"])
    return Shared(least + more)


def _contests(width: int, drop: int = 0) -> Contest:
    async def contest(ctx: Context, x: tuple[Shared, ...]) -> tuple[Shared, ...]:
        return (await largest(ctx, x[0], width, drop),)

    return contest


def _radix(most: int, rows: int) -> int:
    """How many meet in one contest, of rows of which none has more than `most`."""
    return _LAST if most <= _LAST and rows <= _FEW else MOST


async def maximum_along(ctx: Context, x: Shared, width: int, drop: int) -> Shared:
    """The largest words of numbers that lose drop > 0 bits, over the last axis: [*S, k] -> [*S], shares modulo 2^width.

    Input and words as `largest`. Rounds 3 (4) ceil(log4 k), 1 for k = 1; for up to 256 rows 3 (4) ceil(log4(k / 2)) if
    k > 4. Openings and correlation those of `largest`.
    """

    def radix() -> int:
        return _radix(x.shape[-1], x.share.numel() // max(1, x.shape[-1]))

    (x,) = await knock_out(ctx, (x,), radix(), _contests(width, drop))
    while x.shape[-1] > 1:
        (x,) = await knock_out(ctx, (x,), radix(), _contests(width))
    return x.map(lambda t: t[..., 0])


async def maximum_of_groups(ctx: Context, x: Shared, groups: torch.Tensor, width: int, drop: int) -> Shared:
    """As `maximum_along`, of each group of elements: [P] -> [G]; groups as in `tournament.maximum_of_groups`."""
    contest, left = _contests(width, drop), True
    while len(groups) and left:
        sizes = torch.bincount(groups)
        x, groups = await knock_out_of_groups(ctx, x, groups, _radix(int(sizes.max()), len(sizes)), contest)
        contest, left = _contests(width), len(groups) > len(sizes)
    return x
