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
