"""A secret index becomes the one-hot vector that it stands for, at the cost of its bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mpcinfer.protocol.context import Context
from mpcinfer.protocol.lookup import OneHot, index_bits, one_hot
from mpcinfer.protocol.types import Shared

Run = Callable[..., Any]


def of(count: int) -> Callable[[Context, Shared], Any]:
    return lambda ctx, index: one_hot(ctx, index, count)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 100])
def test_every_index(run: Run, count: int) -> None:
    index = torch.arange(count).flip(0)
    ran = run(of(count), index)
    assert torch.equal(ran.value, torch.eye(count, dtype=torch.int64).flip(0)) and ran.frac_bits == 0


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0), (2, 3, 4)])
def test_of_any_shape(run: Run, shape: tuple[int, ...]) -> None:
    index = torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(of(11), index).value, torch.nn.functional.one_hot(index, 11))


def test_an_index_out_of_range_selects_nothing_or_one_thing(run: Run) -> None:
    """Whatever a client shares, what comes out is a vector with at most a single one."""
    index = torch.tensor([11, 15, -1, 16, 2**40 + 3, -(2**63)])
    want = torch.zeros(6, 11, dtype=torch.int64)
    want[3, 0] = want[4, 3] = want[5, 0] = 1
    assert torch.equal(run(of(11), index).value, want)


@pytest.mark.parametrize(("count", "bits"), [(1, 1), (2, 1), (3, 2), (256, 8), (257, 9), (30_522, 15)])
def test_bits(count: int, bits: int) -> None:
    assert index_bits(count) == bits


@pytest.mark.parametrize(("count", "bits"), [(2, 1), (9, 4), (256, 8)])
def test_costs_and_openings(run: Run, count: int, bits: int) -> None:
    ran = run(of(count), torch.zeros(80, dtype=torch.int64))
    ran.costs(rounds=1, sent=80 * bits // 8, dealt=80 * 8 << bits)
    assert ran.opened() == [("OneHot.r", bits)]


@pytest.mark.parametrize("bits", [0, 25, 64])
def test_impossible_sizes(bits: int) -> None:
    with pytest.raises(ValueError, match="1 to 24 bits"):
        OneHot((3,), bits)
