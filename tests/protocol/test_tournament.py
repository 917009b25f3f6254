"""Maximum and argmax along the last axis: exact, lowest index among equals."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, log2
from typing import Any

import numpy as np
import pytest
import torch

from mpcinfer.protocol.tournament import argmax_along, maximum_along, maximum_of_groups, top_along
from mpcinfer.protocol.types import Shared
from tests.openings import assert_hides

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


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
def test_costs_and_openings(run: Run, k: int) -> None:
    x = torch.zeros(1000, k, dtype=torch.int64)
    rounds = 4 * ceil(log2(k))
    ran = run(maximum_along, x)
    ran.costs(rounds, sent=12_375 * (k - 1), dealt=59_000 * (k - 1))
    levels = [("Comparison.r", 64), ("Comparison.leaf", 7), ("Comparison.top", 6), ("Comparison.beta", 1)]
    assert ran.opened() == levels * ceil(log2(k))
    ran = run(argmax_along, x)
    ran.costs(rounds, sent=20_375 * (k - 1), dealt=67_000 * (k - 1))
    assert ran.opened() == [levels[0], ("Comparison.s", 64), *levels[1:]] * ceil(log2(k))


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
def test_groups_cost_a_comparison_for_each_loser(run: Run, k: int) -> None:
    groups = groups_of(*[k, 1] * 1000)
    ran = run(lambda ctx, s: maximum_of_groups(ctx, s, groups), torch.zeros(len(groups), dtype=torch.int64))
    ran.costs(4 * ceil(log2(k)), sent=12_375 * (k - 1), dealt=59_000 * (k - 1))
    level = [("Comparison.r", 64), ("Comparison.leaf", 7), ("Comparison.top", 6), ("Comparison.beta", 1)]
    assert ran.opened() == level * ceil(log2(k))


def test_openings_of_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three: the first two meet, and the winner meets the third."""
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
    assert ran.transcript.bytes_sent < 12 * 150 * (ran.parties - 1)
