"""e^x of numbers that are not positive, against float64 and, for the tables, against exact decimals."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, localcontext

import pytest
import torch

from mpcinfer.protocol.context import Context
from mpcinfer.protocol.exponential import exp_nonpositive, scaled_exp
from mpcinfer.protocol.local import LocalWorld
from mpcinfer.protocol.types import Shared
from tests.openings import assert_differences, assert_uniform, observe, seed
from tests.protocol.conftest import Ran

Worlds = Callable[..., LocalWorld]

CHECKSUMS = [-8637791234678513975, 231118060778344033]


def worst_error(world: LocalWorld, x: torch.Tensor, frac_bits: int, out_bits: int | None = None) -> float:
    shares = world.run(lambda ctx, s: exp_nonpositive(ctx, s, out_bits), world.share(x, frac_bits))
    scale = frac_bits if out_bits is None else out_bits
    assert shares[0].frac_bits == scale
    return float((world.reveal(shares).double() / 2**scale - torch.exp(x.double() / 2**frac_bits)).abs().max())


@pytest.mark.parametrize("scale", [19, 42])
@pytest.mark.parametrize("frac_bits", [8, 16, 20, 24])
def test_table_is_exact_to_the_last_place(frac_bits: int, scale: int) -> None:
    top = 17 if scale == 19 else 0
    x = torch.randint(-16 << frac_bits, top << frac_bits or 1, (400,), generator=torch.Generator().manual_seed(scale))
    x[:2] = torch.tensor([-16 << frac_bits, (top << frac_bits) - 1])
    with localcontext(prec=40):
        for u, got in zip(x.tolist(), scaled_exp(x, frac_bits, scale).tolist(), strict=True):
            want = (Decimal(u) / (1 << frac_bits)).exp() * (1 << scale)
            assert abs(got - want) <= Decimal("0.5") + want / (1 << 28)


def test_table_is_the_same_on_every_host() -> None:
    """Parties and dealers multiply by these numbers: a host that rounds in another way makes noise."""
    x = torch.arange(-16 << 12, 17 << 12)
    weights = torch.arange(1, len(x) + 1)
    assert [int((scaled_exp(x, 12, scale) * weights).sum()) for scale in (19, 30)] == CHECKSUMS
    assert scaled_exp(x.to("meta"), 12, 19).shape == x.shape


def test_dense_grid(world: Worlds, parties: int) -> None:
    f = 16
    x = torch.cat([torch.arange(-17 << f, 1, 7), torch.arange(-5000, 1)])
    assert worst_error(world(parties), x, f) <= 2**-16 + 1.3e-6
    assert worst_error(world(parties, "finer"), x[::5], f, 24) <= 2**-24 + 1.3e-6


@pytest.mark.parametrize("frac_bits", [8, 9, 10, 11, 12, 13, 16, 20, 23, 24])
def test_every_scale(world: Worlds, frac_bits: int) -> None:
    x = torch.linspace(-20 * 2.0**frac_bits, 0, 20_001).to(torch.int64)
    assert worst_error(world(2), x, frac_bits) <= 2.0**-frac_bits + 1.3e-6


@pytest.mark.parametrize("frac_bits", [0, 4, 7, 25, 28, 32])
def test_no_other_scale(world: Worlds, frac_bits: int) -> None:
    with pytest.raises(ValueError, match=f"with {frac_bits} fraction bits"):
        worst_error(world(2), torch.zeros(1, dtype=torch.int64), frac_bits)


def test_whole_range(world: Worlds, parties: int) -> None:
    """Down to the ends of the domain, powers of two and their neighbours, the clip, and the slack above zero."""
    f = 16
    powers = torch.tensor([-(1 << k) for k in range(59)])
    clip = -(16 << f) + (1 << (f - 4))
    edges = [0, -(2**59), clip - 1, clip, clip + 1, -16 << f, 1, 2, 5, (1 << (f - 4)) - 1]
    x = torch.cat([powers, powers + 1, powers - 1, torch.tensor(edges)])
    assert worst_error(world(parties), x, f) <= 2**-16 + 1.3e-6
    far = torch.randint(-(2**59), -(2**20), (5000,), generator=torch.Generator().manual_seed(1))
    used = world(parties, "far")
    assert float(used.reveal(used.run(exp_nonpositive, used.share(far, f))).abs().max()) <= 1


def test_positive_numbers_stay_small(world: Worlds) -> None:
    used = world(2)
    x = torch.randint(0, 2**59, (5000,), generator=torch.Generator().manual_seed(1))
    y = used.reveal(used.run(exp_nonpositive, used.share(x, 16)))
    assert 0 <= int(y.min()) and int(y.max()) <= 1.07 * 2**16


def test_costs(run: Callable[..., Ran]) -> None:
    ran = run(exp_nonpositive, (-torch.arange(64).reshape(8, 8), 16))
    ran.costs(5, 64 * 22, 64 * 90 + 64 * 6 // 8)
    assert ran.opened() == [
        ("Exponential.r", 64),
        ("Exponential.low_leaf", 5),
        ("Exponential.leaf", 7),
        ("Exponential.low_top", 2),
        ("Exponential.top", 6),
        ("Exponential.beta", 1),
        ("Truncation.r", 64),
    ]
    assert run(exp_nonpositive, (-torch.arange(64), 24)).transcript.bytes_sent == 64 * 22.5 * (ran.parties - 1)
    assert run(exp_nonpositive, (torch.zeros((0, 3), dtype=torch.int64), 16)).value.shape == (0, 3)
    assert abs(int(run(exp_nonpositive, (torch.tensor(0), 16)).value) - (1 << 16)) <= 1


def test_openings() -> None:
    async def protocol(ctx: Context, x: Shared) -> Shared:
        return await exp_nonpositive(ctx, Shared(x.share, 16))

    x, y = -torch.arange(1000) * 977, torch.zeros(1000, dtype=torch.int64)
    assert_differences(observe(protocol, x), observe(protocol, y), [x - y])
    assert_uniform([observe(protocol, x, key=seed(i)) for i in range(70)])
