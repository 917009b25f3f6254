"""Comparing a public number with a dealt one, digit by digit: tables, AND blocks, and their kernels.

A secret low(r) of m - 1 bits is dealt as digits of 4 bits. For each digit r_j the table lt(v) = [v < r_j], v = 0..14,
is XOR-shared (15 bits; lt(15) = 0); eq(v) = lt(v - 1) xor lt(v) with lt(-1) = 1. The public digit is looked up
locally, which gives shares of (lt, eq) per digit: the leaves. A block of k leaves, most significant first, folds to
    lt = lt_0 + eq_0 lt_1 + eq_0 eq_1 lt_2 + ...        eq = eq_0 eq_1 ... eq_(k-1)
lt_0 is linear; the other 2k - 1 bits are opened in one word (bit 0: eq_0, bits 2t - 1 and 2t: lt_t and eq_t) under a
mask word, and every product of masks that the two sums need is dealt. Given the opened word, lt and eq are XORs of
dealt bits, so folding is a table look-up and a parity. The last level needs no eq and so neither its last bit; where
one block holds all digits it is the only level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit

from mpcinfer.ring import bits as packed
from mpcinfer.ring.bits import parity
from mpcinfer.ring.domain import array

DIGIT_BITS = 4
TABLE_BITS = 15
# largest ring width -> (blocks of the first level = leaves of the second, leaves of a first-level block)
LAYOUTS = {64: (4, 4), 48: (3, 4), 36: (3, 3), 32: (2, 4), 25: (2, 3), 17: (1, 4)}
_CONST = np.uint32(1 << 31)


def layout(width: int) -> tuple[int, int]:
    """The smallest of LAYOUTS for numbers of so many bits, their sign included; spare leading digits are zero.

    ValueError for numbers that have not two digits, or too many.
    """
    if not 2 * DIGIT_BITS < width <= max(LAYOUTS):
        raise ValueError(f"no comparisons of numbers of {width} bits")
    return LAYOUTS[min(most for most in LAYOUTS if most >= width)]


@dataclass(frozen=True)
class Block:
    """The algebra of one AND block: `width` opened bits, `products` dealt ones, and the tables by opened word."""

    width: int
    products: int
    lt: npt.NDArray[np.uint32]  # bits of (mask | products << width) to XOR; bit 31: the public constant
    eq: npt.NDArray[np.uint32]
    product_of: npt.NDArray[np.int32]  # mask word -> product word


@cache
def block(leaves: int, with_eq: bool) -> Block:
    """The block of that many leaves."""
    width = 2 * leaves - 1 if with_eq else 2 * leaves - 2
    eq_bit = [2 * t for t in range(leaves)]
    terms = [tuple(eq_bit[:t]) + (2 * t - 1,) for t in range(1, leaves)]
    product = tuple(eq_bit) if with_eq else None
    monomials: list[tuple[int, ...]] = []
    for term in [*terms, *([product] if product else [])]:
        for size in range(2, len(term) + 1):
            monomials += [s for s in combinations(sorted(term), size) if s not in monomials]
    place = {(b,): b for b in range(width)} | {s: width + i for i, s in enumerate(monomials)}

    def table(sums: list[tuple[int, ...]]) -> npt.NDArray[np.uint32]:
        out = np.zeros(1 << width, np.uint32)
        for word in range(1 << width):
            for term in sums:
                for size in range(len(term) + 1):
                    for chosen in combinations(sorted(term), size):
                        if all(word >> b & 1 for b in term if b not in chosen):
                            out[word] ^= _CONST if not chosen else np.uint32(1 << place[chosen])
        return out

    product_of = np.zeros(1 << width, np.int32)
    for word in range(1 << width):
        for i, s in enumerate(monomials):
            if all(word >> b & 1 for b in s):
                product_of[word] |= 1 << i
    return Block(width, len(monomials), table(terms), table([product] if product else []), product_of)


@njit("void(uint64[::1], uint64, uint16[:, ::1])", nogil=True, cache=True)
def _tables(r: Any, low: Any, out: Any) -> None:
    for i in range(r.size):
        rest = r[i] & low
        for j in range(out.shape[1]):
            out[i, j] = (np.uint32(1) << np.uint32(rest & np.uint64(15))) - np.uint32(1)
            rest >>= np.uint64(4)


def tables(r: torch.Tensor, width: int) -> torch.Tensor:
    """The lt tables of the digits of low(r), least significant first: int64 [*S] -> int16 [*S, digits]."""
    digits = math.prod(layout(width))
    out = torch.empty((*r.shape, digits), dtype=torch.int16)
    low = np.uint64((1 << (width - 1)) - 1)
    _tables(array(r, r.numel()).view(np.uint64), low, out.numpy().reshape(-1, digits).view(np.uint16))
    return out


@njit("void(uint8[::1], int32[::1], int32[::1])", nogil=True, cache=True)
def _products(masks: Any, product_of: Any, out: Any) -> None:
    for i in range(masks.size):
        out[i] = product_of[masks[i]]


def products(masks: torch.Tensor, spec: Block) -> torch.Tensor:
    """The dealt products of mask words, int32 of the same shape."""
    out = torch.empty(masks.shape, dtype=torch.int32)
    _products(array(masks, masks.numel()), spec.product_of, out.numpy().reshape(-1))
    return out


def _leaves_of(k: int) -> Any:
    """The kernel for blocks of k leaves: that it knows k saves a third of its time."""

    @njit(
        "void(uint64[::1], uint64[::1], uint64, uint16[:, ::1], boolean, "
        "uint8[:, :, ::1], uint8[:, :, ::1], uint8[:, :, ::1])",
        nogil=True,
        cache=True,
    )
    def kernel(c: Any, thresholds: Any, low: Any, lt: Any, first: Any, masks: Any, words: Any, tops: Any) -> None:
        one, held = np.uint32(1), np.uint32(first)
        blocks = words.shape[2]
        kept = np.uint32((1 << (2 * k - (1 if blocks > 1 else 2))) - 1)
        for t in range(thresholds.size):
            for i in range(c.size):
                u = (c[i] - thresholds[t]) & low
                for b in range(blocks):
                    at = lt.shape[1] - (b + 1) * k
                    part = np.uint32(u >> np.uint64(4 * at))
                    word, less = np.uint32(0), np.uint32(0)
                    for j in range(k):
                        v = (part >> np.uint32(4 * j)) & np.uint32(15)
                        # bit v + 1 of the extended table is lt(v); bit 0 is lt(-1) = 1, held by the first party
                        two = ((np.uint32(lt[i, at + j]) << one) | held) >> v
                        less = (two >> one) & one
                        word = (word << np.uint32(2)) | (((two & one) ^ less) << one) | less
                    tops[t, i, b] = np.uint8(less)
                    words[t, i, b] = masks[t, i, b] ^ np.uint8((word >> one) & kept)

    return kernel


_LEAVES = {k: _leaves_of(k) for k in sorted({leaves for _, leaves in LAYOUTS.values()})}


def _leaves(c: Any, thresholds: Any, low: Any, lt: Any, first: bool, masks: Any, words: Any, tops: Any) -> None:
    _LEAVES[lt.shape[1] // words.shape[2]](c, thresholds, low, lt, first, masks, words, tops)


@njit(
    "void(uint8[:, :, ::1], uint8[:, :, ::1], uint32[:, :, ::1], uint8[:, :, ::1], boolean, int64, "
    "uint32[::1], uint32[::1], uint8[:, ::1], uint8[:, ::1], uint8[:, ::1])",
    nogil=True,
    cache=True,
)
def _fold_blocks(
    opened: Any,
    masks: Any,
    dealt: Any,
    tops: Any,
    first: Any,
    width: Any,
    lt: Any,
    eq: Any,
    next_masks: Any,
    words: Any,
    top: Any,
) -> None:
    shift = np.uint32(width)
    for t in range(opened.shape[0]):
        for i in range(opened.shape[1]):
            word = next_masks[t, i]
            for b in range(opened.shape[2]):
                e = opened[t, i, b]
                share = np.uint32(masks[t, i, b]) | (dealt[t, i, b] << shift)
                if first:
                    share |= np.uint32(0x80000000)
                less = parity(lt[e] & share) ^ tops[t, i, b]
                if b == 0:
                    top[t, i] = less
                else:
                    word ^= less << np.uint8(2 * b - 1)
                if b + 1 < opened.shape[2]:
                    word ^= parity(eq[e] & share) << np.uint8(2 * b)
            words[t, i] = word


@njit(
    "void(uint8[:, ::1], uint8[:, ::1], uint32[:, ::1], uint8[:, ::1], boolean, int64, "
    "uint32[::1], uint64[::1], uint64[::1], int64, uint8[::1], uint8[:, ::1])",
    nogil=True,
    cache=True,
)
def _finish(
    opened: Any,
    masks: Any,
    dealt: Any,
    top: Any,
    first: Any,
    width: Any,
    lt: Any,
    c: Any,
    thresholds: Any,
    sign: Any,
    msb: Any,
    out: Any,
) -> None:
    shift = np.uint32(width)
    for t in range(opened.shape[0]):
        for i in range(opened.shape[1]):
            share = np.uint32(masks[t, i]) | (dealt[t, i] << shift)
            bit = msb[i]
            if first:
                share |= np.uint32(0x80000000)
                bit ^= np.uint8(((c[i] - thresholds[t]) >> np.uint64(sign)) & np.uint64(1))
            out[t, i] = bit ^ top[t, i] ^ parity(lt[opened[t, i]] & share)


def _dealt(x: torch.Tensor, *shape: int) -> npt.NDArray[np.uint32]:
    """Product words, held in the smallest container, as the kernels want them."""
    return packed.unsigned(array(x, *shape)).astype(np.uint32, copy=False)


def leaves(
    c: torch.Tensor, thresholds: tuple[int, ...], width: int, lt: torch.Tensor, first: bool, masks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked leaf words to open and the linear top bits, both uint8 [T, *S, blocks].

    c: opened x + r, [*S]; lt: shares of r's tables, int16 [*S, digits]; masks: uint8 [T, *S, blocks].
    """
    if c.device.type == "meta":
        return torch.empty_like(masks), torch.empty_like(masks)
    n, t, blocks = c.numel(), len(thresholds), masks.shape[-1]
    words, tops = torch.empty_like(masks), torch.empty_like(masks)
    public = np.array([x % (1 << 64) for x in thresholds], np.uint64)
    low = np.uint64((1 << (width - 1)) - 1)
    _leaves(
        array(c, n).view(np.uint64), public, low, array(lt, n, lt.shape[-1]).view(np.uint16), first,
        array(masks, t, n, blocks), words.numpy().reshape(t, n, blocks), tops.numpy().reshape(t, n, blocks),
    )  # fmt: skip
    return words, tops


def fold_blocks(
    opened: torch.Tensor,
    masks: torch.Tensor,
    dealt: torch.Tensor,
    tops: torch.Tensor,
    first: bool,
    spec: Block,
    next_masks: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """First-level blocks to the second level's masked words and top bits, uint8 [T, *S]."""
    words, top = torch.empty_like(next_masks), torch.empty_like(next_masks)
    if opened.device.type == "meta":
        return words, top
    t, blocks = opened.shape[0], opened.shape[-1]
    n = next_masks.numel() // t
    _fold_blocks(
        array(opened, t, n, blocks), array(masks, t, n, blocks), _dealt(dealt, t, n, blocks),
        array(tops, t, n, blocks), first, spec.width, spec.lt, spec.eq, array(next_masks, t, n),
        words.numpy().reshape(t, n), top.numpy().reshape(t, n),
    )  # fmt: skip
    return words, top


def finish(
    opened: torch.Tensor, masks: torch.Tensor, dealt: torch.Tensor, top: torch.Tensor, first: bool, spec: Block,
    c: torch.Tensor, thresholds: tuple[int, ...], width: int, msb: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The last fold, and the sign: shares of [x < t], uint8 [T, *S]."""
    out = torch.empty_like(opened)
    if opened.device.type == "meta":
        return out
    t, n = opened.shape[0], c.numel()
    public = np.array([x % (1 << 64) for x in thresholds], np.uint64)
    _finish(
        array(opened, t, n), array(masks, t, n), _dealt(dealt, t, n), array(top, t, n), first, spec.width,
        spec.lt, array(c, n).view(np.uint64), public, width - 1, array(msb, n), out.numpy().reshape(t, n),
    )  # fmt: skip
    return out
