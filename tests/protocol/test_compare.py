"""Comparison with public thresholds: exact on the whole domain, for each ring width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mpcinfer.protocol import select
from mpcinfer.protocol.compare import Comparison, less_than
from mpcinfer.protocol.types import Shared
from mpcinfer.ring import digits
from mpcinfer.ring.domain import Z64

Run = Callable[..., Any]
WIDTHS = [64, 48, 36, 32]
RNG = torch.Generator().manual_seed(1)


def deltas(width: int) -> list[int]:
    """Values of x - t: adjacent, at both edges of the domain, at digit boundaries, and of all sizes."""
    half = 1 << (width - 1)
    random = torch.randint(-half, half - 1, (200,), generator=RNG)
    random[::2] >>= torch.randint(0, width - 1, (100,), generator=RNG)
    powers = [s * (1 << k) + a for k in range(width - 1) for s in (1, -1) for a in (-1, 0, 1)]
    edges = [*range(-4, 5), *range(-half, -half + 4), *range(half - 4, half)]
    return [v for v in [*edges, *powers, *map(int, random)] if -half <= v < half]


def compared(run: Run, x: torch.Tensor, thresholds: tuple[int, ...], width: int) -> Any:
    return run(lambda ctx, s: less_than(ctx, s, thresholds, width), x)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("t", [0, 1, -1, 98765, -98765, 2**62, -(2**62), 2**63 - 1, -(2**63)])
def test_exact_on_its_domain(run: Run, width: int, t: int) -> None:
    x = [t + v for v in deltas(width) if -(2**63) <= t + v < 2**63]
    ran = compared(run, torch.tensor(x), (t,), width)
    assert ran.value.dtype == torch.uint8
    assert ran.value.tolist() == [[int(v < t) for v in x]]


@pytest.mark.parametrize("width", WIDTHS)
def test_adjacent_values_and_many_thresholds(run: Run, width: int) -> None:
    thresholds = (-(2**20), -2, -1, 0, 1, 2, 3 << 16, 2**29)
    x = [t + v for t in thresholds for v in range(-3, 4)]
    ran = compared(run, torch.tensor(x), thresholds, width)
    assert ran.value.tolist() == [[int(v < t) for v in x] for t in thresholds]


@pytest.mark.parametrize("width", WIDTHS)
def test_random(run: Run, width: int) -> None:
    bound = 1 << (width - 2)
    x = torch.randint(-bound, bound, (3000,), generator=RNG).reshape(30, 100)
    thresholds = tuple(int(t) for t in torch.randint(-bound, bound, (3,), generator=RNG))
    ran = compared(run, x, thresholds, width)
    assert torch.equal(ran.value.bool(), torch.stack([x < t for t in thresholds]))


@pytest.mark.parametrize("width", WIDTHS)
def test_equal_values_under_many_masks(run: Run, width: int) -> None:
    for v in (-7, 0, 7):
        ran = compared(run, torch.full((2000,), v), (v, v + 1), width)
        assert ran.value.sum(1).tolist() == [0, 2000]


@pytest.mark.parametrize(
    ("width", "sent", "per_t", "dealt", "dealt_per_t"),
    [
        (64, 8000, 4250, 30_125, 12_875), (48, 6000, 3125, 22_625, 8875),
        (36, 4500, 2375, 17_000, 3625), (32, 4000, 2000, 15_125, 5625), (17, 2125, 750, 7625, 1875),
    ],
)  # fmt: skip
@pytest.mark.parametrize("count", [1, 3])
def test_costs_and_openings(
    run: Run, width: int, sent: int, per_t: int, dealt: int, dealt_per_t: int, count: int
) -> None:
    ran = compared(run, torch.zeros(1000, dtype=torch.int64), tuple(range(count)), width)
    blocks, leaves = digits.LAYOUTS[width]
    words = [("leaf", 2 * leaves - 1), ("top", 2 * blocks - 2)] if blocks > 1 else [("top", 2 * leaves - 2)]
    ran.costs(rounds=1 + len(words), sent=sent + count * per_t, dealt=dealt + count * dealt_per_t)
    assert ran.opened() == [(f"Comparison.{name}", bits) for name, bits in [("r", width), *words]]


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (2, 3, 4)])
def test_any_shape(run: Run, shape: tuple[int, ...]) -> None:
    x = torch.randint(-5, 5, shape, generator=RNG)
    ran = compared(run, x, (0, 2), 64)
    assert torch.equal(ran.value.bool(), torch.stack([x < 0, x < 2]))


def test_outside_the_domain_of_a_narrow_ring_it_is_another_question(run: Run) -> None:
    # x - t = 2^35 reads as -2^35 in 36 bits: the caller's bound, not this protocol, must exclude it
    assert compared(run, torch.tensor([2**35]), (0,), 36).value.tolist() == [[1]]
    assert compared(run, torch.tensor([2**35]), (0,), 48).value.tolist() == [[0]]


def test_the_check_catches_a_wrong_sign(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    derive = Comparison.derive
    monkeypatch.setattr(
        Comparison, "derive", lambda self, *rest: derive(self, *rest) | {"msb": torch.zeros(self.shape)}
    )
    x = torch.tensor(deltas(64))
    assert compared(run, x, (0,), 64).value.tolist() != [[int(v < 0) for v in x.tolist()]]


@pytest.mark.parametrize("parameters", [{"thresholds": 2, "products": True}, {"thresholds": 0}])
def test_further_values_are_with_one_outcome(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="one threshold"):
        Comparison((3,), others=1, **parameters)


@pytest.mark.parametrize("more", [{}, {"products": True}, {"others": 1, "numbers": True}])
def test_only_of_what_is_not_multiplied_are_bits_left_out(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="left out"):
        Comparison((3,), 17, d=4, **more)


@pytest.mark.parametrize("width", [64, 48, 36, 32, 17])
def test_products_with_the_outcome_open_whole_words(run: Run, width: int) -> None:
    """However narrow the comparison: the operand is all of x, and a narrower mask would not hide it."""
    for more in ({"products": True}, {"others": 1}):
        assert Comparison((3,), width, **more).free()["r"].ring == Z64
    x = torch.tensor([-(2 ** (width - 2)), -1, 0, 1, 2 ** (width - 2)])
    ran = run(lambda ctx, s: select.relu(ctx, s, width), x)
    assert ran.value.tolist() == [0, 0, 0, 1, 2 ** (width - 2)] and ran.opened()[0][1] == 64


def test_comparing_shares_that_came_from_arithmetic(run: Run) -> None:
    x, y = torch.randint(-(2**40), 2**40, (2, 500), generator=RNG)

    async def difference(ctx: Any, a: Shared, b: Shared) -> Any:
        return await less_than(ctx, a - b, (0,), 48)

    assert torch.equal(run(difference, x, y).value[0].bool(), x < y)
