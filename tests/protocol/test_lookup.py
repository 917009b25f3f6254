"""A secret index as a one-hot vector, and rows of tables: exact; whatever is shared, nobody learns more by it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from mpcinfer.errors import InputError
from mpcinfer.protocol import lookup
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.correlation import from_json, to_json
from mpcinfer.protocol.linear import mask_weight
from mpcinfer.protocol.local import LocalWorld
from mpcinfer.protocol.lookup import MAX_BITS, OneHot, block_size, index_bits, one_hot, row_of
from mpcinfer.protocol.types import Shared, Weight
from tests.openings import View, assert_differences, assert_uniform, faulty_masks, observe, seed, shares_of
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


# --- rows ----------------------------------------------------------------------------------------------------------

TABLE = torch.randint(-(2**63), 2**63 - 1, (24, 2), generator=torch.Generator().manual_seed(2))
OPENED = [("OneHot.r", 5), ("FixedProduct.a", 64), ("Triple.a", 64), ("Triple.b", 64)]


def deployed(world: LocalWorld) -> list[dict[str, Weight]]:
    shares = shares_of(TABLE, world.parties, seed("table"))
    table = world.run(lambda ctx, s: mask_weight(ctx, "table", Shared(s.share, 16)), shares)
    return [{"table": each} for each in table]


async def rows(ctx: Context, index: Shared) -> Shared:
    return await row_of(ctx, index, ctx.weights["table"])


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round is worth nothing, so that small tables are looked up twice."""
    monkeypatch.setattr(lookup, "_ROUND_BYTES", 0)


@pytest.mark.parametrize("shape", [(), (0,), (24,), (1, 3)])
def test_rows_by_blocks(
    run_in: Callable[..., Ran], world: Callable[..., LocalWorld], parties: int, blocks: None, shape: tuple[int, ...]
) -> None:
    there = world(parties)
    index = torch.arange(24)[-math.prod(shape) or 24 :].reshape(shape) if 0 not in shape else torch.zeros(shape).long()
    ran = run_in(there, rows, index, weights=deployed(there))
    assert torch.equal(ran.value, TABLE[index]) and ran.frac_bits == 16
    assert block_size(24, 2, index.numel()) == 3
    count = index.numel()
    ran.costs(3, -(-count * 5 // 8) + 8 * count * (8 + 3 * 2 + 3), 8 * count * (32 + 3 * 2 + 2))
    assert ran.opened() == OPENED


def test_rows_of_small_tables(run_in: Callable[..., Ran], world: Callable[..., LocalWorld], parties: int) -> None:
    there, index = world(parties), torch.arange(24)
    ran = run_in(there, rows, index, weights=deployed(there))
    assert torch.equal(ran.value, TABLE[index])
    ran.costs(2, 24 * 5 // 8 + 24 * 24 * 8, 24 * 8 * (32 + 2))


def test_an_index_beyond_the_table_yields_another_row_or_zeros(
    run_in: Callable[..., Ran], world: Callable[..., LocalWorld], parties: int, blocks: None
) -> None:
    there, index = world(parties), torch.tensor([24, 31, 32, -1, 2**40 + 3])
    padded = torch.cat([TABLE, torch.zeros(8, 2, dtype=torch.int64)])
    assert torch.equal(run_in(there, rows, index, weights=deployed(there)).value, padded[index & 31])


def test_sizes_of_blocks() -> None:
    """The cheapest divisors; none where there is none, or too little to save."""
    assert block_size(49_152, 576, 1) == 8 and block_size(30_522, 384, 32) == 6 and block_size(50_257, 768, 1) == 29
    assert block_size(50_021, 64, 1000) == block_size(300, 4, 16) == block_size(2, 512, 1) == block_size(1, 1, 1) == 1
    assert block_size(300, 4, 60) == 6  # 8 x 60 x (300 - 50 - 24 - 6)


def seen(index: torch.Tensor, *key: object) -> View:
    world = LocalWorld(2, seed("rows", *key))
    return observe(rows, index, key=seed("rows", *key), world=world, weights=deployed(world))


def test_openings_of_rows(monkeypatch: pytest.MonkeyPatch, blocks: None) -> None:
    x, y = torch.arange(1000) % 24, torch.full((1000,), 5)

    def places(index: torch.Tensor) -> list[torch.Tensor]:
        block = torch.nn.functional.one_hot(index // 3, 8)
        place = torch.nn.functional.one_hot(index % 3, 3).unsqueeze(-2)
        return [index, block, place, TABLE.reshape(8, 3, 2)[index // 3]]

    def uniform() -> None:
        assert_uniform([seen(x, i) for i in range(3)], symbols=1 << 12)

    assert_differences(seen(x), seen(y), [a - b for a, b in zip(places(x), places(y), strict=True)])
    uniform()
    faulty_masks(monkeypatch, lambda mask, ring: mask >> 1 & 2**62 - 1 if ring.bits == 64 else mask)
    with pytest.raises(AssertionError, match="not uniform"):
        uniform()
