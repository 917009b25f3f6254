"""Comparisons of few bits in one step: the algebra by brute force, and whole comparisons by one party."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpcinfer.ring import digits, prg, short
from mpcinfer.ring.domain import Ring

EDGES = [0, 1, 31, 32, 1 << 19, (1 << 20) - 1, (1 << 20) - 32, 0b11111_00000_11111_00000]


def test_what_is_opened_and_dealt() -> None:
    assert short.LEAVES * short.DIGIT_BITS == short.BITS == 20
    assert (short.COMPARED.width, short.COMPARED.products) == (6, 15)
    assert [(short.conjunction(n).width, short.conjunction(n).products) for n in (2, 3, 5)] == [(2, 1), (3, 4), (5, 26)]


def test_tables_say_which_values_are_below_the_digit() -> None:
    r = prg.expand(bytes(32), (40,), Ring(64))
    r[0], r[1] = 0, -1
    tables = short.tables(r, 6)
    assert int(tables.min()) >= 0  # of 31 bits
    for j in range(6):
        digit = r >> 5 * j & 31
        for v in range(31):
            assert torch.equal((tables[:, j] >> v & 1).bool(), v < digit)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_the_conjunction_of_every_word_under_every_mask(count: int) -> None:
    spec = short.conjunction(count)
    words = np.arange(1 << count)
    for mask in words:
        share = int(mask) | int(spec.product_of[mask]) << count | 1 << 31
        got = [(int(spec.lt[opened]) & share).bit_count() & 1 for opened in words ^ mask]
        assert got == [int(word == len(words) - 1) for word in words]


def folded(opened: torch.Tensor, masks: torch.Tensor, tops: torch.Tensor, spec: digits.Block) -> list[int]:
    """What one party that holds all shares makes of opened words [N], no sign added."""
    dealt, none = digits.products(masks, spec), torch.zeros(len(opened), dtype=torch.uint8)
    x = torch.zeros(len(opened), dtype=torch.int64)
    parts = [t.unsqueeze(0) for t in (opened, masks, dealt, tops)]
    found: list[int] = digits.finish(*parts, True, spec, x, (0,), 64, none)[0].tolist()  # type: ignore[arg-type]
    return found


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    random = [prg.expand(bytes([i]) * 32, (500,), Ring(20)) for i in range(2)]
    near = random[0] + torch.randint(-1, 2, (500,), generator=torch.Generator().manual_seed(1))
    edges = torch.cartesian_prod(torch.tensor(EDGES), torch.tensor(EDGES))
    return torch.cat([*random, edges[:, 0]]), torch.cat([random[1], near & ((1 << 20) - 1), edges[:, 1]])


@pytest.mark.parametrize("seed", range(4))
def test_comparing(seed: int) -> None:
    c, r = pairs()
    masks = prg.expand(bytes([seed]) * 32, (len(c),), Ring(6, xor=True))
    words, tops = short.leaves(c, short.tables(r, 4), True, masks)
    assert folded(words, masks, tops, short.COMPARED) == (c < r).int().tolist()


@pytest.mark.parametrize("count", [2, 4])
def test_equality_of_digits(count: int) -> None:
    c, r = (x & ((1 << 5 * count) - 1) for x in pairs())
    c, r = torch.cat([c, r, r ^ 1]), torch.cat([r, r, r])
    masks = prg.expand(bytes(32), (len(c),), Ring(count, xor=True))
    words = short.equal(c, short.tables(r, count), True, masks)
    expected = (c == r).int().tolist()
    assert 0 < sum(expected) < len(expected)
    assert folded(words, masks, torch.zeros_like(masks), short.conjunction(count)) == expected


def test_a_wrong_table_is_noticed() -> None:
    c, r = pairs()
    masks = torch.zeros(len(c), dtype=torch.uint8)
    words, tops = short.leaves(c, short.tables(r + 1, 4), True, masks)
    assert folded(words, masks, tops, short.COMPARED) != (c < r).int().tolist()


def test_on_meta() -> None:
    c, masks = torch.empty(3, device="meta", dtype=torch.int64), torch.empty(3, device="meta", dtype=torch.uint8)
    lt = torch.empty(3, 4, device="meta", dtype=torch.int32)
    words, tops = short.leaves(c, lt, True, masks)
    assert words.shape == tops.shape == short.equal(c, lt, True, masks).shape == (3,)
