"""Comparing numbers of few bits in one step: four digits of 5 bits and one AND block; and whether digits are equal.

As in `ring.digits`, with larger digits: the table lt(v) = [v < r_j], v = 0..30, is 31 bits (lt(31) = 0). Four digits,
of 20 bits, make the one block: a round less than two levels of smaller digits take, and fewer bits opened.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numba import njit

from mpcinfer.ring.digits import Block, block
from mpcinfer.ring.domain import array

DIGIT_BITS = 5
TABLE_BITS = 31
LEAVES = 4
BITS = DIGIT_BITS * LEAVES
# of a comparison: what is opened and dealt in its one step, folded by `digits.finish`
COMPARED = block(LEAVES, False)
_CONST = np.uint32(1 << 31)


@cache
def conjunction(count: int) -> Block:
    """Of so many bits, whether all are 1; all of them are opened. In place of `lt`, which `digits.finish` folds by."""
    subsets = [s for size in range(count + 1) for s in combinations(range(count), size)]
    products = [s for s in subsets if len(s) > 1]
    place = {(b,): b for b in range(count)} | {s: count + i for i, s in enumerate(products)}
    table, product_of = np.zeros(1 << count, np.uint32), np.zeros(1 << count, np.int32)
    for word in range(1 << count):
        for s in subsets:
            if all(word >> b & 1 for b in range(count) if b not in s):
                table[word] ^= np.uint32(1 << place[s]) if s else _CONST
        for i, s in enumerate(products):
            if all(word >> b & 1 for b in s):
                product_of[word] |= 1 << i
    return Block(count, len(products), table, np.zeros_like(table), product_of)


@njit("void(uint64[::1], uint32[:, ::1])", nogil=True, cache=True)
def _tables(r: Any, out: Any) -> None:
    for i in range(r.size):
        rest = r[i]
        for j in range(out.shape[1]):
            out[i, j] = np.uint32((np.uint64(1) << (rest & np.uint64(31))) - np.uint64(1))
            rest >>= np.uint64(5)


def tables(r: torch.Tensor, digits: int) -> torch.Tensor:
    """The lt tables of so many digits of r, least significant first: int64 [*S] -> int32 [*S, digits]."""
    out = torch.empty((*r.shape, digits), dtype=torch.int32)
    _tables(array(r, r.numel()).view(np.uint64), out.numpy().reshape(-1, digits).view(np.uint32))
    return out


@njit("void(uint64[::1], uint32[:, ::1], boolean, uint8[::1], uint8[::1], uint8[::1])", nogil=True, cache=True)
def _leaves(c: Any, lt: Any, first: Any, masks: Any, words: Any, tops: Any) -> None:
    for i in range(c.size):
        word = masks[i]
        for leaf in range(4):
            j = 3 - leaf
            v = (c[i] >> np.uint64(5 * j)) & np.uint64(31)
            # bit v + 1 of the extended table is lt(v); bit 0 is lt(-1) = 1, held by the first party
            table = (np.uint64(lt[i, j]) << np.uint64(1)) | np.uint64(first)
            below = (table >> v) & np.uint64(1)
            less = (table >> (v + np.uint64(1))) & np.uint64(1)
            if leaf < 3:
                word ^= np.uint8((below ^ less) << np.uint64(2 * leaf))
            if leaf == 0:
                tops[i] = np.uint8(less)
            else:
                word ^= np.uint8(less << np.uint64(2 * leaf - 1))
        words[i] = word


@njit("void(uint64[::1], uint32[:, ::1], boolean, uint8[::1], uint8[::1])", nogil=True, cache=True)
def _equal(c: Any, lt: Any, first: Any, masks: Any, words: Any) -> None:
    for i in range(c.size):
        word = masks[i]
        for j in range(lt.shape[1]):
            v = (c[i] >> np.uint64(5 * j)) & np.uint64(31)
            table = (np.uint64(lt[i, j]) << np.uint64(1)) | np.uint64(first)
            word ^= np.uint8((((table >> v) ^ (table >> (v + np.uint64(1)))) & np.uint64(1)) << np.uint64(j))
        words[i] = word


def leaves(c: torch.Tensor, lt: torch.Tensor, first: bool, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked words to open, and the linear top bits, for [c mod 2^20 < r mod 2^20]; both uint8 [*S].

    c: opened x + r, [*S]; lt: shares of the tables of r's lowest digits, int32 [*S, 4]; masks: uint8 [*S].
    """
    words, tops = torch.empty_like(masks), torch.empty_like(masks)
    if c.device.type != "meta":
        n = c.numel()
        _leaves(
            array(c, n).view(np.uint64), array(lt, n, LEAVES).view(np.uint32), first, array(masks, n),
            words.numpy().reshape(n), tops.numpy().reshape(n),
        )  # fmt: skip
    return words, tops


def equal(c: torch.Tensor, lt: torch.Tensor, first: bool, masks: torch.Tensor) -> torch.Tensor:
    """Masked words to open, uint8 [*S]: of each digit of r whether it is that of the public c, [*S].

    lt: shares of the tables of r's digits, int32 [*S, digits]; masks: uint8 [*S].
    """
    words = torch.empty_like(masks)
    if c.device.type != "meta":
        n = c.numel()
        _equal(
            array(c, n).view(np.uint64), array(lt, n, lt.shape[-1]).view(np.uint32), first, array(masks, n),
            words.numpy().reshape(n),
        )  # fmt: skip
    return words
