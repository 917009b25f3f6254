"""1/x over many octaves, against float64."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch

from mpcinfer.protocol import inverse
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.inverse import divided, inverse_polynomial, reciprocal
from mpcinfer.protocol.local import LocalWorld
from mpcinfer.protocol.types import Shared
from tests.openings import assert_hides
from tests.protocol.conftest import Ran

Worlds = Callable[..., LocalWorld]
RELATIVE, FEWER_OCTAVES = 4.5e-5, 3.5e-5


def over(low: int, high: int, frac_bits: int = 30) -> Callable[[Context, Shared], object]:
    return lambda ctx, x: reciprocal(ctx, x, low=low, high=high, frac_bits=frac_bits)


def decoded(world: LocalWorld, protocol: Callable[..., object], x: torch.Tensor, frac_bits: int) -> torch.Tensor:
    shares = world.run(protocol, world.share(x, frac_bits))  # type: ignore[arg-type]
    return world.reveal(shares).double() / 2.0 ** shares[0].frac_bits


def assert_close(
    got: torch.Tensor, x: torch.Tensor, frac_bits: int, out_bits: int = 30, relative: float = FEWER_OCTAVES
) -> None:
    want = 2.0**frac_bits / x.double()
    assert float(((got - want).abs() - relative * want).max()) <= 2.0**-out_bits


def grid(low: int, high: int, frac_bits: int, count: int) -> torch.Tensor:
    """As many numbers in each octave, and every power of two, every cut, and their neighbours."""
    x = torch.round(torch.exp2(torch.linspace(low, high, count, dtype=torch.float64) + frac_bits)).to(torch.int64)
    edges = [t << (frac_bits + k) for k in range(low, high) for t in (1, 2)]
    edges += [(181 << (frac_bits + k)) >> 7 for k in range(low, high)]
    near = torch.tensor([e + i for e in edges for i in (-1, 0, 1, 2)])
    return torch.cat([x, near[(near >= 1 << (frac_bits + low)) & (near <= 1 << (frac_bits + high))]])


@pytest.mark.parametrize(("degree", "bound"), [(1, Fraction(1, 3)), (3, Fraction(1, 3)), (4, Fraction(11, 64))])
def test_polynomial_is_the_best_one(degree: int, bound: Fraction) -> None:
    """The residual equioscillates degree + 2 times: nothing of that degree is better."""
    p = inverse_polynomial(degree, bound)
    assert len(p) == degree + 1
    h = torch.linspace(-float(bound), float(bound), 100_001, dtype=torch.float64)
    residual = 1 - (1 - h) * sum(float(a) * h**j for j, a in enumerate(p))
    worst = float(residual.abs().max())
    extreme = residual[residual.abs() > worst * (1 - 1e-6)].sign()
    assert int((extreme[1:] != extreme[:-1]).sum()) == degree + 1


def test_default_range(world: Worlds, parties: int) -> None:
    """The error is also below what issue 3 asks: 1e-3 |y| or 2 units in the last place."""
    x = grid(-8, 20, 16, 10_000)
    got = decoded(world(parties), reciprocal, x, 16)
    assert_close(got, x, 16)
    want = 2.0**16 / x.double()
    assert bool(((got - want).abs() <= torch.clamp(1e-3 * want, min=2 * 2.0**-30)).all())


@pytest.mark.parametrize(
    ("frac_bits", "low", "high", "out_bits"),
    [
        (8, -8, 20, 30),
        (24, -8, 20, 30),
        (24, 0, 7, 30),
        (16, 0, 1, 30),
        (8, -8, -7, 24),
        (16, -16, -8, 28),
        (16, 0, 30, 60),
        (16, -16, 21, 30),
        (8, -8, 29, 30),
    ],
)
def test_other_ranges_and_scales(world: Worlds, frac_bits: int, low: int, high: int, out_bits: int) -> None:
    x = grid(low, high, frac_bits, 3000)
    relative = FEWER_OCTAVES if high - low <= 34 else RELATIVE
    assert_close(decoded(world(2), over(low, high, out_bits), x, frac_bits), x, frac_bits, out_bits, relative)


def test_every_number_of_an_octave(world: Worlds) -> None:
    x = torch.arange(1 << 16, (2 << 16) + 1)
    assert_close(decoded(world(3), over(0, 2), x, 16), x, 16)


def test_outside_the_range_the_nearer_end_counts(world: Worlds, parties: int) -> None:
    low = torch.tensor([256, 255, 1, 0, -1, -(2**36), -(2**62)])
    high = torch.tensor([2**36, 2**36 + 1, 2**40, 2**62])
    assert_close(decoded(world(parties), reciprocal, low, 16), torch.full_like(low, 256), 16)
    assert_close(decoded(world(parties, "high"), reciprocal, high, 16), torch.full_like(high, 2**36), 16)


@pytest.mark.parametrize(("low", "high"), [(-8, -7), (-8, -3), (0, 1)])
def test_the_range_of_the_input_shrinks_by_the_shift_that_small_ranges_need(world: Worlds, low: int, high: int) -> None:
    shift = max(0, 9 - high - 8)
    edge = 1 << (62 - shift)
    x = torch.tensor([edge, -edge])
    ends = torch.tensor([1 << (8 + high), 1 << (8 + low)])
    assert_close(decoded(world(2), over(low, high, 24), x, 8), ends, 8, 24)
    if shift > 1:  # a planted fault: the bound without the shift, where x wraps around
        got = decoded(world(2, "beyond"), over(low, high, 24), torch.tensor([1 << 61, -(1 << 61)]), 8)
        with pytest.raises(AssertionError):
            assert_close(got, ends, 8, 24)


def test_a_wider_range_would_be_wrong(world: Worlds, monkeypatch: pytest.MonkeyPatch) -> None:
    x = grid(-16, 28, 16, 1000)
    with pytest.raises(ValueError, match="no reciprocals"):
        decoded(world(2), over(-16, 28), x, 16)
    monkeypatch.setattr(inverse, "MAX_OCTAVES", 44)
    with pytest.raises(AssertionError):
        assert_close(decoded(world(2, "wider"), over(-16, 28), x, 16), x, 16, relative=RELATIVE)


@pytest.mark.parametrize(
    ("low", "high", "frac_bits"),
    [(-17, 0, 30), (3, 3, 30), (0, 40, 30), (-16, 38, 30), (-8, 20, 53), (-16, 22, 30), (-8, 30, 30)],
)
def test_impossible_ranges(world: Worlds, low: int, high: int, frac_bits: int) -> None:
    with pytest.raises(ValueError, match="no reciprocals"):
        decoded(world(2), over(low, high, frac_bits), torch.ones(1, dtype=torch.int64), 16)


def test_costs(run: Callable[..., Ran]) -> None:
    x = (torch.arange(16).reshape(2, 8) + 1) << 16
    ran = run(reciprocal, (x, 16))
    thresholds = 57
    comparison = 7 * 512 + 1 + thresholds * (177 + 2 * 64)
    rest = 4 * (64 + 28) + 2 * (64 + 37) + (64 + 22)  # powers, product of what is truncated, truncation
    ran.costs(6, 16 * 40 + thresholds * 16 * 13 // 8, 16 * (comparison + rest) // 8)
    assert ran.frac_bits == 30
    assert ran.opened() == [
        ("TruncatedComparison.r", 64),
        ("TruncatedComparison.leaf", 12),
        ("TruncatedComparison.beta", 1),
        ("TruncatedPowers.r", 64),
        ("TruncatedProduct.r", 64),
        ("TruncatedProduct.b", 64),
        ("Truncation.r", 64),
    ]
    assert run(over(0, 7), (x, 16)).transcript.rounds == 6
    assert run(reciprocal, (torch.zeros((0, 3), dtype=torch.int64), 16)).value.shape == (0, 3)
    assert abs(int(run(reciprocal, (torch.tensor(1 << 16), 16)).value) - (1 << 30)) <= FEWER_OCTAVES * 2**30


def test_openings(monkeypatch: pytest.MonkeyPatch) -> None:
    async def protocol(ctx: Context, x: Shared) -> Shared:
        return await reciprocal(ctx, Shared(x.share, 16), low=-2, high=2)

    assert_hides(monkeypatch, protocol, torch.arange(1, 14_001) << 6, torch.full((14_000,), 1 << 16))


def quotient(low: int, high: int, frac_bits: int = 16) -> Callable[[Context, Shared, Shared], object]:
    async def numerator(y: Shared) -> Shared:
        return y

    async def protocol(ctx: Context, y: Shared, x: Shared) -> Shared:
        return await divided(ctx, numerator(y), x, low=low, high=high, frac_bits=frac_bits)

    return protocol


@pytest.mark.parametrize(("low", "high", "frac_bits"), [(0, 1, 16), (0, 6, 16), (-3, 9, 12), (0, 15, 20), (0, 20, 16)])
def test_quotients(world: Worlds, parties: int, low: int, high: int, frac_bits: int) -> None:
    """Of any size that is allowed, whatever they are divided by."""
    x = grid(low, high, 24, 60)[:, None]
    most = 2.0 ** (32 - frac_bits)
    wanted = torch.tensor([0.0, 1.0, -1.0, 0.3, most * 0.999, -most * 0.999], dtype=torch.float64)
    scale = min(frac_bits + 24, 61 - (32 - frac_bits) - high)
    y = torch.round(wanted * x * 2.0 ** (scale - 24)).to(torch.int64)
    used = world(parties)
    shares = used.run(quotient(low, high, frac_bits), used.share(y, scale), used.share(x, 24))
    assert shares[0].frac_bits == frac_bits
    exact = (y.double() / 2.0**scale) / (x.double() / 2**24)
    error = (used.reveal(shares).double() / 2.0**frac_bits - exact).abs() - 4.5e-5 * exact.abs()
    assert float(error.max()) <= (1.1 + 2.0 ** (high - low - 23)) * 2.0**-frac_bits


def test_costs_of_quotients(run: Callable[..., Ran]) -> None:
    x, y = torch.full((8, 1), 3 << 24), torch.arange(80).reshape(8, 10) << 38
    ran = run(quotient(0, 4), (y, 40), (x, 24))
    assert ran.transcript.rounds == 6
    assert ran.transcript.bytes_sent == (80 * 24 + 8 * (8 + 8 + 8 + 8) + 9 * 13) * (ran.parties - 1)
    assert [name for name, _ in ran.opened()][-4:] == [
        "TruncatedProduct.b", "ProductOfTruncated.r", "ProductOfTruncated.b", "Truncation.r",
    ]  # fmt: skip


@pytest.mark.parametrize(("low", "high", "bits"), [(0, 6, 24), (0, 38, 40), (-30, 0, 40)])
def test_impossible_quotients(run: Callable[..., Ran], low: int, high: int, bits: int) -> None:
    with pytest.raises(ValueError, match="no quotients"):
        run(quotient(low, high), (torch.ones(3, dtype=torch.int64), bits), (torch.ones(3, dtype=torch.int64), 24))


def test_openings_of_quotients(monkeypatch: pytest.MonkeyPatch) -> None:
    async def protocol(ctx: Context, x: Shared) -> object:
        numerator = Shared(x.share << 20, 40)
        return await quotient(-1, 1)(ctx, numerator, Shared(x.share, 16))  # type: ignore[misc]

    assert_hides(monkeypatch, protocol, torch.arange(14_000) << 2, torch.zeros(14_000, dtype=torch.int64))
