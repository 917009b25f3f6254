"""Digit tables and AND blocks: the algebra by brute force, and whole comparisons by one party that holds everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpcinfer.ring import digits, prg
from mpcinfer.ring.domain import Ring

WIDTHS = sorted([*digits.LAYOUTS, 9, 24, 30, 45, 49])


def parity(word: int) -> int:
    return word.bit_count() & 1


@pytest.mark.parametrize(
    ("leaves", "with_eq", "width", "products"),
    [(4, True, 7, 22), (4, False, 6, 15), (3, True, 5, 8), (3, False, 4, 5), (2, False, 2, 1)],
)
def test_blocks_open_and_deal_what_the_design_says(leaves: int, with_eq: bool, width: int, products: int) -> None:
    spec = digits.block(leaves, with_eq)
    assert (spec.width, spec.products) == (width, products)


@pytest.mark.parametrize("leaves", [2, 3, 4])
@pytest.mark.parametrize("with_eq", [True, False])
def test_a_block_folds_every_word_under_every_mask(leaves: int, with_eq: bool) -> None:
    spec = digits.block(leaves, with_eq)
    for plain in range(1 << spec.width):
        eq = [plain >> 2 * t & 1 if 2 * t < spec.width else 0 for t in range(leaves)]
        lt = [0, *(plain >> (2 * t - 1) & 1 for t in range(1, leaves))]  # lt_0 is linear, and added elsewhere
        less = 0
        for t in range(1, leaves):
            less ^= all(eq[:t]) & lt[t]
        for mask in range(1 << spec.width):
            opened = plain ^ mask
            dealt = mask | int(spec.product_of[mask]) << spec.width | 1 << 31
            assert parity(int(spec.lt[opened]) & dealt) == less
            if with_eq:
                assert parity(int(spec.eq[opened]) & dealt) == all(eq)


def test_products_of_masks() -> None:
    spec = digits.block(4, True)
    masks = torch.arange(128, dtype=torch.uint8).reshape(2, 64)
    dealt = digits.products(masks, spec)
    assert dealt.dtype == torch.int32 and dealt.shape == masks.shape
    assert dealt.reshape(-1).tolist() == spec.product_of.tolist()


@pytest.mark.parametrize("width", WIDTHS)
def test_tables_say_which_values_are_below_the_digit(width: int) -> None:
    blocks, leaves = digits.layout(width)
    count = blocks * leaves
    low = prg.expand(bytes(32), (50,), Ring(width - 1))
    low[0], low[1] = 0, (1 << (width - 1)) - 1
    tables = digits.tables(low, width)
    assert tables.shape == (count, 50) and tables.dtype == torch.int16
    for j in range(count):
        for v in range(15):
            assert torch.equal((tables[j] >> v & 1).bool(), v < (low >> 4 * j & 15))


def compare(c: list[int], r: list[int], thresholds: tuple[int, ...], width: int, seed: bytes) -> np.ndarray:
    """[c - r < t] by the kernels, all shares held by one party, under masks drawn from `seed`: [T, N]."""
    blocks, leaves = digits.layout(width)
    inner, outer = digits.block(leaves, True), digits.block(leaves if blocks == 1 else blocks, False)
    n, many = len(c), (len(thresholds), len(c))
    opened = torch.from_numpy(np.array(c, np.uint64).view(np.int64))
    secret = torch.from_numpy(np.array(r, np.uint64).view(np.int64))
    leaf = prg.expand(prg.derive(seed, "leaf"), (blocks, *many), Ring(inner.width, xor=True))
    top = prg.expand(prg.derive(seed, "top"), many, Ring(outer.width, xor=True))
    lt = digits.tables(secret, width)
    msb = ((secret >> (width - 1)) & 1).to(torch.uint8)
    if blocks == 1:
        words, high = (part[0] for part in digits.leaves(opened, thresholds, width, lt, True, top[None]))
    else:
        words, tops = digits.leaves(opened, thresholds, width, lt, True, leaf)
        words, high = digits.fold_blocks(words, leaf, digits.products(leaf, inner), tops, True, inner, top)
    bits = digits.finish(words, top, digits.products(top, outer), high, True, outer, opened, thresholds, width, msb)
    assert bits.shape == many and n == bits.shape[1]
    return bits.numpy()


@st.composite
def comparisons(draw: st.DrawFn) -> tuple[int, list[tuple[int, int, int]]]:
    width = draw(st.sampled_from(WIDTHS))
    half = 1 << (width - 1)
    near = st.integers(-3, 3)
    delta = st.one_of(near, st.just(-half), st.just(half - 1), st.integers(-half, half - 1))
    t = st.one_of(near, st.integers(-(2**62), 2**62))
    r = st.one_of(st.sampled_from([0, half - 1, half, 2 * half - 1]), st.integers(0, 2 * half - 1))
    return width, draw(st.lists(st.tuples(delta, t, r), min_size=1, max_size=4))


@given(comparisons(), st.binary(min_size=32, max_size=32))
def test_comparisons_are_exact(case: tuple[int, list[tuple[int, int, int]]], seed: bytes) -> None:
    width, items = case
    for delta, t, r in items:
        c = (t + delta + r) % (1 << width)
        assert compare([c], [r], (t,), width, seed).tolist() == [[int(delta < 0)]]


def assert_opened_words_hold_the_whole_mask(width: int, first: bool) -> None:
    """A mask word enters by exclusive or, all of it, and what the words hide stays within its bits."""
    blocks, leaves = digits.layout(width)
    inner = digits.block(leaves, blocks > 1)
    t, n = 2, 1 << inner.width
    low = (1 << (width - 1)) - 1
    c, r = (prg.expand(prg.derive(bytes(32), name), (n,), Ring(width)) for name in ("c", "r"))
    lt = digits.tables(r & low, width)
    leaf = torch.arange(n, dtype=torch.uint8).reshape(1, 1, n).expand(blocks, t, n).contiguous()  # every mask word
    masked, tops = digits.leaves(c, (0, 5), width, lt, first, leaf)
    plain, same_tops = digits.leaves(c, (0, 5), width, lt, first, torch.zeros_like(leaf))
    assert torch.equal(masked ^ plain, leaf) and torch.equal(tops, same_tops)
    assert int(masked.max()) < 1 << inner.width and int(tops.max()) <= 1
    if blocks == 1:
        return

    outer = digits.block(blocks, False)
    top = (torch.arange(n, dtype=torch.uint8) % (1 << outer.width)).expand(t, n).contiguous()
    arguments = masked, leaf, digits.products(leaf, inner), tops, first, inner
    masked, high = digits.fold_blocks(*arguments, top)
    plain, same_high = digits.fold_blocks(*arguments, torch.zeros_like(top))
    assert torch.equal(masked ^ plain, top) and torch.equal(high, same_high)
    assert int(masked.max()) < 1 << outer.width and int(high.max()) <= 1


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("first", [True, False])
def test_opened_words_hold_the_whole_mask_and_no_bit_beyond_it(width: int, first: bool) -> None:
    assert_opened_words_hold_the_whole_mask(width, first)


@pytest.mark.parametrize(("kernel", "at", "width"), [("_leaves", 5, 64), ("_leaves", 5, 17), ("_fold_blocks", 8, 64)])
@pytest.mark.parametrize("fault", ["short", "wide"])
def test_the_check_catches_a_mask_bit_left_out_and_a_bit_left_bare(
    monkeypatch: pytest.MonkeyPatch, kernel: str, at: int, width: int, fault: str
) -> None:
    honest = getattr(digits, kernel)

    def faulty(*args: object) -> None:
        changed = list(args)
        masks = changed[at]
        assert isinstance(masks, np.ndarray)
        changed[at] = masks & 0xFE if fault == "short" else masks | 0x80
        honest(*changed)

    monkeypatch.setattr(digits, kernel, faulty)
    with pytest.raises(AssertionError):
        assert_opened_words_hold_the_whole_mask(width, True)


@pytest.mark.parametrize("width", WIDTHS)
def test_many_elements_and_thresholds(width: int) -> None:
    half = 1 << (width - 1)
    thresholds = (-5, 0, 7)
    x = [-half + 8, -6, -5, -1, 0, 1, 6, 7, 8, half - 8]
    r = [int(v) % (2 * half) for v in prg.expand(bytes(32), (len(x),), Ring(width))]
    c = [(a + b) % (2 * half) for a, b in zip(x, r, strict=True)]
    expected = [[int(v < t) for v in x] for t in thresholds]
    assert compare(c, r, thresholds, width, bytes(32)).tolist() == expected
