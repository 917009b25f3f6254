"""Maximum and argmax along the last axis: exact, lowest index among equals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mpcinfer.protocol import tournament
from mpcinfer.protocol.tournament import argmax_along, maximum_along, maximum_of_groups, top_along
from mpcinfer.protocol.types import Shared
from mpcinfer.ring.domain import Ring
from tests.openings import assert_differences, assert_hides, assert_uniform, faulty_masks, observe, seed

Run = Callable[..., Any]
RNG = torch.Generator().manual_seed(1)


def rows(k: int) -> torch.Tensor:
    """Random rows, rows of few values (ties), constant rows, rows of extremes."""
    random = torch.randint(-(2**61), 2**61, (40, k), generator=RNG)
    ties = torch.randint(-1, 2, (60, k), generator=RNG)
    extremes = torch.tensor([-(2**61), 2**61, 0])[torch.randint(0, 3, (20, k), generator=RNG)]
    constant = torch.tensor([[-3], [0], [2**61]]).expand(3, k)
    return torch.cat([random, ties, extremes, constant])


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7, 8, 9, 10])
def test_maximum_and_argmax(run: Run, k: int) -> None:
    x = rows(k)
    values, indices = x.max(-1).values, torch.from_numpy(x.numpy().argmax(-1))
    assert torch.equal(run(maximum_along, (x, 16)).value, values)
    ran = run(argmax_along, (x, 16))
    assert torch.equal(ran.value[0], values) and torch.equal(ran.value[1], indices)
    assert ran.frac_bits == [16, 0]


def test_every_order_of_four(run: Run) -> None:
    x = torch.from_numpy(np.indices((3, 3, 3, 3)).reshape(4, -1).T.copy()) - 1
    value, index = run(argmax_along, x).value
    assert torch.equal(value, x.max(-1).values)
    assert index.tolist() == x.numpy().argmax(-1).tolist()


# of a contest of so many: bytes sent to a peer and dealt; and more for what each number carries
SENT = {1: (0, 0), 2: (12.375, 8), 3: (29.125, 16), 4: (50.25, 24)}
DEALT = {1: (0, 0), 2: (59, 8), 3: (225, 48), 4: (594, 168)}


def contests(k: int, radix: int) -> list[list[int]]:
    """How many meet in each contest of each level."""
    levels = []
    while k > 1:
        levels.append([min(radix, k - start) for start in range(0, k, radix)])
        k = len(levels[-1])
    return levels


def costs(k: int, results: int, radix: int, carried: int) -> dict[str, int]:
    """Of a maximum, or with its place `carried` from the second level on."""
    meetings = [(size, carried and level > 0) for level, sizes in enumerate(contests(k, radix)) for size in sizes]
    sent, dealt = (sum(table[size][0] + more * table[size][1] for size, more in meetings) for table in (SENT, DEALT))
    return {"rounds": 4 * len(contests(k, radix)), "sent": int(results * sent), "dealt": int(results * dealt)}


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7, 8, 11])
def test_costs(run: Run, k: int) -> None:
    for results, radix in ((1000, 4), (8 * ((1 << 14) // (8 * k) + 1), 2)):
        x = torch.zeros(results, k, dtype=torch.int64)
        for carried, protocol in enumerate((maximum_along, argmax_along)):
            expected = costs(k, results, radix, carried)
            ran = run(protocol, x)
            if radix == 4 or k < 3:
                ran.costs(**expected)
            else:  # fewer are left after the first levels, and four meet then
                assert expected["rounds"] >= ran.transcript.rounds
                assert expected["sent"] / 1.5 <= ran.transcript.bytes_sent / (ran.parties - 1) <= expected["sent"] * 1.5


def test_rounds_of_a_row_and_of_many() -> None:
    assert costs(64, 1, 4, 0)["rounds"] == 12 and costs(128, 1, 4, 0)["rounds"] == 16
    assert costs(4, 1000, 4, 0)["sent"] == 50_250 and costs(8, 1000, 4, 1)["dealt"] == 2 * 594_000 + 67_000


def test_what_is_opened(run: Run) -> None:
    pair = [("Comparison.r", 64), ("Comparison.leaf", 7), ("Comparison.top", 6), ("Comparison.beta", 1)]
    four = [("Contest.r", 64), ("Contest.leaf", 7), ("Contest.top", 6), ("Contest.beta", 1)]
    assert run(maximum_along, torch.zeros(9, 8, dtype=torch.int64)).opened() == [*four, *pair]
    ran = run(argmax_along, torch.zeros(9, 16, dtype=torch.int64))
    assert ran.opened() == [*four, four[0], ("Contest.s", 64), *four[1:]]


# --- places of few bits --------------------------------------------------------------------------------------------


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places are of 8 bits however few numbers are left."""
    monkeypatch.setattr(tournament, "_MANY", 0)


@pytest.mark.parametrize("k", [1, 2, 4, 5, 17, 64, 65, 130, 300])
def test_places_of_few_bits(run: Run, narrow: None, k: int) -> None:
    x = torch.cat([torch.randint(-3, 4, (12, k), generator=RNG), torch.zeros(1, k), torch.eye(k)]).long()
    value, index = run(argmax_along, x).value
    assert torch.equal(value, x.amax(-1)) and torch.equal(index, torch.from_numpy(x.numpy().argmax(-1)))


@pytest.mark.parametrize("k", [5, 64, 300])
def test_costs_of_places_of_few_bits(run: Run, narrow: None, k: int) -> None:
    """A byte instead of 8 while places are below 128; then, or at the end, they are lifted."""
    results = 40
    expected = costs(k, results, 4, 0)
    levels = contests(k, 4)
    sent, dealt = expected["sent"], expected["dealt"]
    for sizes, width in zip(levels[1:], (1, 1, 8, 8), strict=False):
        sent += results * sum(SENT[size][1] for size in sizes) * width // 8
        dealt += results * sum(DEALT[size][1] for size in sizes) * width // 8
    lifted = results * (len(levels[2]) if k == 300 else 1)
    ran = run(argmax_along, torch.zeros(results, k, dtype=torch.int64))
    ran.costs(4 * len(levels) + 1, sent + lifted, dealt + 15 * lifted)


def test_openings_of_places_of_few_bits(monkeypatch: pytest.MonkeyPatch, narrow: None) -> None:
    x = torch.arange(8 * 2000).reshape(-1, 8) << 30
    y = x.flip(-1)

    def uniform() -> None:
        assert_uniform([observe(argmax_along, x, key=seed(i)) for i in range(5)], symbols=1 << 13)

    first = [v.reshape(-1, 2, 4)[..., 1:] - v.reshape(-1, 2, 4)[..., :1] for v in (x, y)]
    assert_differences(observe(argmax_along, x), observe(argmax_along, y), [(first[0] - first[1]).movedim(-1, 0)])
    uniform()
    faulty_masks(monkeypatch, lambda mask, ring: mask & 127 if ring == Ring(8) else mask)
    with pytest.raises(AssertionError, match="not uniform"):
        uniform()


def test_as_many_as_a_vocabulary(run: Run) -> None:
    x = torch.randint(-(2**46), 2**46, (40_000,), generator=RNG)
    x[[39_999, 777]] = 2**46
    ran = run(lambda ctx, s: argmax_along(ctx, s, 48), x)
    assert [int(v) for v in ran.value] == [2**46, 777]
    assert ran.opened().count(("Lift.r", 8)) == 1


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 10])
def test_top(run: Run, k: int) -> None:
    x = torch.stack([torch.randperm(50, generator=RNG)[:k] - 25 for _ in range(60)])
    for top in {1, (k + 1) // 2, k}:
        expected = x.topk(top, -1)
        ran = run(lambda ctx, s, top=top: top_along(ctx, s, top), (x, 16))
        assert torch.equal(ran.value[0], expected.values) and torch.equal(ran.value[1], expected.indices)
        assert ran.frac_bits == [16, 0]


def test_top_of_equals_are_that_many_different_places(run: Run) -> None:
    x = torch.randint(-1, 2, (50, 6), generator=RNG)
    values, indices = run(lambda ctx, s: top_along(ctx, s, 4), x).value
    assert torch.equal(values, x.topk(4, -1).values) and torch.equal(values, x.gather(-1, indices))
    assert all(len(set(row)) == 4 for row in indices.tolist())


def test_top_costs_one_comparison_per_exchange(run: Run) -> None:
    ran = run(lambda ctx, s: top_along(ctx, s, 3), torch.zeros(1000, 8, dtype=torch.int64))
    ran.costs(rounds=4 * 6, sent=20_375 * 19, dealt=67_000 * 19)  # Batcher: 19 exchanges in 6 layers


@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 3, 5), (1, 1)])
def test_any_leading_shape(run: Run, shape: tuple[int, ...]) -> None:
    x = torch.randint(-5, 5, shape, generator=RNG)
    value, index = run(argmax_along, x).value
    assert torch.equal(value, x.amax(-1))
    assert torch.equal(index, torch.from_numpy(np.asarray(x.numpy().argmax(-1))))


def groups_of(*sizes: int) -> torch.Tensor:
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))


@pytest.mark.parametrize("sizes", [(1,), (1, 1, 1), (5,), (3, 1, 4, 2, 7, 1), (2, 9, 16, 1), ()])
def test_maximum_of_groups(run: Run, sizes: tuple[int, ...]) -> None:
    groups = groups_of(*sizes)
    for x in rows(max(1, sum(sizes)))[::9]:
        x = x[: sum(sizes)]
        ran = run(lambda ctx, s: maximum_of_groups(ctx, s, groups), (x, 16))
        assert ran.value.tolist() == [int(part.max()) for part in x.split(list(sizes))] if sizes else not len(ran.value)
        assert ran.frac_bits == 16


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
def test_groups_cost_what_rows_cost(run: Run, k: int) -> None:
    groups = groups_of(*[k, 1] * 1000)
    ran = run(lambda ctx, s: maximum_of_groups(ctx, s, groups), torch.zeros(len(groups), dtype=torch.int64))
    ran.costs(**costs(k, 1000, 4, 0))


def test_openings_of_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three: so many that the first two meet, and the winner meets the third."""
    groups = groups_of(*[3] * 14_000)

    async def protocol(ctx: Any, x: Shared) -> Shared:
        return await maximum_of_groups(ctx, x, groups)

    x, y = torch.arange(42_000) << 30, torch.arange(42_000) % 5
    duels = [(v[0::3] - v[1::3]) for v in (x, y)]
    assert_hides(monkeypatch, protocol, x, y, duels[0] - duels[1])


def test_narrow_comparisons(run: Run) -> None:
    x = torch.randint(-(1 << 46), 1 << 46, (30, 6), generator=RNG)
    values, indices = x.max(-1).values, torch.from_numpy(x.numpy().argmax(-1))
    assert torch.equal(run(lambda ctx, s: maximum_along(ctx, s, 48), x).value, values)
    assert torch.equal(run(lambda ctx, s: argmax_along(ctx, s, 48), x).value[1], indices)
    assert torch.equal(run(lambda ctx, s: top_along(ctx, s, 2, 48), x).value[0], x.topk(2, -1).values)
    ran = run(lambda ctx, s: maximum_of_groups(ctx, s, groups_of(*[6] * 30), 48), x.reshape(-1))
    assert torch.equal(ran.value, values)
    assert ran.transcript.bytes_sent < 14 * 150 * (ran.parties - 1)
