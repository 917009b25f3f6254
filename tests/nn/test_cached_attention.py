"""Attention over keys and values that were opened before: as plain attention, at a cost that the room alone decides."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch.nn import functional

from mpcinfer.errors import UnsupportedError
from mpcinfer.nn.attention import attention
from mpcinfer.protocol.cache import append
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.local import LocalWorld, Transcript
from mpcinfer.protocol.types import Cached, Public, Shared
from tests.models_local import grid
from tests.openings import seed

ERROR = 33 * 2.0**-16  # of a softmax
ONE = 1 << 16


def encoded(x: torch.Tensor) -> torch.Tensor:
    return torch.round(x * ONE).to(torch.int64)


def causal(new: int, rows: int, window: int = 0) -> torch.Tensor:
    """Which rows each new position sees."""
    positions = torch.arange(rows - new, rows)[:, None]
    mask = torch.arange(rows) <= positions
    return mask & (torch.arange(rows) > positions - window) if window else mask


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    room: int,
    parties: int = 2,
    **how: Any,
) -> tuple[torch.Tensor, torch.Tensor, Transcript]:
    """What attention over a cache yields, what it yields without one, and what the first has shown."""
    world = LocalWorld(parties, seed("attention"))
    public = None if mask is None else Public(mask)

    async def cached(ctx: Context, q: Shared, k: Shared, v: Shared) -> Shared:
        caches = []
        for name, x in (("k", k), ("v", v)):
            none = x.share[..., :0, :]
            caches.append(await append(ctx.scope(name), Cached(name, none, none, room, 16), x))
        return await attention(ctx, q, *caches, public, **how)

    async def plain(ctx: Context, q: Shared, k: Shared, v: Shared) -> Shared:
        return await attention(ctx, q, k, v, public, **how)

    shares = [world.share(encoded(x), 16) for x in (q, k, v)]
    over_cache = world.reveal(world.run(cached, *shares)).double() / ONE
    seen, world.transcript = world.transcript, Transcript()
    return over_cache, world.reveal(world.run(plain, *shares)).double() / ONE, seen


def inputs(heads: int, keys: int, new: int, rows: int, width: int, values: int) -> list[torch.Tensor]:
    shapes = ((1, heads, new, width), (1, keys, rows, width), (1, keys, rows, values))
    return [grid(*shape, scale=2.0, seed=i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("reach", [None, 11, 20])
@pytest.mark.parametrize(
    ("heads", "keys", "new", "rows", "width", "values", "room", "window"),
    [
        (1, 1, 1, 1, 4, 4, 8, 0),
        (2, 2, 3, 7, 4, 6, 8, 0),
        (4, 2, 1, 5, 8, 8, 8, 0),
        (4, 1, 2, 8, 4, 4, 8, 3),
        (2, 2, 5, 5, 3, 2, 9, 2),
    ],
)
def test_agrees(
    parties: int,
    heads: int,
    keys: int,
    new: int,
    rows: int,
    width: int,
    values: int,
    room: int,
    window: int,
    reach: int | None,
) -> None:
    q, k, v = inputs(heads, keys, new, rows, width, values)
    mask, shared = causal(new, rows, window), heads != keys
    cached, plain, _ = attend(q, k, v, mask, room, parties, enable_gqa=shared, reach=reach)
    expected = functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=shared)
    assert cached.shape == expected.shape
    assert float((cached - expected).abs().max()) < ERROR and float((cached - plain).abs().max()) < 2 * ERROR


@pytest.mark.parametrize("factor", [0.5, 0.3])
def test_scales(factor: float) -> None:
    q, k, v = inputs(2, 2, 1, 6, 4, 4)
    for bits, reach in product((0, 20, 30), (None, 8, 14)):
        cached, _, _ = attend(q, k, v, None, 8, scale=factor, factor_bits=bits, reach=reach)
        expected = functional.scaled_dot_product_attention(q, k, v, scale=factor)
        assert float((cached - expected).abs().max()) < ERROR


@pytest.mark.parametrize("reach", [None, 9, 16])
def test_scores_far_below_zero_beat_rows_that_are_not_there(reach: int | None) -> None:
    """The largest score of a row is far below the zeros that a product with absent rows yields."""
    q, k, v = inputs(1, 1, 2, 3, 4, 4)
    q, k = q.abs() * 4, -k.abs() * 4
    cached, _, _ = attend(q, k, v, causal(2, 3), 16, reach=reach)
    expected = functional.scaled_dot_product_attention(q, k, v, causal(2, 3))
    assert float((cached - expected).abs().max()) < ERROR


@pytest.mark.parametrize("score", [1 << 60, (1 << 62) - (1 << 40)])
def test_scores_up_to_the_ends_of_their_domain(parties: int, score: int) -> None:
    """They are compared before they are truncated: with each other, and with rows that are not there."""
    rows = [score >> 30, -score >> 30, (score >> 30) - (1 << 9)]
    q, k = (torch.tensor(x, dtype=torch.float64).reshape(1, 1, -1, 1) / ONE for x in ([1 << 30], rows))
    v = grid(1, 1, 3, 4)
    for at, sign in ((0, 1), (1, -1)):
        cached, plain, _ = attend(sign * q, k, v, None, 8, parties, scale=1.0)
        assert float((cached - v[..., at : at + 1, :]).abs().max()) < 2.0**-14
        assert float((plain - cached).abs().max()) < 2.0**-14


@pytest.mark.parametrize("reach", [11, 12, 26])
def test_scores_up_to_the_ends_of_what_they_reach(parties: int, reach: int) -> None:
    """Absent rows are below the lowest of them, and still near enough to be compared with the highest."""
    end = 2.0**reach - 2.0**-12
    q, k = torch.ones(1, 1, 2, 1, dtype=torch.float64), torch.tensor([end, -end, -end]).double().reshape(1, 1, 3, 1)
    q[..., 1, :] = -1
    v = grid(1, 1, 3, 4)
    cached, _, _ = attend(q, k, v, None, 8, parties, scale=1.0, reach=reach)
    expected = torch.stack([v[0, 0, 0], v[0, 0, 1:].mean(0)])
    assert float((cached - expected).abs().max()) < 2.0**-14
    lowest, _, _ = attend(q[..., :1, :], k[..., 1:, :], v[..., 1:, :], None, 8, parties, scale=1.0, reach=reach)
    assert float((lowest - expected[1]).abs().max()) < 2.0**-14


@pytest.mark.parametrize(("sum_bits", "right"), [(None, False), (34, True)])
@pytest.mark.parametrize("reach", [None, 4])
def test_many_equal_scores_of_large_values(reach: int | None, sum_bits: int | None, right: bool) -> None:
    """2,048 values of 3,000: with all 24 fraction bits of the powers their sum would wrap around."""
    rows = 2048
    q, k = torch.zeros(1, 1, 1, 2, dtype=torch.float64), torch.ones(1, 1, rows, 2, dtype=torch.float64)
    cached, _, _ = attend(
        q, k, torch.full((1, 1, rows, 1), 3000.0).double(), None, rows, reach=reach, sum_bits=sum_bits
    )
    assert (abs(float(cached) - 3000) <= 5e-5 * 3000) == right


def test_messages_depend_on_the_room_alone(parties: int) -> None:
    sizes = []
    for rows in (3, 6):
        q, k, v = inputs(2, 1, 1, rows, 4, 4)
        _, _, seen = attend(q, k, v, causal(1, rows), 8, parties, enable_gqa=True)
        opened = [(label, bits, x.shape) for label, bits, x in seen.openings if "RowMask" not in label]
        sizes.append((seen.rounds, opened))
    assert sizes[0] == sizes[1]


def test_refusals() -> None:
    q, k, v = inputs(1, 1, 2, 3, 4, 4)
    for mask, how in ((torch.tensor([[0.5, 0, 0], [0, 0, 0]]), {}), (None, {"is_causal": True})):
        public = None if mask is None else Public(encoded(mask), 16)

        async def cached(ctx: Context, q: Shared, k: Shared, p: Any = public, how: Any = how) -> Any:
            none = k.share[..., :0, :]
            rows = await append(ctx.scope("k"), Cached("k", none, none, 8, 16), k)
            return await attention(ctx, q, rows, rows, p, 0.0, bool(how))

        world = LocalWorld(2, seed("refusal"))
        with pytest.raises(UnsupportedError, match="over a cache"):
            world.run(cached, world.share(encoded(q), 16), world.share(encoded(k), 16))

    async def mixed(ctx: Context, q: Shared, k: Shared) -> Any:
        return await attention(ctx, q, Cached("k", k.share, k.share, 8, 16), k)

    world = LocalWorld(2, seed("refusal"))
    with pytest.raises(UnsupportedError, match="other way round"):
        world.run(mixed, world.share(encoded(q), 16), world.share(encoded(k), 16))
