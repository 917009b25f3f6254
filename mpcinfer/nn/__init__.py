"""The operators of a network, over shares: importing this package registers them all."""

from mpcinfer.nn import (
    activation,
    attention,
    compare,
    elementwise,
    embedding,
    functions,
    linear,
    normalise,
    pooling,
    public,
    reveal,
    sampling,
    shape,
    softmax,
)
from mpcinfer.nn.registry import lookup, operator, supported, takes_integers, yields_integers

__all__ = [
    "activation",
    "attention",
    "compare",
    "elementwise",
    "embedding",
    "functions",
    "linear",
    "lookup",
    "normalise",
    "operator",
    "pooling",
    "public",
    "reveal",
    "sampling",
    "shape",
    "softmax",
    "supported",
    "takes_integers",
    "yields_integers",
]
