"""Activations that are piecewise linear."""

from __future__ import annotations

from typing import Any

from mpcinfer.errors import UnsupportedError
from mpcinfer.nn.elementwise import encode, scale
from mpcinfer.nn.registry import operator
from mpcinfer.protocol import select
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.types import Shared


@operator("aten.relu.default")
async def relu(ctx: Context, x: Shared) -> Shared:
    """max(x, 0)."""
    return await select.relu(ctx, x)


@operator("aten.hardtanh.default", "aten.clamp.default")
async def clamp(ctx: Context, x: Shared, low: Any = None, high: Any = None) -> Shared:
    """x limited to [low, high], each a public number or None."""
    if low is None and high is None:
        return x
    if low is not None and high is not None and low > high:
        raise UnsupportedError("clamp with low > high")
    thresholds: list[int] = []
    slopes, offsets = [1], [0]
    if low is not None:
        thresholds.append(encode(low, x.frac_bits))
        slopes, offsets = [0, 1], [thresholds[0], 0]
    if high is not None:
        thresholds.append(encode(high, x.frac_bits))
        slopes, offsets = [*slopes, 0], [*offsets, thresholds[-1]]
    return await select.piecewise_linear(ctx, x, tuple(thresholds), tuple(slopes), tuple(offsets))


@operator("aten.relu6.default")
async def relu6(ctx: Context, x: Shared) -> Shared:
    """x limited to [0, 6]."""
    return await clamp(ctx, x, 0, 6)


@operator("aten.leaky_relu.default")
async def leaky_relu(ctx: Context, x: Shared, negative_slope: float = 0.01) -> Shared:
    """x where x >= 0, exactly, else negative_slope * x: ReLU, and `scale` of what it took away."""
    positive = await select.relu(ctx, x)
    return positive + await scale(ctx, x - positive, negative_slope)


@operator("aten.abs.default")
async def absolute(ctx: Context, x: Shared) -> Shared:
    """abs(x)."""
    return await select.piecewise_linear(ctx, x, (0,), (-1, 1), (0, 0))


@operator("aten.threshold.default")
async def threshold(ctx: Context, x: Shared, limit: float, value: float) -> Shared:
    """x where x > limit, else value."""
    at = encode(limit, x.frac_bits) + 1
    return await select.piecewise_linear(ctx, x, (at,), (0, 1), (encode(value, x.frac_bits), 0))
