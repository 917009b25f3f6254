"""The two groups: laws, reduction, and the wire format."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpcinfer.ring.domain import BIT, Z64, Ring

rings = st.builds(Ring, st.integers(1, 64), st.booleans())


def signed(v: int, width: int) -> int:
    """The container's reading of an unsigned word; uint8 has no sign."""
    return v - (1 << width) if width > 8 and v >= 1 << (width - 1) else v


def element(ring: Ring, v: int) -> torch.Tensor:
    return torch.tensor([signed(v, ring.width)], dtype=ring.dtype)


def value(ring: Ring, x: torch.Tensor) -> int:
    return int(x) % (1 << ring.width)


@st.composite
def ring_and_values(draw: st.DrawFn) -> tuple[Ring, list[int]]:
    ring = draw(rings)
    return ring, draw(st.lists(st.integers(0, (1 << ring.bits) - 1), min_size=3, max_size=3))


@given(ring_and_values())
def test_group_laws(case: tuple[Ring, list[int]]) -> None:
    ring, numbers = case
    a, b, c = (element(ring, v) for v in numbers)
    modulus = 1 << ring.bits
    expected = numbers[0] ^ numbers[1] if ring.xor else (numbers[0] + numbers[1]) % modulus
    assert value(ring, ring.add(a, b)) == expected
    assert torch.equal(ring.add(a, b), ring.add(b, a))
    assert torch.equal(ring.add(ring.add(a, b), c), ring.add(a, ring.add(b, c)))
    assert torch.equal(ring.sub(ring.add(a, b), b), a)
    assert value(ring, ring.sub(a, a)) == 0


@given(rings, st.integers(0, 2**64 - 1))
def test_reduce_keeps_the_low_bits(ring: Ring, v: int) -> None:
    x = element(ring, v % (1 << ring.width))
    assert value(ring, ring.reduce(x)) == v % (1 << ring.bits)


@given(rings, st.lists(st.integers(0, 2**64 - 1), max_size=20))
def test_pack_and_unpack(ring: Ring, numbers: list[int]) -> None:
    numbers = [v % (1 << ring.bits) for v in numbers]
    x = torch.tensor([signed(v, ring.width) for v in numbers], dtype=ring.dtype)
    data = bytes(ring.pack(x))
    assert len(data) == ring.packed_bytes(len(numbers)) == (len(numbers) * ring.bits + 7) // 8
    assert int.from_bytes(data, "little") == sum(v << (i * ring.bits) for i, v in enumerate(numbers))
    assert torch.equal(ring.unpack(data, (len(numbers),)), x)


@given(rings, st.lists(st.integers(0, 2**64 - 1), max_size=12), st.integers(0, 2**64 - 1))
def test_what_others_packed_is_added_as_it_comes(ring: Ring, numbers: list[int], first: int) -> None:
    words = [signed(first * k % (1 << ring.bits), ring.width) for k in range(len(numbers))]
    own = torch.tensor(words, dtype=ring.dtype)
    theirs = torch.tensor([signed(v % (1 << ring.bits), ring.width) for v in numbers], dtype=ring.dtype)
    odd = memoryview(b"\0" + bytes(ring.pack(theirs)))[1:]  # where no word begins
    assert torch.equal(ring.add_packed(own, odd), ring.add(own, theirs))


@pytest.mark.parametrize("ring", [Z64, BIT, Ring(8), Ring(16), Ring(32), Ring(48), Ring(16, xor=True)])
def test_shapes_of_what_is_added(ring: Ring) -> None:
    x = ring.reduce(torch.arange(24, dtype=torch.int64).to(ring.dtype)).reshape(2, 3, 4)
    for own in (x.transpose(0, 2), x[:, ::2], x[0, 0, 1], x[:0]):
        theirs = ring.add(own, own)
        found = ring.add_packed(own, ring.pack(theirs))
        assert found.shape == own.shape and torch.equal(found, ring.add(own, theirs))


@pytest.mark.parametrize("ring", [Z64, BIT, Ring(48), Ring(7, xor=True), Ring(15, xor=True)])
def test_shapes_order_and_length(ring: Ring) -> None:
    x = ring.reduce(torch.arange(24, dtype=torch.int64).to(ring.dtype)).reshape(2, 3, 4)
    data = ring.pack(x.transpose(0, 2))
    assert torch.equal(ring.unpack(data, (4, 3, 2)), x.transpose(0, 2))
    scalar = x[0, 0, 1]
    assert torch.equal(ring.unpack(ring.pack(scalar), ()), scalar)
    assert ring.unpack(ring.pack(x[:0]), (0, 3, 4)).shape == (0, 3, 4)
    for wrong in (bytes(data)[:-1], bytes(data) + b"\0"):
        with pytest.raises(ValueError, match="were expected"):
            ring.unpack(wrong, (4, 3, 2))


def test_a_packed_word_is_little_endian() -> None:
    assert bytes(Z64.pack(torch.tensor([1, -2]))) == (1).to_bytes(8, "little") + (2**64 - 2).to_bytes(8, "little")


@pytest.mark.parametrize("bits", [0, 65, -1])
def test_other_widths_do_not_exist(bits: int) -> None:
    with pytest.raises(ValueError, match="1 to 64"):
        Ring(bits)


def test_containers() -> None:
    assert [Ring(b, xor=True).dtype for b in (1, 8, 9, 16, 17, 32, 33, 64)] == [
        torch.uint8, torch.uint8, torch.int16, torch.int16, torch.int32, torch.int32, torch.int64, torch.int64,
    ]  # fmt: skip
    assert Ring(3).dtype == torch.int64
