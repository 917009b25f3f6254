"""ONNX operators that work element by element."""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mpcinfer.errors import UnsupportedError
from mpcinfer.models.onnx.table import TABLE, Operator, number, operator


def _of_one(function: Callable[..., Any]) -> Callable[[Tensor], Any]:
    return lambda x: function(x)


_ONE: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Log": torch.log,
    "Mish": functional.mish,
    "HardSwish": functional.hardswish,
    "Neg": torch.neg,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "SiLU": functional.silu,
    "Softplus": functional.softplus,
    "Softsign": functional.softsign,
    "Sqrt": torch.sqrt,
    "Tanh": torch.tanh,
    "Not": torch.logical_not,
}
for _name, _function in _ONE.items():
    TABLE[_name] = Operator(_of_one(_function), (), False)

_SEVERAL: dict[str, Callable[..., Any]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": lambda a, b: a / b,
    "Equal": lambda a, b: a == b,
    "Greater": lambda a, b: a > b,
    "GreaterOrEqual": lambda a, b: a >= b,
    "Less": lambda a, b: a < b,
    "LessOrEqual": lambda a, b: a <= b,
    "And": lambda a, b: torch.logical_and(a, b),
    "Or": lambda a, b: torch.logical_or(a, b),
    "Xor": lambda a, b: torch.logical_xor(a, b),
    "Where": lambda condition, a, b: torch.where(condition, a, b),
    "Sum": lambda *xs: functools.reduce(lambda a, b: a + b, xs),
    "Mean": lambda *xs: functools.reduce(lambda a, b: a + b, xs) / len(xs),
    "Max": lambda *xs: functools.reduce(_largest, xs),
    "Min": lambda *xs: functools.reduce(_smallest, xs),
}
for _name, _function in _SEVERAL.items():
    TABLE[_name] = Operator(_function, (), True)


def _largest(a: Any, b: Any) -> Tensor:
    a, b = (b, a) if not isinstance(a, Tensor) else (a, b)
    return torch.maximum(a, b) if isinstance(b, Tensor) else torch.clamp(a, min=b)


def _smallest(a: Any, b: Any) -> Tensor:
    a, b = (b, a) if not isinstance(a, Tensor) else (a, b)
    return torch.minimum(a, b) if isinstance(b, Tensor) else torch.clamp(a, max=b)


@operator()
def Cast(x: Tensor, to: int) -> Tensor:
    floating = to in (1, 10, 11, 16)
    if x.dtype.is_floating_point and not floating:
        raise UnsupportedError("makes integers of secret numbers")
    return x if x.dtype.is_floating_point or not floating else x.to(torch.float32)


@operator(public="min max")
def Clip(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    low, high = (None if bound is None else number(bound) for bound in (min, max))
    low = None if low is None or low < -1e30 else low
    high = None if high is None or high > 1e30 else high
    return x if low is None and high is None else torch.clamp(x, low, high)


@operator(public="exponent")
def Pow(x: Tensor, exponent: Any) -> Tensor:
    power = number(exponent)
    return torch.pow(x, int(power) if float(power).is_integer() else power)


@operator()
def LeakyRelu(x: Tensor, alpha: float = 0.01) -> Tensor:
    return functional.leaky_relu(x, alpha)


@operator()
def PRelu(x: Tensor, slope: Any) -> Tensor:
    positive = torch.relu(x)
    return positive + slope * (x - positive)


@operator()
def ThresholdedRelu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return functional.threshold(x, alpha, 0.0)


@operator()
def Elu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return functional.elu(x, alpha)


@operator()
def Celu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return functional.celu(x, alpha)


@operator()
def Selu(x: Tensor, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    return gamma * functional.elu(x, alpha)


@operator()
def HardSigmoid(x: Tensor, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return torch.clamp(alpha * x + beta, 0, 1)


@operator()
def Gelu(x: Tensor, approximate: str = "none") -> Tensor:
    return functional.gelu(x, approximate=approximate)


@operator(name="com.microsoft.Gelu")
def GeluOfMicrosoft(x: Tensor) -> Tensor:
    return functional.gelu(x)


@operator(name="com.microsoft.BiasGelu")
def BiasGelu(x: Tensor, bias: Tensor) -> Tensor:
    return functional.gelu(x + bias)


@operator(name="com.microsoft.FastGelu")
def FastGelu(x: Tensor, bias: Any = 0.0) -> Tensor:
    return functional.gelu(x + bias, approximate="tanh")
