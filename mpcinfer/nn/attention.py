"""Scaled dot-product attention: of scores that are masked out by a public mask nothing is computed.

Unless keys and values come from a cache: then all scores that there is room for are computed, so that what a step costs
changes only when the cache has outgrown its room.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from mpcinfer.errors import UnsupportedError
from mpcinfer.nn.elementwise import FACTOR_BITS, add_public, fraction, scale, width
from mpcinfer.nn.public import MASKED_FROM
from mpcinfer.nn.registry import operator
from mpcinfer.nn.softmax import EXP_BITS, coarse_powers, count_bits, octaves_of_sum, powers_below, roomy_bits, span
from mpcinfer.protocol.cache import appending, cached_product
from mpcinfer.protocol.context import Begun, Context
from mpcinfer.protocol.inverse import divided
from mpcinfer.protocol.multiply import multiply
from mpcinfer.protocol.tournament import maximum_along, maximum_of_groups
from mpcinfer.protocol.truncate import OFFSET_BITS, truncate
from mpcinfer.protocol.types import Cached, Public, Shared
from mpcinfer.ring.digits import DIGIT_BITS
from mpcinfer.ring.kernels import MATMUL

# more fraction bits for queries that are multiplied by a scale that is no power of two
QUERY_BITS = 4
# what such a scale needs to be exact enough without them: scores of 64 are then off by 2^-11 at most
LEAST_FACTOR_BITS = 16
# of scores before they are truncated: more would leave too little above the window in which e^x is not zero
_MOST_BITS = 59


@operator("aten.scaled_dot_product_attention.default")
async def attention(
    ctx: Context,
    q: Shared,
    k: Shared | Cached,
    v: Shared | Cached,
    mask: Any = None,
    dropout: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    factor_bits: int = 0,
    reach: int | None = None,
    sum_bits: int | None = None,
) -> Shared:
    """softmax(q k^T scale + mask) v: q [*S, L, D], k [*S, M, D], v [*S, M, E] -> [*S, L, E].

    k and v: secrets, opened here under masks of their own, or both from a cache, opened before. Then M stands for its
    capacity in what follows, and no pair is skipped.
    mask: None; public, boolean (False: skipped) or additive (at most -2^14: skipped), [L, M] or more axes; or secret,
    added. Skipped pairs cost nothing but a masked zero in the product with v. A row that skips all gives zeros.
    Input: abs(q k^T scale) < 2^(58 - 2 frac_bits), abs(v) < 2^(32 - frac_bits) and 2^(62 - sum_bits - frac_bits).
    Output: error below 5e-5 of the largest abs(v), plus 1.5 units in the last place.
    factor_bits: what room there is in the products of q and k for a scale that is no power of two; reach: 2 to this
    power is above all scores, masks included, or None (see graph.bounds). Scores beyond it would wrap around. sum_bits:
    what room there is for the fraction bits of powers, 24 or fewer, and those that count them; None: for all.
    Scores are truncated by the exponential, not before. Where their reach is known, what is subtracted from a row is
    not its largest but a number near it (see `coarse_powers`); else public masks are added to truncated scores, and
    secret ones to scores of twice the fraction bits (one more round where they have more).
    Rounds 3 ceil(log4 M) + 11 for scores that reach 2^12 at most, 4 ceil(log4 M) + 11 up to 2^26 (of up to 256 rows
    M / 2 for M, if that is above 2), and one more where their reach is not known or there is too little room; per pair
    that is kept 24.2 bytes (28.9, 37.7), and 8 for every pair; offline about 160 (200, 276), and about 60 per number
    of the result. Of unknown reach more rounds, 33.3 and 137 bytes for many pairs: see `tournament.maximum_along`.
    """
    if dropout:
        raise UnsupportedError("dropout: a deployed model draws no random numbers")
    heads = q.shape
    if enable_gqa and q.shape[-3] != k.shape[-3]:  # queries that share keys stand one below the other
        q = q.map(lambda t: t.reshape(*t.shape[:-3], k.shape[-3], -1, t.shape[-1]))
    if isinstance(k, Cached) != isinstance(v, Cached):
        raise UnsupportedError("keys from a cache and values that are not, or the other way round")
    scores, bits = await _scores(ctx, q, k, 1 / math.sqrt(q.shape[-1]) if scale is None else scale, factor_bits, reach)
    columns = k.capacity if isinstance(k, Cached) else k.shape[-2]
    scores = scores.map(lambda t: t.reshape(*heads[:-1], columns))
    kept = EXP_BITS if sum_bits is None else min(EXP_BITS, sum_bits - count_bits(columns))
    if isinstance(k, Cached):
        weights = await _powers(ctx, scores, bits, reach, kept, hidden=_hidden(k, scores.shape, mask, causal))
    else:
        keep, added = _mask(scores.shape, mask, causal)
        roomy = span(scores, reach) is not None
        if isinstance(mask, Shared):
            # the room that was found for a factor's bits is that of products, not of sums with a mask
            spare = 0 if roomy else max(0, 2 * bits - scores.frac_bits)
            scores, bits = await truncate(ctx, scores, spare), bits - spare
            scores = scores + mask.rescaled(scores.frac_bits)
        elif roomy and added is not None:
            scores, added = add_public(ctx, scores, added << (scores.frac_bits - mask.frac_bits)), None
        weights = await _weights(ctx, scores, bits, reach, kept, keep, added)
    sums = weights.map(lambda t: t.sum(-1, keepdim=True))
    weights = weights.map(lambda t: t.reshape(*q.shape[:-1], columns))

    async def values(ctx: Context) -> Shared:
        if isinstance(v, Cached):
            y = await cached_product(ctx, weights, v, transposed=False)
        else:
            y = await multiply(ctx, weights, v, MATMUL)
        return y.map(lambda t: t.reshape(*heads[:-1], -1))

    y = values(ctx.scope("values"))
    return await divided(ctx.scope("divided"), y, sums, **octaves_of_sum(columns, about=True), frac_bits=v.frac_bits)


def _factor_bits(factor: float, frac_bits: int, room: int, reach: int | None) -> int:
    """How many bits of a public factor products of queries and keys are multiplied by; 0: it is for the queries."""
    most = FACTOR_BITS
    if reach is not None:  # more than is needed would leave scores no room above for coarse comparisons
        most = min(most, max(LEAST_FACTOR_BITS, roomy_bits(reach) - 2 * frac_bits + math.frexp(factor)[1]))
    bits = min(room, most)
    return bits if bits >= LEAST_FACTOR_BITS else 0


async def _scores(
    ctx: Context, q: Shared, k: Shared | Cached, factor: float, room: int, reach: int | None
) -> tuple[Shared, int]:
    """q k^T factor, and how many bits it is to be truncated by."""
    n, d = fraction(factor)
    bits = k.frac_bits
    if n & (n - 1) == 0:
        q = q.times(n)
    elif chosen := _factor_bits(factor, bits, room, reach):
        d = chosen - math.frexp(factor)[1]
        q = q.times(round(math.ldexp(factor, d)))
    else:
        wider = q.rescaled(q.frac_bits + QUERY_BITS)
        q = await scale(ctx.scope("scale"), wider, factor)
        bits, d = bits + QUERY_BITS, 0
    if isinstance(k, Cached):
        y = await cached_product(ctx, q, k, transposed=True)
    else:
        y = await multiply(ctx, q, k.map(lambda t: t.transpose(-1, -2)), MATMUL)
    return Shared(y.share, y.frac_bits + d), bits + d


def _mask(shape: tuple[int, ...], mask: Any, causal: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Which pairs are kept (None: all) and what is added to the scores, at the mask's scale, each of `shape`."""
    if causal:
        keep = torch.ones(shape[-2:], dtype=torch.bool).tril()
        return (None if bool(keep.all()) else keep.expand(shape)), None
    if mask is None or isinstance(mask, Shared):
        return None, None
    if not isinstance(mask, Public):
        raise UnsupportedError("an attention mask that is a fixed weight")
    if mask.value.dtype == torch.bool:
        keep, added = mask.value, None
    else:
        keep = mask.value > int(MASKED_FROM) << mask.frac_bits
        added = None if bool((mask.value[keep] == 0).all()) else mask.value.expand(shape)
    return (None if bool(keep.all()) else keep.expand(shape)), added


def _hidden(cache: Cached, shape: tuple[int, ...], mask: Any, causal: bool) -> torch.Tensor:
    """Which of the scores [*S, L, capacity] mean nothing: masked, or of rows that are not there yet."""
    if mask is not None and not isinstance(mask, Public):
        raise UnsupportedError("a secret mask over a cache")
    keep, added = _mask((*shape[:-1], cache.shape[-2]), mask, causal)
    if added is not None or (causal and shape[-2] > 1):
        raise UnsupportedError("over a cache, a mask of truth values that says which rows each query may see")
    hidden = torch.ones(shape, dtype=torch.bool)
    hidden[..., : cache.shape[-2]] = False if keep is None else ~keep
    return hidden


async def _comparable(
    ctx: Context, scores: Shared, bits: int, added: torch.Tensor | None = None
) -> tuple[Shared, int, int]:
    """Scores as their maximum is taken, how wide comparisons of them are, and how many bits they are still to lose.

    As a rule all `bits`, or three less, by which e^x is opened; public terms are at the scale that this leaves.
    """
    if added is not None:
        x = add_public(ctx, await truncate(ctx, scores, bits), added)
        return x, width(x), 0
    kept = -(-(scores.frac_bits - bits) // DIGIT_BITS) * DIGIT_BITS
    x = await truncate(ctx, scores, max(0, scores.frac_bits - _MOST_BITS))
    return x, 64, x.frac_bits - kept


async def _powers(
    ctx: Context,
    scores: Shared,
    bits: int,
    reach: int | None,
    frac_bits: int,
    *,
    added: torch.Tensor | None = None,
    groups: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
) -> Shared:
    """e^(score - about the largest) of rows, or of groups of elements; zero where hidden."""

    def visible(x: Shared, far: int) -> Shared:
        """What is hidden gets a number that is far from none of the scores that it is compared with, and below all."""
        if hidden is None:
            return x
        return x.map(lambda t: torch.where(hidden.to(t.device), far if ctx.first else 0, t))

    room = span(scores, reach)
    if room is not None:
        x = visible(scores, -(1 << (scores.frac_bits + room + 1)))
        powers = await coarse_powers(ctx, x, room, groups, frac_bits)
    else:
        x, compared, d = await _comparable(ctx, scores, bits, added)
        x = visible(x, -(1 << OFFSET_BITS))
        if groups is None:
            top = (await maximum_along(ctx, x, compared)).map(lambda t: t.unsqueeze(-1))
        else:
            top = (await maximum_of_groups(ctx, x, groups, compared)).map(lambda t: t[groups.to(t.device)])
        powers = await powers_below(ctx, x - top, d, frac_bits)
    return powers if hidden is None else powers.map(lambda t: torch.where(hidden.to(t.device), 0, t))


async def _weights(
    ctx: Context,
    scores: Shared,
    bits: int,
    reach: int | None,
    frac_bits: int,
    keep: torch.Tensor | None,
    added: torch.Tensor | None,
) -> Shared:
    """e^(score - about the row's largest), zero where skipped, [*S, L, M]."""
    if keep is None:
        return await _powers(ctx, scores, bits, reach, frac_bits, added=added)
    at = keep.reshape(-1).nonzero()[:, 0]
    kept = scores.map(lambda t: t.reshape(-1)[at.to(t.device)])
    groups = torch.unique_consecutive(at // scores.shape[-1], return_inverse=True)[1]
    more = None if added is None else added.reshape(-1)[at]
    powers = await _powers(ctx, kept, bits, reach, frac_bits, added=more, groups=groups)

    def placed(t: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(scores.shape, dtype=torch.int64, device=t.device).reshape(-1)
        return zeros.index_copy(0, at.to(t.device), t).reshape(scores.shape)

    return powers.map(placed)


@operator("mpc.append")
async def append_rows(ctx: Context, cache: Cached, rows: Shared) -> Begun:
    """torch.cat([cache, rows], -2), by which a cache grows; attention over it opens its queries in the same round."""
    return appending(ctx, cache, rows)
