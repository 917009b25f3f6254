"""The operators of a network, over shares: importing this package registers them all."""

from mpcinfer.nn import activation, elementwise, embedding, linear, pooling, public, reveal, shape, softmax
from mpcinfer.nn.registry import lookup, operator, supported, takes_integers, yields_integers

__all__ = [
    "activation",
    "elementwise",
    "embedding",
    "linear",
    "lookup",
    "operator",
    "pooling",
    "public",
    "reveal",
    "shape",
    "softmax",
    "supported",
    "takes_integers",
    "yields_integers",
]
