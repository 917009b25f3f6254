"""Truncation: at most one unit in the last place off, on every element, and on average not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mpcinfer.protocol.context import Context
from mpcinfer.protocol.local import LocalWorld
from mpcinfer.protocol.truncate import (
    Truncation,
    logical_shift,
    truncate,
    truncated_parts,
    unopened_bits,
    without_low_bits,
)
from mpcinfer.protocol.types import Shared
from tests.openings import seed

LIMIT = 2**62
Worlds = Callable[..., LocalWorld]


def numbers(count: int, key: int) -> torch.Tensor:
    """Absolute values of all sizes up to 2^61, both signs, and the edges of the domain."""
    g = torch.Generator().manual_seed(key)
    x = torch.randint(-(2**61), 2**61, (count,), generator=g)
    x[::2] >>= torch.randint(0, 62, (len(x[::2]),), generator=g)
    edges = [0, 1, -1, 2, -2, 2**16, -(2**16), 2**16 - 1, 2**61, -(2**61), LIMIT - 1, -LIMIT, LIMIT - 2**20]
    x[: len(edges)] = torch.tensor(edges)
    return x


def worst_error(x: torch.Tensor, y: torch.Tensor, d: int) -> float:
    """The largest |y - x / 2^d| in units in the last place; exact, since it is counted in integers."""
    ulp = 1 << d
    off = y - (x >> d)  # the nearest integers below and above are at 0 and, if x is no multiple, at 1
    near = (off >= 0) & (off <= 1)
    remainder = x & (ulp - 1)
    error = torch.where(off == 0, remainder, ulp - remainder)
    return float("inf") if not bool(near.all()) else float(error.max()) / ulp


def truncated(world: LocalWorld, x: torch.Tensor, d: int) -> torch.Tensor:
    return world.reveal(world.run(lambda ctx, s: truncate(ctx, s, d), world.share(x)))


@pytest.mark.parametrize("d", [1, 8, 15, 16, 24, 32, 48, 61])
def test_error_below_one_unit(world: Worlds, parties: int, d: int) -> None:
    x = numbers(20_000, d)
    assert worst_error(x, truncated(world(parties), x, d), d) < 1


@pytest.mark.parametrize("d", [40, 47, 61])
def test_without_its_low_bits_a_number_is_truncated_alike(world: Worlds, parties: int, d: int) -> None:
    low = unopened_bits(d)
    assert low == 32 and unopened_bits(39) == 0
    # what the low bits carry is lost, by which a number may get less than the least one
    x = numbers(20_000, d).clamp(-LIMIT + (parties << low))
    shares = [without_low_bits(share, low) for share in world(parties).share(x, 60)]
    assert {share.frac_bits for share in shares} == {60 - low}
    short = sum(share.share for share in shares) % (1 << (64 - low))
    lost = ((x >> low) - short) % (1 << (64 - low))
    assert int(lost.max()) <= parties - 1
    s = torch.randint(0, 1 << (64 - low), x.shape, generator=torch.Generator().manual_seed(d))
    c = (short + (LIMIT >> low) + s) % (1 << (64 - low))
    public, wrapped = truncated_parts(c, d, low)
    got = public - (s >> (d - low)) + wrapped * (s >> (63 - low))
    assert set((got - (x >> d)).unique().tolist()) <= {-1, 0, 1}  # -1: what was lost was the last of a multiple
    assert float((got - (x >> d)).double().mean()) < 0.6
    beyond = truncated_parts((c + (1 << (62 - low))) % (1 << (64 - low)), d, low)  # this test can fail
    assert not torch.equal(beyond[0] - (s >> (d - low)) + beyond[1] * (s >> (63 - low)), got + (LIMIT >> d))


def test_multiples_are_exact(world: Worlds, parties: int) -> None:
    x = numbers(1000, 3) >> 16 << 16
    assert torch.equal(truncated(world(parties), x, 16), x >> 16)


def test_mean_error_is_zero(world: Worlds, parties: int) -> None:
    x = numbers(200_000, 1) >> 20
    error = (truncated(world(parties), x, 16) - (x >> 16)).double() - (x & 0xFFFF).double() / 2**16
    # rounding by a coin of the right bias: standard deviation at most 1/2 each
    assert abs(float(error.mean())) < 5 * 0.5 / len(x) ** 0.5
    for remainder in (1, 1 << 14, 1 << 15, 0xFFFF):
        x = torch.full((100_000,), -(5 << 16) + remainder)
        up = float((truncated(world(parties, remainder), x, 16) + 5).double().mean())
        p = remainder / 2**16
        assert abs(up - p) < 5 * (p * (1 - p) / len(x)) ** 0.5 + 1e-4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_million_elements(world: Worlds, parties: int) -> None:
    for chunk in range(10):
        x = numbers(1_000_000, 100 + chunk)
        assert worst_error(x, truncated(world(parties, chunk), x, 16), 16) < 1, f"chunk {chunk}"


async def local(ctx: Context, x: Shared) -> Shared:
    """What published systems do: each party shifts its share."""
    shifted = x.share >> 16 if ctx.first else -(-x.share >> 16)
    return Shared(shifted)


def test_the_check_catches_local_truncation(world: Worlds, parties: int) -> None:
    x, w = numbers(20_000, 1), world(parties)
    assert worst_error(x, w.reveal(w.run(local, w.share(x))), 16) >= 1


@pytest.mark.parametrize("field", ["wrap", "high"])
def test_the_check_catches_a_missing_term(
    world: Worlds, parties: int, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    derive = Truncation.derive

    def faulty(self: Truncation, *rest: Any) -> Any:
        values = derive(self, *rest)
        return values | {field: torch.zeros_like(values[field])}

    monkeypatch.setattr(Truncation, "derive", faulty)
    x = numbers(20_000, 1)
    assert worst_error(x, truncated(world(parties), x, 16), 16) >= 1


def test_the_check_catches_an_error_of_two_units() -> None:
    x = torch.tensor([5 << 16, (5 << 16) + 1])
    assert worst_error(x, torch.tensor([5, 6]), 16) < 1
    for y in ([6, 5], [5, 7], [4, 5], [5, 4]):
        assert worst_error(x, torch.tensor(y), 16) >= 1


@pytest.mark.parametrize("d", [1, 16, 32])
def test_costs_and_openings(run: Callable[..., Any], d: int) -> None:
    ran = run(lambda ctx, x: truncate(ctx, x, d), (numbers(1000, 1), 2 * d))
    ran.costs(rounds=1, sent=8000, dealt=8000 + 125 * d)
    assert ran.opened() == [("Truncation.r", 64)]
    assert ran.frac_bits == d


def test_the_opening_is_offset_and_masked(world: Worlds, parties: int) -> None:
    x = torch.tensor([0, 1, -LIMIT, LIMIT - 1])
    one, two = world(parties), world(parties)
    truncated(one, x, 16)
    truncated(two, x[:1].expand(4), 16)
    (_, _, c1), (_, _, c2) = one.transcript.openings[0], two.transcript.openings[0]
    assert torch.equal(c1 - c2, x)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3, 4)])
def test_any_shape(run: Callable[..., Any], shape: tuple[int, ...]) -> None:
    x = torch.full(shape, -(7 << 16))
    assert torch.equal(run(lambda ctx, s: truncate(ctx, s, 16), x).value, x >> 16)


def test_by_nothing_costs_nothing(run: Callable[..., Any]) -> None:
    x = numbers(100, 1)
    ran = run(lambda ctx, s: truncate(ctx, s, 0), (x, 5))
    ran.costs(rounds=0, sent=0, dealt=0)
    assert torch.equal(ran.value, x) and ran.frac_bits == 5


@pytest.mark.parametrize("d", [-1, 62, 63, 64])
def test_other_shifts_are_refused(d: int) -> None:
    world = LocalWorld(2, seed(d))
    with pytest.raises(ValueError, match=f"by {d} bits"):
        truncated(world, torch.tensor([1]), d)


def test_logical_shift() -> None:
    x = torch.tensor([-1, 5, -(2**63)])
    for d in (1, 16, 63):
        assert [int(v) for v in logical_shift(x, d)] == [int(v) % 2**64 >> d for v in x]
