"""What each module of crypten.nn computes, as an operator of ONNX: most of them mirror one, down to the attributes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import functional

from mpcinfer.errors import UnsupportedError
from mpcinfer.models.onnx.table import operator


@dataclass(frozen=True)
class Leaf:
    """An operator, its attributes, and which parameters and buffers of the module follow its inputs as operands."""

    op: str
    attributes: dict[str, Any] = field(default_factory=dict)
    parameters: Sequence[str] = ()


# What ONNX has no operator for, or one with other conventions.


@operator(name="crypten.Linear")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.linear(x, weight, bias)


@operator(name="crypten.AdaptiveAvgPool2d")
def _adaptive_average(x: Tensor, output_size: Any) -> Tensor:
    return functional.adaptive_avg_pool2d(x, output_size)


@operator(name="crypten.AdaptiveMaxPool2d")
def _adaptive_maximum(x: Tensor, output_size: Any) -> Tensor:
    return functional.adaptive_max_pool2d(x, output_size)


@operator(name="crypten.ConstantPad")
def _constant_pad(x: Tensor, padding: Any, value: float) -> Tensor:
    return functional.pad(x, padding, value=value)


def _pair(x: Any, dims: int) -> list[int]:
    """A size for each spatial axis, of one for all or of one for each."""
    if isinstance(x, str):
        raise UnsupportedError(f"padding {x!r}: give it as numbers")
    return [int(x)] * dims if isinstance(x, int) else [int(size) for size in x]


def _given(x: Any, what: str) -> Any:
    if x is None:
        raise UnsupportedError(f"has no {what}: pass it when the module is made")
    return x


def _some(**attributes: Any) -> dict[str, Any]:
    """Attributes that are not left to an operand; tensors among them are sizes and indices."""
    given = {name: x for name, x in attributes.items() if x is not None}
    return {name: x.long().numpy() if isinstance(x, Tensor) else x for name, x in given.items()}


def _bias(module: Any) -> Sequence[str]:
    return ("weight", "bias") if "bias" in module._parameters else ("weight",)


def _conv(module: Any, dims: int, parameters: Sequence[str]) -> Leaf:
    return Leaf(
        "Conv",
        {
            "strides": _pair(module.stride, dims),
            "pads": _pair(module.padding, dims) * 2,
            "dilations": _pair(module.dilation, dims),
            "group": module.groups,
        },
        parameters,
    )


def _pool(module: Any) -> Leaf:
    average = module.pool_type == "average"
    if average and module.ceil_mode:
        raise UnsupportedError("ceil_mode: CrypTen divides the last windows by another number than torch")
    kernel = _pair(module.kernel_size, 2)
    attributes = {
        "kernel_shape": kernel,
        "strides": kernel if module.stride is None else _pair(module.stride, 2),
        "pads": _pair(module.padding, 2) * 2,
        "ceil_mode": int(module.ceil_mode),
    }
    return Leaf("AveragePool", {**attributes, "count_include_pad": 1}) if average else Leaf("MaxPool", attributes)


def _batch_norm(module: Any) -> Leaf:
    return Leaf("BatchNormalization", {"epsilon": module.eps}, ("weight", "bias", "running_mean", "running_var"))


def _shape(module: Any) -> Leaf:
    if module.dim is not None:
        raise UnsupportedError("of one axis: a Shape of all with a Gather behind it does the same")
    return Leaf("Shape")


def _reduce(module: Any) -> Leaf:
    op = {"mean": "ReduceMean", "sum": "ReduceSum"}[module.reduction_fn]
    axes = [module.dim] if isinstance(module.dim, int) else list(module.dim)
    return Leaf(op, {"axes": axes, "keepdims": int(module.keepdim)})


def _gather(module: Any) -> Leaf:
    return Leaf("Gather", {"axis": _given(module.dimension, "dimension"), **_some(indices=module.indices)})


def _same(op: str) -> Callable[[Any], Leaf]:
    return lambda module: Leaf(op)


# By the class that has the `forward`: BatchNorm2d inherits that of _BatchNorm, and so on.
LEAVES: dict[str, Callable[[Any], Leaf]] = {
    **{name: _same(name) for name in ("Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Exp", "Erf", "Sigmoid", "Expand")},
    **{name: _same("Identity") for name in ("Identity", "Dropout", "DropoutNd", "Cast")},  # while not in training
    "ReLU": _same("Relu"),
    "GlobalAveragePool": _same("GlobalAveragePool"),
    "Hardtanh": lambda m: Leaf("Clip", {"min": m.min_val, "max": m.max_val}),
    "Softmax": lambda m: Leaf("Softmax", {"axis": m.dim}),
    "LogSoftmax": lambda m: Leaf("LogSoftmax", {"axis": m.dim}),
    "Linear": lambda m: Leaf("crypten.Linear", {}, _bias(m)),
    "Gemm": lambda m: Leaf("Gemm", {"alpha": m.alpha, "beta": m.beta, "transA": m.trans_a, "transB": m.trans_b}),
    "MatMul": lambda m: Leaf("MatMul", {}, tuple(m._parameters)),
    "Conv": lambda m: _conv(m, len(m.stride), ()),
    "Conv1d": lambda m: _conv(m, 1, _bias(m)),
    "Conv2d": lambda m: _conv(m, 2, _bias(m)),
    "_Pool2d": _pool,
    "AdaptiveAvgPool2d": lambda m: Leaf("crypten.AdaptiveAvgPool2d", _some(output_size=m.output_size)),
    "AdaptiveMaxPool2d": lambda m: Leaf("crypten.AdaptiveMaxPool2d", _some(output_size=m.output_size)),
    "BatchNormalization": lambda m: Leaf("BatchNormalization", {"epsilon": m.eps}),
    "_BatchNorm": _batch_norm,
    "_ConstantPad": lambda m: Leaf(
        "crypten.ConstantPad", {"padding": list(_given(m.padding, "padding")), "value": m.value}
    ),
    "_Reduce": _reduce,
    "Flatten": lambda m: Leaf("Flatten", {"axis": m.axis}),
    "Reshape": lambda m: Leaf("Reshape", _some(shape=m.shape)),
    "Transpose": lambda m: Leaf("Transpose", {"perm": list(m.perm)}),
    "Squeeze": lambda m: Leaf("Squeeze", {"axes": [m.dimension]}),
    "Unsqueeze": lambda m: Leaf("Unsqueeze", {} if m.dimension is None else {"axes": [m.dimension]}),
    "Concat": lambda m: Leaf("Concat", {"axis": m.dimension}),
    "Slice": lambda m: Leaf("Slice", _some(starts=m.starts, ends=m.ends, axes=m.axes)),
    "Gather": _gather,
    "Shape": _shape,
    "ConstantOfShape": lambda m: Leaf("ConstantOfShape", {"value": m.value.reshape(-1)[:1].numpy()}),
}
