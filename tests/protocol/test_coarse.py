"""Maxima of leading bits: a word of the largest number, what it costs, and what is seen of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from mpcinfer.errors import InputError
from mpcinfer.protocol import coarse
from mpcinfer.protocol.coarse import LONG, SHORT, CoarseContest, largest, maximum_along, maximum_of_groups
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.correlation import from_json, to_json
from mpcinfer.protocol.types import Shared
from mpcinfer.ring.digits import block
from tests.openings import assert_hides

Run = Callable[..., Any]
RNG = torch.Generator().manual_seed(1)
WIDTHS = [SHORT, LONG]


def signed(x: torch.Tensor, width: int) -> torch.Tensor:
    """Words as numbers."""
    return (x << (64 - width)) >> (64 - width)


def rows(k: int, width: int, drop: int) -> torch.Tensor:
    """Random rows, rows of few words (ties), numbers next to a word's end, the ends of the range."""
    end = 1 << (width - 2)
    random = torch.randint(-end << drop, end << drop, (40, k), generator=RNG)
    ties = torch.randint(-1, 2, (40, k), generator=RNG) << drop
    near = (torch.randint(-1, 2, (40, k), generator=RNG) << drop) + torch.randint(-1, 2, (40, k), generator=RNG)
    extremes = torch.tensor([-end, end - 2, 0])[torch.randint(0, 3, (20, k), generator=RNG)] << drop
    return torch.cat([random, ties, near, extremes])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6, 7, 8, 17])
def test_the_word_of_the_largest(run: Run, k: int, width: int) -> None:
    """Its floor, or one more; where no number has anything below its word, exactly it."""
    drop = 20
    x = rows(k, width, drop)
    beyond = torch.randint(-(2**62), 2**62, x.shape, generator=RNG) << (width + drop) % 64 if width < LONG else 0
    ran = run(lambda ctx, s: maximum_along(ctx, s, width, drop), x + beyond)
    over = signed(ran.value, width) - (x.amax(-1) >> drop)
    assert set(over.tolist()) == {0, 1}
    whole = (x & ((1 << drop) - 1) == 0).all(-1)
    assert bool((over[whole] == 0).all()) and bool(whole.any())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_every_order_and_every_tie(run: Run, k: int, width: int) -> None:
    x = torch.tensor(list(product(range(-2, min(k, 4) - 1), repeat=k))) << (width - 5)
    assert torch.equal(signed(run(lambda ctx, s: largest(ctx, s, width), x).value, width), x.amax(-1))
    many = run(lambda ctx, s: largest(ctx, s, width, 9), x << 9)
    assert torch.equal(signed(many.value, width), x.amax(-1))


def test_numbers_of_64_bits(run: Run) -> None:
    x = torch.tensor([[-(2**61), 2**61 - 2**44, 5], [-(2**61), -(2**61), -(2**61) + (1 << 43)]])
    ran = run(lambda ctx, s: maximum_along(ctx, s, SHORT, 64 - SHORT), x)
    assert signed(ran.value, SHORT).tolist() == [(1 << 18) - 2, -(1 << 18) + 1]
    assert ran.opened()[0] == ("CoarseContest.r", 64)


@pytest.mark.parametrize("width", WIDTHS)
def test_groups(run: Run, width: int) -> None:
    sizes = [1, 4, 2, 7, 1, 33, 3]
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    x = torch.randint(-1000, 1000, (len(groups),), generator=RNG) << 12
    ran = run(lambda ctx, s: maximum_of_groups(ctx, s, groups, width, 12), x)
    assert signed(ran.value, width).tolist() == [int(part.max()) >> 12 for part in x.split(sizes)]
    alone = run(lambda ctx, s: maximum_of_groups(ctx, s, torch.arange(5), width, 12), x[:5])
    assert signed(alone.value, width).tolist() == (x[:5] >> 12).tolist() and alone.transcript.rounds == 1
    none = run(lambda ctx, s: maximum_of_groups(ctx, s, groups[:0], width, 12), x[:0])
    assert none.value.shape == (0,) and none.transcript.rounds == 0


_LEAF, _TOP = block(3, True).products, block(3, False).products
# bits sent to a peer and dealt: of a pair, and of the words of so many
PAIR = {SHORT: (6 + 1, 4 * 31 + 1 + 15), LONG: (3 * 5 + 4 + 1, 9 * 15 + 1 + 3 * _LEAF + _TOP)}


def bits(size: int, width: int, drop: int) -> tuple[int, int]:
    """Of one contest."""
    pairs, subsets = size * (size - 1) // 2, (size - 1) * ((1 << (size - 1)) - 1)
    words = size * (width + drop) if drop else (size - 1) * width
    sent, dealt = (pairs * each for each in PAIR[width])
    return sent + words, dealt + 2 * subsets * width + (size * width if drop else 0)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("k", "levels", "rows"),
    [
        (1, [[1]], 8),
        (2, [[2]], 8),
        (4, [[4]], 8),
        (7, [[7]], 8),
        (9, [[4, 4, 1], [3]], 8),
        (32, [[4] * 8, [8]], 8),
        (7, [[4, 3], [2]], 520),
    ],
)
def test_costs(run: Run, k: int, levels: list[list[int]], rows: int, width: int) -> None:
    contests = [bits(size, width, 0 if level else 24) for level, sizes in enumerate(levels) for size in sizes]
    sent, dealt = (sum(part) * rows // 8 for part in zip(*contests, strict=True))
    ran = run(lambda ctx, s: maximum_along(ctx, s, width, 24), torch.zeros(rows, k, dtype=torch.int64))
    ran.costs((3 if width == SHORT else 4) * len(levels) if k > 1 else 1, sent, dealt)


def test_a_contest_of_four_words_in_bytes() -> None:
    assert [bits(4, width, 0)[0] / 8 for width in WIDTHS] == [13.125, 28.5]


def test_what_is_opened(run: Run) -> None:
    ran = run(lambda ctx, s: maximum_along(ctx, s, SHORT, 28), torch.zeros(9, 16, dtype=torch.int64))
    assert ran.opened() == [
        ("CoarseContest.r", 49), ("CoarseContest.leaf", 6), ("CoarseContest.beta", 1),
        ("CoarseContest.r", 21), ("CoarseContest.leaf", 6), ("CoarseContest.beta", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(("width", "drop"), [(SHORT, 43), (LONG, 28)])
def test_openings_of_numbers(monkeypatch: pytest.MonkeyPatch, width: int, drop: int) -> None:
    """What is opened is uniform over 64 bits; with masks a bit short it would not be."""

    async def protocol(ctx: Context, x: Shared) -> None:
        for _ in range(2):
            await maximum_along(ctx, x, width, drop)

    x = torch.arange(4 * 3500).reshape(-1, 4) << 40
    y = x.flip(-1)
    assert_hides(monkeypatch, protocol, x, y, (x - y).movedim(-1, 0).unsqueeze(-1))


@pytest.mark.parametrize("width", WIDTHS)
def test_openings_of_words(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    async def protocol(ctx: Context, x: Shared) -> None:
        for _ in range(2):
            await largest(ctx, x, width)

    x = torch.arange(4 * 4700).reshape(-1, 4) & 1023
    y = x.flip(-1)
    first = (x[..., 1:] - x[..., :1]) - (y[..., 1:] - y[..., :1])
    assert_hides(monkeypatch, protocol, x, y, first.movedim(-1, 0), width)


def test_another_picking_is_noticed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that no opening shows: products of masks that are not those of the outcomes."""
    x = torch.tensor(list(product(range(3), repeat=3)))
    true = coarse.products_of_outcomes
    monkeypatch.setattr(coarse, "products_of_outcomes", lambda beta, size: true(beta.flip(0), size))
    assert not torch.equal(signed(run(lambda ctx, s: largest(ctx, s, SHORT), x).value, SHORT), x.amax(-1))


def test_impossible_kinds() -> None:
    kind = CoarseContest((2,), 4, SHORT, 20)
    assert from_json(to_json(kind)) == kind
    for change in ({"size": 9}, {"size": 0}, {"size": 1, "drop": 0}, {"drop": 44}, {"drop": -1}, {"width": 22}):
        with pytest.raises(ValueError):
            replace(kind, **change)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="impossible parameters"):
            from_json(to_json(kind) | change)
