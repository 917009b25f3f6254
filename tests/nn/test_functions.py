"""Exponentials, logarithms, roots, reciprocals, quotients, powers: over their whole range and outside their domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from mpcinfer.errors import UnsupportedError
from mpcinfer.graph.capture import capture
from mpcinfer.nn import lookup
from mpcinfer.protocol.local import LocalWorld
from tests.models_local import Outputs, grid, run_local
from tests.nn.operators import check


def test_agrees(parties: int) -> None:
    check("functions", parties)


def over_shares(op: str, x: torch.Tensor, *rest: object, frac_bits: int = 16, parties: int = 2) -> torch.Tensor:
    """An operator by itself: no program bounds its input."""
    rule, world = lookup(op), LocalWorld(parties, bytes(32))
    assert rule is not None
    shares = world.run(rule, world.share(torch.round(x * 2.0**frac_bits).to(torch.int64), frac_bits), *rest)
    assert all(s.frac_bits == frac_bits for s in shares)
    return world.reveal(shares).double() / 2.0**frac_bits


def positive(frac_bits: int, top: int) -> torch.Tensor:
    """Numbers of every octave that fixed point holds, up to 2^top: both ends and some between."""
    octaves = torch.exp2(torch.arange(-frac_bits, top).double())
    x = (octaves[:, None] * torch.tensor([1.0, 1.3, 1.41, 1.5, 1.9])).flatten()
    return torch.cat([torch.floor(x * 2**frac_bits) / 2**frac_bits, torch.tensor([2.0**top], dtype=torch.float64)])


FUNCTIONS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], float, float]] = {
    # relative and absolute error, the latter besides 2 units in the last place
    "log": (torch.log, 0, 1e-5),
    "sqrt": (torch.sqrt, 3e-5, 0),
    "rsqrt": (torch.rsqrt, 3e-5, 0),
}


@pytest.mark.parametrize("frac_bits", [8, 16, 24])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_octave(name: str, frac_bits: int) -> None:
    function, relative, absolute = FUNCTIONS[name]
    x = positive(frac_bits, min(40, 61 - 2 * frac_bits))
    got, want = over_shares(f"aten.{name}.default", x, frac_bits=frac_bits), function(x)
    assert bool(((got - want).abs() <= relative * want.abs() + absolute + 2 * 2.0**-frac_bits).all())


@pytest.mark.parametrize("frac_bits", [8, 16, 24])
def test_outside_the_domain_of_logarithms_and_roots(frac_bits: int, parties: int) -> None:
    unit = 2.0**-frac_bits
    x = torch.tensor([0.0, -unit, -1, -(2.0 ** (60 - 2 * frac_bits))], dtype=torch.float64)
    assert over_shares("aten.sqrt.default", x, frac_bits=frac_bits, parties=parties).abs().max() <= unit
    root = over_shares("aten.rsqrt.default", x, frac_bits=frac_bits, parties=parties)
    assert float((root - unit**-0.5).abs().max()) <= 2 * unit + 1e-5 * unit**-0.5
    log = over_shares("aten.log.default", x, frac_bits=frac_bits, parties=parties)
    assert float((log - math.log(unit)).abs().max()) <= 1e-5 + 2 * unit


@pytest.mark.parametrize("frac_bits", [8, 16, 24])
def test_reciprocals(frac_bits: int, parties: int) -> None:
    nearest, farthest = 2.0 ** (2 - frac_bits), 2.0 ** min(20, 62 - 2 * frac_bits)
    inside = positive(frac_bits, int(math.log2(farthest)) - 1)
    beyond = torch.tensor([0.0, 2.0**-frac_bits, nearest / 2, 1.5 * farthest], dtype=torch.float64)
    x = torch.cat([inside, -inside, beyond, -beyond])
    want = torch.where(x < 0, -1.0, 1.0) / x.abs().clamp(nearest, farthest)
    got = over_shares("aten.reciprocal.default", x, frac_bits=frac_bits, parties=parties)
    assert bool(((got - want).abs() <= 4e-5 * want.abs() + 2 * 2.0**-frac_bits).all())


@pytest.mark.parametrize("frac_bits", [8, 16, 20])
def test_exponentials(frac_bits: int, parties: int) -> None:
    x = torch.cat([torch.linspace(-20, 8, 400), torch.tensor([9.0, 100, 20_000, -100, -20_000])]).double()
    x = torch.round(x * 2**frac_bits) / 2**frac_bits
    got, want = over_shares("aten.exp.default", x, frac_bits=frac_bits, parties=parties), x.clamp(max=8).exp()
    assert bool(((got - want).abs()[:400] <= 5e-5 * want[:400] + 2 * 2.0**-frac_bits).all())
    assert bool(((got - want).abs()[400:] <= 0.14 * want[400:] + 2.0**-frac_bits).all())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (0,), (2, 0, 3)])
def test_shapes(shape: Sequence[int]) -> None:
    x = torch.full(tuple(shape), 2.0, dtype=torch.float64)
    for name in ("exp", "log", "sqrt", "rsqrt", "reciprocal", "square"):
        got, want = over_shares(f"aten.{name}.default", x), getattr(torch, name)(x)
        assert got.shape == want.shape
        assert bool(((got - want).abs() <= 1e-3).all())


def test_quotients_of_very_different_sizes(parties: int) -> None:
    x = torch.tensor([1.0, 1000, 2.0**17, -(2.0**17), 0, 3], dtype=torch.float64)
    y = torch.tensor([2.0**17, -1000, 2.0**17, 0.5, 7, -0.001953125], dtype=torch.float64)
    rule, world = lookup("aten.div.Tensor"), LocalWorld(parties, bytes(32))
    assert rule is not None
    a, b = (world.share(torch.round(v * 2.0**16).to(torch.int64), 16) for v in (x, y))
    got = world.reveal(world.run(rule, a, b)).double() / 2.0**16
    assert bool(((got - x / y).abs() <= 4e-5 * (x / y).abs() + (2 + x.abs() / 2**11) * 2.0**-16).all())


def test_an_expanded_divisor_is_inverted_once() -> None:
    x, y = grid(8, 64, seed=1), grid(8, 1, seed=2).abs() + 1
    functions = {"expanded": lambda m, x, y: x / y.expand(-1, 64), "row": lambda m, x, y: x / y}
    models = [Outputs({name: function}).eval() for name, function in functions.items()]
    expanded, row = (run_local(capture(model, [x, y]), [x, y], 2)[1] for model in models)
    assert (expanded.rounds, expanded.bytes_sent) == (row.rounds, row.bytes_sent)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda m, x: x / 0.0, "aten.div.Tensor at .*division by zero"),
        (lambda m, x: x**x, "aten.pow.Tensor_Tensor"),
        (lambda m, x: 2**x, "aten.pow.Scalar"),
        (lambda m, x: x.sin(), "aten.sin.default"),
    ],
)
def test_refusals(function: Callable[..., torch.Tensor], why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        capture(Outputs({"f": function}).double().eval(), [grid(2, 8)])
