"""Comparisons in one step: the algebra by brute force, and whole comparisons by one party that holds everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpcinfer.ring import flat, prg
from mpcinfer.ring.domain import Ring

MASK = Ring(flat.WIDTH, xor=True)


def test_what_is_opened_and_dealt() -> None:
    assert flat.DIGITS * flat.DIGIT_BITS == 63
    assert flat.WIDTH == 12 and len(flat._MONOMIALS) == flat.PRODUCT_WORDS * flat.PRODUCT_BITS == 177


def test_the_block_folds_every_word_under_many_masks() -> None:
    rng = np.random.default_rng(1)
    plain = np.arange(1 << flat.WIDTH)
    eq = [plain >> 2 * t & 1 for t in range(flat.DIGITS - 1)]
    less = np.zeros_like(plain)
    so_far = np.ones_like(plain)
    for t in range(1, flat.DIGITS):
        so_far &= eq[t - 1]
        less ^= so_far & (plain >> (2 * t - 1))
    less &= 1
    for mask in (0, (1 << flat.WIDTH) - 1, *rng.integers(0, 1 << flat.WIDTH, 60)):
        opened = plain ^ mask
        share = np.concatenate([[mask | 1 << flat._CONST], flat.products(torch.tensor([mask]))[0].numpy()])
        bits = flat.folding()[opened] & share.astype(np.uint64)
        got = np.array([sum(int(w).bit_count() for w in row) & 1 for row in bits])
        assert np.array_equal(got, less)


def test_tables_say_which_values_are_below_the_digit() -> None:
    r = prg.expand(bytes(32), (40,), Ring(64))
    r[0], r[1] = 0, -1
    tables = flat.tables(r)
    for j in range(flat.DIGITS):
        digit = r >> 9 * j & 511
        for v in range(512):
            assert torch.equal((tables[:, j, v // 64] >> v % 64 & 1).bool(), v < digit)


def compare(c: list[int], r: list[int], thresholds: tuple[int, ...], seed: bytes) -> list[list[int]]:
    """[c - r < t] by the kernels, all shares held by one party, under masks drawn from `seed`: [T, N]."""
    opened, secret = (torch.from_numpy(np.array(x, np.uint64).view(np.int64)) for x in (c, r))
    masks = prg.expand(seed, (len(thresholds), len(c)), MASK)
    words, tops = flat.leaves(opened, thresholds, flat.tables(secret), True, masks)
    msb = ((secret >> 63) & 1).to(torch.uint8)
    found: list[list[int]] = flat.finish(
        words, masks, flat.products(masks), tops, True, opened, thresholds, msb
    ).tolist()
    return found


HALF = 1 << 63
NEAR = st.integers(-3, 3)


@given(
    st.lists(
        st.tuples(
            st.one_of(NEAR, st.just(-HALF), st.just(HALF - 1), st.integers(-HALF, HALF - 1)),
            st.one_of(NEAR, st.integers(-(2**62), 2**62)),
            st.one_of(st.sampled_from([0, HALF - 1, HALF, 2 * HALF - 1]), st.integers(0, 2 * HALF - 1)),
        ),
        min_size=1,
        max_size=4,
    ),
    st.binary(min_size=32, max_size=32),
)
def test_comparisons_are_exact(items: list[tuple[int, int, int]], seed: bytes) -> None:
    for delta, t, r in items:
        assert compare([(t + delta + r) % (1 << 64)], [r], (t,), seed) == [[int(delta < 0)]]


def test_many_at_once() -> None:
    c, r = ([x % (1 << 64) for x in prg.expand(bytes([i] * 32), (50,), Ring(64)).tolist()] for i in (1, 2))
    differences = [(a - b + HALF) % (1 << 64) - HALF for a, b in zip(c, r, strict=True)]
    thresholds = (0, 1 << 40, -5)
    usable = [i for i, d in enumerate(differences) if abs(d) < 1 << 62]
    got = compare([c[i] for i in usable], [r[i] for i in usable], thresholds, bytes(32))
    assert got == [[int(differences[i] < t) for i in usable] for t in thresholds]


@pytest.mark.parametrize("first", [True, False])
def test_opened_words_hold_the_whole_mask_and_no_bit_beyond_it(first: bool) -> None:
    n = 1 << flat.WIDTH
    c, r = (prg.expand(prg.derive(bytes(32), name), (n,), Ring(64)) for name in ("c", "r"))
    masks = torch.arange(n, dtype=torch.int16).expand(2, n).contiguous()
    masked, tops = flat.leaves(c, (0, 5), flat.tables(r), first, masks)
    plain, same_tops = flat.leaves(c, (0, 5), flat.tables(r), first, torch.zeros_like(masks))
    assert torch.equal(masked ^ plain, masks) and torch.equal(tops, same_tops)
    assert 0 <= int(masked.min()) and int(masked.max()) < n and int(tops.max()) <= 1
