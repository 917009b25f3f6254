"""Sums and products of secrets, parameters, public tensors and numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpcinfer.errors import UnsupportedError
from mpcinfer.graph.capture import capture
from mpcinfer.nn.elementwise import divide, encode, fraction, scale
from mpcinfer.protocol.local import LocalWorld
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
    # a factor has 24 significant bits: at 24 fraction bits, that of 1/3 is half a unit off
    assert_agrees(model, captured, inputs, 2, 1.01 if frac_bits < 20 else 4, names)


def over_shares(x: torch.Tensor, frac_bits: int, protocol: Callable[..., Any]) -> torch.Tensor:
    """A function of this module, by itself: no program bounds its input."""
    world = LocalWorld(2, bytes(32))
    shares = world.run(protocol, world.share(torch.round(x * 2.0**frac_bits).to(torch.int64), frac_bits))
    assert all(s.frac_bits == frac_bits for s in shares)
    return world.reveal(shares).double() / 2.0**frac_bits


@pytest.mark.parametrize("frac_bits", [8, 16, 20, 24])
@pytest.mark.parametrize(
    "factor",
    [0.9, -2.7, 1e-4, -3e-6, 1 / 3, 50000.5, 2.0**30 + 0.5, 1e-11, 1e-30, 0.375, 2, -(2**20), 2**30, 0, True],
)
def test_factors_have_the_range_and_the_precision_that_are_documented(frac_bits: int, factor: float) -> None:
    n, d = fraction(factor)
    edge = min(2.0**62 / max(1, abs(n)), 2.0 ** (62 - frac_bits)) / 2**frac_bits
    assert d == 0 or edge >= 2.0 ** (38 - frac_bits)
    x = grid(40, frac_bits=frac_bits, scale=edge * (1 - 2.0**-30))
    x[:2] = torch.tensor([edge, -edge]) * (1 - 2.0**-30)
    x = torch.round(x * 2**frac_bits) / 2**frac_bits
    got = over_shares(x, frac_bits, lambda ctx, s: scale(ctx, s, factor))
    exact = float(factor).is_integer()
    allowed = 0 if exact else 1.0 + (x * factor).abs() * 2.0 ** (frac_bits - 24)
    assert bool(((got - x * factor).abs() * 2**frac_bits <= allowed).all())


@pytest.mark.parametrize(
    ("factor", "n", "d"),
    [
        (3, 3, 0), (-2.0**40, -(2**40), 0), (True, 1, 0), (0.5, 1, 1), (-0.75, -3, 2), (2.5, 5, 1), (0, 0, 0),
        (1 / 3, 11184811, 25), (1e-300, 0, 0), (2.0**-61, 1, 61), (2.0**30 + 0.5, 2**30, 0),
    ],
)  # fmt: skip
def test_fractions_are_the_nearest_and_the_shortest(factor: float, n: int, d: int) -> None:
    assert fraction(factor) == (n, d)


@given(st.floats(2.0**-37, 2.0**60))
def test_fractions_have_24_significant_bits(factor: float) -> None:
    n, d = fraction(factor)
    assert abs(n / 2**d - factor) <= factor * 2.0**-24
    assert fraction(-factor) == (-n, d)
    assert d == 0 or (n < 1 << 24 and n % 2)


# before, a count's inverse had 24 fraction bits (16 at 8): 15, 230, 720, 12 and 184,320 units off
@pytest.mark.parametrize(
    ("frac_bits", "side", "truncations", "ulps"),
    [(16, 28, 2, 1), (16, 112, 2, 1), (16, 224, 2, 1), (8, 56, 1, 1), (24, 224, 2, 7), (16, 16, 1, 1), (16, 15, 1, 1)],
)
def test_means_of_many_are_right_to_the_last_place(frac_bits: int, side: int, truncations: int, ulps: float) -> None:
    x = torch.full((2, 1, side, side), 10.0, dtype=torch.float64)
    x[1] = grid(1, side, side, frac_bits=frac_bits)
    model = Outputs({"mean": lambda m, x: x.mean((2, 3))}).eval()
    transcript = assert_agrees(model, capture(model, [x], frac_bits=frac_bits), [x], 2, ulps + 2.0 ** (frac_bits - 23))
    assert transcript.rounds == truncations


@pytest.mark.parametrize("frac_bits", [8, 16, 24])
@pytest.mark.parametrize("count", [3, 255, 257, 1000, 50_176, 4096])
def test_means_have_the_range_that_is_documented(frac_bits: int, count: int) -> None:
    edge = min(2.0**14, 2.0 ** (62 - frac_bits) / count) * (1 - 2.0**-20)
    x = grid(20, frac_bits=frac_bits, scale=edge * count)
    x[:2] = torch.tensor([edge, -edge]) * count
    x = torch.round(x * 2**frac_bits) / 2**frac_bits
    got = over_shares(x, frac_bits, lambda ctx, s: divide(ctx, s, count))
    allowed = 1 + 2.0 ** (frac_bits - 23) + (x / count).abs() * 2.0 ** (frac_bits - 25)
    assert bool(((got - x / count).abs() * 2**frac_bits <= allowed).all())


def test_large_factors() -> None:
    """They wrapped around: 24 fraction bits stayed, however large the factor."""
    model = Outputs({"integer": lambda m, x: x * 2**20, "other": lambda m, x: 100 * x * 50000.5}).eval()
    x = torch.full((1, 1), 10.0, dtype=torch.float64)
    assert_agrees(model, capture(model, [x]), [x], 2, 0)


COSTS: dict[str, tuple[Callable[..., torch.Tensor], int, int]] = {
    "x + y": (lambda m, x, y: x + y, 0, 0),
    "x + secret": (lambda m, x, y: x + m.secret, 0, 0),
    "public - x": (lambda m, x, y: m.public - x, 0, 0),
    "3 x - 1": (lambda m, x, y: 3 * x - 1, 0, 0),
    "x / 3": (lambda m, x, y: x / 3, 1, 8),
    "x * public": (lambda m, x, y: x * m.public, 1, 8),
    "x * secret": (lambda m, x, y: x * m.secret, 2, 8 + 8),
    "x / secret": (lambda m, x, y: x / m.divisor, 2, 8 + 8),
    "x / public": (lambda m, x, y: x / m.public_divisor, 1, 8),
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
        (lambda m, x, y: x / 0, "division by zero"),
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
