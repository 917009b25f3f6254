"""One small run of everything that is slow the first time, so that no client waits for it."""

from __future__ import annotations

import secrets

import torch

from mpcinfer.protocol.context import Context
from mpcinfer.protocol.linear import fixed_product, mask_weight
from mpcinfer.protocol.local import LocalWorld
from mpcinfer.protocol.select import relu
from mpcinfer.protocol.tracing import trace
from mpcinfer.protocol.truncate import truncate
from mpcinfer.protocol.types import Shared, Weight
from mpcinfer.ring.kernels import Bilinear

_MATMUL = Bilinear("matmul")


async def _layer(ctx: Context, x: Shared) -> Shared:
    return await relu(ctx, await truncate(ctx, await fixed_product(ctx, x, ctx.weights["w"], _MATMUL), 16))


def warm_up() -> None:
    """Load the compiled kernels, and torch's meta and int64 paths: a linear layer and a ReLU, traced and run."""
    world = LocalWorld(2, secrets.token_bytes(32))
    zeros = torch.zeros(2, 2, dtype=torch.int64)
    weights: list[dict[str, Weight]] = [{"w": w} for w in world.run(_mask, world.share(zeros, 16))]
    world.run(_layer, world.share(zeros, 16), weights=weights)
    meta = zeros.to("meta")
    trace(lambda ctx: _layer(ctx, Shared(meta, 16)), parties=2, weights={"w": Weight("w", meta, meta, 16)})


async def _mask(ctx: Context, w: Shared) -> Weight:
    return await mask_weight(ctx, "w", w)
