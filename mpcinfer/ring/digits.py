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


@njit("void(uint64[::1], uint64, uint64, uint16[::1])", nogil=True, cache=True)
def _tables(r: Any, low: Any, shift: Any, out: Any) -> None:
    one = np.uint64(1)
    for i in range(r.size):
        out[i] = np.uint16((one << (((r[i] & low) >> shift) & np.uint64(15))) - one)


def tables(r: torch.Tensor, width: int) -> torch.Tensor:
    """The lt tables of the digits of low(r), least significant first: int64 [*S] -> int16 [digits, *S]."""
    digits = math.prod(layout(width))
    out = torch.empty((digits, *r.shape), dtype=torch.int16)
    low, values = np.uint64((1 << (width - 1)) - 1), array(r, r.numel()).view(np.uint64)
    for j, row in enumerate(out.numpy().reshape(digits, -1).view(np.uint16)):
        _tables(values, low, np.uint64(DIGIT_BITS * j), row)
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


@njit("UniTuple(uint64, 2)(uint64, uint64, uint64, uint64)", nogil=True, cache=True, inline="always")
def _digit(word: Any, table: Any, held: Any, v: Any) -> Any:
    """The leaf of a digit v: what is before it with eq and lt appended, and lt."""
    one = np.uint64(1)
    # bit v + 1 of the extended table is lt(v); bit 0 is lt(-1) = 1, held by the first party
    two = ((table << one) | held) >> (v & np.uint64(15))
    less = (two >> one) & one
    return (word << np.uint64(2)) | (((two & one) ^ less) << one) | less, less


# The kernels' inner loops are functions of arrays of one dimension: only of these LLVM sees that they fill vectors.
@njit(
    "void(uint64[::1], uint64, uint64, uint64, uint16[::1], uint16[::1], uint16[::1], uint16[::1], boolean, uint64, "
    "uint64, uint8[::1], uint8[::1], uint8[::1])",
    nogil=True,
    cache=True,
)
def _leaves_of_one(
    c: Any, threshold: Any, low: Any, shift: Any, lt0: Any, lt1: Any, lt2: Any, lt3: Any, four: Any, held: Any,
    kept: Any, masks: Any, words: Any, tops: Any,
) -> None:  # fmt: skip
    for i in range(words.size):
        part = ((c[i] - threshold) & low) >> shift
        word, less = _digit(np.uint64(0), np.uint64(lt0[i]), held, part)
        word, less = _digit(word, np.uint64(lt1[i]), held, part >> np.uint64(4))
        word, less = _digit(word, np.uint64(lt2[i]), held, part >> np.uint64(8))
        if four:
            word, less = _digit(word, np.uint64(lt3[i]), held, part >> np.uint64(12))
        tops[i] = np.uint8(less)
        words[i] = masks[i] ^ np.uint8((word >> np.uint64(1)) & kept)


@njit(
    "void(uint64[::1], uint64[::1], uint64, uint16[:, ::1], boolean, uint8[:, :, ::1], uint8[:, :, ::1], "
    "uint8[:, :, ::1])",
    nogil=True,
    cache=True,
)
def _leaves(c: Any, thresholds: Any, low: Any, lt: Any, first: Any, masks: Any, words: Any, tops: Any) -> None:
    blocks = masks.shape[0]
    k = lt.shape[0] // blocks
    kept = np.uint64((1 << (2 * k - (1 if blocks > 1 else 2))) - 1)
    for b in range(blocks):
        at = lt.shape[0] - (b + 1) * k
        shift = np.uint64(4 * at)
        for t in range(thresholds.size):
            _leaves_of_one(
                c, thresholds[t], low, shift, lt[at], lt[at + 1], lt[at + 2], lt[at + k - 1], k == 4,
                np.uint64(first), kept, masks[b, t], words[b, t], tops[b, t],
            )  # fmt: skip


@njit(
    "void(uint8[::1], uint8[::1], uint32[::1], uint32, uint32, uint32[::1], uint8[::1])",
    nogil=True,
    cache=True,
)
def _folded(opened: Any, masks: Any, dealt: Any, width: Any, const: Any, table: Any, out: Any) -> None:
    for i in range(out.size):
        share = np.uint32(masks[i]) | (dealt[i] << width) | const
        out[i] = parity(np.uint32(table[opened[i]] & share))


@njit("void(uint8[::1], uint8[::1], uint8)", nogil=True, cache=True)
def _add_bit(word: Any, bit: Any, at: Any) -> None:
    for i in range(word.size):
        word[i] ^= bit[i] << at


@njit(
    "void(uint8[:, ::1], uint8[:, ::1], uint32[:, ::1], uint8[:, ::1], boolean, int64, "
    "uint32[::1], uint32[::1], uint8[::1], uint8[::1], uint8[::1])",
    nogil=True,
    cache=True,
)
def _fold_blocks(
    opened: Any, masks: Any, dealt: Any, tops: Any, first: Any, width: Any, lt: Any, eq: Any, next_masks: Any,
    words: Any, top: Any,
) -> None:  # fmt: skip
    words[:] = next_masks
    shift, const = np.uint32(width), np.uint32(0x80000000 if first else 0)
    bit = np.empty(words.size, np.uint8)
    for b in range(opened.shape[0]):
        if b == 0:
            _folded(opened[b], masks[b], dealt[b], shift, const, lt, top)
            _add_bit(top, tops[b], np.uint8(0))
        else:
            _folded(opened[b], masks[b], dealt[b], shift, const, lt, bit)
            _add_bit(bit, tops[b], np.uint8(0))
            _add_bit(words, bit, np.uint8(2 * b - 1))
        if b + 1 < opened.shape[0]:
            _folded(opened[b], masks[b], dealt[b], shift, const, eq, bit)
            _add_bit(words, bit, np.uint8(2 * b))


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
    """Masked leaf words to open and the linear top bits, both uint8 [blocks, T, *S].

    c: opened x + r, [*S]; lt: shares of r's tables, int16 [digits, *S]; masks: uint8 [blocks, T, *S].
    """
    words, tops = torch.empty_like(masks), torch.empty_like(masks)
    if c.device.type == "meta":
        return words, tops
    n, t, blocks = c.numel(), len(thresholds), len(masks)
    public = np.array([x % (1 << 64) for x in thresholds], np.uint64)
    _leaves(
        array(c, n).view(np.uint64), public, np.uint64((1 << (width - 1)) - 1),
        array(lt, len(lt), n).view(np.uint16), first, array(masks, blocks, t, n),
        words.numpy().reshape(blocks, t, n), tops.numpy().reshape(blocks, t, n),
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
    """First-level blocks, [blocks, T, *S], to the second level's masked words and top bits, uint8 [T, *S]."""
    words, top = torch.empty_like(next_masks), torch.empty_like(next_masks)
    if opened.device.type == "meta":
        return words, top
    blocks, size = len(opened), next_masks.numel()
    _fold_blocks(
        array(opened, blocks, size), array(masks, blocks, size), _dealt(dealt, blocks, size),
        array(tops, blocks, size), first, spec.width, spec.lt, spec.eq, array(next_masks, size),
        words.numpy().reshape(size), top.numpy().reshape(size),
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
