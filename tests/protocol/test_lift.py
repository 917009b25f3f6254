"""Small numbers shared modulo a small power of two, lifted: exact, whatever the shares hold above."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mpcinfer.errors import InputError
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.correlation import from_json, to_json
from mpcinfer.protocol.lift import Lift, lift
from mpcinfer.protocol.types import Shared
from tests.openings import assert_differences, assert_uniform, faulty_masks, observe, seed
from tests.protocol.conftest import Ran


def of(bits: int) -> Callable[[Context, Shared], object]:
    return lambda ctx, x: lift(ctx, x, bits)


@pytest.mark.parametrize("bits", [2, 8, 13, 32])
def test_every_number(run: Callable[..., Ran], bits: int) -> None:
    x = torch.arange(1 << (bits - 1)) if bits < 20 else torch.tensor([0, 1, 12345, 2**31 - 1])
    above = torch.randint(-(2**62), 2**62, x.shape, generator=torch.Generator().manual_seed(1)) << bits
    ran = run(of(bits), (x + above, 3))
    assert torch.equal(ran.value, x) and ran.frac_bits == 3


def test_costs(run: Callable[..., Ran]) -> None:
    ran = run(of(8), torch.zeros(100, dtype=torch.int64))
    ran.costs(1, 100, 100 * (8 + 7))
    assert ran.opened() == [("Lift.r", 8)]


@pytest.mark.parametrize("bits", [-1, 0, 64, 65])
def test_impossible_plans_are_refused(bits: int) -> None:
    with pytest.raises(InputError, match="impossible"):
        from_json(to_json(Lift((2,), 8)) | {"bits": bits})


def test_openings(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.arange(6400) % 128, torch.full((6400,), 3)

    def uniform() -> None:
        assert_uniform([observe(of(8), x, key=seed(i)) for i in range(5)], symbols=1 << 14)

    assert_differences(observe(of(8), x), observe(of(8), y), [x - y])
    uniform()
    faulty_masks(monkeypatch, lambda mask, ring: mask & 127 if ring.bits == 8 else mask)
    with pytest.raises(AssertionError, match="not uniform"):
        uniform()
