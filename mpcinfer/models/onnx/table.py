"""What each ONNX operator means in torch: a table of functions, one for each, with the operator's name and arguments.

A function takes a node's operands in order and its attributes by name. Where an opset made an operand of what was an
attribute, both have one name, and so one parameter. Operands named in `public` arrive as arrays if they are known;
the others are tensors, or numbers where the model has single ones. What an operator can't do it refuses with
UnsupportedError: loading runs every one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mpcinfer.errors import UnsupportedError


@dataclass(frozen=True)
class Operator:
    """`public`: positions of operands that stay arrays; `numbers`: whether operands of one element become numbers."""

    function: Callable[..., Any]
    public: tuple[int, ...]
    numbers: bool


TABLE: dict[str, Operator] = {}
# as they were before opset 13
BEFORE_13: dict[str, Operator] = {}


def operator(
    public: str = "", numbers: bool = False, name: str = "", table: dict[str, Operator] = TABLE
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        parameters = list(inspect.signature(function).parameters)
        positions = tuple(parameters.index(p) for p in public.split())
        table[name or function.__name__] = Operator(function, positions, numbers)
        return function

    return register


def lookup(op: str, opset: int) -> Operator | None:
    """What an operator means in an opset, or None."""
    return (BEFORE_13.get(op) if opset < 13 else None) or TABLE.get(op)


def ints(x: Any) -> list[Any]:
    """An attribute or a known operand as a list of sizes."""
    return list(_known(x).reshape(-1).tolist())


def number(x: Any) -> Any:
    """An attribute or a known operand that is one number."""
    value = _known(x)
    if value.size != 1:
        raise UnsupportedError("takes one number here, not a tensor")
    return value.reshape(()).item()


def _known(x: Any) -> Any:
    if isinstance(x, Tensor):
        raise UnsupportedError("an operand that must be known depends on the values of an input")
    return np.asarray(x)
