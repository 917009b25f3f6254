"""A secret index as a one-hot vector: exact; whatever is shared as an index, nobody learns more by it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mpcinfer.errors import InputError
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.correlation import from_json, to_json
from mpcinfer.protocol.lookup import MAX_BITS, OneHot, index_bits, one_hot
from mpcinfer.protocol.types import Shared
from tests.openings import assert_differences, assert_uniform, faulty_masks, observe, seed
from tests.protocol.conftest import Ran


def among(count: int) -> Callable[[Context, Shared], object]:
    return lambda ctx, index: one_hot(ctx, index, count)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 64, 100])
def test_every_index(run: Callable[..., Ran], count: int) -> None:
    ran = run(among(count), torch.arange(count))
    assert torch.equal(ran.value, torch.eye(count, dtype=torch.int64)) and ran.frac_bits == 0


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_any_shape(run: Callable[..., Ran], shape: tuple[int, ...]) -> None:
    index = torch.randint(0, 7, shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(run(among(7), index).value, torch.nn.functional.one_hot(index, 7))


def test_other_indices_are_taken_modulo_a_power_of_two(run: Callable[..., Ran]) -> None:
    index = torch.tensor([5, 6, 7, 8, 9, -1, -4, 2**62 + 3, -(2**63)])
    expected = torch.nn.functional.one_hot(index & 7, 8)[:, :5]
    assert torch.equal(run(among(5), index).value, expected)


def test_costs(run: Callable[..., Ran]) -> None:
    ran = run(among(100), torch.zeros(16, dtype=torch.int64))
    ran.costs(1, 16 * 7 // 8, 16 * 8 * 128)
    assert ran.opened() == [("OneHot.r", 7)]
    assert [index_bits(count) for count in (1, 2, 3, 256, 257, 30_522)] == [1, 1, 2, 8, 9, 15]


@pytest.mark.parametrize("bits", [-1, 0, MAX_BITS + 1])
def test_impossible_plans_are_refused(bits: int) -> None:
    with pytest.raises(InputError, match="impossible"):
        from_json(to_json(OneHot((2,), 3)) | {"bits": bits})


def test_openings(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.arange(3300) % 13, torch.full((3300,), 3)

    def uniform() -> None:
        assert_uniform([observe(among(13), x, key=seed(i)) for i in range(5)], symbols=1 << 14)

    assert_differences(observe(among(13), x), observe(among(13), y), [x - y])
    uniform()
    # a mask below the number of rows instead of a power of two: how an index leaks
    faulty_masks(monkeypatch, lambda x, ring: x % 13)
    with pytest.raises(AssertionError, match="not uniform"):
        uniform()


def test_an_opening_of_something_else_is_seen() -> None:
    async def fault(ctx: Context, index: Shared) -> None:
        await one_hot(ctx, index.times(3), 13)

    x, y = torch.arange(13), torch.zeros(13, dtype=torch.int64)
    with pytest.raises(AssertionError, match="not value"):
        assert_differences(observe(fault, x), observe(fault, y), [x - y])
