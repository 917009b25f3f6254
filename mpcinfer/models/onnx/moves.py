"""ONNX operators that only move elements."""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mpcinfer.errors import UnsupportedError
from mpcinfer.models.onnx.table import ints, number, operator


@operator()
def Identity(x: Tensor) -> Tensor:
    return x


@operator(public="ratio training_mode")
def Dropout(x: Tensor, ratio: Any = None, training_mode: Any = None, seed: int = 0) -> Tensor:
    if training_mode is not None and number(training_mode):
        raise UnsupportedError("is in training mode; export the model in evaluation mode")
    return x


@operator()
def Transpose(x: Tensor, perm: list[int] | None = None) -> Tensor:
    return x.permute(perm or list(range(x.dim()))[::-1])


@operator(public="shape")
def Reshape(x: Tensor, shape: Any, allowzero: int = 0) -> Tensor:
    sizes = ints(shape)
    zeros = [i for i, s in enumerate(sizes) if isinstance(s, int) and s == 0]
    if zeros and allowzero:
        raise UnsupportedError("makes an empty tensor")
    return x.reshape([x.shape[i] if i in zeros else s for i, s in enumerate(sizes)])


@operator()
def Flatten(x: Tensor, axis: int = 1) -> Tensor:
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 0:
        return x.reshape(1, -1)
    y = x.flatten(axis) if axis < x.dim() else x.unsqueeze(-1)
    return y.flatten(0, axis - 1) if axis > 1 else y


@operator(public="axes")
def Squeeze(x: Tensor, axes: Any = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(ints(axes))


@operator(public="axes")
def Unsqueeze(x: Tensor, axes: Any) -> Tensor:
    dims = ints(axes)
    for axis in sorted(a % (x.dim() + len(dims)) for a in dims):
        x = x.unsqueeze(axis)
    return x


@operator()
def Concat(*xs: Tensor, axis: int) -> Tensor:
    return torch.cat(xs, axis)


@operator(public="split")
def Split(x: Tensor, split: Any = None, axis: int = 0, num_outputs: int = 0) -> tuple[Tensor, ...]:
    return torch.split(x, ints(split) if split is not None else x.shape[axis] // num_outputs, axis)


@operator(public="starts ends axes steps")
def Slice(x: Tensor, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Tensor:
    first = ints(starts)
    dims = list(range(len(first))) if axes is None else ints(axes)
    strides = [1] * len(first) if steps is None else ints(steps)
    for start, end, axis, step in zip(first, ints(ends), dims, strides, strict=True):
        if step > 0:
            x = x[(slice(None),) * (axis % x.dim()) + (slice(start, end, step),)]
        else:
            x = _taken(x, list(range(x.shape[axis]))[start:end:step], axis)
    return x


@operator(public="indices")
def Gather(x: Tensor, indices: Any, axis: int = 0) -> Tensor:
    if isinstance(indices, Tensor):
        if axis or x.dim() != 2:
            raise UnsupportedError("takes computed indices into something other than the rows of a table")
        return functional.embedding(indices, x)
    axis %= x.dim()
    at = np.asarray(indices)
    if at.ndim == 0:
        return x.select(axis, int(at))
    y = _taken(x, [int(i) for i in at.flat], axis)
    return y if at.ndim == 1 else y.reshape([*x.shape[:axis], *at.shape, *x.shape[axis + 1 :]])


def _taken(x: Tensor, indices: list[int], axis: int) -> Tensor:
    """x at these indices of an axis: as few slices as there are runs of equal steps."""
    size = x.shape[axis]
    at = [i % size for i in indices]
    parts = []
    while at:
        step = at[1] - at[0] if len(at) > 1 else 1
        length = next((i for i in range(1, len(at)) if at[i] - at[i - 1] != step), len(at))
        run, at = at[:length], at[length:]
        if step == 0:
            part = x.narrow(axis, run[0], 1).expand([-1 if i != axis % x.dim() else length for i in range(x.dim())])
        else:
            low, high = min(run), max(run)
            part = x[(slice(None),) * (axis % x.dim()) + (slice(low, high + 1, abs(step)),)]
            part = part.flip(axis) if step < 0 else part
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


@operator(public="shape")
def Expand(x: Tensor, shape: Any) -> Tensor:
    sizes = ints(shape)
    lead = max(0, x.dim() - len(sizes))
    sizes = [1] * lead + sizes
    new = len(sizes) - x.dim()
    return x.expand([-1 if i >= new and isinstance(s, int) and s == 1 else s for i, s in enumerate(sizes)])


@operator(public="repeats")
def Tile(x: Tensor, repeats: Any) -> Tensor:
    return x.repeat(ints(repeats))


@operator(public="pads value")
def Pad(x: Tensor, pads: Any, value: Any = None, mode: str = "constant") -> Tensor:
    sizes, dims = ints(pads), x.dim()
    flat = [p for axis in reversed(range(dims)) for p in (sizes[axis], sizes[axis + dims])]
    while flat[-2:] == [0, 0]:
        flat = flat[:-2]
    if not flat:
        return x
    if mode == "constant":
        return functional.pad(x, flat, value=0.0 if value is None else float(number(value)))
    return functional.pad(x, flat, mode={"edge": "replicate"}.get(mode, mode))


@operator(public="roi scales sizes")
def Resize(
    x: Tensor,
    roi: Any = None,
    scales: Any = None,
    sizes: Any = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    if mode != "nearest":
        raise UnsupportedError(f"mode {mode!r}; supported is 'nearest'")
    for axis, size in enumerate(x.shape):
        if scales is not None and np.size(scales):
            factor = float(np.asarray(scales)[axis])
            out = math.floor(size * factor) if factor != 1 else size
        else:
            out = ints(sizes)[axis]
            factor = out / size if out is not size else 1
        if factor == 1:
            continue
        at = _nearest(size, out, factor, coordinate_transformation_mode, nearest_mode)
        if out % size == 0 and at == [i // (out // size) for i in range(out)]:
            x = x.repeat_interleave(out // size, dim=axis)
        else:
            x = _taken(x, at, axis)
    return x


def _nearest(size: int, out: int, factor: float, coordinates: str, rounding: str) -> list[int]:
    """For each index of a resized axis the index it takes its value from."""
    place: dict[str, Callable[[int], float]] = {
        "half_pixel": lambda i: (i + 0.5) / factor - 0.5,
        "pytorch_half_pixel": lambda i: (i + 0.5) / factor - 0.5 if out > 1 else 0.0,
        "asymmetric": lambda i: i / factor,
        "align_corners": lambda i: i * (size - 1) / (out - 1) if out > 1 else 0.0,
    }
    rounded: dict[str, Callable[[float], int]] = {
        "round_prefer_floor": lambda v: math.ceil(v - 0.5),
        "round_prefer_ceil": lambda v: math.floor(v + 0.5),
        "floor": math.floor,
        "ceil": math.ceil,
    }
    if coordinates not in place or rounding not in rounded:
        raise UnsupportedError(f"coordinates by {coordinates!r}, rounded by {rounding!r}")
    return [min(max(rounded[rounding](place[coordinates](i)), 0), size - 1) for i in range(out)]


@operator()
def DepthToSpace(x: Tensor, blocksize: int, mode: str = "DCR") -> Tensor:
    if mode == "CRD":
        return functional.pixel_shuffle(x, blocksize)
    n, c, h, w = x.shape
    y = x.reshape(n, blocksize, blocksize, c // blocksize**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(n, c // blocksize**2, h * blocksize, w * blocksize)


@operator()
def SpaceToDepth(x: Tensor, blocksize: int) -> Tensor:
    n, c, h, w = x.shape
    y = x.reshape(n, c, h // blocksize, blocksize, w // blocksize, blocksize).permute(0, 3, 5, 1, 2, 4)
    return y.reshape(n, c * blocksize**2, h // blocksize, w // blocksize)
