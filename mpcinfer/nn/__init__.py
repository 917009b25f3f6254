"""The operators of a network, over shares: importing this package registers them all."""

from mpcinfer.nn import (
    activation,
    attention,
    compare,
    elementwise,
    functions,
    linear,
    normalise,
    pooling,
    reveal,
    shape,
    softmax,
)
from mpcinfer.nn.registry import lookup, operator, supported

__all__ = [
    "activation",
    "attention",
    "compare",
    "elementwise",
    "functions",
    "linear",
    "lookup",
    "normalise",
    "operator",
    "pooling",
    "reveal",
    "shape",
    "softmax",
    "supported",
]
