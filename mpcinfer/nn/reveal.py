"""What leaves the parties: the last node of a Program turns logits into no more than the model owner allows."""

from __future__ import annotations

from mpcinfer.errors import UnsupportedError
from mpcinfer.nn.elementwise import width
from mpcinfer.nn.registry import operator
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.tournament import argmax_along, top_along
from mpcinfer.protocol.types import Shared


@operator("mpc.argmax", integer=True)
async def argmax(ctx: Context, x: Shared) -> Shared:
    """The index of the largest entry of the last axis: an integer."""
    return (await argmax_along(ctx, x, width(x)))[1]


@operator("mpc.top_k", integer=True)
async def top_k(ctx: Context, x: Shared, k: int) -> Shared:
    """The indices of the k largest entries of the last axis, largest first."""
    if not 1 <= k <= x.shape[-1]:
        raise UnsupportedError(f"top-k with k = {k} of {x.shape[-1]} classes")
    return (await top_along(ctx, x, k, width(x)))[1]


@operator("aten.argmax.default", integer=True)
async def aten_argmax(ctx: Context, x: Shared, dim: int | None = None, keepdim: bool = False) -> Shared:
    """torch.argmax; the lowest index among equals."""
    if dim is None:
        index = await argmax(ctx, x.map(lambda t: t.reshape(-1)))
        return index.map(lambda t: t.reshape([1] * len(x.shape))) if keepdim else index
    index = await argmax(ctx, x.map(lambda t: t.movedim(dim, -1).contiguous()))
    return index.map(lambda t: t.unsqueeze(dim)) if keepdim else index


@operator("aten.argmin.default", integer=True)
async def aten_argmin(ctx: Context, x: Shared, dim: int | None = None, keepdim: bool = False) -> Shared:
    """torch.argmin; the lowest index among equals."""
    return await aten_argmax(ctx, -x, dim, keepdim)
