"""The operators of a network, over shares: importing this package registers them all."""

from mpcinfer.nn import activation, elementwise, linear, pooling, reveal, shape, softmax
from mpcinfer.nn.registry import lookup, operator, supported

__all__ = [
    "activation",
    "elementwise",
    "linear",
    "lookup",
    "operator",
    "pooling",
    "reveal",
    "shape",
    "softmax",
    "supported",
]
