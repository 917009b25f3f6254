"""Polynomials of truncated numbers: exact for one of the two numbers that truncation may give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mpcinfer.protocol.context import Context
from mpcinfer.protocol.local import LocalWorld
from mpcinfer.protocol.polynomial import polynomial
from mpcinfer.protocol.types import Shared
from tests.openings import assert_differences, assert_uniform, observe, seed
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


def test_openings() -> None:
    x, y = torch.arange(-500, 500) << 40, torch.zeros(1000, dtype=torch.int64)
    assert_differences(observe(by(20), x), observe(by(20), y), [x - y])
    assert_uniform([observe(by(20), x, key=seed(i)) for i in range(70)])
