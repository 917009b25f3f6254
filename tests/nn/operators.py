"""Models that together use every operator: small ones with one output for each way to call an operator.

Inputs and parameters are numbers that fixed point holds exactly, so that what is left is the operator's own error.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from mpcinfer.graph.capture import Captured, capture
from tests.models_local import assert_agrees, grid
from tests.nn.group import Group
from tests.nn.operators_of_functions import FUNCTION_GROUPS, below

A = torch.ops.aten


@cache
def prepared(name: str) -> tuple[Group, nn.Module, Captured]:
    """A group with its model, captured once per session."""
    group = GROUPS[name]
    model = group.model()
    return group, model, capture(model, group.inputs())


def check(name: str, parties: int) -> None:
    """Every function of the group, over shares, is as close to plaintext as its kind can be."""
    group, model, captured = prepared(name)
    assert_agrees(model, captured, group.inputs(), parties, group.ulps, list(group.functions), group.exceptions)


ELEMENTWISE = Group(
    functions={
        "x + y": lambda m, x, y: x + y,
        "x + a y": lambda m, x, y: torch.add(x, y, alpha=0.5),
        "x - y": lambda m, x, y: x - y,
        "x * y": lambda m, x, y: x * y,
        "x * row of y": lambda m, x, y: x[:, :1] * y,
        "rsub(x, y)": lambda m, x, y: torch.rsub(x, y, alpha=2),
        "x + 1.5": lambda m, x, y: x + 1.5,
        "2 + x": lambda m, x, y: 2 + x,
        "x - 1": lambda m, x, y: x - 1,
        "1 - x": lambda m, x, y: 1 - x,
        "x + True": lambda m, x, y: x + True,
        "x * 3": lambda m, x, y: x * 3,
        "x * 2.7": lambda m, x, y: x * 2.7,
        "-0.001 * x": lambda m, x, y: -0.001 * x,
        "x / 3": lambda m, x, y: x / 3,
        "x / size": lambda m, x, y: x / x.shape[0],
        "-x": lambda m, x, y: -x,
        "x * x": lambda m, x, y: x * x,
        "x * copy": lambda m, x, y: x * x.clone(),
        "x ** 2": lambda m, x, y: x**2,
        "square": lambda m, x, y: torch.square(x),
        "x + secret": lambda m, x, y: x + m.secret,
        "secret - x": lambda m, x, y: m.secret - x,
        "x - secret": lambda m, x, y: x - m.secret,
        "x * secret": lambda m, x, y: x * m.secret,
        "secret * x": lambda m, x, y: m.secret * x,
        "x * scalar secret": lambda m, x, y: x * m.scalar,
        "x / secret": lambda m, x, y: x / m.divisor,
        "x + public": lambda m, x, y: x + m.public,
        "public + x": lambda m, x, y: m.public + x,
        "x + 3 public": lambda m, x, y: torch.add(x, m.public, alpha=3),
        "public + 0.5 x": lambda m, x, y: torch.add(m.public, x, alpha=0.5),
        "public - x": lambda m, x, y: m.public - x,
        "x - public": lambda m, x, y: x - m.public,
        "x * public": lambda m, x, y: x * m.public,
        "public * x": lambda m, x, y: m.public * x,
        "x / public": lambda m, x, y: x / m.public_divisor,
        "x * (secret * public)": lambda m, x, y: x * (m.secret * m.public),
        "constant": lambda m, x, y: x * torch.tensor([1.0, 2.0, 0.5, 0.25]) + torch.arange(4),
        "sum": lambda m, x, y: x.sum(),
        "sum of axis": lambda m, x, y: x.sum(-1),
        "sum of axes": lambda m, x, y: x.sum((1, 2), keepdim=True),
        "mean": lambda m, x, y: x.mean(),
        "mean of axes": lambda m, x, y: x.mean((2, 3)),
        "mean, kept": lambda m, x, y: x.mean(1, keepdim=True),
        "add.Scalar": lambda m, x, y: A.add.Scalar(x, 1, 2),
        "sub.Scalar": lambda m, x, y: A.sub.Scalar(x, 1),
        "mul.Scalar": lambda m, x, y: A.mul.Scalar(x, 0.3),
        "div.Scalar": lambda m, x, y: A.div.Scalar(x, 7),
        "dtype": lambda m, x, y: x.float().double() + y.to("cpu"),
    },
    shapes=[(2, 3, 5, 4), (2, 3, 5, 4)],
    ulps=1.01,
    state=lambda: {
        "secret": nn.Parameter(torch.ones(4)),
        "scalar": nn.Parameter(torch.ones(())),
        "divisor": nn.Parameter(torch.tensor([2.0, -4.0, 0.5, 8.0], dtype=torch.float64)),
        "public": grid(5, 4, seed=7),
        "public_divisor": torch.tensor([2.0, -4.0, 0.5, 8.0], dtype=torch.float64),
    },
    # a product of two numbers, or an inverse, was rounded before the operator: |x| <= 6 times half a unit
    exceptions={"x * (secret * public)": 5.0, "x / secret": 5.0},
)

ACTIVATION = Group(
    functions={
        "relu": lambda m, x: torch.relu(x),
        "relu in place": lambda m, x: (x + 1).relu_(),
        "relu6": lambda m, x: F.relu6(x),
        "hardtanh": lambda m, x: F.hardtanh(x),
        "hardtanh(-0.5, 2.25)": lambda m, x: F.hardtanh(x, -0.5, 2.25),
        "clamp both": lambda m, x: x.clamp(-1.5, 0.5),
        "clamp low": lambda m, x: x.clamp(min=-0.25),
        "clamp high": lambda m, x: torch.clamp(x, max=0.75),
        "clamp to a point": lambda m, x: x.clamp(1, 1),
        "abs": lambda m, x: x.abs(),
        "threshold": lambda m, x: F.threshold(x, 0.5, -20.0),
        "threshold 0": lambda m, x: F.threshold(x, 0.0, 3.0),
    },
    shapes=[(2, 3, 50)],
    ulps=0,
)

LEAKY = Group(
    functions={
        "default": lambda m, x: F.leaky_relu(x),
        "0.2": lambda m, x: F.leaky_relu(x, 0.2),
        "negative": lambda m, x: F.leaky_relu(x, -0.3),
        "0": lambda m, x: F.leaky_relu(x, 0.0),
        "1": lambda m, x: F.leaky_relu(x, 1.0),
        "above 1": lambda m, x: F.leaky_relu(x, 3.5),
        "dropouts": lambda m, x: m.dropouts(x),
    },
    shapes=[(2, 3, 50)],
    ulps=1.01,
    state=lambda: {
        "dropouts": nn.Sequential(nn.Dropout(), nn.Dropout1d(), nn.AlphaDropout(), nn.FeatureAlphaDropout())
    },
)

LINEAR = Group(
    functions={
        "linear": lambda m, x, y: m.linear(x),
        "without bias": lambda m, x, y: m.plain(x),
        "of one axis": lambda m, x, y: m.linear(x[0, 0, 0]),
        "computed weight": lambda m, x, y: F.linear(x[0, 0], y[0, 0]),
        "computed weight and bias": lambda m, x, y: F.linear(x[0, 0], y[0, 0], y[0, 1, :, 0]),
        "x @ W": lambda m, x, y: x @ m.square,
        "x @ W.T": lambda m, x, y: x @ m.plain.weight.t(),
        "W @ x": lambda m, x, y: m.left @ x,
        "x @ y": lambda m, x, y: x @ y.transpose(-1, -2),
        "x @ public": lambda m, x, y: x @ m.public,
        "mm": lambda m, x, y: torch.mm(x[:, 0, 0], m.square),
        "bmm": lambda m, x, y: torch.bmm(x[:, 0], y[:, 0].transpose(1, 2)),
        "bmm with W": lambda m, x, y: torch.bmm(x[:, 0].transpose(0, 1), m.stacked),
        "weight norm": lambda m, x, y: m.normed(x),
    },
    shapes=[(2, 3, 5, 4), (2, 3, 5, 4)],
    ulps=1.01,
    state=lambda: {
        "linear": nn.Linear(4, 6),
        "plain": nn.Linear(4, 6, bias=False),
        "square": nn.Parameter(torch.ones(4, 4)),
        "left": nn.Parameter(torch.ones(7, 5)),
        "public": grid(4, 3, seed=9),
        "stacked": nn.Parameter(torch.ones(5, 4, 3)),
        "normed": weight_norm(nn.Linear(4, 6)),
    },
    exceptions={"weight norm": 12.0},  # four weights rounded after normalisation, each times |x| <= 6
)

CONV = Group(
    functions={
        "3 x 3": lambda m, x: m.plain(x),
        "strided": lambda m, x: m.strided(x),
        "dilated": lambda m, x: m.dilated(x),
        "padded": lambda m, x: m.padded(x),
        "uneven": lambda m, x: m.uneven(x),
        "grouped": lambda m, x: m.grouped(x),
        "depthwise": lambda m, x: m.depthwise(x),
        "depthwise, two each": lambda m, x: m.multiplied(x),
        "pointwise": lambda m, x: m.pointwise(x),
        "same": lambda m, x: m.same(x),
        "valid": lambda m, x: m.valid(x),
        "circular": lambda m, x: m.circular(x),
        "reflect": lambda m, x: m.reflect(x),
        "whole image": lambda m, x: m.whole(x),
        "unbatched": lambda m, x: m.strided(x[0]),
        "public kernel": lambda m, x: F.conv2d(x, m.public),
        "computed kernel": lambda m, x: F.conv2d(x, x[:, :, :2, :2]),
        "transposed": lambda m, x: m.transposed(x),
        "transposed, strided": lambda m, x: m.transposed_strided(x),
        "transposed, grouped": lambda m, x: m.transposed_grouped(x),
        "transposed, unbatched": lambda m, x: m.transposed(x[0]),
        "transposed, computed kernel": lambda m, x: F.conv_transpose2d(x, x[0, :, None, :2, :2], stride=2),
        "affine": lambda m, x: m.norm(x),
    },
    shapes=[(2, 4, 8, 6)],
    ulps=1.01,
    state=lambda: {
        "plain": nn.Conv2d(4, 5, 3),
        "strided": nn.Conv2d(4, 5, 3, stride=2),
        "dilated": nn.Conv2d(4, 5, 3, dilation=2),
        "padded": nn.Conv2d(4, 5, 3, padding=2, bias=False),
        "uneven": nn.Conv2d(4, 5, (2, 3), stride=(3, 1), padding=(1, 2), dilation=(2, 1)),
        "grouped": nn.Conv2d(4, 6, 3, groups=2),
        "depthwise": nn.Conv2d(4, 4, 3, groups=4, padding=1),
        "multiplied": nn.Conv2d(4, 8, 3, groups=4, stride=2),
        "pointwise": nn.Conv2d(4, 2, 1),
        "same": nn.Conv2d(4, 2, (3, 5), padding="same"),
        "valid": nn.Conv2d(4, 2, 3, padding="valid"),
        "transposed": nn.ConvTranspose2d(4, 3, 3),
        "transposed_strided": nn.ConvTranspose2d(4, 3, (3, 2), (2, 3), (2, 1), (1, 2), dilation=(1, 2)),
        "transposed_grouped": nn.ConvTranspose2d(4, 6, 2, 2, groups=2, bias=False),
        "circular": nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"),
        "reflect": nn.Conv2d(4, 2, 3, padding=2, padding_mode="reflect"),
        "whole": nn.Conv2d(4, 2, (8, 6)),
        "public": grid(2, 4, 3, 3, seed=3),
        "norm": nn.BatchNorm2d(4),
    },
    exceptions={"affine": 6.0},  # gains rounded after division by the standard deviation, times |x| <= 6
)

CONV1D = Group(
    functions={
        "plain": lambda m, x: m.plain(x),
        "strided": lambda m, x: m.strided(x),
        "dilated, padded": lambda m, x: m.dilated(x),
        "grouped": lambda m, x: m.grouped(x),
        "depthwise": lambda m, x: m.depthwise(x),
        "same": lambda m, x: m.same(x),
        "causal": lambda m, x: m.plain(F.pad(x, (2, 0))),
        "transposed": lambda m, x: m.transposed(x),
        "unbatched": lambda m, x: m.plain(x[0]),
    },
    shapes=[(2, 4, 17)],
    ulps=1.01,
    state=lambda: {
        "plain": nn.Conv1d(4, 5, 3),
        "strided": nn.Conv1d(4, 5, 4, stride=3),
        "dilated": nn.Conv1d(4, 5, 3, dilation=4, padding=3),
        "grouped": nn.Conv1d(4, 6, 3, groups=2, bias=False),
        "depthwise": nn.Conv1d(4, 4, 5, groups=4, padding=2),
        "same": nn.Conv1d(4, 2, 5, padding="same"),
        "transposed": nn.ConvTranspose1d(4, 6, 4, 2, 1, groups=2),
    },
)

MAX_POOL = Group(
    functions={
        "2": lambda m, x: F.max_pool2d(x, 2),
        "overlapping": lambda m, x: F.max_pool2d(x, 3, stride=1),
        "padded": lambda m, x: F.max_pool2d(x, 3, stride=2, padding=1),
        "uneven": lambda m, x: F.max_pool2d(x, (2, 3), stride=(3, 1), padding=(0, 1)),
        "dilated": lambda m, x: F.max_pool2d(x, 2, stride=1, dilation=3),
        "stride only": lambda m, x: F.max_pool2d(x, 1, stride=2),
        "all": lambda m, x: F.max_pool2d(x, (7, 6)),
        "unbatched": lambda m, x: F.max_pool2d(x[0], 2),
        "1d": lambda m, x: F.max_pool1d(x[:, 0], 3, stride=2, padding=1),
        "1d dilated": lambda m, x: F.max_pool1d(x[:, 0], 2, stride=1, dilation=2),
        "ceil": lambda m, x: F.max_pool2d(x, 2, ceil_mode=True),
        "ceil, padded": lambda m, x: F.max_pool2d(x, 3, (2, 4), 1, ceil_mode=True),
        "ceil, dilated": lambda m, x: F.max_pool2d(x, 2, 3, 1, dilation=(2, 3), ceil_mode=True),
        "1d ceil": lambda m, x: F.max_pool1d(x[:, 0], 3, 2, ceil_mode=True),
        "adaptive": lambda m, x: F.adaptive_max_pool2d(x, (1, 3)),
        "adaptive, one axis": lambda m, x: F.adaptive_max_pool2d(x, (None, 2)),
        "adaptive 1d": lambda m, x: F.adaptive_max_pool1d(x[:, 0], 3),
    },
    shapes=[(2, 3, 7, 6)],
    ulps=0,
)

AVG_POOL = Group(
    functions={
        "2": lambda m, x: F.avg_pool2d(x, 2),
        "overlapping": lambda m, x: F.avg_pool2d(x, 3, stride=1),
        "padded": lambda m, x: F.avg_pool2d(x, 3, stride=2, padding=1),
        "padding not counted": lambda m, x: F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False),
        "divisor": lambda m, x: F.avg_pool2d(x, 3, divisor_override=5),
        "uneven": lambda m, x: F.avg_pool2d(x, (2, 3), stride=(3, 1), padding=(1, 0), count_include_pad=False),
        "of one": lambda m, x: F.avg_pool2d(x, 1, stride=2),
        "ceil": lambda m, x: F.avg_pool2d(x, 2, ceil_mode=True),
        "ceil, padded": lambda m, x: F.avg_pool2d(x, 3, (2, 4), 1, ceil_mode=True),
        "ceil, not counted": lambda m, x: F.avg_pool2d(x, 3, (2, 4), 1, ceil_mode=True, count_include_pad=False),
        "ceil, divisor": lambda m, x: F.avg_pool2d(x, 3, 2, ceil_mode=True, divisor_override=4),
        "1d ceil": lambda m, x: F.avg_pool1d(x[:, 0], 3, 2, ceil_mode=True),
        "1d": lambda m, x: F.avg_pool1d(x[:, 0], 3),
        "1d padded": lambda m, x: F.avg_pool1d(x[:, 0], 4, stride=2, padding=2, count_include_pad=False),
        "adaptive": lambda m, x: F.adaptive_avg_pool2d(x, (1, 3)),
        "adaptive, unequal": lambda m, x: F.adaptive_avg_pool2d(x, (3, 4)),
        "adaptive, larger": lambda m, x: F.adaptive_avg_pool2d(x, (9, 6)),
        "adaptive, one axis": lambda m, x: F.adaptive_avg_pool2d(x, (None, 5)),
        "adaptive 1d": lambda m, x: F.adaptive_avg_pool1d(x[:, 0], 4),
        "global": lambda m, x: F.adaptive_avg_pool2d(x, 1),
        "decomposed": lambda m, x: A._adaptive_avg_pool2d(x, [2, 2]),
    },
    shapes=[(2, 3, 7, 6)],
    ulps=1.01,
)

SHAPE = Group(
    functions={
        "view": lambda m, x: x.view(x.shape[0], 12, -1),
        "flatten": lambda m, x: x.flatten(1),
        "unflatten": lambda m, x: x.unflatten(1, (3, 2)),
        "reshape after permute": lambda m, x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1),
        "_unsafe_view": lambda m, x: A._unsafe_view(x, [x.shape[0], 120]),
        "transpose": lambda m, x: x.transpose(1, 3),
        "mT": lambda m, x: x.mT,
        "t": lambda m, x: x[0, 0].t(),
        "movedim": lambda m, x: x.movedim(1, -1),
        "squeeze": lambda m, x: x[:, :1].squeeze(1),
        "squeeze several": lambda m, x: x[:, :1, :1].squeeze((1, 2)),
        "squeeze all": lambda m, x: x[0, :1, :1].squeeze(),
        "unsqueeze": lambda m, x: x.unsqueeze(-1),
        "None": lambda m, x: x[:, None],
        "expand": lambda m, x: x[:, :1].expand(-1, 3, -1, -1),
        "repeat": lambda m, x: x.repeat(1, 2, 1, 2),
        "repeat as often as there are inputs": lambda m, x: x[:, 0].repeat(1, x.shape[0] + 1, x.shape[0] - 1),
        "repeat half as often": lambda m, x: x[:, 0].repeat(1, 1 + x.shape[0] // 2, 2 * x.shape[0] * x.shape[0]),
        "repeat_interleave": lambda m, x: x.repeat_interleave(3, dim=2),
        "select": lambda m, x: x[:, 2],
        "slice": lambda m, x: x[:, 1:4, :, -2:],
        "step": lambda m, x: x[:, ::2, 1::3],
        "narrow": lambda m, x: x.narrow(2, 1, 3),
        "flip": lambda m, x: x.flip((1, 3)),
        "roll": lambda m, x: x.roll((1, -2), (2, 3)),
        "roll by the batch size": lambda m, x: x.roll(-x.shape[0], 2),
        "pixel_shuffle": lambda m, x: F.pixel_shuffle(x[:, :4], 2),
        "diagonal": lambda m, x: x.diagonal(0, 2, 3),
        "detach": lambda m, x: x.detach(),
        "alias": lambda m, x: A.alias(x),
        "contiguous": lambda m, x: x.transpose(1, 2).contiguous(),
        "chunk": lambda m, x: x.chunk(4, 1)[1],
        "split": lambda m, x: x.split(4, 1)[1],
        "split sizes": lambda m, x: x.split([1, 2, 3], 1)[2],
        "unbind": lambda m, x: x.unbind(2)[3],
        "cat": lambda m, x: torch.cat([x, x[:, :2]], 1),
        "cat with a parameter": lambda m, x: torch.cat([m.token.expand(x.shape[0], -1, -1, -1), x], 1),
        "cat with a public tensor": lambda m, x: torch.cat([m.public.t().expand(x.shape[0], 1, -1, -1), x], 1),
        "cat with ones and positions": lambda m, x: torch.cat(
            [torch.ones(x.shape[0], 1, 5, 4), x, torch.arange(20).reshape(5, 4).expand(x.shape[0], 1, -1, -1)], 1
        ),
        "cat of batches": lambda m, x: torch.cat([x, x]),
        "concat": lambda m, x: torch.concat([x, x], -1),
        "stack": lambda m, x: torch.stack([x, x.flip(1)], 2),
        "pad": lambda m, x: F.pad(x, (1, 2)),
        "pad with a value": lambda m, x: F.pad(x, (1, 0, 0, 2), value=-2.5),
        "crop": lambda m, x: F.pad(x, (-1, 0, 0, -1)),
        "constant_pad_nd": lambda m, x: A.constant_pad_nd(x, [1, 1], 3.0),
        "reflect": lambda m, x: F.pad(x, (3, 2, 1, 4), mode="reflect"),
        "replicate": lambda m, x: F.pad(x, (3, 0, 5, 9), mode="replicate"),
        "circular": lambda m, x: F.pad(x, (4, 3, 0, 5), mode="circular"),
        "replicate, cropping": lambda m, x: F.pad(x, (-1, 2, 0, 0), mode="replicate"),
        "upsample": lambda m, x: F.interpolate(x, scale_factor=2),
        "upsample by halves": lambda m, x: F.interpolate(x, scale_factor=(1.5, 2.5)),
        "resize": lambda m, x: F.interpolate(x, size=(9, 2)),
        "upsample 1d": lambda m, x: F.interpolate(x[:, :, 0], scale_factor=3),
        "zero pad": lambda m, x: nn.ZeroPad2d((1, 0, 2, 0))(x),
        "view of a public tensor": lambda m, x: x + m.public.t(),
    },
    shapes=[(2, 6, 5, 4)],
    ulps=0,
    state=lambda: {"token": nn.Parameter(torch.ones(1, 1, 5, 4)), "public": grid(4, 5)},
)

INDICES = Group(
    functions={
        "last axis": lambda m, x: x.argmax(-1),
        "first axis": lambda m, x: x.argmax(1, keepdim=True),
        "all": lambda m, x: x.argmax(),
        "all, kept": lambda m, x: torch.argmax(x, keepdim=True),
        "argmin": lambda m, x: x.argmin(2),
        "argmin of all": lambda m, x: x.argmin(),
        "moved": lambda m, x: x.argmax(1).transpose(1, 2)[:, :2],
        "logits too": lambda m, x: x * 2,
    },
    shapes=[(2, 5, 3, 4)],
    ulps=0,
)


EMBEDDING = Group(
    functions={
        "secret index": lambda m, x: m.table(x.argmax(-1)),
        "secret index in a computed table": lambda m, x: F.embedding(x[:, :, 0].argmax(-1), x[0, 0, :, :2] * m.factor),
        "position": lambda m, x: m.table(torch.arange(x.shape[0])),
        "position by position": lambda m, x: m.table(m.positions[0, torch.arange(x.shape[0])]),
        "index_select": lambda m, x: x.index_select(2, torch.tensor([4, 0, 0])),
        "several": lambda m, x: x[:, [0, 2], [1, -1]],
        "list": lambda m, x: x[:, :, [0, 2, -1]],
        "mask": lambda m, x: x[:, torch.tensor([True, False, True])],
        "pairs": lambda m, x: x[:, :, below(5)[:, :4]],
        "gather": lambda m, x: x.gather(2, (torch.arange(4) % 3).expand(x.shape[0], 3, 2, 4)),
        "masked_fill": lambda m, x: x.masked_fill(below(5)[:, :4], -2.5),
        "masked_fill with a tensor": lambda m, x: x.masked_fill(torch.arange(4) > 1, m.factor[0] * 0 + 3),
        "truth of a size": lambda m, x: x * below(4 + x.shape[0])[-1, :4],
        "index as a number": lambda m, x: x.argmax(-1).float() * 0.5,
    },
    shapes=[(2, 3, 5, 4)],
    ulps=1.01,
    state=lambda: {
        "table": nn.Embedding(9, 4),
        "factor": nn.Parameter(torch.ones(2)),
        "positions": torch.arange(16)[None],
    },
)

SOFTMAX = Group(
    functions={
        "last axis": lambda m, x: F.softmax(x, -1),
        "first axis": lambda m, x: torch.softmax(x, 1),
        "decomposed": lambda m, x: A._softmax(x, 1, False),
        "logarithm": lambda m, x: F.log_softmax(x, -1),
        "logarithm, first axis": lambda m, x: F.log_softmax(x, 1),
        "logarithm, decomposed": lambda m, x: A._log_softmax(x, 1, False),
        "logsumexp": lambda m, x: x.logsumexp(1),
        "logsumexp of all but the first axis": lambda m, x: torch.logsumexp(x, (1, -1), keepdim=True),
    },
    shapes=[(2, 5, 7)],
    ulps=6,
)

GROUPS = {
    "elementwise": ELEMENTWISE,
    "activation": ACTIVATION,
    "leaky": LEAKY,
    "linear": LINEAR,
    "conv": CONV,
    "conv1d": CONV1D,
    "max_pool": MAX_POOL,
    "avg_pool": AVG_POOL,
    "shape": SHAPE,
    "indices": INDICES,
    "softmax": SOFTMAX,
    "embedding": EMBEDDING,
    **FUNCTION_GROUPS,
}
