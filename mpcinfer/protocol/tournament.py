"""Maximum and argmax along an axis, by a knock-out tournament of radix 4, or 2 for many numbers."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import torch

from mpcinfer.protocol import contest
from mpcinfer.protocol.context import Context, together
from mpcinfer.protocol.lift import lift
from mpcinfer.protocol.select import maximum
from mpcinfer.protocol.types import Shared

# with more numbers than this, comparing all pairs of four costs more time than the rounds it saves
_FEW = 1 << 14
# with more numbers than this, carrying places of 8 bits is worth the round in which they become whole numbers
_MANY = 1 << 14
_PLACE_BITS = 8


def _radix(x: Shared) -> int:
    """How many meet in one contest."""
    return contest.MOST if x.share.numel() <= _FEW else 2


async def _contest(
    ctx: Context, x: Shared, carried: tuple[Shared, ...], width: int, bits: int, placed: bool
) -> tuple[Shared, ...]:
    """The winners of contests along the last axis, one to four in each, what they carry, their places if `placed`."""
    size = x.shape[-1]
    if size == 1:
        found = tuple(y.map(lambda t: t[..., 0]) for y in (x, *carried))
        return (*found, Shared(torch.zeros_like(found[0].share))) if placed else found
    if size == 2:
        left, right = ([y.map(lambda t, i=i: t[..., i]) for y in (x, *carried)] for i in range(2))  # type: ignore[misc]
        pairs = tuple(zip(left[1:], right[1:], strict=True))
        return tuple(await maximum(ctx, left[0], right[0], pairs, width, bits=bits, placed=placed))
    largest, others = await contest.largest(ctx, x, carried, width, bits=bits, placed=placed)
    return (largest, *others)


Contest = Callable[[Context, tuple[Shared, ...]], Coroutine[Any, Any, tuple[Shared, ...]]]


async def knock_out(ctx: Context, x: tuple[Shared, ...], radix: int, contest: Contest) -> tuple[Shared, ...]:
    """Who is left of each `radix` that meet along the last axis, the last of them fewer perhaps, and what they carry.

    x: numbers and what each carries, all of one shape [*S, k]. contest: of [*S, j], 0 < j <= radix, makes [*S].
    """
    size = x[0].shape[-1]
    whole = size // radix * radix

    def grouped(y: Shared, start: int, group: int) -> Shared:
        count = (y.shape[-1] - start) // group
        return y.map(lambda t: t[..., start : start + count * group].reshape(*t.shape[:-1], count, group))

    parts = tuple(grouped(y, 0, radix) for y in x) if whole else ()
    rest = tuple(grouped(y, whole, size - whole) for y in x) if size > whole else ()
    results = await together(*(contest(ctx, part) for part in (parts, rest) if part))
    return tuple(
        Shared(torch.cat([part.share for part in each], -1), each[0].frac_bits) for each in zip(*results, strict=True)
    )


async def knock_out_of_groups(
    ctx: Context, x: Shared, groups: torch.Tensor, radix: int, contest: Contest
) -> tuple[Shared, torch.Tensor]:
    """As `knock_out`, within each group of elements: [P] -> [Q], and the groups of who is left."""
    sizes = torch.bincount(groups)
    starts = sizes.cumsum(0) - sizes
    place = torch.arange(len(groups)) - starts[groups]
    leaders = (place % radix == 0).nonzero()[:, 0]
    members = (sizes[groups] - place).clamp(max=radix)[leaders]
    by_size = {size: leaders[members == size] for size in range(1, radix + 1) if bool((members == size).any())}
    results = await together(
        *(contest(ctx, (_picked(x, first.unsqueeze(1) + torch.arange(size)),)) for size, first in by_size.items())
    )
    order = torch.cat(list(by_size.values())).argsort()
    x = _picked(Shared(torch.cat([winners.share for (winners,) in results]), x.frac_bits), order)
    return x, groups[leaders]


def _contests(width: int, bits: int = 64, placed: bool = False) -> Contest:
    return lambda ctx, x: _contest(ctx, x[0], x[1:], width, bits, placed)


async def maximum_along(ctx: Context, x: Shared, width: int = 64) -> Shared:
    """Shares of the maximum over the last axis: [*S, k] -> [*S]. Exact.

    Rounds 4 ceil(log4 k); online 16.75 (k - 1) bytes per result and peer. As long as more than 16,384 numbers are left,
    two meet at a time, not four: rounds 4 ceil(log2 k), 12.4 (k - 1) bytes. Openings: those of `select.maximum` and
    `contest.largest`.
    """
    while x.shape[-1] > 1:
        (x,) = await knock_out(ctx, (x,), _radix(x), _contests(width))
    return x.map(lambda t: t[..., 0])


async def maximum_of_groups(ctx: Context, x: Shared, groups: torch.Tensor, width: int = 64) -> Shared:
    """Shares of the maximum of each group of elements: [P] -> [G], for public groups of any sizes. Exact.

    groups: for each element the number of its group, int64 [P], ascending from 0 without gaps.
    Rounds and bytes as `maximum_along`, for the largest group and for each element but one of a group.
    """
    while len(groups) and int(torch.bincount(groups).max()) > 1:
        x, groups = await knock_out_of_groups(ctx, x, groups, _radix(x), _contests(width))
    return x


def _picked(x: Shared, at: torch.Tensor) -> Shared:
    return x.map(lambda t: t[at.to(t.device)])


def _places(ctx: Context, x: Shared) -> Shared:
    """Each element's place along the last axis, an integer."""
    places = torch.arange(x.shape[-1], dtype=torch.int64, device=x.share.device).expand(x.share.shape)
    return Shared(places.clone() if ctx.first else torch.zeros_like(places), 0)


async def argmax_along(ctx: Context, x: Shared, width: int = 64) -> tuple[Shared, Shared]:
    """Shares of the maximum over the last axis and of its index (an integer, frac_bits 0); lowest index among equals.

    Of who is left of a group of numbers the place in that group is carried to the next level. The first level knows it
    from the outcomes; at a later one what is carried is opened in differences under masks: while groups and thus places
    are small, and many numbers are left, modulo 2^8.
    Rounds and openings as `maximum_along`; 8 bytes more per loser and peer after the first level. With more than 16,384
    numbers left after that 1 byte, as long as groups have at most 128 numbers; then a round more, of `lift`.
    """
    if x.shape[-1] == 1:
        return x.map(lambda t: t[..., 0]), Shared(torch.zeros_like(x.share[..., 0]))
    group = _radix(x)
    x, place = await knock_out(ctx, (x,), group, _contests(width, placed=True))
    bits = _PLACE_BITS if x.shape[-1] > 1 and x.share.numel() > _MANY else 64
    while x.shape[-1] > 1:
        radix = _radix(x)
        if group * radix >= 1 << bits:  # bits = 64: never
            place, bits = await lift(ctx, place, bits), 64
        if ctx.first:
            place = place.map(lambda t, r=radix, g=group: t + torch.arange(t.shape[-1], device=t.device) % r * g)  # type: ignore[misc]
        x, place = await knock_out(ctx, (x, place), radix, _contests(width, bits))
        group *= radix
    if bits < 64:
        place = await lift(ctx, place, bits)
    return x.map(lambda t: t[..., 0]), place.map(lambda t: t[..., 0])


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
    index = _places(ctx, x)
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
