"""Activations, and dropout in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mpcinfer.errors import UnsupportedError
from mpcinfer.graph.capture import capture
from tests.models_local import Outputs, assert_agrees, grid, run_local
from tests.nn.operators import check


@pytest.mark.parametrize("group", ["activation", "leaky", "smooth"])
def test_agrees(group: str, parties: int) -> None:
    check(group, parties)


def test_large_and_adjacent_values_are_exact(parties: int) -> None:
    model = nn.Sequential(nn.ReLU()).eval()
    unit, large = 2.0**-16, 2.0**29
    x = torch.tensor([[0, unit, -unit, large, -large, large - unit, unit - large, 1]], dtype=torch.float64)
    assert_agrees(model, capture(model, [x]), [x], parties, ulps=0)


@pytest.mark.parametrize("parties", [2, 3, 5])
def test_relu_takes_four_rounds_and_at_most_sixteen_bytes(parties: int) -> None:
    x = grid(4, 250)
    _, transcript = run_local(capture(nn.ReLU().eval(), [x]), [x], parties)
    assert transcript.rounds == 4
    assert transcript.bytes_sent <= 16 * x.numel() * (parties - 1)


@pytest.mark.parametrize(
    ("function", "rounds"),
    [(F.relu6, 4), (torch.abs, 4), (F.leaky_relu, 5), (lambda x: x.clamp(max=1.0), 4), (F.dropout1d, 0)],
)
def test_rounds(function: Callable[..., torch.Tensor], rounds: int) -> None:
    x = grid(2, 8)
    training = {"training": False} if function is F.dropout1d else {}
    captured = capture(Outputs({"f": lambda m, x: function(x, **training)}).eval(), [x])
    assert run_local(captured, [x], 2)[1].rounds == rounds


@pytest.mark.parametrize("frac_bits", [8, 12, 20, 24])
def test_other_scales(frac_bits: int) -> None:
    functions = {
        "relu6": lambda m, x: F.relu6(x),
        "hardtanh": lambda m, x: F.hardtanh(x, -0.5, 1.25),
        "leaky": lambda m, x: F.leaky_relu(x, 0.25),
    }
    model, x = Outputs(functions).eval(), grid(3, 40, frac_bits=frac_bits, scale=8)
    assert_agrees(model, capture(model, [x], frac_bits=frac_bits), [x], 2, 0, list(functions), {"leaky": 1.0})


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda m, x: x.clamp(2, -1), "aten.clamp.default at .*low > high"),
        (lambda m, x: x.clamp(max=float("inf")), "aten.clamp.default at .*not a finite number"),
        (lambda m, x: F.dropout(x, 0.5, training=True), "native_dropout"),
        (lambda m, x: F.rrelu(x, training=True), "rrelu"),
    ],
)
def test_refusals(function: Callable[..., torch.Tensor], why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        capture(Outputs({"f": function}).double().eval(), [grid(2, 8)])


SMOOTH: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "mish": F.mish,
    "softplus": F.softplus,
    "log_sigmoid": F.logsigmoid,
    "elu": F.elu,
    "selu": F.selu,
}


@pytest.mark.parametrize("frac_bits", [8, 16, 20])
def test_the_whole_range(frac_bits: int, parties: int) -> None:
    """What lies outside the fitted interval takes its asymptote."""
    ends = torch.tensor([32.0, 64, 100, 1000, 20_000])
    x = torch.cat([torch.linspace(-9, 9, 181), ends, -ends]).double()[None]
    x = torch.round(x * 2**frac_bits) / 2**frac_bits
    model = Outputs({name: lambda m, x, f=f: f(x) for name, f in SMOOTH.items()}).eval()
    ulps = max(2, 5e-4 * 2**frac_bits)
    # a factor has 24 significant bits, which 20,000 uses up; an ulp of x counts for a function's slope
    factors = {"hardsigmoid": ulps, "selu": ulps + 2.0**frac_bits * 2e-3}
    assert_agrees(model, capture(model, [x], frac_bits=frac_bits), [x], parties, ulps + 1, list(SMOOTH), factors)


@pytest.mark.parametrize("name", ["gelu", "silu", "sigmoid", "tanh", "erf"])
def test_smooth_functions_take_at_most_six_rounds_and_sixty_bytes(name: str) -> None:
    x = grid(4, 50)
    captured = capture(Outputs({name: lambda m, x: SMOOTH[name](x)}).eval(), [x])
    _, seen = run_local(captured, [x], 2)
    assert seen.rounds <= 6
    assert seen.bytes_sent <= 60 * x.numel()
    assert seen.dealer_bytes <= 600 * x.numel()


def test_shapes_of_activations() -> None:
    functions = {
        "0-d": lambda m, x: F.gelu(x[0, 0]),
        "one element": lambda m, x: torch.tanh(x[:1, :1]),
        "halves of one": lambda m, x: F.glu(x[:, :2]),
        "slopes of a row": lambda m, x: F.prelu(x, m.slopes),
    }
    x = grid(3, 6)
    model = Outputs(functions, slopes=nn.Parameter(torch.full((6,), 0.25))).double().eval()
    assert_agrees(model, capture(model, [x], dynamic_shapes=({},)), [x], 2, 140, list(functions))


def test_limits_beyond_all_secrets() -> None:
    functions = {
        "high": lambda m, x: x.clamp(max=2.0**40),
        "low": lambda m, x: x.clamp(min=-(2.0**40)),
        "threshold": lambda m, x: F.threshold(x, -(2.0**40), 1.0),
    }
    x = torch.tensor([[0.0, 2.0**25, -(2.0**25)]], dtype=torch.float64)
    model = Outputs(functions).eval()
    assert_agrees(model, capture(model, [x]), [x], 2, 0, list(functions))
