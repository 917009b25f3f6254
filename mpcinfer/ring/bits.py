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


@njit(
    [f"void({t}[::1], int64, uint8[::1])" for t in ("uint8", "uint16", "uint32", "uint64")], nogil=True, cache=True
)
def _pack(values: Any, k: int, out: Any) -> None:
    acc = np.uint64(0)
    fill = 0
    at = 0
    for v in values:
        left = k
        word = np.uint64(v)
        while left > 0:
            take = min(left, 32)
            acc |= (word & np.uint64((1 << take) - 1)) << np.uint64(fill)
            word >>= np.uint64(take)
            fill += take
            left -= take
            while fill >= 8:
                out[at] = acc & np.uint64(255)
                acc >>= np.uint64(8)
                fill -= 8
                at += 1
    if fill > 0:
        out[at] = acc & np.uint64(255)


@njit(
    [f"void(uint8[::1], int64, {t}[::1])" for t in ("uint8", "uint16", "uint32", "uint64")], nogil=True, cache=True
)
def _unpack(data: Any, k: int, out: Any) -> None:
    acc = np.uint64(0)
    fill = 0
    at = 0
    for i in range(out.size):
        word = np.uint64(0)
        have = 0
        while have < k:
            take = min(k - have, 32)
            while fill < take:
                acc |= np.uint64(data[at]) << np.uint64(fill)
                fill += 8
                at += 1
            word |= (acc & np.uint64((1 << take) - 1)) << np.uint64(have)
            acc >>= np.uint64(take)
            fill -= take
            have += take
        out[i] = word


def unsigned(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same memory as unsigned integers of the same width."""
    return array.view(_UNSIGNED[array.dtype.itemsize])


def pack(values: npt.NDArray[Any], k: int) -> npt.NDArray[np.uint8]:
    """`values` (1-D integers; the low k bits count) as a little-endian bit string of ceil(size * k / 8) bytes."""
    out = np.empty((values.size * k + 7) // 8, np.uint8)
    if k == 1:
        return np.packbits(values.view(np.uint8)[:: values.itemsize] & 1, bitorder="little")
    _pack(unsigned(values), k, out)
    return out


def unpack(data: memoryview | bytes, k: int, out: npt.NDArray[Any]) -> None:
    """Fill `out` (1-D integers) from the bit string that `pack` made of as many values."""
    raw = np.frombuffer(data, np.uint8)
    if k == 1:
        out[:] = np.unpackbits(raw, count=out.size, bitorder="little")
        return
    # numba takes no read-only arrays for this signature, and incoming messages are
    _unpack(raw if raw.flags.writeable else raw.copy(), k, unsigned(out))
