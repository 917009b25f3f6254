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


async def maximum_along(ctx: Context, x: Shared) -> Shared:
    """Shares of the maximum over the last axis: [*S, k] -> [*S]. Exact.

    Rounds 4 ceil(log2 k); online 12.4 (k - 1) bytes per result and peer; openings: those of `select.maximum`.
    """
    while x.shape[-1] > 1:
        left, right, rest = _halves(x)
        (winners,) = await maximum(ctx, left, right)
        x = _append(winners, rest)
    return x.map(lambda t: t[..., 0])


async def argmax_along(ctx: Context, x: Shared) -> tuple[Shared, Shared]:
    """Shares of the maximum over the last axis and of its index (an integer, frac_bits 0); lowest index among equals.

    Rounds 4 ceil(log2 k); online about 20.4 (k - 1) bytes per result and peer; openings: those of `select.maximum`.
    """
    places = torch.arange(x.shape[-1], dtype=torch.int64, device=x.share.device).expand(x.share.shape)
    index = Shared(places.clone() if ctx.first else torch.zeros_like(places), 0)
    while x.shape[-1] > 1:
        left, right, rest = _halves(x)
        index_left, index_right, index_rest = _halves(index)
        winners, indices = await maximum(ctx, left, right, ((index_left, index_right),))
        x, index = _append(winners, rest), _append(indices, index_rest)
    return x.map(lambda t: t[..., 0]), index.map(lambda t: t[..., 0])
