"""e^x of numbers of a known range against float64, over all of that range and beyond its upper end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mpcinfer.errors import InputError
from mpcinfer.protocol import powers
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.correlation import from_json, to_json
from mpcinfer.protocol.powers import BoundedPower, bounded_power
from mpcinfer.protocol.types import Shared
from tests.openings import assert_hides

Run = Callable[..., Any]
RNG = torch.Generator().manual_seed(1)
SLACK = 2.0**-24 + 1.3e-6


def numbers(reach: int, frac_bits: int) -> torch.Tensor:
    """A grid of the window, its edges, the whole range, its ends."""
    one = 1 << frac_bits
    edges = [0, -1, one // 16 - (1 << max(0, frac_bits - 16)) - 1, -16 * one, -16 * one + one // 16, -16 * one - 1]
    far = torch.randint(-(1 << (reach + frac_bits)) + 1, 1, (2000,), generator=RNG)
    near = torch.randint(-16 * one, one // 17, (6000,), generator=RNG)
    ends = torch.tensor([*edges, -(1 << (reach + frac_bits)) + one, 1 - (1 << (reach + frac_bits))])
    found = torch.cat([near, far, ends])
    return found[found > -(1 << (reach + frac_bits))]


def assert_close(y: torch.Tensor, x: torch.Tensor, frac_bits: int) -> None:
    """A power of the floor at 16 fraction bits or of one more; 0 below the window."""
    floor = torch.floor(x.double() / 2.0 ** (frac_bits - 16)) / 2**16
    ends = [torch.where(at < 2.0**-4 - 16, 0, torch.exp(at)) for at in (floor, floor + 2.0**-16)]
    assert bool(((y >= ends[0] - SLACK) & (y <= ends[1] + SLACK)).all())


@pytest.mark.parametrize(("reach", "frac_bits"), [(13, 35), (4, 16), (10, 53), (14, 40), (20, 24), (28, 35)])
def test_powers(run: Run, reach: int, frac_bits: int) -> None:
    x = numbers(reach, frac_bits)
    ran = run(lambda ctx, s: bounded_power(ctx, s, reach), (x, frac_bits))
    assert ran.frac_bits == 24
    assert_close(ran.value.double() / 2**24, x, frac_bits)


def test_nothing_above_the_range_matters(run: Run) -> None:
    x = numbers(13, 35)
    beyond = torch.randint(0, 1 << 15, x.shape, generator=RNG) << 49
    y = run(lambda ctx, s: bounded_power(ctx, s, 13), (x + beyond, 35)).value
    assert_close(y.double() / 2**24, x, 35)


def test_positive_numbers_give_zero(run: Run) -> None:
    x = torch.randint(1 << 31, 1 << 48, (3000,), generator=RNG)
    assert not run(lambda ctx, s: bounded_power(ctx, s, 13), (x, 35)).value.any()


def test_costs(run: Run) -> None:
    ran = run(lambda ctx, s: bounded_power(ctx, s, 13), (-torch.arange(64).reshape(8, 8), 35))
    ran.costs(4, 8 * (49 + 6 + 2 * 2 + 3 + 64), 8 * (6 * 31 + 15 + 2 + 6 * 64 + 64 + 37))
    assert ran.opened() == [
        ("BoundedPower.r", 49),
        ("BoundedPower.leaf", 6),
        ("BoundedPower.ends", 2),
        ("BoundedPower.beta", 1),
        ("Truncation.r", 64),
    ]
    more = run(lambda ctx, s: bounded_power(ctx, s, 14), (-torch.arange(64), 35))
    more.costs(4, 8 * (50 + 6 + 2 * 3 + 3 + 64), 8 * (7 * 31 + 15 + 2 * 4 + 6 * 64 + 64 + 37))
    assert (
        run(lambda ctx, s: bounded_power(ctx, s, 13), (torch.zeros((0, 3), dtype=torch.int64), 35)).value.numel() == 0
    )


@pytest.mark.parametrize(("reach", "frac_bits"), [(13, 15), (13, 51), (3, 35), (30, 20)])
def test_no_other_ranges(run: Run, reach: int, frac_bits: int) -> None:
    with pytest.raises(ValueError, match="powers"):
        run(lambda ctx, s: bounded_power(ctx, s, reach), (torch.zeros(1, dtype=torch.int64), frac_bits))


@pytest.mark.parametrize("reach", [13, 28])
def test_openings(monkeypatch: pytest.MonkeyPatch, reach: int) -> None:
    async def protocol(ctx: Context, x: Shared) -> None:
        await bounded_power(ctx, Shared(x.share, 63 - reach), reach)

    assert_hides(monkeypatch, protocol, -torch.arange(14_000) * 977, torch.zeros(14_000, dtype=torch.int64))


def test_openings_of_narrow_words(monkeypatch: pytest.MonkeyPatch) -> None:
    async def twice(ctx: Context, x: Shared) -> None:
        for _ in range(2):
            await bounded_power(ctx, Shared(x.share, 35), 12)

    x, y = -torch.arange(14_000) * 977, torch.zeros(14_000, dtype=torch.int64)
    assert_hides(monkeypatch, twice, x, y, width=48)


def test_ends_that_are_not_asked_for_are_noticed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the borrow in them, the ends are a window too high or low."""
    monkeypatch.setattr(powers.short, "equal", lambda c, *rest, true=powers.short.equal: true(c + 1, *rest))
    with pytest.raises(AssertionError):
        test_powers(run, 13, 35)


def test_kinds() -> None:
    kind = BoundedPower((3,), 30, 19)
    assert from_json(to_json(kind)) == kind
    for change in ({"width": 20}, {"width": 46}, {"drop": 35}, {"drop": -1}):
        with pytest.raises(InputError, match="impossible parameters"):
            from_json(to_json(kind) | change)
