"""Bit packing: k-bit values without gaps, and the parity of a word. Kernels are compiled once and cached on disk."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

if sys.byteorder != "little":  # the wire format and every view below assume it
    raise ImportError("mpcinfer needs a little-endian machine")

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@njit([f"void({t}[::1], int64, uint32[::1])" for t in ("uint8", "uint16", "uint32", "uint64")], nogil=True, cache=True)
def _pack(values: Any, k: int, out: Any) -> None:
    low, high = np.uint64(min(k, 32)), np.uint64(max(k - 32, 0))
    low_mask, high_mask = (np.uint64(1) << low) - np.uint64(1), (np.uint64(1) << high) - np.uint64(1)
    word = np.uint64(32)
    acc = np.uint64(0)
    fill = np.uint64(0)
    at = 0
    for value in values:
        acc |= (np.uint64(value) & low_mask) << fill
        fill += low
        if fill >= word:
            out[at] = np.uint32(acc)
            acc >>= word
            fill -= word
            at += 1
        if high > 0:
            acc |= ((np.uint64(value) >> word) & high_mask) << fill
            fill += high
            if fill >= word:
                out[at] = np.uint32(acc)
                acc >>= word
                fill -= word
                at += 1
    if fill > 0:
        out[at] = np.uint32(acc)


@njit([f"void(uint32[::1], int64, {t}[::1])" for t in ("uint8", "uint16", "uint32", "uint64")], nogil=True, cache=True)
def _unpack(data: Any, k: int, out: Any) -> None:
    low, high = np.uint64(min(k, 32)), np.uint64(max(k - 32, 0))
    low_mask, high_mask = (np.uint64(1) << low) - np.uint64(1), (np.uint64(1) << high) - np.uint64(1)
    word = np.uint64(32)
    acc = np.uint64(0)
    fill = np.uint64(0)
    at = 0
    for i in range(out.size):
        if fill < low:
            acc |= np.uint64(data[at]) << fill
            fill += word
            at += 1
        value = acc & low_mask
        acc >>= low
        fill -= low
        if high > 0:
            if fill < high:
                acc |= np.uint64(data[at]) << fill
                fill += word
                at += 1
            value |= (acc & high_mask) << word
            acc >>= high
            fill -= high
        out[i] = value


def unsigned(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same memory as unsigned integers of the same width."""
    return array.view(_UNSIGNED[array.dtype.itemsize])


def pack(values: npt.NDArray[Any], k: int) -> npt.NDArray[np.uint8]:
    """`values` (1-D integers; the low k bits count) as a little-endian bit string of ceil(size * k / 8) bytes."""
    if k == 1:
        return np.packbits((values & 1).astype(np.uint8, copy=False), bitorder="little")
    words = np.empty((values.size * k + 31) // 32, np.uint32)
    _pack(unsigned(values), k, words)
    return words.view(np.uint8)[: (values.size * k + 7) // 8]


def unpack(data: memoryview | bytes, k: int, out: npt.NDArray[Any]) -> None:
    """Fill `out` (1-D integers) from the bit string that `pack` made of as many values."""
    raw = np.frombuffer(data, np.uint8)
    if k == 1:
        out[:] = np.unpackbits(raw, count=out.size, bitorder="little")
        return
    words = np.zeros((raw.size + 3) // 4, np.uint32)  # aligned, writable, whole words: what the kernel takes
    words.view(np.uint8)[: raw.size] = raw
    _unpack(words, k, unsigned(out))
