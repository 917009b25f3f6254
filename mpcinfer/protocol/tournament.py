"""Maximum and argmax along an axis, by a knock-out tournament of radix 2."""

from __future__ import annotations

import torch

from mpcinfer.protocol.context import Context
from mpcinfer.protocol.select import maximum
from mpcinfer.protocol.types import Shared


def _halves(x: Shared) -> tuple[Shared, Shared, Shared]:
    """Even places, odd places, and the place left over (possibly empty) along the last axis."""
    size = x.shape[-1]
    even = size // 2 * 2
    return (
        x.map(lambda t: t[..., 0:even:2]),
        x.map(lambda t: t[..., 1:even:2]),
        x.map(lambda t: t[..., even:]),
    )


def _append(x: Shared, rest: Shared) -> Shared:
    return Shared(torch.cat([x.share, rest.share], dim=-1), x.frac_bits) if rest.shape[-1] else x


async def maximum_along(ctx: Context, x: Shared, width: int = 64) -> Shared:
    """Shares of the maximum over the last axis: [*S, k] -> [*S]. Exact.

    Rounds 4 ceil(log2 k); online 12.4 (k - 1) bytes per result and peer; openings: those of `select.maximum`.
    """
    while x.shape[-1] > 1:
        left, right, rest = _halves(x)
        (winners,) = await maximum(ctx, left, right, width=width)
        x = _append(winners, rest)
    return x.map(lambda t: t[..., 0])


async def maximum_of_groups(ctx: Context, x: Shared, groups: torch.Tensor, width: int = 64) -> Shared:
    """Shares of the maximum of each group of elements: [P] -> [G], for public groups of any sizes. Exact.

    groups: for each element the number of its group, int64 [P], ascending from 0 without gaps.
    Rounds 4 ceil(log2 k) for the largest group of k; online 12.4 (P - G) bytes per peer; openings: those of
    `select.maximum`.
    """
    while True:
        sizes = torch.bincount(groups)
        if not len(groups) or int(sizes.max()) == 1:
            return x
        starts = sizes.cumsum(0) - sizes
        place = torch.arange(len(groups)) - starts[groups]
        even = place % 2 == 0
        paired = even & (place + 1 < sizes[groups])
        left, alone = paired.nonzero()[:, 0], (even & ~paired).nonzero()[:, 0]
        (winners,) = await maximum(ctx, _picked(x, left), _picked(x, left + 1), width=width)
        order = torch.cat([left, alone]).argsort()
        x = _picked(_append(winners, _picked(x, alone)), order)
        groups = groups[torch.cat([left, alone])[order]]


def _picked(x: Shared, at: torch.Tensor) -> Shared:
    return x.map(lambda t: t[at.to(t.device)])


async def argmax_along(ctx: Context, x: Shared, width: int = 64) -> tuple[Shared, Shared]:
    """Shares of the maximum over the last axis and of its index (an integer, frac_bits 0); lowest index among equals.

    Rounds 4 ceil(log2 k); online about 20.4 (k - 1) bytes per result and peer; openings: those of `select.maximum`.
    """
    places = torch.arange(x.shape[-1], dtype=torch.int64, device=x.share.device).expand(x.share.shape)
    index = Shared(places.clone() if ctx.first else torch.zeros_like(places), 0)
    while x.shape[-1] > 1:
        left, right, rest = _halves(x)
        index_left, index_right, index_rest = _halves(index)
        winners, indices = await maximum(ctx, left, right, ((index_left, index_right),), width)
        x, index = _append(winners, rest), _append(indices, index_rest)
    return x.map(lambda t: t[..., 0]), index.map(lambda t: t[..., 0])


def _sorting_layers(n: int) -> list[list[tuple[int, int]]]:
    """Batcher's odd-even merge sort: layers of disjoint compare-exchanges (i < j)."""
    layers = []
    p = 1
    while p < n:
        k = p
        while k >= 1:
            layers.append(
                [
                    (i + j, i + j + k)
                    for j in range(k % p, n - k, 2 * k)
                    for i in range(min(k, n - j - k))
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p)
                ]
            )
            k //= 2
        p *= 2
    return layers


async def top_along(ctx: Context, x: Shared, k: int, width: int = 64) -> tuple[Shared, Shared]:
    """Shares of the k largest values over the last axis and of their indices, largest first.

    The order among equal values is unspecified. Rounds 4 a layer of Batcher's sorting network, log2(n)(log2(n)+1)/2
    layers; openings: those of `select.maximum`. The loser of a comparison is the sum minus the winner: free.
    """
    places = torch.arange(x.shape[-1], dtype=torch.int64, device=x.share.device).expand(x.share.shape)
    index = Shared(places.clone() if ctx.first else torch.zeros_like(places), 0)
    for layer in _sorting_layers(x.shape[-1]):
        upper = [i for i, _ in layer]
        lower = [j for _, j in layer]
        a, b = x.map(lambda t, at=upper: t[..., at]), x.map(lambda t, at=lower: t[..., at])  # type: ignore[misc]
        ia, ib = index.map(lambda t, at=upper: t[..., at]), index.map(lambda t, at=lower: t[..., at])  # type: ignore[misc]
        winner, winning = await maximum(ctx, a, b, ((ia, ib),), width)
        x, index = (
            _placed(x, upper, lower, winner, a + b - winner),
            _placed(index, upper, lower, winning, ia + ib - winning),
        )
    return x.map(lambda t: t[..., :k]), index.map(lambda t: t[..., :k])


def _placed(x: Shared, upper: list[int], lower: list[int], winners: Shared, losers: Shared) -> Shared:
    share = x.share.clone()
    share[..., upper] = winners.share
    share[..., lower] = losers.share
    return Shared(share, x.frac_bits)
