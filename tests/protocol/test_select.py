"""Step functions, ReLU, clamps and maxima: exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mpcinfer.protocol.select import (
    indicators,
    maximum,
    piecewise_linear,
    piecewise_linears,
    relu,
    sign_and_absolute,
    step,
    steps,
)
from mpcinfer.protocol.types import Shared
from tests.openings import assert_hides

Run = Callable[..., Any]
RNG = torch.Generator().manual_seed(1)
ONE = 1 << 16
COMPARISON = [("Comparison.r", 64), ("Comparison.leaf", 7), ("Comparison.top", 6), ("Comparison.beta", 1)]
# thresholds, slopes, offsets
Ints = tuple[int, ...]
FUNCTIONS: dict[str, tuple[Ints, Ints, Ints]] = {
    "relu6": ((0, 6 * ONE), (0, 1, 0), (0, 0, 6 * ONE)),
    "hardtanh": ((-ONE, ONE), (0, 1, 0), (-ONE, 0, ONE)),
    "absolute": ((0,), (-1, 1), (0, 0)),
    "step": ((5,), (0, 0), (0, 1)),
    "leaky, scaled by 100": ((0,), (1, 100), (0, 0)),
    "five pieces": ((-9, -3, 4, 10), (2, 0, -3, 1, 7), (1, -5, 0, 2, -8)),
}


def numbers(*around: int) -> torch.Tensor:
    near = [a + v for a in (0, *around) for v in range(-3, 4)]
    edges = [2**63 - 1, -(2**63), 2**62, -(2**62), 2**31, -(2**31), -(2**63) + 1]
    random = torch.randint(-(2**62), 2**62, (400,), generator=RNG) >> torch.randint(0, 62, (400,), generator=RNG)
    return torch.cat([torch.tensor(near + edges), random])


def reference(x: torch.Tensor, thresholds: Ints, slopes: Ints, offsets: Ints) -> torch.Tensor:
    piece = torch.bucketize(x, torch.tensor(thresholds), right=True)
    return x * torch.tensor(slopes)[piece] + torch.tensor(offsets)[piece]


def test_relu(run: Run) -> None:
    x = numbers()
    ran = run(relu, (x, 16))
    assert torch.equal(ran.value, x.clamp(min=0)) and ran.frac_bits == 16


def test_relu_costs_and_openings(run: Run) -> None:
    ran = run(relu, torch.zeros(1000, dtype=torch.int64))
    ran.costs(rounds=4, sent=12_375, dealt=59_000)
    assert ran.opened() == COMPARISON
    if ran.parties == 2:
        assert ran.transcript.rounds == 4 and ran.transcript.bytes_sent <= 16 * 1000


@pytest.mark.parametrize("name", FUNCTIONS)
def test_piecewise_linear(run: Run, name: str) -> None:
    thresholds, slopes, offsets = FUNCTIONS[name]
    x = numbers(*thresholds)
    # where x - t leaves the 64-bit range the comparison is another one
    x = x[(x.abs() <= 2**62) & (x != -(2**63))]
    ran = run(lambda ctx, s: piecewise_linear(ctx, s, thresholds, slopes, offsets), (x, 16))
    assert torch.equal(ran.value, reference(x, thresholds, slopes, offsets))
    assert ran.frac_bits == 16


@pytest.mark.parametrize("count", [1, 2, 5])
def test_piecewise_linear_costs_and_openings(run: Run, count: int) -> None:
    args = tuple(range(count)), tuple(range(count + 1)), (0,) * (count + 1)
    ran = run(lambda ctx, s: piecewise_linear(ctx, s, *args), torch.zeros(1000, dtype=torch.int64))
    ran.costs(rounds=4, sent=8000 + 4375 * count, dealt=30_125 + 28_875 * count)
    assert ran.opened() == COMPARISON


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0), (2, 3, 4)])
def test_relu_of_any_shape(run: Run, shape: tuple[int, ...]) -> None:
    x = torch.randint(-5, 5, shape, generator=RNG)
    assert torch.equal(run(relu, x).value, x.clamp(min=0))


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Ties, neighbours, both signs, and differences at the edges of 64 bits."""
    some = torch.tensor([0, 1, -1, 7, -7, 2**61, -(2**61), 2**62, -(2**62)])
    left, right = torch.cartesian_prod(some, some).T
    big = 2**63
    extreme = torch.tensor([[2**62, 1 - 2**62], [-(2**62), 2**62], [-big, -1], [big - 1, 0], [-1, big - 1]]).T
    fits = (left.double() - right.double()) < 2**63
    x, y = torch.randint(-(2**62), 2**62, (2, 300), generator=RNG)
    return torch.cat([left[fits], extreme[0], x]), torch.cat([right[fits], extreme[1], y])


def test_maximum(run: Run) -> None:
    left, right = pairs()
    (value,) = run(maximum, left, right).value
    assert torch.equal(value, torch.maximum(left, right))


def test_maximum_carries_along_and_left_wins_ties(run: Run) -> None:
    left, right = pairs()
    a, b, c, d = torch.randint(-(2**62), 2**62, (4, len(left)), generator=RNG)

    async def protocol(ctx: Any, x: Shared, y: Shared, p: Shared, q: Shared, r: Shared, s: Shared) -> Any:
        return await maximum(ctx, x, y, ((p, q), (r, s)))

    value, first, second = run(protocol, left, right, a, b, c, d).value
    assert torch.equal(value, torch.maximum(left, right))
    assert torch.equal(first, torch.where(left >= right, a, b))
    assert torch.equal(second, torch.where(left >= right, c, d))


def test_maximum_with_the_place_and_numbers_of_few_bits(run: Run) -> None:
    left, right = pairs()
    a, b = torch.randint(-(2**62), 2**62, (2, len(left)), generator=RNG)

    async def protocol(ctx: Any, x: Shared, y: Shared, p: Shared, q: Shared) -> Any:
        return (await maximum(ctx, x, y, ((p, q),), bits=8, placed=True))[1:]

    ran = run(protocol, left, right, a, b)
    assert torch.equal(ran.value[0] & 255, torch.where(left >= right, a, b) & 255)
    assert torch.equal(ran.value[1], (left < right).long())
    assert [bits for label, bits in ran.opened() if label == "Comparison.s"] == [8]


@pytest.mark.parametrize(("one", "other"), [(4, 8), (8, 4), (8, 8)])
def test_maximum_of_different_scales(run: Run, one: int, other: int) -> None:
    left, right = torch.tensor([5, 7, -3, 2]), torch.tensor([7, 5, 2, 2])

    async def protocol(ctx: Any, x: Shared, y: Shared) -> Any:
        return await maximum(ctx, x, y, ((x, y),))

    ran = run(protocol, (left << one, one), (right << other, other))
    assert ran.frac_bits == [8, 8]
    for value in ran.value:
        assert (value >> 8).tolist() == [7, 7, 2, 2]


@pytest.mark.parametrize("carried", [0, 1, 2])
def test_maximum_costs_and_openings(run: Run, carried: int) -> None:
    zeros = torch.zeros(1000, dtype=torch.int64)

    async def protocol(ctx: Any, x: Shared, y: Shared) -> Any:
        return await maximum(ctx, x, y, ((x, y),) * carried)

    ran = run(protocol, zeros, zeros)
    ran.costs(rounds=4, sent=12_375 + 8000 * carried, dealt=59_000 + 8000 * carried)
    assert sorted(ran.opened()) == sorted([*COMPARISON, ("Comparison.s", 64)][: 5 if carried else 4])


@pytest.mark.parametrize(
    ("thresholds", "values"), [((0,), (0, 1)), ((-5, 5), (-1, 0, 1)), ((-9, 3, 4, 10), (7, 7, -(2**60), 0, 2**62))]
)
def test_step(run: Run, thresholds: Ints, values: Ints) -> None:
    x = numbers(*thresholds)
    x = x[(x.abs() <= 2**62) & (x != -(2**63))]
    ran = run(lambda ctx, s: step(ctx, s, thresholds, values), (x, 16))
    assert torch.equal(ran.value, torch.tensor(values)[torch.bucketize(x, torch.tensor(thresholds), right=True)])
    assert ran.frac_bits == 0


def test_step_costs_and_openings(run: Run) -> None:
    ran = run(lambda ctx, s: step(ctx, s, (0, 5, 9), (1, 2, 3, 4)), (torch.zeros(1000, dtype=torch.int64), 16))
    ran.costs(rounds=4, sent=8000 + 4375 * 3, dealt=30_125 + 20_875 * 3)
    assert ran.opened() == COMPARISON


@pytest.mark.parametrize("count", [1, 3])
def test_indicators(run: Run, count: int) -> None:
    thresholds = (-4, 0, 9)[:count]
    x = torch.arange(-500, 500)
    ran = run(lambda ctx, s: indicators(ctx, s, thresholds, 48), (x, 16))
    assert torch.equal(ran.value, torch.stack([x < t for t in thresholds]).to(torch.int64))
    ran.costs(rounds=4, sent=6000 + 3250 * count, dealt=22_625 + 16_875 * count)
    assert ran.opened()[0] == ("Comparison.r", 48) and ran.frac_bits == 0


def test_several_functions_of_one_number(run: Run) -> None:
    x, thresholds = numbers(-3, 10)[:30], (-3, 10)
    functions = ((0, 1, -2), (5, 0, 1 << 40)), ((0, 0, 0), (1, 2, 3))
    ran = run(lambda ctx, s: piecewise_linears(ctx, s, thresholds, functions), (x >> 2, 16))
    for value, (slopes, offsets) in zip(ran.value, functions, strict=True):
        assert torch.equal(value, reference(x >> 2, thresholds, slopes, offsets))
    assert ran.frac_bits == [16, 16] and ran.opened() == COMPARISON


@pytest.mark.parametrize("d", [0, 1, 20, 47])
def test_steps_of_what_has_lost_bits(run: Run, d: int) -> None:
    """Of the floor of x / 2^d, or of one more; nothing but the bits that matter is opened."""
    edges = torch.tensor([-(1 << 16) + 9, -6, -5, -4, -1, 0, 6, 7, 8, (1 << 16) - 9])
    x = torch.cat([(edges << d) + part for part in {0, (1 << d) // 2, (1 << d) - 1}])
    values = (3, -9, 1 << 40), (0, 1, 2)
    ran = run(lambda ctx, s: steps(ctx, s, (-5, 7), values, 17, d), x)
    down, up = (torch.bucketize((x + more) >> d, torch.tensor((-5, 7)), right=True) for more in (0, (1 << d) - 1))
    for got, of in zip(ran.value, map(torch.tensor, values), strict=True):
        assert bool(((got == of[down]) | (got == of[up])).all())
    assert [bits for _, bits in ran.opened()] == [17 + d, 6, 1]
    ran = run(lambda ctx, s: steps(ctx, s, (-5, 7), values, 17, d), torch.zeros(1000, dtype=torch.int64))
    ran.costs(rounds=3, sent=125 * (17 + d) + 875 * 2, dealt=7625 + 9875 * 2)


def test_sign_and_absolute(run: Run) -> None:
    x = numbers()
    ran = run(sign_and_absolute, (x, 16))
    assert torch.equal(ran.value[0], (x < 0).to(torch.int64))
    assert torch.equal(ran.value[1], x.abs())  # of -2^63 itself, as ever
    assert ran.frac_bits == [0, 16]
    assert run(sign_and_absolute, torch.zeros((0, 3), dtype=torch.int64)).value[1].shape == (0, 3)


def test_sign_and_absolute_costs_and_openings(run: Run) -> None:
    ran = run(sign_and_absolute, torch.zeros(1000, dtype=torch.int64))
    ran.costs(rounds=4, sent=12_375, dealt=59_000)
    assert ran.opened() == COMPARISON


def test_openings(monkeypatch: pytest.MonkeyPatch) -> None:
    async def both(ctx: Any, x: Shared) -> None:
        await sign_and_absolute(ctx, x)
        await step(ctx, x.times(-5), (0,), (-1, 1), 48)

    x = torch.arange(-7000, 7000) << 31
    assert_hides(monkeypatch, both, x, torch.zeros_like(x))


def test_openings_of_what_has_lost_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    async def lossy(ctx: Any, x: Shared) -> None:
        await steps(ctx, x, (-3, 900), ((1, 2, 3), (5, 0, 1)), 17, 11)
        await steps(ctx, x.times(2), (7,), ((0, 1),), 17, 11)

    x = torch.arange(14_000) << 12
    assert_hides(monkeypatch, lossy, x, torch.zeros_like(x), width=28)


@pytest.mark.parametrize("width", [48, 36, 32])
def test_narrow_comparisons(run: Run, width: int) -> None:
    """To the ends of their domain, which is half a bit less where a threshold or a number is subtracted."""
    edge = 1 << (width - 1)
    x = torch.cat(
        [torch.tensor([-edge, edge - 1, 1 - edge, 0, 1, -1]), torch.randint(-edge, edge, (200,), generator=RNG)]
    )
    assert torch.equal(run(lambda ctx, s: relu(ctx, s, width), x).value, x.clamp(min=0))
    signs, absolute = run(lambda ctx, s: sign_and_absolute(ctx, s, width), x).value
    assert torch.equal(signs, (x < 0).to(torch.int64)) and torch.equal(absolute, x.abs())
    x = x >> 1
    ran = run(lambda ctx, s: step(ctx, s, (-3, 7), (5, -5, 9), width), x)
    assert torch.equal(ran.value, torch.tensor([5, -5, 9])[torch.bucketize(x, torch.tensor((-3, 7)), right=True)])
    y = x.roll(1)
    assert torch.equal(run(lambda ctx, a, b: maximum(ctx, a, b, (), width), x, y).value[0], torch.maximum(x, y))


def test_narrow_comparisons_are_wrong_beyond_their_domain(run: Run) -> None:
    x = torch.tensor([1 << 47, -(1 << 47) - 1])
    assert run(lambda ctx, s: relu(ctx, s, 48), x).value.tolist() == [0, -(1 << 47) - 1]


def test_narrow_comparisons_cost_less(run: Run) -> None:
    ran = run(lambda ctx, s: relu(ctx, s, 48), torch.zeros(1000, dtype=torch.int64))
    assert ran.transcript.rounds == 4 and ran.transcript.bytes_sent == 11_250 * (ran.parties - 1)
    assert ran.opened()[0] == ("Comparison.r", 64)  # its product with the outcome needs all of it
