"""sqrt(x) and 1/sqrt(x) over many octaves, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mpcinfer.protocol import root
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.local import LocalWorld
from mpcinfer.protocol.root import over_root, rsqrt, sqrt
from mpcinfer.protocol.types import Shared
from tests.openings import assert_hides
from tests.protocol.conftest import Ran

Worlds = Callable[..., LocalWorld]
RELATIVE, FEWER_OCTAVES = 2.5e-5, 1.5e-5


def decoded(
    world: LocalWorld, function: Callable[..., Any], x: torch.Tensor, scale: int, **limits: int
) -> torch.Tensor:
    shares = world.run(lambda ctx, s: function(ctx, s, **limits), world.share(x, scale))
    return world.reveal(shares).double() / 2.0 ** shares[0].frac_bits


def wanted(function: Callable[..., Any], x: torch.Tensor, frac_bits: int) -> torch.Tensor:
    return (x.double() / 2.0**frac_bits) ** (0.5 if function is sqrt else -0.5)


def assert_close(got: torch.Tensor, want: torch.Tensor, out_bits: int, relative: float = FEWER_OCTAVES) -> None:
    assert float(((got - want).abs() - relative * want).max()) <= 2.0**-out_bits


def grid(low: int, high: int, frac_bits: int, count: int) -> torch.Tensor:
    """As many numbers in each octave, and every power of two, every cut, and their neighbours."""
    x = torch.round(torch.exp2(torch.linspace(low, high, count, dtype=torch.float64) + frac_bits)).to(torch.int64)
    edges = [t << (frac_bits + k) for k in range(low, high) for t in (1, 2)]
    edges += [(181 << (frac_bits + k)) >> 7 for k in range(low, high)]
    near = torch.tensor([e + i for e in edges for i in (-1, 0, 1, 2)])
    return torch.cat([x, near[(near >= 1 << (frac_bits + low)) & (near <= 1 << (frac_bits + high))]])


def test_default_range(world: Worlds, parties: int) -> None:
    """The error is also below what issue 3 asks: 1e-3 |y| or 2 units in the last place."""
    x = grid(-8, 20, 16, 8000)
    got, want = decoded(world(parties), rsqrt, x, 16), wanted(rsqrt, x, 16)
    assert_close(got, want, 28)
    assert bool(((got - want).abs() <= torch.clamp(1e-3 * want, min=2 * 2.0**-28)).all())
    x = grid(-16, 20, 16, 8000)
    assert_close(decoded(world(parties, "sqrt"), sqrt, x, 16), wanted(sqrt, x, 16), 16)


@pytest.mark.parametrize("function", [sqrt, rsqrt])
@pytest.mark.parametrize(
    ("frac_bits", "low", "high", "out_bits"),
    [
        (8, -8, 20, 16),
        (24, -8, 20, 28),
        (24, 0, 7, 28),
        (16, 0, 1, 28),
        (8, -8, -7, 24),
        (16, -16, -8, 28),
        (24, -9, 30, 30),
        (8, -7, 46, 16),
        (16, -16, 32, 16),
        (24, -18, 30, 16),
        (8, 0, 46, 16),
    ],
)
def test_other_ranges_and_scales(
    world: Worlds, function: Callable[..., Any], frac_bits: int, low: int, high: int, out_bits: int
) -> None:
    x = grid(low, high, frac_bits, 2000)
    limits = {"low": low, "high": high, "frac_bits": out_bits}
    relative = FEWER_OCTAVES if high - low < 40 else RELATIVE
    if high - low > root.MAX_OCTAVES:
        with pytest.raises(ValueError, match="roots over"):
            decoded(world(2), function, x, frac_bits, **limits)
        return
    assert_close(
        decoded(world(2), function, x, frac_bits, **limits), wanted(function, x, frac_bits), out_bits, relative
    )


def test_every_number_of_an_octave(world: Worlds) -> None:
    """At 2^-14 of x: all numbers that the polynomial can see."""
    x = torch.arange(1 << 14, (4 << 14) + 1)
    for function in (sqrt, rsqrt):
        got = decoded(world(2, function.__name__), function, x, 14, low=0, high=2, frac_bits=28)
        assert_close(got, wanted(function, x, 14), 28)


@pytest.mark.parametrize("over", [1, 2, 3, 384, 768, 4096, 65_537])
def test_of_a_mean(world: Worlds, over: int) -> None:
    x = grid(-8, 20, 16, 1000)
    got = decoded(world(2), rsqrt, x, 16, over=over)
    assert_close(got, wanted(rsqrt, x, 16) * over**0.5, 28)


def test_outside_the_range(world: Worlds, parties: int) -> None:
    below = torch.tensor([255, 1, 0, -1, -(2**36), -(2**62)])
    above = torch.tensor([2**36 + 1, 2**40, 2**62])
    ends = wanted(rsqrt, torch.tensor([256, 2**36]), 16)
    assert_close(decoded(world(parties), rsqrt, below, 16), ends[:1], 28)
    assert_close(decoded(world(parties, "above"), rsqrt, above, 16), ends[1:], 28)
    assert not decoded(world(parties, "zero"), sqrt, below[2:], 16).any()
    assert not decoded(world(parties, "low"), sqrt, below, 16, low=-8).any()
    assert_close(decoded(world(parties, "high"), sqrt, above, 16), torch.full((3,), 2.0**10), 16)


@pytest.mark.parametrize("function", [sqrt, rsqrt])
@pytest.mark.parametrize(
    ("low", "high", "frac_bits"), [(-17, 0, 16), (3, 3, 16), (0, 39, 16), (-16, 33, 16), (-8, 20, 56)]
)
def test_impossible_ranges(world: Worlds, function: Callable[..., Any], low: int, high: int, frac_bits: int) -> None:
    with pytest.raises(ValueError, match="roots over"):
        decoded(world(2), function, torch.ones(1, dtype=torch.int64), 16, low=low, high=high, frac_bits=frac_bits)


def test_a_wider_range_would_be_wrong(world: Worlds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(root, "MAX_OCTAVES", 52)
    x = grid(-8, 44, 8, 1000)
    got = decoded(world(2), rsqrt, x, 8, low=-8, high=44)
    with pytest.raises(AssertionError):
        assert_close(got, wanted(rsqrt, x, 8), 28, RELATIVE)


@pytest.mark.parametrize(("function", "octaves", "cuts"), [(rsqrt, 28, 2 * 36 + 27), (sqrt, 36, 2 * 40 + 33)])
def test_costs(run: Callable[..., Ran], function: Callable[..., Any], octaves: int, cuts: int) -> None:
    x = (torch.arange(16).reshape(2, 8) + 1) << 16
    ran = run(function, (x, 16))
    thresholds = 2 * octaves + 1
    comparison = 7 * 512 + 1 + thresholds * (177 + 2 * 64)
    rest = 4 * (64 + 28) + 3 * 64 + cuts  # powers; product of what is truncated, truncation
    ran.costs(6, 16 * 40 + thresholds * 16 * 13 // 8, 16 * (comparison + rest) // 8)
    assert ran.opened() == [
        ("TruncatedComparison.r", 64),
        ("TruncatedComparison.leaf", 12),
        ("TruncatedComparison.beta", 1),
        ("TruncatedPowers.r", 64),
        ("TruncatedProduct.r", 64),
        ("TruncatedProduct.b", 64),
        ("Truncation.r", 64),
    ]
    assert run(function, (torch.zeros((0, 3), dtype=torch.int64), 16)).value.shape == (0, 3)


def test_openings(monkeypatch: pytest.MonkeyPatch) -> None:
    async def protocol(ctx: Context, x: Shared) -> Shared:
        return await rsqrt(ctx, Shared(x.share, 16), low=-2, high=2)

    assert_hides(monkeypatch, protocol, torch.arange(1, 14_001) << 6, torch.full((14_000,), 1 << 16))


def over(low: int, high: int, kept: int, frac_bits: int, drop: int = 0) -> Callable[..., Any]:
    async def protocol(ctx: Context, y: Shared, x: Shared) -> Shared:
        return await over_root(ctx, y, drop, x, low=low, high=high, over=3, d=4, kept=kept, frac_bits=frac_bits)

    return protocol


@pytest.mark.parametrize("drop", [0, 12])
@pytest.mark.parametrize(("kept", "frac_bits"), [(22, 48), (36, 55), (6, 50)])
def test_quotients_by_roots(world: Worlds, parties: int, drop: int, kept: int, frac_bits: int) -> None:
    """Of numbers up to the root itself, in all octaves and at all edges of the scales."""
    low, high = -10, 30
    x = torch.cat([grid(low, high, 20, 100), torch.tensor([1 << 49, 1 << 12])])[:, None]
    root_of_third = torch.sqrt(x.double() / 2**20 / 3)
    y = torch.round(root_of_third * torch.tensor([0.0, 1.0, -1.0, 0.37]) * 2.0 ** (16 + drop)).to(torch.int64)
    used = world(parties)
    shares = used.run(over(low, high, kept, frac_bits, drop), used.share(y, 16 + drop), used.share(x << 4, 24))
    assert shares[0].frac_bits == frac_bits
    got = used.reveal(shares).double() / 2.0**frac_bits
    inside = (x >= 1 << (20 + low)).squeeze(1)
    want = (y >> drop).double() / 2**16 / root_of_third
    # what y has lost, of which the bound of the docstring says nothing, besides a unit of x
    lost = (1.01 / 2**16 if drop else 0) / root_of_third + want.abs() / x.double()
    bound = 2.5e-5 * want.abs() + 2.0 ** (kept - frac_bits) + 1.2 * 2.0**-kept + lost
    assert float(((got - want).abs() - bound)[inside].max()) <= 0


def test_costs_of_quotients_by_roots(run: Callable[..., Ran]) -> None:
    x, y = torch.full((8, 1), 3 << 24), torch.arange(80).reshape(8, 10) << 8
    ran = run(over(-4, 26, 22, 46), (y, 16), (x, 24))
    assert ran.transcript.rounds == 5
    assert ran.transcript.bytes_sent == (80 * 16 + 8 * (8 + 8 + 8 + 8) + 61 * 13) * (ran.parties - 1)
    assert [name for name, _ in ran.opened()][-2:] == ["ProductOfTruncated.r", "ProductOfTruncated.b"]


@pytest.mark.parametrize(("kept", "frac_bits"), [(22, 20), (22, 30), (60, 61)])
def test_impossible_scales_of_quotients(run: Callable[..., Ran], kept: int, frac_bits: int) -> None:
    x = torch.ones(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="cannot keep"):
        run(over(-4, 26, kept, frac_bits), (torch.ones_like(x), 16), (x, 24))


def test_openings_of_quotients_by_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    async def protocol(ctx: Context, x: Shared) -> object:
        x = Shared(x.share, 16)
        return await over_root(ctx, x, 0, x, low=-2, high=2, over=1, d=0, kept=20, frac_bits=40)

    assert_hides(monkeypatch, protocol, torch.arange(14_000) << 3, torch.zeros(14_000, dtype=torch.int64))
