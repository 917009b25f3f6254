"""Comparing a public number with a dealt one in one step: fewer, larger digits than `ring.digits`, and one AND block.

A number of 63 bits is 7 digits of 9 bits. Their tables lt(v) = [v < r_j], v = 0..510 (lt(511) = 0), are 512 bits each;
as there, the public digits look up shares of (lt, eq), most significant first, lt_0 is linear, and of
    lt = lt_0 + eq_0 lt_1 + ... + eq_0 ... eq_5 lt_6
the other 12 bits are opened in one word under a mask word (bit 0: eq_0, bits 2t - 1 and 2t: lt_t and eq_t), whose 177
products that the sum needs are dealt, in 3 words. A round less, and about as many dealt bits again.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit

from mpcinfer.ring.bits import parity
from mpcinfer.ring.domain import array

DIGITS, DIGIT_BITS = 7, 9
TABLE_WORDS = (1 << DIGIT_BITS) // 64
WIDTH = 2 * DIGITS - 2  # of the opened word
PRODUCT_WORDS, PRODUCT_BITS = 3, 59
_TERMS = [(*range(0, 2 * t, 2), 2 * t - 1) for t in range(1, DIGITS)]
_MONOMIALS = sorted({s for t in _TERMS for k in range(2, len(t) + 1) for s in combinations(sorted(t), k)})
_CONST = WIDTH  # the bit of the mask word that stands for 1, held by the first party

Words = npt.NDArray[np.uint64]


def _holding(bits: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Which of all words have all these bits."""
    wanted = sum(1 << b for b in bits)
    held: npt.NDArray[np.bool_] = (np.arange(1 << WIDTH) & wanted) == wanted
    return held


@cache
def _places() -> dict[tuple[int, ...], tuple[int, int]]:
    """Word and bit of 1, of the mask's bits and of their products."""
    single = {(): (0, _CONST)} | {(b,): (0, b) for b in range(WIDTH)}
    return single | {s: (1 + i // PRODUCT_BITS, i % PRODUCT_BITS) for i, s in enumerate(_MONOMIALS)}


@cache
def folding() -> Words:
    """By opened word, which bits of the mask and which products add up to the sum without lt_0."""
    out = np.zeros((1 << WIDTH, 1 + PRODUCT_WORDS), np.uint64)
    for term in _TERMS:
        for size in range(len(term) + 1):
            for chosen in combinations(sorted(term), size):
                word, bit = _places()[chosen]
                others = _holding(tuple(b for b in term if b not in chosen))
                out[:, word] ^= others.astype(np.uint64) << np.uint64(bit)
    return out


@cache
def _products() -> torch.Tensor:
    """By mask word, its products: int64 [2^12, 3]."""
    out = np.zeros((1 << WIDTH, PRODUCT_WORDS), np.int64)
    for i, s in enumerate(_MONOMIALS):
        out[:, i // PRODUCT_BITS] |= _holding(s).astype(np.int64) << (i % PRODUCT_BITS)
    return torch.from_numpy(out)


def products(masks: torch.Tensor) -> torch.Tensor:
    """The dealt products of mask words [*S]: int64 [*S, 3]."""
    return _products()[masks.to(torch.int64)]


@njit("void(uint64[::1], uint64[:, :, ::1])", nogil=True, cache=True)
def _tables(r: Any, out: Any) -> None:
    one, all_ones = np.uint64(1), np.uint64(0xFFFFFFFFFFFFFFFF)
    for i in range(r.size):
        rest = r[i]
        for j in range(out.shape[1]):
            digit = rest & np.uint64((1 << DIGIT_BITS) - 1)
            for w in range(out.shape[2]):
                start = np.uint64(64 * w)
                if digit >= start + np.uint64(64):
                    out[i, j, w] = all_ones
                elif digit > start:
                    out[i, j, w] = (one << (digit - start)) - one
                else:
                    out[i, j, w] = np.uint64(0)
            rest >>= np.uint64(DIGIT_BITS)


def tables(r: torch.Tensor) -> torch.Tensor:
    """The lt tables of the digits of r's low 63 bits, least significant first: int64 [*S] -> int64 [*S, 7, 8]."""
    out = torch.empty((*r.shape, DIGITS, TABLE_WORDS), dtype=torch.int64)
    _tables(array(r, r.numel()).view(np.uint64), array(out, r.numel(), DIGITS, TABLE_WORDS).view(np.uint64))
    return out


@njit(
    "void(uint64[::1], uint64[::1], uint64[:, :, ::1], boolean, int16[:, ::1], int16[:, ::1], uint8[:, ::1])",
    nogil=True,
    cache=True,
)
def _leaves(c: Any, thresholds: Any, lt: Any, first: Any, masks: Any, words: Any, tops: Any) -> None:
    one = np.uint64(1)
    for t in range(thresholds.size):
        for i in range(c.size):
            u = c[i] - thresholds[t]
            word = np.uint64(masks[t, i])
            for leaf in range(DIGITS):
                j = DIGITS - 1 - leaf
                v = (u >> np.uint64(DIGIT_BITS * j)) & np.uint64((1 << DIGIT_BITS) - 1)
                less = (lt[i, j, v >> np.uint64(6)] >> (v & np.uint64(63))) & one
                below = np.uint64(first)  # lt(-1) = 1
                if v > 0:
                    below = (lt[i, j, (v - one) >> np.uint64(6)] >> ((v - one) & np.uint64(63))) & one
                if leaf == 0:
                    tops[t, i] = np.uint8(less)
                else:
                    word ^= less << np.uint64(2 * leaf - 1)
                if leaf + 1 < DIGITS:
                    word ^= (below ^ less) << np.uint64(2 * leaf)
            words[t, i] = np.int16(word)


@njit(
    "void(int16[:, ::1], int16[:, ::1], uint64[:, :, ::1], uint8[:, ::1], boolean, uint64[:, ::1], uint64[::1], "
    "uint64[::1], uint8[::1], uint8[:, ::1])",
    nogil=True,
    cache=True,
)
def _finish(
    opened: Any, masks: Any, dealt: Any, tops: Any, first: Any, fold: Any, c: Any, thresholds: Any, msb: Any, out: Any
) -> None:
    for t in range(opened.shape[0]):
        for i in range(opened.shape[1]):
            e = opened[t, i]
            share = np.uint64(masks[t, i])
            bit = msb[i] ^ tops[t, i]
            if first:
                share |= np.uint64(1 << _CONST)
                bit ^= np.uint8((c[i] - thresholds[t]) >> np.uint64(63))
            x = fold[e, 0] & share
            for w in range(dealt.shape[2]):
                x ^= fold[e, 1 + w] & dealt[t, i, w]
            out[t, i] = bit ^ parity(x)


def _public(thresholds: tuple[int, ...]) -> Words:
    return np.array([x % (1 << 64) for x in thresholds], np.uint64)


def leaves(
    c: torch.Tensor, thresholds: tuple[int, ...], lt: torch.Tensor, first: bool, masks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked words to open, int16 [T, *S], and the linear top bits, uint8 [T, *S].

    c: opened x + r, [*S]; lt: shares of r's tables, [*S, 7, 8]; masks: int16 [T, *S].
    """
    words, tops = torch.empty_like(masks), torch.empty_like(masks, dtype=torch.uint8)
    if c.device.type == "meta":
        return words, tops
    n, t = c.numel(), len(thresholds)
    _leaves(
        array(c, n).view(np.uint64), _public(thresholds), array(lt, n, DIGITS, TABLE_WORDS).view(np.uint64), first,
        array(masks, t, n), words.numpy().reshape(t, n), tops.numpy().reshape(t, n),
    )  # fmt: skip
    return words, tops


def finish(
    opened: torch.Tensor, masks: torch.Tensor, dealt: torch.Tensor, tops: torch.Tensor, first: bool, c: torch.Tensor,
    thresholds: tuple[int, ...], msb: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The fold, and the sign: shares of [x < t], uint8 [T, *S]."""
    out = torch.empty_like(tops)
    if opened.device.type == "meta":
        return out
    t, n = len(thresholds), c.numel()
    _finish(
        array(opened, t, n), array(masks, t, n), array(dealt, t, n, PRODUCT_WORDS).view(np.uint64), array(tops, t, n),
        first, folding(), array(c, n).view(np.uint64), _public(thresholds), array(msb, n),
        out.numpy().reshape(t, n),
    )  # fmt: skip
    return out
