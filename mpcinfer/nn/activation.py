"""Activations: piecewise linear ones, exactly, and smooth ones as splines."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mpcinfer.errors import UnsupportedError
from mpcinfer.nn.elementwise import add_public, encode, product, reachable, scale, width
from mpcinfer.nn.registry import operator
from mpcinfer.protocol import select
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.piecewise import ARGUMENT_BITS, piecewise, splines
from mpcinfer.protocol.truncate import truncate
from mpcinfer.protocol.truncated_product import truncated_product
from mpcinfer.protocol.types import Shared

_LEAST_THRESHOLD = 10.0  # of softplus, where it is 5e-5 from its asymptote
SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805


@operator("aten.relu.default")
async def relu(ctx: Context, x: Shared) -> Shared:
    """max(x, 0)."""
    return await select.relu(ctx, x, width(x))


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
        thresholds.append(encode(reachable(x, low), x.frac_bits))
        slopes, offsets = [0, 1], [encode(low, x.frac_bits), 0]
    if high is not None:
        thresholds.append(encode(reachable(x, high), x.frac_bits))
        slopes, offsets = [*slopes, 0], [*offsets, encode(high, x.frac_bits)]
    return await select.piecewise_linear(ctx, x, tuple(thresholds), tuple(slopes), tuple(offsets), width(x))


@operator("aten.clamp_min.default")
async def clamp_min(ctx: Context, x: Shared, low: float) -> Shared:
    """max(x, low)."""
    return await clamp(ctx, x, low)


@operator("aten.clamp_max.default")
async def clamp_max(ctx: Context, x: Shared, high: float) -> Shared:
    """min(x, high)."""
    return await clamp(ctx, x, None, high)


@operator("aten.relu6.default")
async def relu6(ctx: Context, x: Shared) -> Shared:
    """x limited to [0, 6]."""
    return await clamp(ctx, x, 0, 6)


@operator("aten.leaky_relu.default")
async def leaky_relu(ctx: Context, x: Shared, negative_slope: float = 0.01) -> Shared:
    """x where x >= 0, exactly, else negative_slope * x: ReLU, and `scale` of what it took away."""
    positive = await select.relu(ctx, x, width(x))
    return positive + await scale(ctx, x - positive, negative_slope)


@operator("aten.abs.default")
async def absolute(ctx: Context, x: Shared) -> Shared:
    """abs(x)."""
    return await select.piecewise_linear(ctx, x, (0,), (-1, 1), (0, 0), width(x))


@operator("aten.threshold.default")
async def threshold(ctx: Context, x: Shared, limit: float, value: float) -> Shared:
    """x where x > limit, else value."""
    at = encode(reachable(x, limit), x.frac_bits) + 1
    return await select.piecewise_linear(ctx, x, (at,), (0, 1), (encode(value, x.frac_bits), 0), width(x))


def _smooth(name: str) -> Any:
    async def rule(ctx: Context, x: Shared) -> Shared:
        return await piecewise(ctx, x, splines()[name], width(x))

    return rule


for _name in "silu sigmoid tanh erf hardswish mish".split():
    operator(f"aten.{_name}.default")(_smooth(_name))


@operator("aten.gelu.default")
async def gelu(ctx: Context, x: Shared, approximate: str = "none") -> Shared:
    """x times the normal distribution function of x, or torch's tanh approximation of that."""
    return await piecewise(ctx, x, splines()["gelu_tanh" if approximate == "tanh" else "gelu"], width(x))


@operator("mpc.gate")
async def gate(ctx: Context, x: Shared, u: Shared, function: str) -> Shared:
    """function(x) * u for two products that were not truncated (ValueError otherwise); see `graph.gate`.

    Neither takes a round of its own to be truncated: x is when its pieces are chosen, u when it is multiplied.
    """
    if x.frac_bits != 2 * ARGUMENT_BITS or u.frac_bits != 2 * ARGUMENT_BITS:
        raise ValueError("a gate takes two products that were not truncated")
    shape = np.broadcast_shapes(x.shape, u.shape)
    x, u = (y.map(lambda t: t.expand(shape)) for y in (x, u))
    f = await piecewise(ctx, x, splines()[function], widest=math.inf)
    return await truncate(ctx, await truncated_product(ctx, u, ARGUMENT_BITS, f), ARGUMENT_BITS)


@operator("aten.hardsigmoid.default")
async def hardsigmoid(ctx: Context, x: Shared) -> Shared:
    """x / 6 + 1/2, limited to [0, 1]."""
    return await clamp(ctx, add_public(ctx, await scale(ctx, x, 1 / 6), 1 << (x.frac_bits - 1)), 0, 1)


@operator("aten.softplus.default")
async def softplus(ctx: Context, x: Shared, beta: float = 1, threshold: float = 20) -> Shared:
    """log(1 + e^(beta x)) / beta; torch's threshold only says where the asymptote may be taken, unless it is low."""
    if threshold < _LEAST_THRESHOLD:
        raise UnsupportedError(f"softplus that is its asymptote from {threshold:g} on, where that is no approximation")
    y = await piecewise(ctx, await scale(ctx, x, beta), splines()["softplus"])
    return await scale(ctx, y, 1 / beta)


@operator("aten.log_sigmoid.default")
async def log_sigmoid(ctx: Context, x: Shared) -> Shared:
    """-softplus(-x)."""
    return -await softplus(ctx, -x)


@operator("aten.elu.default")
async def elu(ctx: Context, x: Shared, alpha: float = 1, factor: float = 1, input_scale: float = 1) -> Shared:
    """factor * x where x >= 0, else factor * alpha * (e^(input_scale x) - 1)."""
    if alpha == factor == input_scale == 1:
        return await piecewise(ctx, x, splines()["elu"], width(x))
    positive = await select.relu(ctx, x, width(x))
    # of the other sign's part elu(z) is z for z >= 0, so min(x, 0) in, nothing but the exponential out
    exponential = await piecewise(ctx, await scale(ctx, x - positive, input_scale), splines()["elu"])
    return await scale(ctx, positive, factor) + await scale(ctx, exponential, factor * alpha)


@operator("aten.selu.default")
async def selu(ctx: Context, x: Shared) -> Shared:
    """torch.selu."""
    return await elu(ctx, x, SELU_ALPHA, SELU_SCALE)


@operator("aten.celu.default")
async def celu(ctx: Context, x: Shared, alpha: float = 1) -> Shared:
    """torch.celu."""
    return await elu(ctx, x, alpha, 1, 1 / alpha)


@operator("aten.glu.default")
async def glu(ctx: Context, x: Shared, dim: int = -1) -> Shared:
    """The first half times the sigmoid of the second half."""
    half = x.shape[dim] // 2
    gate = await piecewise(ctx, x.map(lambda t: t.narrow(dim, half, half)), splines()["sigmoid"])
    y: Shared = await product(ctx.scope("product"), x.map(lambda t: t.narrow(dim, 0, half)), gate)
    return y


@operator("aten.prelu.default")
async def prelu(ctx: Context, x: Shared, weight: Shared) -> Shared:
    """x where x >= 0, else weight * x, one weight a channel."""
    column = weight.map(lambda t: t.reshape(-1, *([1] * max(0, len(x.shape) - 2))) if t.numel() > 1 else t)
    positive = await select.relu(ctx, x, width(x))
    y: Shared = await product(ctx, x - positive, column)
    return positive + y
