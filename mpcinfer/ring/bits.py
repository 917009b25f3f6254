"""Bit packing: k-bit values without gaps, and the parity of a word. Kernels are compiled once and cached on disk."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit
from numba.extending import intrinsic

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


_MANY = 1 << 12  # bytes: of fewer, calls would take longer than what they save
_WIDER = [("uint16", 8), ("uint32", 16), ("uint64", 32)]


@njit([f"void({t}[::1], {t}, {t}, {t}, {t}[::1])" for t, _ in _WIDER], nogil=True, cache=True)
def _join(pairs: Any, half: Any, k: Any, mask: Any, out: Any) -> None:
    """Two values of k bits, each in half a word, to one of 2k bits."""
    for i in range(pairs.size):
        out[i] = (pairs[i] & mask) | (((pairs[i] >> half) & mask) << k)


@njit([f"void({t}[::1], {t}, {t}, {t})" for t, _ in _WIDER], nogil=True, cache=True)
def _split(words: Any, half: Any, k: Any, mask: Any) -> None:
    """The inverse of `_join`, in place."""
    for i in range(words.size):
        words[i] = (words[i] & mask) | (((words[i] >> k) & mask) << half)


@intrinsic
def _ones(_: Any, x: Any) -> Any:
    """How many bits of a word are set: the processor's own instruction, where it has one."""

    def code(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return x(x), code


@njit(["uint8(uint32)", "uint8(uint64)"], nogil=True, cache=True, inline="always")
def parity(x: Any) -> Any:
    """Whether an odd number of a word's bits are set; of kernels."""
    return np.uint8(np.uint8(_ones(x)) & np.uint8(1))  # type: ignore[call-arg]  # the first one is its typing context


_EACH = ("uint8", "uint16", "uint32", "uint64")


@njit([f"void({t}[:, ::1], int64, uint8[:, ::1])" for t in _EACH], nogil=True, cache=True)
def _pack_rows(values: Any, k: int, out: Any) -> None:
    for i in range(values.shape[0]):
        acc, fill, at = np.uint64(0), 0, 0
        for j in range(values.shape[1]):
            rest, left = np.uint64(values[i, j]), k
            while left > 0:
                take = min(left, 32)
                acc |= (rest & ((np.uint64(1) << np.uint64(take)) - np.uint64(1))) << np.uint64(fill)
                rest >>= np.uint64(take)
                left -= take
                fill += take
                while fill >= 8:
                    out[i, at] = np.uint8(acc & np.uint64(255))
                    acc >>= np.uint64(8)
                    fill -= 8
                    at += 1
        if fill > 0:
            out[i, at] = np.uint8(acc)


@njit([f"void(uint8[:, ::1], int64, {t}[:, ::1])" for t in _EACH], nogil=True, cache=True)
def _unpack_rows(data: Any, k: int, out: Any) -> None:
    for i in range(out.shape[0]):
        acc, fill, at = np.uint64(0), 0, 0
        for j in range(out.shape[1]):
            value, done = np.uint64(0), 0
            while done < k:
                take = min(k - done, 32)
                while fill < take:
                    acc |= np.uint64(data[i, at]) << np.uint64(fill)
                    fill += 8
                    at += 1
                value |= (acc & ((np.uint64(1) << np.uint64(take)) - np.uint64(1))) << np.uint64(done)
                acc >>= np.uint64(take)
                fill -= take
                done += take
            out[i, j] = value


def unsigned(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same memory as unsigned integers of the same width."""
    return array.view(_UNSIGNED[array.dtype.itemsize])


def pack(values: npt.NDArray[Any], k: int) -> npt.NDArray[np.uint8]:
    """`values` (1-D integers; the low k bits count) as a little-endian bit string of ceil(size * k / 8) bytes."""
    if k == 1:
        return np.packbits((values & 1).astype(np.uint8, copy=False), bitorder="little")
    length, values = (values.size * k + 7) // 8, unsigned(values)
    if length >= _MANY and values.ctypes.data % 8:  # as slices may be
        values = values.copy()
    words = np.empty((length + 3) // 4, np.uint32)
    for wider, half in _WIDER:  # two values become one, by kernels that fill vectors; the last one takes each by itself
        if values.itemsize * 8 == half and values.size % 2 == 0 and length >= _MANY:
            pairs = values.view(wider)
            numbers = np.array([half, k, (1 << k) - 1], wider)
            values, k = np.empty_like(pairs), 2 * k
            _join(*[pairs, *numbers, values])
    _pack(values, k, words)
    return words.view(np.uint8)[:length]


def unpack(data: memoryview | bytes, k: int, out: npt.NDArray[Any]) -> None:
    """Fill `out` (1-D integers) from the bit string that `pack` made of as many values."""
    raw = np.frombuffer(data, np.uint8)
    if k == 1:
        out[:] = np.unpackbits(raw, count=out.size, bitorder="little")
        return
    words = np.zeros((raw.size + 3) // 4, np.uint32)  # aligned, writable, whole words: what the kernel takes
    words.view(np.uint8)[: raw.size] = raw
    into, steps = unsigned(out), list[Any]()
    for wider, half in _WIDER:  # as `pack`
        if raw.size >= _MANY and into.itemsize * 8 == half and into.size % 2 == 0 and not into.ctypes.data % 8:
            into = into.view(wider)
            steps.append((into, *np.array([half, k, (1 << k) - 1], wider)))
            k *= 2
    _unpack(words, k, into)
    for step in reversed(steps):
        _split(*step)


def pack_rows(values: npt.NDArray[Any], k: int) -> npt.NDArray[np.uint8]:
    """What `pack` makes of each row of `values` [m, n]: [m, ceil(n k / 8)]."""
    if k == 1:
        return np.packbits((values & 1).astype(np.uint8, copy=False), axis=1, bitorder="little")
    out = np.empty((values.shape[0], (values.shape[1] * k + 7) // 8), np.uint8)
    _pack_rows(unsigned(values), k, out)
    return out


def unpack_rows(data: memoryview | bytes, k: int, out: npt.NDArray[Any]) -> None:
    """Fill `out` [m, n] from the rows that `pack_rows` made."""
    raw = np.frombuffer(data, np.uint8).reshape(out.shape[0], -1)
    if k == 1:
        out[:] = np.unpackbits(raw, axis=1, count=out.shape[1], bitorder="little")
        return
    _unpack_rows(raw.copy(), k, unsigned(out))  # a copy: writable, as the kernel's signature has it
