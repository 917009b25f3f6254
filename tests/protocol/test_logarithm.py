"""log(x) over many octaves, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mpcinfer.protocol.context import Context
from mpcinfer.protocol.local import LocalWorld
from mpcinfer.protocol.logarithm import log
from mpcinfer.protocol.types import Shared
from tests.openings import assert_hides
from tests.protocol.conftest import Ran

Worlds = Callable[..., LocalWorld]
ABSOLUTE = 1.5e-5


def decoded(world: LocalWorld, x: torch.Tensor, scale: int, **limits: int) -> torch.Tensor:
    shares = world.run(lambda ctx, s: log(ctx, s, **limits), world.share(x, scale))
    return world.reveal(shares).double() / 2.0 ** shares[0].frac_bits


def assert_close(got: torch.Tensor, x: torch.Tensor, frac_bits: int, out_bits: int = 16) -> None:
    assert float((got - torch.log(x.double() / 2.0**frac_bits)).abs().max()) <= ABSOLUTE + 1.5 * 2.0**-out_bits


def grid(low: int, high: int, frac_bits: int, count: int) -> torch.Tensor:
    """As many numbers in each octave, and the neighbours of every power of two."""
    x = torch.round(torch.exp2(torch.linspace(low, high, count, dtype=torch.float64) + frac_bits)).to(torch.int64)
    near = torch.tensor([(1 << (frac_bits + k)) + i for k in range(low, high + 1) for i in (-1, 0, 1)])
    return torch.cat([x, near[(near >= 1 << (frac_bits + low)) & (near <= 1 << (frac_bits + high))]])


def test_default_range(world: Worlds, parties: int) -> None:
    x = grid(-16, 20, 16, 8000)
    assert_close(decoded(world(parties), x, 16), x, 16)


@pytest.mark.parametrize(
    ("frac_bits", "low", "high", "out_bits"),
    [
        (8, -8, 20, 8),
        (24, -24, 31, 24),
        (24, 0, 7, 30),
        (16, 0, 1, 48),
        (8, -8, -7, 24),
        (16, -16, -15, 2),
        (16, -16, 39, 16),
        (8, -8, 47, 20),
    ],
)
def test_other_ranges_and_scales(world: Worlds, frac_bits: int, low: int, high: int, out_bits: int) -> None:
    x = grid(low, high, frac_bits, 2000)
    assert_close(decoded(world(2), x, frac_bits, low=low, high=high, frac_bits=out_bits), x, frac_bits, out_bits)


def test_every_number_of_an_octave(world: Worlds) -> None:
    x = torch.arange(1 << 15, (2 << 15) + 1)
    assert_close(decoded(world(2), x, 15, low=0, high=2, frac_bits=30), x, 15, 30)


def test_outside_the_range_the_nearer_end_counts(world: Worlds, parties: int) -> None:
    below = torch.tensor([255, 1, 0, -1, -(2**36), -(2**62)])
    assert_close(decoded(world(parties), below, 16, low=-8), torch.full_like(below, 256), 16)
    above = torch.tensor([2**36 + 1, 2**40, 2**62])
    assert_close(decoded(world(parties, "above"), above, 16), torch.full_like(above, 2**36), 16)


@pytest.mark.parametrize(
    ("low", "high", "frac_bits"), [(-17, 0, 16), (3, 3, 16), (0, 40, 16), (-8, 20, 49), (-8, 20, 1), (-8, 20, -1)]
)
def test_impossible_ranges(world: Worlds, low: int, high: int, frac_bits: int) -> None:
    with pytest.raises(ValueError, match="no logarithms over"):
        decoded(world(2), torch.ones(1, dtype=torch.int64), 16, low=low, high=high, frac_bits=frac_bits)


def test_costs(run: Callable[..., Ran]) -> None:
    x = (torch.arange(16).reshape(2, 8) + 1) << 16
    ran = run(log, (x, 16))
    thresholds = 2 * 36 + 1
    comparison = 7 * 512 + 1 + thresholds * (177 + 2 * 64)
    ran.costs(5, 16 * 24 + thresholds * 16 * 13 // 8, 16 * (comparison + 4 * (64 + 28) + 64 + 47) // 8)
    assert ran.frac_bits == 16
    assert ran.opened() == [
        ("TruncatedComparison.r", 64),
        ("TruncatedComparison.leaf", 12),
        ("TruncatedComparison.beta", 1),
        ("TruncatedPowers.r", 64),
        ("Truncation.r", 64),
    ]
    assert run(log, (torch.zeros((0, 3), dtype=torch.int64), 16)).value.shape == (0, 3)
    assert abs(int(run(log, (torch.tensor(1 << 16), 16)).value)) <= 2


def test_openings(monkeypatch: pytest.MonkeyPatch) -> None:
    async def protocol(ctx: Context, x: Shared) -> Shared:
        return await log(ctx, Shared(x.share, 16), low=-2, high=2)

    assert_hides(monkeypatch, protocol, torch.arange(1, 14_001) << 6, torch.full((14_000,), 1 << 16))
