"""Splitting and combining."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpcinfer.ring import prg, sharing
from mpcinfer.ring.domain import BIT, Z64, Ring

N = [2, 3, 5]


def shares_of(x: torch.Tensor, ring: Ring, n: int) -> list[torch.Tensor]:
    seeds, last = sharing.split(x, ring, n)
    assert len(seeds) == n - 1 and len(set(seeds)) == n - 1
    return [*(prg.expand(seed, tuple(x.shape), ring) for seed in seeds), last]


@given(st.sampled_from(N), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=8))
def test_combine_undoes_split(n: int, numbers: list[int]) -> None:
    x = torch.tensor(numbers, dtype=torch.int64)
    assert torch.equal(sharing.combine(shares_of(x, Z64, n), Z64), x)


@pytest.mark.parametrize("n", N)
@pytest.mark.parametrize("ring", [Ring(36), Ring(7), BIT, Ring(7, xor=True), Ring(15, xor=True), Ring(64, xor=True)])
def test_every_ring(ring: Ring, n: int) -> None:
    x = prg.expand(bytes(32), (4, 5), ring)
    parts = shares_of(x, ring, n)
    assert all(p.dtype == ring.dtype and torch.equal(ring.reduce(p), p) for p in parts)
    assert torch.equal(sharing.combine(parts, ring), x)


def test_values_outside_a_ring_are_reduced() -> None:
    x = torch.tensor([-1, (1 << 36) + 16])
    assert sharing.combine(shares_of(x, Ring(36), 3), Ring(36)).tolist() == [2**36 - 1, 16]


@pytest.mark.parametrize("n", N)
def test_sharing_is_fresh_and_its_last_share_uniform(n: int) -> None:
    x = torch.zeros(4096, dtype=torch.int64)
    _, first = sharing.split(x, Z64, n)
    _, second = sharing.split(x, Z64, n)
    assert not torch.equal(first, second)
    for bit in (0, 31, 63):  # a fair coin's count, within 6 sigma
        assert abs(int(((first >> bit) & 1).sum()) - 2048) < 6 * 32


@pytest.mark.parametrize("n", [1, 0, -1])
def test_one_party_cannot_share(n: int) -> None:
    with pytest.raises(ValueError, match="two parties"):
        sharing.split(torch.zeros(1, dtype=torch.int64), Z64, n)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, dtype=torch.int64)
    assert torch.equal(sharing.combine(shares_of(x, Z64, 2), Z64), x)
