"""ONNX operators along axes: matrix products, norms, softmax, sums, maxima."""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mpcinfer.errors import UnsupportedError
from mpcinfer.models.onnx.table import BEFORE_13, ints, number, operator

# matrices


@operator()
def MatMul(a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


@operator()
def Gemm(
    a: Tensor, b: Tensor, c: Any = None, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0
) -> Tensor:
    a = a.t() if transA else a
    if transB and alpha == 1 and beta == 1 and isinstance(c, Tensor) and c.dim() == 1:
        return functional.linear(a, b, c)
    y = alpha * (a @ (b.t() if transB else b)) if alpha != 1 else a @ (b.t() if transB else b)
    return y if c is None else y + (beta * c if beta != 1 else c)


@operator()
def Einsum(a: Tensor, b: Tensor, equation: str) -> Tensor:
    """Of two tensors, as one matrix product."""
    left, _, out = equation.replace(" ", "").partition("->")
    x, y = left.split(",")
    if (
        "." in equation
        or not out
        or any(len(set(t)) != len(t) for t in (x, y, out))
        or set(x + y) - set(out) - (set(x) & set(y))
    ):
        raise UnsupportedError(f"{equation!r} is not a matrix product of two tensors")
    batch = [i for i in out if i in x and i in y]
    rows = [i for i in out if i in x and i not in y]
    columns = [i for i in out if i in y and i not in x]
    inner = [i for i in x if i not in out]
    size = dict(zip(x, a.shape, strict=True)) | dict(zip(y, b.shape, strict=True))
    lead = [size[i] for i in batch]
    depth, height, width = (math.prod(size[i] for i in axes) for axes in (inner, rows, columns))
    first = a.permute([x.index(i) for i in batch + rows + inner]).reshape([*lead, height, depth])
    second = b.permute([y.index(i) for i in batch + inner + columns]).reshape([*lead, depth, width])
    product = (first @ second).reshape([*lead, *(size[i] for i in rows + columns)])
    return product.permute([(batch + rows + columns).index(i) for i in out])


# normalisation and softmax


@operator()
def BatchNormalization(
    x: Tensor,
    scale: Tensor,
    b: Tensor,
    mean: Tensor,
    var: Tensor,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Tensor:
    if training_mode:
        raise UnsupportedError("is in training mode; export the model in evaluation mode")
    return functional.batch_norm(x, mean, var, scale, b, False, 0.0, epsilon)


@operator()
def LayerNormalization(
    x: Tensor, scale: Any = None, b: Any = None, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    return functional.layer_norm(x, x.shape[axis:], scale, b, epsilon)


@operator()
def RMSNormalization(x: Tensor, scale: Any = None, axis: int = -1, epsilon: float = 1e-5) -> Tensor:
    return functional.rms_norm(x, x.shape[axis:], scale, epsilon)


@operator()
def InstanceNormalization(x: Tensor, scale: Tensor, b: Tensor, epsilon: float = 1e-5) -> Tensor:
    return functional.group_norm(x, x.shape[1], scale, b, epsilon)


@operator()
def LpNormalization(x: Tensor, axis: int = -1, p: int = 2) -> Tensor:
    return x / torch.linalg.vector_norm(x, p, axis, keepdim=True)


@operator()
def Softmax(x: Tensor, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


@operator()
def LogSoftmax(x: Tensor, axis: int = -1) -> Tensor:
    return torch.log_softmax(x, axis)


@operator(name="Softmax", table=BEFORE_13)
def SoftmaxOfMatrix(x: Tensor, axis: int = 1) -> Tensor:
    return _as_matrix(x, axis, torch.softmax)


@operator(name="LogSoftmax", table=BEFORE_13)
def LogSoftmaxOfMatrix(x: Tensor, axis: int = 1) -> Tensor:
    return _as_matrix(x, axis, torch.log_softmax)


def _as_matrix(x: Tensor, axis: int, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Over all axes from one on, together."""
    axis %= x.dim()
    return function(x, -1) if axis == x.dim() - 1 else function(x.flatten(axis), -1).reshape(x.shape)


# along axes


def _reduction(name: str, reduce: Callable[..., Tensor]) -> None:
    def along(x: Tensor, axes: Any = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        dims = [] if axes is None else ints(axes)
        if not dims and noop_with_empty_axes:
            return x
        return reduce(x, dims or list(range(x.dim())), bool(keepdims))

    operator(public="axes", name=name)(along)


_reduction("ReduceMean", lambda x, axes, keep: x.mean(axes, keepdim=keep))
_reduction("ReduceSum", lambda x, axes, keep: x.sum(axes, keepdim=keep))
_reduction("ReduceMax", lambda x, axes, keep: torch.amax(x, axes, keep))
_reduction("ReduceMin", lambda x, axes, keep: torch.amin(x, axes, keep))
_reduction("ReduceL1", lambda x, axes, keep: x.abs().sum(axes, keepdim=keep))
_reduction("ReduceL2", lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep))
_reduction("ReduceSumSquare", lambda x, axes, keep: x.square().sum(axes, keepdim=keep))


@operator()
def ArgMax(x: Tensor, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    if select_last_index:
        raise UnsupportedError("the last of equal maxima; the first is supported")
    return torch.argmax(x, axis, bool(keepdims))


@operator(public="k")
def TopK(x: Tensor, k: Any, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    values, indices = torch.topk(x, number(k), axis, bool(largest), bool(sorted))
    return values, indices
