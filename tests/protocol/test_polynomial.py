"""Polynomials of truncated numbers: exact for one of the two numbers that truncation may give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mpcinfer.protocol.context import Context
from mpcinfer.protocol.local import LocalWorld
from mpcinfer.protocol.polynomial import polynomial, polynomials
from mpcinfer.protocol.types import Shared
from tests.openings import assert_hides
from tests.protocol.conftest import Ran

COEFFICIENTS = (5, -7, 11, 3)


def evaluate(y: torch.Tensor, coefficients: tuple[int, ...]) -> torch.Tensor:
    """Mod 2^64."""
    total = torch.zeros_like(y)
    for a in reversed(coefficients):
        total = total * y + a
    return total


def by(d: int, coefficients: tuple[int, ...] = COEFFICIENTS) -> Callable[[Context, Shared], object]:
    return lambda ctx, x: polynomial(ctx, x, d, coefficients, 9)


@pytest.mark.parametrize("d", [1, 16, 47, 61])
def test_value_of_a_neighbouring_integer(world: Callable[..., LocalWorld], parties: int, d: int) -> None:
    x = torch.randint(-(2**62), 2**62, (5000,), generator=torch.Generator().manual_seed(d))
    x[:7] = torch.tensor([0, 1, -1, 2**62 - 1, -(2**62), 1 << d, -(1 << d)])
    used = world(parties)
    got = used.reveal(used.run(by(d), used.share(x)))
    below = x >> d
    at, above = evaluate(below, COEFFICIENTS), evaluate(below + 1, COEFFICIENTS)
    assert bool(((got == at) | (got == above)).all())
    exact = (below << d) == x
    assert torch.equal(got[exact], at[exact])


def test_costs(run: Callable[..., Ran]) -> None:
    ran = run(by(10), torch.arange(24).reshape(4, 6))
    ran.costs(1, 8 * 24, 3 * (24 * 8 + 24 * 10 // 8))
    assert ran.opened() == [("TruncatedPowers.r", 64)] and ran.frac_bits == 9
    assert run(by(10), torch.zeros((0, 3), dtype=torch.int64)).value.shape == (0, 3)


@pytest.mark.parametrize("d", [1, 20, 61])
def test_several_of_one_number(world: Callable[..., LocalWorld], parties: int, d: int) -> None:
    """Of one and the same neighbour, whatever their degrees; a constant needs no power."""
    x = torch.randint(-(2**62), 2**62, (3000,), generator=torch.Generator().manual_seed(d))
    x[:4] = torch.tensor([0, -1, 2**62 - 1, -(2**62)])
    many = ((0, 1), COEFFICIENTS, (9,), (-(2**62), 0, 2**61))
    used = world(parties)
    found = used.run(lambda ctx, s: polynomials(ctx, s, d, many, (3, 2, 1, 0)), used.share(x))
    assert [part.frac_bits for part in found[0]] == [3, 2, 1, 0]
    y, *values = (used.reveal(part) for part in zip(*found, strict=True))
    assert bool(((y == x >> d) | (y == (x >> d) + 1)).all())
    for value, coefficients in zip(values, many[1:], strict=True):
        assert torch.equal(value, evaluate(y, coefficients))


def test_several_cost_what_the_highest_degree_costs(run: Callable[..., Ran]) -> None:
    x = torch.arange(24).reshape(4, 6)
    ran = run(lambda ctx, s: polynomials(ctx, s, 10, ((0, 1), (1, 2, 3), (4,)), (1, 2, 3)), x)
    ran.costs(1, 8 * 24, 2 * (24 * 8 + 24 * 10 // 8))
    assert ran.opened() == [("TruncatedPowers.r", 64)] and ran.frac_bits == [1, 2, 3]


def test_openings(monkeypatch: pytest.MonkeyPatch) -> None:
    async def twice(ctx: Context, x: Shared) -> None:
        await polynomial(ctx, x, 20, COEFFICIENTS, 9)
        await polynomials(ctx, x.times(-5), 20, (COEFFICIENTS, (0, 1)), (9, 9))

    x = torch.arange(-7000, 7000) << 40
    assert_hides(monkeypatch, twice, x, torch.zeros_like(x))
