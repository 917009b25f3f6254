"""Linear layers and convolutions: one opening of the input, one of the output to truncate it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpcinfer.errors import UnsupportedError
from mpcinfer.nn.registry import operator
from mpcinfer.nn.shape import per_axis
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.linear import fixed_product
from mpcinfer.protocol.multiply import multiply
from mpcinfer.protocol.truncate import truncate
from mpcinfer.protocol.types import Shared, Weight
from mpcinfer.ring.kernels import MATMUL, MATMUL_T, MUL, Bilinear


async def _bilinear(
    ctx: Context, x: Shared, w: Shared | Weight, bias: Shared | None, op: Bilinear, wide: bool = False
) -> Shared:
    """op(x, w) + bias, back at x's scale unless `wide`."""
    y = await (fixed_product(ctx, x, w, op) if isinstance(w, Weight) else multiply(ctx, x, w, op))
    if bias is not None:
        y = y + bias.rescaled(y.frac_bits)
    return y if wide else await truncate(ctx, y, y.frac_bits - x.frac_bits)


@operator("mpc.linear")
async def linear(ctx: Context, x: Shared, w: Weight, bias: Shared | None = None, *, wide: bool = False) -> Shared:
    """x @ w + bias, w laid out [in, out] (capture transposes torch's [out, in]); for `wide` see `graph.postpone`."""
    return await _bilinear(ctx, x, w, bias, MATMUL, wide)


@operator("mpc.tied_linear")
async def tied_linear(ctx: Context, x: Shared, w: Weight, bias: Shared | None = None, *, wide: bool = False) -> Shared:
    """x @ w.T + bias, w laid out [out, in], as the table of an embedding that it also is."""
    return await _bilinear(ctx, x, w, bias, MATMUL_T, wide)


@operator("aten.linear.default")
async def linear_of_secrets(ctx: Context, x: Shared, w: Shared, bias: Shared | None = None) -> Shared:
    """x @ w.T + bias where w was computed."""
    return await _bilinear(ctx, x, w.map(lambda t: t.transpose(-1, -2)), bias, MATMUL)


@operator("aten.matmul.default", "aten.mm.default", "aten.bmm.default")
async def matmul(ctx: Context, x: Any, y: Any) -> Shared:
    """x @ y."""
    if not isinstance(x, Shared):
        raise UnsupportedError("a matrix product needs a secret left operand")
    return await _bilinear(ctx, x, y, None, MATMUL)


async def _conv(
    ctx: Context, x: Shared, w: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int, dims: int
) -> Shared:
    stride, dilation = per_axis(stride, dims), per_axis(dilation, dims)
    batched = len(x.shape) == dims + 2
    if not batched:
        x = x.map(lambda t: t.unsqueeze(0))
    if isinstance(padding, str):
        if padding == "valid":
            padding = 0
        else:  # "same": torch puts the odd one at the end
            spans: Sequence[int] = [d * (k - 1) for d, k in zip(dilation, w.shape[2:], strict=True)]
            if any(span % 2 for span in spans):
                raise UnsupportedError('padding="same" with an even kernel; pad explicitly')
            padding = [span // 2 for span in spans]
    if bias is not None:
        bias = bias.map(lambda t: t.reshape(-1, *([1] * dims)))
    op = Bilinear("conv", (stride, per_axis(padding, dims), dilation, int(groups)))
    y = await _bilinear(ctx, x, w, bias, op)
    return y if batched else y.map(lambda t: t.squeeze(0))


@operator("aten.conv2d.default", "aten.conv2d.padding")
async def conv2d(
    ctx: Context,
    x: Shared,
    w: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Shared:
    """Two-dimensional convolution."""
    return await _conv(ctx, x, w, bias, stride, padding, dilation, groups, 2)


@operator("aten.conv1d.default", "aten.conv1d.padding")
async def conv1d(
    ctx: Context,
    x: Shared,
    w: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Shared:
    """One-dimensional convolution."""
    return await _conv(ctx, x, w, bias, stride, padding, dilation, groups, 1)


async def _conv_transpose(
    ctx: Context, x: Shared, w: Any, bias: Any, sizes: Sequence[Any], groups: int, dims: int
) -> Shared:
    """sizes: stride, padding, output_padding, dilation."""
    batched = len(x.shape) == dims + 2
    if not batched:
        x = x.map(lambda t: t.unsqueeze(0))
    if bias is not None:
        bias = bias.map(lambda t: t.reshape(-1, *([1] * dims)))
    op = Bilinear("conv_transpose", (*(per_axis(size, dims) for size in sizes), int(groups)))
    y = await _bilinear(ctx, x, w, bias, op)
    return y if batched else y.map(lambda t: t.squeeze(0))


@operator("aten.conv_transpose2d.input")
async def conv_transpose2d(
    ctx: Context,
    x: Shared,
    w: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Shared:
    """Two-dimensional transposed convolution; x is opened as it is, without the zeros between its elements."""
    return await _conv_transpose(ctx, x, w, bias, (stride, padding, output_padding, dilation), groups, 2)


@operator("aten.conv_transpose1d.default")
async def conv_transpose1d(
    ctx: Context,
    x: Shared,
    w: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Shared:
    """One-dimensional transposed convolution."""
    return await _conv_transpose(ctx, x, w, bias, (stride, padding, output_padding, dilation), groups, 1)


@operator("mpc.affine")
async def affine(ctx: Context, x: Shared, w: Weight, bias: Shared) -> Shared:
    """x * w + bias, broadcasting: what batch normalisation is in evaluation mode."""
    return await _bilinear(ctx, x, w, bias, MUL)
