"""Pooling: maxima by tournaments, averages by local sums and one truncation, or two (`divide`)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

from mpcinfer.errors import UnsupportedError
from mpcinfer.nn.elementwise import divide, width
from mpcinfer.nn.registry import operator
from mpcinfer.nn.shape import per_axis
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.tournament import maximum_along
from mpcinfer.protocol.types import Shared
from mpcinfer.ring.kernels import pool_windows


def _pad(ctx: Context, x: Shared, padding: tuple[int, ...], beyond: tuple[int, ...], value: int) -> Shared:
    if not any(padding + beyond):
        return x
    flat = _flat(padding, beyond)
    return x.map(lambda t: functional.pad(t, flat, value=value if ctx.first else 0))


def _flat(padding: tuple[int, ...], beyond: tuple[int, ...]) -> list[int]:
    """The way torch takes them: from the last axis to the first, before and after."""
    pairs = list(zip(padding, beyond, strict=True))
    return [p for size, more in reversed(pairs) for p in (size, size + more)]


def _beyond(
    spatial: tuple[int, ...],
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    padding: tuple[int, ...],
    dilations: tuple[int, ...],
) -> tuple[int, ...]:
    """How far windows reach beyond the padding with ceil_mode: one more, if it starts before the padding at the end."""
    found = []
    for size, kernel, stride, pad, dilation in zip(spatial, sizes, strides, padding, dilations, strict=True):
        span, whole = dilation * (kernel - 1) + 1, size + 2 * pad
        out = -(-(whole - span) // stride) + 1
        out -= (out - 1) * stride >= size + pad
        found.append(max(0, (out - 1) * stride + span - whole))
    return tuple(found)


async def _max_pool(
    ctx: Context, x: Shared, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, dims: int
) -> Shared:
    sizes = per_axis(kernel, dims)
    strides = per_axis(stride, dims) if stride else sizes
    dilations, pads = per_axis(dilation, dims), per_axis(padding, dims)
    beyond = _beyond(x.shape[-dims:], sizes, strides, pads, dilations) if ceil_mode else (0,) * dims
    # below every number of the model, and no further from them than they are from each other
    x = _pad(ctx, x, pads, beyond, -1 << (62 - x.frac_bits))
    # a maximum is separable: one axis after the other compares less than whole windows
    for axis in range(dims):
        at = axis - dims

        def windows(t: torch.Tensor, axis: int = axis, at: int = at) -> torch.Tensor:
            moved = t.movedim(at, -1).contiguous()
            return pool_windows(moved, (sizes[axis],), (strides[axis],), (dilations[axis],))

        if sizes[axis] > 1 or strides[axis] > 1:
            x = await maximum_along(ctx, x.map(windows), width(x))
            x = x.map(lambda t, at=at: t.movedim(-1, at))  # type: ignore[misc]
    return x


@operator("aten.max_pool2d.default")
async def max_pool2d(
    ctx: Context,
    x: Shared,
    kernel: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Shared:
    """Maximum over windows of the last two axes."""
    return await _max_pool(ctx, x, kernel, stride, padding, dilation, ceil_mode, 2)


@operator("aten.max_pool1d.default")
async def max_pool1d(
    ctx: Context,
    x: Shared,
    kernel: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Shared:
    """Maximum over windows of the last axis."""
    return await _max_pool(ctx, x, kernel, stride, padding, dilation, ceil_mode, 1)


async def _avg_pool(
    ctx: Context,
    x: Shared,
    kernel: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    include_pad: bool,
    divisor: Any,
    dims: int,
) -> Shared:
    sizes = per_axis(kernel, dims)
    strides = per_axis(stride, dims) if stride else sizes
    pads = per_axis(padding, dims)
    spatial = x.shape[-dims:]
    axes = tuple(range(-dims, 0))
    ones = (1,) * dims
    beyond = _beyond(spatial, sizes, strides, pads, ones) if ceil_mode else (0,) * dims
    sums = _pad(ctx, x, pads, beyond, 0).map(lambda t: pool_windows(t.contiguous(), sizes, strides, ones).sum(axes))
    if divisor is not None:
        return await divide(ctx, sums, int(divisor))
    if (include_pad or not any(pads)) and not any(beyond):
        return await divide(ctx, sums, math.prod(sizes))
    counted = functional.pad(torch.ones(spatial, dtype=torch.int64), _flat(pads, (0,) * dims), value=int(include_pad))
    inside = functional.pad(counted, _flat((0,) * dims, beyond))
    return await divide(ctx, sums, pool_windows(inside, sizes, strides, ones).sum(axes))


@operator("aten.avg_pool2d.default")
async def avg_pool2d(
    ctx: Context,
    x: Shared,
    kernel: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: Any = None,
) -> Shared:
    """Mean over windows of the last two axes."""
    return await _avg_pool(ctx, x, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override, 2)


@operator("aten.avg_pool1d.default")
async def avg_pool1d(
    ctx: Context,
    x: Shared,
    kernel: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Shared:
    """Mean over windows of the last axis."""
    return await _avg_pool(ctx, x, kernel, stride, padding, ceil_mode, count_include_pad, None, 1)


def _adaptive(size: int, out: int) -> list[tuple[int, int]]:
    """torch's windows: [floor(i size / out), ceil((i + 1) size / out))."""
    return [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]


def _targets(x: Shared, output_size: Any, dims: int) -> list[int]:
    sizes = list(output_size) if isinstance(output_size, list | tuple) else [output_size] * dims
    return [x.shape[i - dims] if size is None else int(size) for i, size in enumerate(sizes)]


@operator("aten.adaptive_avg_pool2d.default", "aten._adaptive_avg_pool2d.default")
async def adaptive_avg_pool2d(ctx: Context, x: Shared, output_size: Any) -> Shared:
    """Mean over torch's adaptive windows."""
    return await _adaptive_avg(ctx, x, _targets(x, output_size, 2))


@operator("aten.adaptive_avg_pool1d.default")
async def adaptive_avg_pool1d(ctx: Context, x: Shared, output_size: Any) -> Shared:
    """Mean over torch's adaptive windows."""
    return await _adaptive_avg(ctx, x, _targets(x, output_size, 1))


async def _adaptive_avg(ctx: Context, x: Shared, targets: list[int]) -> Shared:
    dims = len(targets)
    counts = torch.ones((), dtype=torch.int64)
    for axis, out in enumerate(targets):
        at = axis - dims
        windows = _adaptive(x.shape[at], out)

        def sums(t: torch.Tensor, at: int = at, windows: list[tuple[int, int]] = windows) -> torch.Tensor:
            return torch.stack([t.narrow(at, a, b - a).sum(at) for a, b in windows], dim=at)

        x = x.map(sums)
        lengths = torch.tensor([b - a for a, b in windows], dtype=torch.int64)
        counts = counts[..., None] * lengths
    uniform = int(counts.flatten()[0])
    return await divide(ctx, x, uniform if bool((counts == uniform).all()) else counts)


@operator("aten.adaptive_max_pool2d.default", "aten.adaptive_max_pool1d.default")
async def adaptive_max_pool(ctx: Context, x: Shared, output_size: Any) -> list[Shared]:
    """Maximum over adaptive windows of equal size; the indices torch also returns are not computed."""
    dims = len(output_size)
    targets = _targets(x, output_size, dims)
    kernel = [x.shape[i - dims] // out for i, out in enumerate(targets)]
    if any(x.shape[i - dims] % out for i, out in enumerate(targets)):
        raise UnsupportedError("adaptive max pooling into windows of unequal size")
    return [await _max_pool(ctx, x, kernel, kernel, 0, 1, False, dims)]
