"""Batch norms that become part of the layer before them, and those that can't; constants computed at deploy."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mpcinfer.errors import RangeError, UnsupportedError
from mpcinfer.graph.capture import capture
from tests.graph.conftest import Case, trained
from tests.models_local import Outputs, assert_agrees

# Folded weights and gains are rounded to 2^-17 of the unit. With inputs of size 4 in at most 40 terms that is an
# error of 80 units at worst, and a few in practice.
ULPS = 24


class OverSequence(nn.Module):
    """A batch norm over the axis before the one that the linear layer makes; both have the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 4), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x))


class Shared(nn.Module):
    """One convolution with two batch norms, and one whose result is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3)
        self.a, self.b, self.c = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.other(x)
        return self.a(self.conv(x)) + self.b(self.conv(x * 2)) + self.c(y) + y


class NormOfImage(nn.Module):
    """A batch norm of an unbatched convolution's result: its channels are an axis of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


MODELS = {
    "conv2d": (nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU()), (3, 2, 6, 6), 0),
    "grouped": (nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4)), (3, 2, 6, 6), 0),
    "conv1d, same": (nn.Sequential(nn.Conv1d(2, 3, 3, padding="same"), nn.BatchNorm1d(3)), (3, 2, 9), 0),
    "linear": (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), (3, 5), 0),
    "no gain": (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False)), (3, 5), 0),
    "first": (nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3)), (3, 2, 6, 6), 1),
    "of rows": (nn.Sequential(nn.BatchNorm1d(5)), (3, 5), 1),
    "of sequences": (nn.Sequential(nn.BatchNorm1d(5)), (3, 5, 2), 1),
    "after ReLU": (nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.BatchNorm1d(4)), (3, 5), 1),
    "three in a row": (nn.Sequential(nn.Linear(5, 4), *(nn.BatchNorm1d(4) for _ in range(3))), (3, 5), 2),
    "over a sequence": (OverSequence(), (3, 4, 5), 1),
    "one convolution, two norms": (Shared(), (2, 2, 5, 5), 1),
    "unbatched convolution": (NormOfImage(), (2, 6, 6), 1),
}


@pytest.mark.parametrize("name", MODELS)
def test_agrees_and_folds_what_it_can(name: str) -> None:
    model, shape, standing = MODELS[name]
    torch.manual_seed(3)
    trained(model)
    x = torch.randn(shape)
    captured = capture(model, [x])
    assert_agrees(model, captured, [x], 2, ULPS)
    ops = [node.op for node in captured.program.nodes]
    assert ops.count("mpc.affine") == standing
    assert not any("batch_norm" in op or "getitem" in op for op in ops)


class Standardised(nn.Module):
    """Raw numbers, centred and divided by their deviations before anything else."""

    def __init__(self, deviations: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([3.0 * d for d in deviations]))
        self.register_buffer("deviation", torch.tensor(deviations))
        self.linear = nn.Linear(len(deviations), 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear((x - self.mean) / self.deviation)
        return y


RAW = [0.5, 12.0, 300.0, 20_000.0, 50_000.0, 1_000_000.0]


def raw(mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    x = mean + deviation * torch.randn(7, len(mean), generator=torch.Generator().manual_seed(1)).clamp(-3, 3)
    return torch.round(x * 16) / 16


def test_raw_numbers_are_divided_by_what_they_are() -> None:
    """The inverse of 50,000 is 1.3 units, that of a million none."""
    model = Standardised(RAW).eval()
    x = raw(model.mean, model.deviation)
    captured = capture(model, [x])
    assert_agrees(model, captured, [x], 2, ULPS)
    assert [node.op for node in captured.program.nodes].count("aten.mul.Tensor") == 2
    few = Standardised([0.5, 3.0, 255.0]).eval()
    program = capture(few, [torch.zeros(2, 3)]).program
    assert [node.op for node in program.nodes].count("aten.mul.Tensor") == 1  # as precise as it must be


def test_what_divides_and_is_public_stays_public() -> None:
    model = Standardised(RAW[:5]).eval()
    x = raw(model.mean, model.deviation)[:, :5]
    captured = capture(model, [x], public=["deviation"])
    assert_agrees(model, captured, [x], 2, ULPS)
    assert not any("deviation" in name for name in captured.weights)


def test_a_norm_of_raw_numbers() -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.BatchNorm1d(len(RAW)), nn.Linear(len(RAW), 2)).eval()
    deviation = torch.tensor(RAW)
    model[0].running_mean.copy_(2 * deviation)
    model[0].running_var.copy_(deviation**2)
    model[0].weight.data.uniform_(0.5, 2)
    model[0].bias.data.uniform_(-1, 1)
    x = raw(2 * deviation, deviation)
    assert_agrees(model, capture(model, [x]), [x], 2, ULPS)


def test_what_no_fraction_bits_hold_is_refused() -> None:
    with pytest.raises(RangeError, match="divides by so large numbers"):
        capture(Standardised([1.0, 1e9]).eval(), [torch.zeros(2, 2)])


def test_folded_norms_cost_nothing(residual: Case) -> None:
    names = [p.name for p in residual.captured.program.parameters]
    assert sum(".folded" in name for name in names) == 2 * 3
    assert [node.path for node in residual.captured.program.nodes if node.op == "mpc.affine"] == ["norm"]


def test_norms_without_statistics_are_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    with pytest.raises(UnsupportedError, match="batch_norm.* at 1"):
        capture(model, [torch.zeros(2, 5)])


def test_statistics_that_depend_on_the_input_are_refused() -> None:
    model = Outputs({"norm": lambda m, x: F.batch_norm(x, x[0], m.variance, training=False)}, variance=torch.ones(4))
    with pytest.raises(UnsupportedError, match="statistics or gains that depend on the input"):
        capture(model.eval(), [torch.zeros(2, 4)])


def test_a_negative_variance_is_a_range_error() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).eval()
    model[1].running_var.fill_(-1)
    with pytest.raises(RangeError, match="parameter .*folded.* contains NaN"):
        capture(model, [torch.zeros(2, 5)])


def test_constants_are_computed_at_deploy() -> None:
    functions = {
        "table": lambda m, x: x + m.table[m.index],
        "scale": lambda m, x: x * torch.sigmoid(m.gate) / torch.tensor([1.0, 2.0, 4.0]),
        "parts": lambda m, x: x * m.table.split(2)[1][0],
    }
    state = {"table": nn.Parameter(torch.randn(5, 3)), "gate": nn.Parameter(torch.randn(3))}
    model = Outputs(functions, **state, index=torch.tensor([3, 1])).eval()
    x = torch.randn(2, 3)
    captured = capture(model, [x])
    assert_agrees(model, captured, [x], 2, ULPS)
    assert {node.op for node in captured.program.nodes} == {"aten.add.Tensor", "aten.mul.Tensor"}


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda m, x: x + torch.rand(3), "draws random numbers"),
        (lambda m, x: x + torch.sin(torch.arange(x.shape[0])[:, None]), "no protocol for: aten.sin"),
    ],
)
def test_constants_that_are_none(function: object, why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        capture(Outputs({"f": function}).eval(), [torch.zeros(2, 3)])
