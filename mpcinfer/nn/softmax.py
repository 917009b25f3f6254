"""Softmax."""

from __future__ import annotations

from mpcinfer.nn.registry import operator
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.exponential import exp_nonpositive
from mpcinfer.protocol.inverse import reciprocal
from mpcinfer.protocol.multiply import multiply
from mpcinfer.protocol.tournament import maximum_along
from mpcinfer.protocol.truncate import truncate
from mpcinfer.protocol.types import Shared

# exponentials keep this many fraction bits, so that a long row's sum does not gather their rounding errors
_EXP_BITS = 24


@operator("mpc.softmax")
async def softmax(ctx: Context, x: Shared) -> Shared:
    """Softmax over the last axis: [*S, k] -> [*S, k]. Error below 5e-5 plus one unit in the last place.

    The maximum, x minus it, e^x, the sum, one reciprocal a row, the product, a truncation. Differences within a row
    must stay below 2^59 units in the last place.
    Rounds 4 ceil(log2 k) + 15; online 50.4 bytes per element and peer, and 48 + 8.75 ceil(log2 k) per row (51.2 per
    element for k = 128); offline 173 bytes per element for k = 128; openings: those of the protocols named.
    """
    top = await maximum_along(ctx, x)
    powers = await exp_nonpositive(ctx, x - top.map(lambda t: t.unsqueeze(-1)), max(_EXP_BITS, x.frac_bits))
    # from 1, the maximum's own, to k; a rounding error beyond either end meets the reciprocal of that end
    octaves = max(1, (x.shape[-1] - 1).bit_length())
    inverse = await reciprocal(ctx, powers.map(lambda t: t.sum(-1, keepdim=True)), low=0, high=octaves)
    y = await multiply(ctx, powers, inverse)  # below 2^55
    return await truncate(ctx, y, y.frac_bits - x.frac_bits)


@operator("aten.softmax.int", "aten._softmax.default")
async def aten_softmax(ctx: Context, x: Shared, dim: int, dtype: object = None) -> Shared:
    """torch.softmax over any axis; `dtype` (`half_to_float`) means nothing for shares."""
    y = await softmax(ctx, x.map(lambda t: t.movedim(dim, -1)))
    return y.map(lambda t: t.movedim(-1, dim))
