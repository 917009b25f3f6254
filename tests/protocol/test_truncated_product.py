"""Products of a number that is truncated first: the truncation's error times the other, at one opening."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mpcinfer.protocol import truncated_product as module
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.truncated_product import (
    ProductOfTruncated,
    TruncatedProduct,
    product_of_truncated,
    truncated_product,
)
from mpcinfer.protocol.types import Shared
from mpcinfer.ring.domain import Z64

Run = Callable[..., Any]
RNG = torch.Generator().manual_seed(7)
LIMIT = 1 << 62
EDGES = [0, 1, -1, (1 << 16) - 1, 1 << 16, -(1 << 16), LIMIT - 1, -LIMIT, LIMIT - (1 << 20), 12345, -12345]


def random(bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(-(1 << bits), 1 << bits, shape, generator=RNG)


def truncated(d: int) -> Callable[..., Any]:
    async def protocol(ctx: Context, x: Shared, y: Shared) -> Shared:
        return await truncated_product(ctx, x, d, y)

    return protocol


@pytest.mark.parametrize("d", [1, 2, 16, 40, 61])
def test_every_edge(run: Run, d: int) -> None:
    x = torch.tensor(EDGES).repeat(40)
    ran = run(truncated(d), (x, 70 - 16), (torch.ones_like(x), 0))
    off = ran.value - (x >> d)  # [0, 1], or wrong by 2^(64 - d)
    assert ((off == 0) | (off == 1)).all()
    assert ran.frac_bits == 54 - d


def test_the_product_is_exact(run: Run) -> None:
    """One truncated number, whatever it has been rounded to, times many: they agree on what it was."""
    x, y = random(61, 500, 1), random(63 - 1, 500, 9)
    y[:, 0] = 1
    value = run(truncated(20), x, y).value
    assert torch.equal(value, value[:, :1] * y)
    assert (((value[:, :1] - (x >> 20)) == 0) | ((value[:, :1] - (x >> 20)) == 1)).all()


def test_the_mean_error_is_zero(run: Run) -> None:
    x = torch.full((20_000,), (5 << 16) + (1 << 14))  # a quarter above 5
    mean = run(truncated(16), x, torch.ones_like(x)).value.double().mean()
    assert abs(float(mean) - 5.25) < 0.02


def test_costs_and_openings(run: Run) -> None:
    ran = run(truncated(16), random(61, 1000), random(62, 1000))
    ran.costs(rounds=1, sent=16_000, dealt=20_000)
    assert ran.opened() == [("TruncatedProduct.r", 64), ("TruncatedProduct.b", 64)]


@pytest.mark.parametrize(("xs", "ys"), [((), ()), ((0,), (0,)), ((3, 1), (4,)), ((2, 3), (3,)), ((5,), ())])
def test_broadcasting_masks_operands_in_their_own_shapes(run: Run, xs: tuple[int, ...], ys: tuple[int, ...]) -> None:
    x, y = random(60, *xs) << 1, random(62, *ys)
    ran = run(truncated(1), x, y)
    assert torch.equal(ran.value, (x >> 1) * y)
    n = x.numel()
    assert ran.cost.bytes_sent == 8 * (n + y.numel()) * (ran.parties - 1)
    assert ran.opened()[0] == ("TruncatedProduct.r", 64)


def test_nothing_to_truncate_is_a_product(run: Run) -> None:
    x, y = random(62, 40), random(62, 40)
    ran = run(truncated(0), x, y)
    assert torch.equal(ran.value, x * y)
    ran.costs(rounds=1, sent=16 * 40, dealt=8 * 40)


@pytest.mark.parametrize("d", [-1, 62, 64])
def test_what_cannot_be_truncated(run: Run, d: int) -> None:
    with pytest.raises(ValueError, match="cannot truncate"):
        run(truncated(d), random(61, 3), random(61, 3))


def test_a_forgotten_wrap_is_noticed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: without msb(r) results are off by 2^(64 - d) times y, for half of the masks."""
    real = module.logical_shift
    monkeypatch.setattr(module, "logical_shift", lambda x, d: torch.zeros_like(x) if d == 63 else real(x, d))
    x = torch.tensor(EDGES).repeat(40)
    value = run(truncated(16), x, torch.ones_like(x)).value
    assert ((value - (x >> 16)).abs() > 1).any()


def test_masks_are_uniform_on_what_is_opened() -> None:
    free = TruncatedProduct((2, 3), (3,), 16).free()
    assert free["r"].ring == free["b"].ring == Z64 and free["r"].shape == (2, 3) and free["b"].shape == (3,)


def both(d: int, e: int, plus: int = 0) -> Callable[..., Any]:
    async def protocol(ctx: Context, x: Shared, y: Shared) -> Shared:
        return await product_of_truncated(ctx, x, d, y, e, plus)

    return protocol


def assert_product_of_either(value: torch.Tensor, x: torch.Tensor, d: int, y: torch.Tensor, e: int, plus: int) -> None:
    """Of what both may have been rounded to."""
    either = [((x >> d) + i + plus) * ((y >> e) + j) for i in (0, 1) for j in (0, 1)]
    assert torch.stack([value == one for one in either]).any(0).all()


@pytest.mark.parametrize(("d", "e", "plus"), [(1, 1, 0), (16, 20, 0), (41, 23, 1 << 22), (2, 61, -5), (61, 3, 7)])
def test_every_edge_of_both(run: Run, d: int, e: int, plus: int) -> None:
    x, y = (torch.tensor(EDGES).repeat(30), torch.tensor(EDGES).repeat_interleave(30))
    ran = run(both(d, e, plus), (x, 60), (y, 61))
    assert_product_of_either(ran.value, x, d, y, e, plus)
    assert ran.frac_bits == 121 - d - e


def test_costs_of_both(run: Run) -> None:
    x, y = random(61, 40, 1), random(61, 40, 5)
    ran = run(both(40, 24), x, y)
    assert_product_of_either(ran.value, x, 40, y, 24, 0)
    ran.costs(rounds=1, sent=8 * 240, dealt=40 * (8 + 5) + 200 * (8 + 3) + 200 * (8 + 5 + 3))
    assert ran.opened() == [("ProductOfTruncated.r", 64), ("ProductOfTruncated.b", 64)]


@pytest.mark.parametrize("top", [63, None])
def test_a_forgotten_wrap_of_either_is_noticed(run: Run, monkeypatch: pytest.MonkeyPatch, top: int | None) -> None:
    """The planted faults: a product lacks msb(r), or the other's msb(b)."""
    real = ProductOfTruncated.derive

    def derive(self: ProductOfTruncated, free: Any, fixed: Any) -> Any:
        values = real(self, free, fixed)
        name = "wrap_high" if top else "high_wrap"
        return {**values, name: torch.zeros_like(values[name])}

    monkeypatch.setattr(ProductOfTruncated, "derive", derive)
    x, y = random(61, 400), random(61, 400)
    with pytest.raises(AssertionError):
        assert_product_of_either(run(both(30, 30), x, y).value, x, 30, y, 30, 0)


@pytest.mark.parametrize(("d", "e"), [(0, 3), (3, 0), (62, 1), (33, 32)])
def test_what_cannot_be_truncated_at_once(run: Run, d: int, e: int) -> None:
    with pytest.raises(ValueError, match="cannot truncate|both top bits"):
        run(both(d, e), random(61, 3), random(61, 3))
