"""ONNX operators on windows: convolutions and pools."""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from typing import Any

from torch import Tensor, ones
from torch.nn import functional

from mpcinfer.errors import UnsupportedError
from mpcinfer.models.onnx.table import operator


def _pads(
    x: Tensor, kernel: list[int], strides: list[int], dilations: list[int], pads: list[int] | None, auto_pad: str
) -> tuple[list[int], list[int]]:
    """What is added before and after each spatial axis."""
    dims = len(kernel)
    if auto_pad in ("NOTSET", ""):
        pads = pads or [0] * (2 * dims)
        return list(pads[:dims]), list(pads[dims:])
    if auto_pad == "VALID":
        return [0] * dims, [0] * dims
    totals = [
        max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        for size, k, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True)
    ]
    less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return (less, more) if auto_pad == "SAME_UPPER" else (more, less)


def _padded(x: Tensor, before: list[int], after: list[int], mode: str = "constant") -> Tensor:
    flat = [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair]
    return functional.pad(x, flat, mode=mode) if any(flat) else x


def _of_rank(dims: int, **functions: Any) -> Any:
    try:
        return functions[f"_{dims}d"]
    except KeyError:
        raise UnsupportedError(f"works on {dims} spatial axes; supported are 1 and 2") from None


@operator()
def Conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    dims = w.dim() - 2
    strides, dilations = strides or [1] * dims, dilations or [1] * dims
    before, after = _pads(x, list(w.shape[2:]), strides, dilations, pads, auto_pad)
    conv = _of_rank(dims, _1d=functional.conv1d, _2d=functional.conv2d)
    if before != after:
        x, before = _padded(x, before, after), [0] * dims
    return conv(x, w, b, strides, before, dilations, group)


@operator()
def ConvTranspose(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    output_padding: list[int] | None = None,
    output_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    dims = w.dim() - 2
    strides, dilations = strides or [1] * dims, dilations or [1] * dims
    more = output_padding or [0] * dims
    if output_shape or auto_pad.startswith("SAME"):
        wanted = output_shape or [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
        totals = [
            stride * (size - 1) + extra + (k - 1) * dilation + 1 - out
            for size, stride, extra, k, dilation, out in zip(
                x.shape[2:], strides, more, w.shape[2:], dilations, wanted[-dims:], strict=True
            )
        ]
        if min(totals) < 0:
            raise UnsupportedError("an output larger than what the kernel reaches")
        less, rest = [t // 2 for t in totals], [t - t // 2 for t in totals]
        before, after = (less, rest) if auto_pad == "SAME_UPPER" else (rest, less)
    else:
        before, after = _pads(x, list(w.shape[2:]), strides, dilations, pads, auto_pad)
    conv = _of_rank(dims, _1d=functional.conv_transpose1d, _2d=functional.conv_transpose2d)
    if before == after:
        return conv(x, w, b, strides, before, more, group, dilations)
    whole = conv(x, w, b, strides, 0, more, group, dilations)
    return _padded(whole, [-p for p in before], [-p for p in after])


@operator()
def MaxPool(
    x: Tensor,
    kernel_shape: list[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: list[int] | None = None,
    pads: list[int] | None = None,
    storage_order: int = 0,
    strides: list[int] | None = None,
) -> Tensor:
    dims = len(kernel_shape)
    strides, dilations = strides or [1] * dims, dilations or [1] * dims
    before, after = _pads(x, kernel_shape, strides, dilations, pads, auto_pad)
    pool = _of_rank(dims, _1d=functional.max_pool1d, _2d=functional.max_pool2d)
    if before != after or any(2 * p > k for p, k in zip(before, kernel_shape, strict=True)):
        # a window that reaches over the edge has the edge in it, so repeating that changes no maximum
        if any(d > 1 for d in dilations) or any(
            p >= k for p, k in zip([*before, *after], kernel_shape * 2, strict=True)
        ):
            raise UnsupportedError("uneven padding of dilated windows, or windows of padding only")
        x, before = _padded(x, before, after, "replicate"), [0] * dims
    return pool(x, kernel_shape, strides, before, dilations, bool(ceil_mode))


@operator()
def AveragePool(
    x: Tensor,
    kernel_shape: list[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    dims = len(kernel_shape)
    strides = strides or [1] * dims
    before, after = _pads(x, kernel_shape, strides, [1] * dims, pads, auto_pad)
    pool = _of_rank(dims, _1d=functional.avg_pool1d, _2d=functional.avg_pool2d)
    if before == after and all(2 * p <= k for p, k in zip(before, kernel_shape, strict=True)):
        return pool(x, kernel_shape, strides, before, bool(ceil_mode), bool(count_include_pad))
    means = pool(_padded(x, before, after), kernel_shape, strides, 0, bool(ceil_mode))
    if count_include_pad:
        return means
    inside = _padded(ones((1, 1, *x.shape[2:])), before, after)
    return means / pool(inside, kernel_shape, strides, 0, bool(ceil_mode))


@operator()
def GlobalAveragePool(x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


@operator()
def GlobalMaxPool(x: Tensor) -> Tensor:
    pool = _of_rank(x.dim() - 2, _1d=functional.adaptive_max_pool1d, _2d=functional.adaptive_max_pool2d)
    return pool(x, 1)
