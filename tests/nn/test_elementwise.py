"""Sums and products of secrets, parameters, public tensors and numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from mpcinfer.errors import UnsupportedError
from mpcinfer.graph.capture import capture
from mpcinfer.nn.elementwise import encode, factor_bits
from tests.models_local import Outputs, assert_agrees, grid, on_grid, run_local
from tests.nn.operators import ELEMENTWISE, check


def test_agrees_within_one_unit(parties: int) -> None:
    check("elementwise", parties)


@pytest.mark.parametrize("frac_bits", [8, 12, 20, 24])
def test_other_scales(frac_bits: int) -> None:
    names = ["x * y", "x + a y", "x * secret", "public - x", "mean of axes", "x / 3", "-0.001 * x"]
    functions = {name: ELEMENTWISE.functions[name] for name in names}
    model = on_grid(Outputs(functions, **ELEMENTWISE.state()), frac_bits)
    for buffer in (model.public,):
        buffer.copy_(torch.round(buffer * 2**frac_bits) / 2**frac_bits)
    inputs = [grid(2, 3, 5, 4, frac_bits=frac_bits, seed=i) for i in range(2)]
    captured = capture(model, inputs, frac_bits=frac_bits)
    assert captured.program.frac_bits == frac_bits
    # a factor has 48 - frac_bits fraction bits where that is less than frac_bits + 8: at 24, 1/3 is half a unit off
    assert_agrees(model, captured, inputs, 2, 1.01 if frac_bits < 20 else 4, names)


@pytest.mark.parametrize("frac_bits", [8, 16, 20, 24])
def test_factors_have_the_range_that_is_documented(frac_bits: int) -> None:
    model = Outputs({"scaled": lambda m, x: x * 0.9, "mean": lambda m, x: x.mean(1)}).eval()
    x = torch.full((1, 3), 2.0**14 - 1, dtype=torch.float64)
    results, _ = run_local(capture(model, [x], frac_bits=frac_bits), [x], 2)
    for got, want in zip(results, [x * 0.9, x.mean(1)], strict=True):
        assert float((got - want).abs().max()) <= 2.0**-frac_bits + 2.0 ** (14 - factor_bits(frac_bits))


COSTS: dict[str, tuple[Callable[..., torch.Tensor], int, int]] = {
    "x + y": (lambda m, x, y: x + y, 0, 0),
    "x + secret": (lambda m, x, y: x + m.secret, 0, 0),
    "public - x": (lambda m, x, y: m.public - x, 0, 0),
    "3 x - 1": (lambda m, x, y: 3 * x - 1, 0, 0),
    "x / 3": (lambda m, x, y: x / 3, 1, 8),
    "x * public": (lambda m, x, y: x * m.public, 1, 8),
    "x * secret": (lambda m, x, y: x * m.secret, 2, 8 + 8),
    "x / secret": (lambda m, x, y: x / m.divisor, 2, 8 + 8),
    "x * y": (lambda m, x, y: x * y, 2, 16 + 8),
    "x * x": (lambda m, x, y: x * x, 2, 8 + 8),
}


@pytest.mark.parametrize("name", COSTS)
def test_costs(name: str) -> None:
    function, rounds, sent = COSTS[name]
    model = on_grid(Outputs({name: function}, **ELEMENTWISE.state()))
    x = grid(2, 3, 5, 4)
    _, transcript = run_local(capture(model, [x, x]), [x, x], 2)
    assert (transcript.rounds, transcript.bytes_sent) == (rounds, sent * x.numel())


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda m, x, y: x / y, "division is supported by a public non-zero number only"),
        (lambda m, x, y: 1 / x, "aten.reciprocal.default"),
        (lambda m, x, y: x**3, "exponent 2 only"),
        (lambda m, x, y: torch.add(x, m.public, alpha=0.5), "fractional alpha"),
        (lambda m, x, y: x * 1e30, "too large for the fixed-point range"),
        (lambda m, x, y: x + math.inf, "not a finite number"),
        (lambda m, x, y: x * math.nan, "not a finite number"),
    ],
)
def test_refusals_name_the_operator(function: Callable[..., torch.Tensor], why: str) -> None:
    model = on_grid(Outputs({"refused": function}, **ELEMENTWISE.state()))
    with pytest.raises(UnsupportedError, match=why) as caught:
        capture(model, [grid(2, 3, 5, 4), grid(2, 3, 5, 4)])
    assert "aten." in str(caught.value)


def test_encode() -> None:
    assert encode(1.5, 16) == 3 << 15
    assert encode(True, 4) == 16
    for bad in (math.nan, math.inf, 2.0**60):
        with pytest.raises(UnsupportedError):
            encode(bad, 16)
