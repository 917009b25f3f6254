"""Models of functions, comparisons, norms and attention: the second half of `operators`."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.models_local import grid
from tests.nn.group import Group

# in units of 2^-16: what the fitted functions may be off by, 5e-4
FITTED = 33

SMOOTH = Group(
    functions={
        "gelu": lambda m, x: F.gelu(x),
        "gelu by tanh": lambda m, x: F.gelu(x, approximate="tanh"),
        "silu": lambda m, x: F.silu(x),
        "sigmoid": lambda m, x: torch.sigmoid(x),
        "tanh": lambda m, x: torch.tanh(x),
        "erf": lambda m, x: torch.erf(x),
        "hardswish": lambda m, x: F.hardswish(x),
        "hardsigmoid": lambda m, x: F.hardsigmoid(x),
        "mish": lambda m, x: F.mish(x),
        "softplus": lambda m, x: F.softplus(x),
        "softplus(2)": lambda m, x: F.softplus(x, 2.0, 10.0),
        "log_sigmoid": lambda m, x: F.logsigmoid(x),
        "elu": lambda m, x: F.elu(x),
        "elu(0.7)": lambda m, x: F.elu(x, 0.7),
        "selu": lambda m, x: F.selu(x),
        "celu": lambda m, x: F.celu(x, 2.0),
        "glu": lambda m, x: F.glu(x, 1),
        "glu of the last axis": lambda m, x: F.glu(x),
        "prelu": lambda m, x: F.prelu(x, m.slopes),
        "prelu of one slope": lambda m, x: F.prelu(x, m.slope),
        "softsign": lambda m, x: F.softsign(x),
        "clamp_min": lambda m, x: torch.clamp_min(x, 0.5),
        "clamp_max": lambda m, x: torch.clamp_max(x, -0.5),
    },
    shapes=[(2, 4, 3, 6)],
    ulps=FITTED,
    state=lambda: {"slopes": nn.Parameter(torch.ones(4)), "slope": nn.Parameter(torch.ones(1))},
    exceptions={"glu": 4 * FITTED, "glu of the last axis": 4 * FITTED},  # the gate's error, times the value
)

FUNCTIONS = Group(
    functions={
        "exp": lambda m, x, y: x.clamp(-20, 2).exp(),
        "expm1": lambda m, x, y: x.clamp(-20, 2).expm1(),
        "log": lambda m, x, y: (x.abs() + 0.25).log(),
        "log1p": lambda m, x, y: x.abs().log1p(),
        "sqrt": lambda m, x, y: x.abs().sqrt(),
        "rsqrt": lambda m, x, y: (x.abs() + 0.25).rsqrt(),
        "1 / x": lambda m, x, y: 1 / (x.abs() + 0.25),
        "reciprocal": lambda m, x, y: (-0.5 - x.abs()).reciprocal(),
        "x / y": lambda m, x, y: x / (y.abs() + 0.5),
        "x / row of y": lambda m, x, y: x / (y[:, :1].abs() + 0.5),
        "x / expanded": lambda m, x, y: x / (y[:, :1].abs() + 0.5).expand(-1, 3, -1),
        "public / y": lambda m, x, y: m.public / (y.abs() + 0.5),
        "secret / y": lambda m, x, y: m.secret / (y.abs() + 0.5),
        "x ** 3": lambda m, x, y: x**3,
        "x ** 5": lambda m, x, y: x**5,
        "x ** 1": lambda m, x, y: x**1,
        "x ** 0": lambda m, x, y: x**0 + x,
        "x ** 0.5": lambda m, x, y: x.abs() ** 0.5,
        "x ** 1.5": lambda m, x, y: x.abs() ** 1.5,
        "x ** 0.3": lambda m, x, y: (x.abs() + 0.25) ** 0.3,
        "x ** -0.5": lambda m, x, y: (x.abs() + 0.25) ** -0.5,
        "x ** -1": lambda m, x, y: (x.abs() + 0.25) ** -1,
        "x ** -2": lambda m, x, y: (x.abs() + 0.25) ** -2,
        "size ** 2": lambda m, x, y: x * (x.shape[0] ** 2),
    },
    shapes=[(2, 3, 10), (2, 3, 10)],
    ulps=8,
    state=lambda: {"public": grid(10, seed=5), "secret": nn.Parameter(torch.ones(10))},
    exceptions={
        "exp": 28, "expm1": 28,  # relative 5e-5, up to e^2
        "x ** 3": 60, "x ** 5": 6000,  # of a product's rounding, times x^4
        "x / y": 20, "x / row of y": 20, "x / expanded": 20, "public / y": 20, "1 / x": 12,
        "x ** 1.5": 16, "x ** 0.3": 12, "x ** -2": 300,  # x^2 rounded, divided by x^4
        "x ** -1": 12,
    },
)  # fmt: skip

COMPARE = Group(
    functions={
        "x < 1": lambda m, x, y: x < 1,
        "x <= 1": lambda m, x, y: (x <= 1).double(),
        "x > 1": lambda m, x, y: x > 1,
        "1 <= x": lambda m, x, y: 1 <= x,
        "x == 1": lambda m, x, y: x == 1,
        "x != 1": lambda m, x, y: x != 1,
        "x < y": lambda m, x, y: x < y,
        "x <= y": lambda m, x, y: x <= y,
        "x > y": lambda m, x, y: (x > y).double() * 0.5,
        "x >= y": lambda m, x, y: x >= y,
        "x == y": lambda m, x, y: x == y,
        "x != y": lambda m, x, y: x != y,
        "x > public": lambda m, x, y: x > m.public,
        "public >= x": lambda m, x, y: m.public >= x,
        "x < secret": lambda m, x, y: x < m.secret,
        "index == 2": lambda m, x, y: x.argmax(-1) == 2,
        "index < index": lambda m, x, y: x.argmax(-1) < y.argmax(-1),
        "sign": lambda m, x, y: x.sign(),
        "and": lambda m, x, y: (x > 0) & (y > 0),
        "or": lambda m, x, y: (x > 0) | (y > 0),
        "xor": lambda m, x, y: (x > 0) ^ (y > 0),
        "not": lambda m, x, y: ~(x > 0),
        "and public": lambda m, x, y: (x > 0) & below(5)[:, :4],
        "public & public": lambda m, x, y: x * (below(5 + x.shape[0]) & ~below(5 + x.shape[0]).t())[3, :4],
        "logical_and": lambda m, x, y: torch.logical_and(x > 0, y > 0),
        "logical_or": lambda m, x, y: torch.logical_or(x > 0, y > 0),
        "logical_xor": lambda m, x, y: torch.logical_xor(x > 0, y > 0),
        "logical_not": lambda m, x, y: torch.logical_not(x > 0),
        "bitwise_and": lambda m, x, y: torch.bitwise_and(x > 0, y > 0),
        "bitwise_or": lambda m, x, y: torch.bitwise_or(x > 0, y > 0),
        "bitwise_xor": lambda m, x, y: torch.bitwise_xor(x > 0, y > 0),
    },
    shapes=[(2, 3, 5, 4), (2, 3, 5, 4)],
    ulps=0,
    state=lambda: {"public": grid(5, 4, seed=1), "secret": nn.Parameter(torch.ones(4))},
)

CHOICE = Group(
    functions={
        "where": lambda m, x, y: torch.where(x > 0, x, y),
        "where, a number": lambda m, x, y: torch.where(x > y, x, 2.5),
        "where, a number first": lambda m, x, y: torch.where(x > y, -1.5, y),
        "where, numbers": lambda m, x, y: torch.where(x > y, 1.5, -2),
        "where, integers": lambda m, x, y: torch.where(x > y, 3, -2),
        "where, public tensors": lambda m, x, y: torch.where(x > y, m.public, torch.arange(4)),
        "where, a parameter": lambda m, x, y: torch.where(x[:, :1] > 0, m.secret, 0.0),
        "where, public condition": lambda m, x, y: torch.where(below(5)[:, :4], x, y),
        "where, indices": lambda m, x, y: torch.where(x[..., 0] > 0, x.argmax(-1), y.argmax(-1)),
        "masked_fill": lambda m, x, y: x.masked_fill(y > 0, -2.5),
        "masked_fill with a tensor": lambda m, x, y: x.masked_fill(y > 0, y[0, 0, 0, 0]),
        "maximum": lambda m, x, y: torch.maximum(x, y),
        "max": lambda m, x, y: torch.max(x, y[:, :1]),
        "minimum": lambda m, x, y: torch.minimum(x, m.public),
        "min": lambda m, x, y: torch.min(m.secret, x),
        "clamp": lambda m, x, y: x.clamp(y, y + 1),
        "clamp_min": lambda m, x, y: torch.clamp_min(x, y),
        "clamp_max": lambda m, x, y: torch.clamp_max(x, m.public),
        "max of all": lambda m, x, y: x.max(),
        "min of all": lambda m, x, y: x.min(),
        "amax": lambda m, x, y: x.amax((1, -1)),
        "amin": lambda m, x, y: x.amin(2, keepdim=True),
        "max of an axis": lambda m, x, y: x.max(1).values,
        "place of the maximum": lambda m, x, y: x.max(2, keepdim=True).indices,
        "min of an axis": lambda m, x, y: x.min(-1).values,
        "place of the minimum": lambda m, x, y: x.min(0).indices,
        "topk": lambda m, x, y: x.topk(2).values,
        "smallest k": lambda m, x, y: x.topk(2, 1, largest=False).values,
        "places of topk": lambda m, x, y: m.distinct(x).topk(3, 2).indices,
        "sort": lambda m, x, y: x.sort(2).values,
        "places of sort": lambda m, x, y: m.distinct(x).sort(2, descending=True).indices,
        "places as numbers": lambda m, x, y: m.distinct(x).sort(2).indices.double() * 0.5,
    },
    shapes=[(2, 3, 5, 4), (2, 3, 5, 4)],
    ulps=0,
    state=lambda: {"public": grid(5, 4, seed=1), "secret": nn.Parameter(torch.ones(4)), "distinct": Distinct()},
)


class Distinct(nn.Module):
    """Numbers moved so far apart along axis 2 that none are equal: no order among equals is promised."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(-4, 4) + 16 * torch.tensor([3, 1, 4, 0, 2])[:, None]


NORM = Group(
    functions={
        "layer norm": lambda m, x: m.layer(x),
        "layer norm, plain": lambda m, x: F.layer_norm(x, (4, 6)),
        "layer norm of both axes": lambda m, x: m.layers(x),
        "rms norm": lambda m, x: m.rms(x),
        "rms norm, plain": lambda m, x: F.rms_norm(x, (6,), eps=1e-6),
        "group norm": lambda m, x: m.group(x),
        "instance norm": lambda m, x: m.instance(x),
        "vector norm": lambda m, x: x.norm(dim=-1),
        "vector norm, kept": lambda m, x: torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True),
        "var": lambda m, x: x.var(1),
        "var, biased": lambda m, x: x.var((1, 3), correction=0, keepdim=True),
        "var of all": lambda m, x: x.var(),
        "std": lambda m, x: x.std(-1, unbiased=False),
        "std, corrected": lambda m, x: x.std((2, 3), correction=0.5),
    },
    shapes=[(2, 4, 4, 6)],
    ulps=40,
    state=lambda: {
        "layer": nn.LayerNorm(6),
        "layers": nn.LayerNorm((4, 6)),
        "rms": nn.RMSNorm(6, eps=1e-5),
        "group": nn.GroupNorm(2, 4),
        "instance": nn.InstanceNorm2d(4, affine=True),
    },
)

ATTENTION = Group(
    functions={
        "plain": lambda m, x, y: F.scaled_dot_product_attention(x, y, y),
        "of three": lambda m, x, y: F.scaled_dot_product_attention(x[..., :3], y[..., :3], y),
        "causal": lambda m, x, y: F.scaled_dot_product_attention(x, y, y, is_causal=True),
        "cross": lambda m, x, y: F.scaled_dot_product_attention(x[:, :, :3], y, y, scale=0.3),
        "grouped": lambda m, x, y: F.scaled_dot_product_attention(torch.cat([x, x], 1), y, y, enable_gqa=True),
        "public mask": lambda m, x, y: F.scaled_dot_product_attention(x, y, y, m.mask),
        "computed mask": lambda m, x, y: F.scaled_dot_product_attention(x, y, y, below(5)),
        "additive mask": lambda m, x, y: F.scaled_dot_product_attention(x, y, y, m.bias),
        "secret mask": lambda m, x, y: F.scaled_dot_product_attention(x, y, y, F.pad(x, (0, 1))),
    },
    shapes=[(2, 3, 5, 4), (2, 3, 5, 4)],
    ulps=30,
    state=lambda: {
        "mask": torch.tensor([[True] * 5, [False] * 5, [True, False] * 2 + [True], [False] * 4 + [True], [True] * 5]),
        "bias": grid(5, 5, seed=6).masked_fill(torch.eye(5) > 0, -(2.0**15)),
    },
)


def below(n: int) -> torch.Tensor:
    """A causal mask of n positions."""
    return torch.arange(n)[None] <= torch.arange(n)[:, None]


FUNCTION_GROUPS = {
    "smooth": SMOOTH,
    "functions": FUNCTIONS,
    "compare": COMPARE,
    "choice": CHOICE,
    "norm": NORM,
    "attention": ATTENTION,
}
