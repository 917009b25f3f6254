"""Bit packing: any width, any container, no gaps, against a big-integer reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpcinfer.ring import bits

CONTAINERS = {np.uint8: 8, np.int16: 16, np.int32: 32, np.int64: 64}


def reference(values: list[int], k: int) -> bytes:
    """The same bit string, by Python's integers."""
    total = sum((v & ((1 << k) - 1)) << (i * k) for i, v in enumerate(values))
    return total.to_bytes((len(values) * k + 7) // 8, "little")


@st.composite
def words(draw: st.DrawFn) -> tuple[list[int], int, type]:
    container = draw(st.sampled_from(list(CONTAINERS)))
    k = draw(st.integers(1, CONTAINERS[container]))
    return draw(st.lists(st.integers(0, (1 << k) - 1), max_size=40)), k, container


def as_container(values: list[int], container: type) -> np.ndarray:
    unsigned = np.dtype(f"u{np.dtype(container).itemsize}")
    return np.array(values, unsigned).view(container)


@given(words())
def test_pack_is_the_little_endian_bit_string_and_unpack_its_inverse(case: tuple[list[int], int, type]) -> None:
    values, k, container = case
    array = as_container(values, container)
    data = bits.pack(array, k)
    assert data.tobytes() == reference(values, k)
    out = np.zeros_like(array)
    bits.unpack(data.tobytes(), k, out)
    assert (out == array).all()


@pytest.mark.parametrize("k", [1, 7, 15, 22, 36, 48, 63])
def test_bits_above_k_do_not_count(k: int) -> None:
    container = next(c for c, width in CONTAINERS.items() if k <= width)
    values = [(1 << k) - 1, 0, 1 << (k - 1)]
    dirty = as_container(values, container).copy()
    if k < CONTAINERS[container]:
        dirty |= as_container([1 << k], container)
    assert bits.pack(dirty, k).tobytes() == reference(values, k)


@pytest.mark.parametrize("k", range(1, 9))
def test_no_elements_are_no_bytes(k: int) -> None:
    empty = np.empty(0, np.uint8)
    assert bits.pack(empty, k).size == 0
    bits.unpack(b"", k, empty)


@pytest.mark.parametrize("k", [1, 7, 30])
def test_unpack_takes_read_only_and_writable_buffers(k: int) -> None:
    values = as_container([1, 0, 1, 1], np.int32)
    data = bits.pack(values, k).tobytes()
    for buffer in (data, bytearray(data), memoryview(data)):
        out = np.zeros(4, np.int32)
        bits.unpack(buffer, k, out)
        assert (out == values).all()


def test_unsigned_is_a_view() -> None:
    array = np.array([-1, 2], np.int64)
    view = bits.unsigned(array)
    assert view.dtype == np.uint64 and view[0] == 2**64 - 1
    view[1] = 5
    assert array[1] == 5


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("count", [bits._MANY * 8 + extra for extra in (0, 1, 2, 4, 6)])
def test_many_are_packed_as_few_are(container: type, count: int) -> None:
    generator = np.random.default_rng(count)
    for k in range(1, CONTAINERS[container] + 1):
        dirty = as_container(generator.integers(0, 1 << 63, count).tolist(), np.int64).astype(container)
        values = dirty.astype(np.uint64) & np.uint64((1 << k) - 1)
        plain = np.unpackbits(values.view(np.uint8).reshape(count, 8), axis=1, bitorder="little")[:, :k]
        data = bits.pack(dirty, k)
        assert data.tobytes() == np.packbits(plain.reshape(-1), bitorder="little").tobytes()
        out = np.zeros_like(dirty)
        bits.unpack(data.tobytes(), k, out)
        assert (bits.unsigned(out) == values).all()


def test_slices_are_packed_wherever_they_begin() -> None:
    base = np.arange(bits._MANY * 8 + 8).astype(np.uint8) & 127
    for first in (1, 2, 4):
        part = base[first : first + bits._MANY * 8]
        data = bits.pack(part, 7).tobytes()
        assert data == bits.pack(part.copy(), 7).tobytes()
        into = np.zeros(base.size, np.uint8)[first : first + part.size]
        bits.unpack(data, 7, into)
        assert (into == part).all()
