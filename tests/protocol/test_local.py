"""The world in one process: sharing, determinism, lock-step, and what it counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mpcinfer.errors import ProtocolError
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.local import LocalWorld
from mpcinfer.protocol.select import relu
from mpcinfer.protocol.truncate import Truncation, truncate
from mpcinfer.protocol.types import Shared
from tests.openings import seed

Worlds = Callable[..., LocalWorld]
X = torch.tensor([[5, -5], [0, 2**61]])


def test_share_and_reveal(world: Worlds, parties: int) -> None:
    w = world(parties)
    shares = w.share(X, 16)
    assert len(shares) == parties and all(s.frac_bits == 16 for s in shares)
    assert torch.equal(w.reveal(shares), X)
    assert not torch.equal(w.share(X)[0].share, shares[0].share)


def test_one_seed_is_one_run(parties: int) -> None:
    def openings(key: bytes) -> list[tuple[str, int, torch.Tensor]]:
        w = LocalWorld(parties, key)
        w.run(relu, w.share(X))  # other shares each time: openings depend on values and masks only
        return w.transcript.openings

    for (la, ba, a), (lb, bb, b) in zip(openings(seed(1)), openings(seed(1)), strict=True):
        assert (la, ba) == (lb, bb) and torch.equal(a, b)
    assert not torch.equal(openings(seed(1))[0][2], openings(seed(2))[0][2])


def test_runs_in_one_world_use_fresh_randomness(world: Worlds, parties: int) -> None:
    w = world(parties)
    for _ in range(2):
        w.run(relu, w.share(X))
    first, second = (v for label, _, v in w.transcript.openings if label.endswith("Comparison.r"))
    assert not torch.equal(first, second)


def test_costs_accumulate_and_scale_with_the_peers(world: Worlds, parties: int) -> None:
    w = world(parties)
    w.run(lambda ctx, x: truncate(ctx, x, 8), w.share(X))
    assert (w.transcript.rounds, w.transcript.bytes_sent, w.transcript.dealer_bytes) == (1, 32 * (parties - 1), 36)
    w.run(lambda ctx, x: truncate(ctx, x, 8), w.share(X))
    assert (w.transcript.rounds, w.transcript.bytes_sent, w.transcript.dealer_bytes) == (2, 64 * (parties - 1), 72)
    assert [label for label, _, _ in w.transcript.openings] == ["#0:Truncation.r"] * 2


def test_lists_give_each_party_its_own(world: Worlds, parties: int) -> None:
    async def protocol(ctx: Context, own: int, common: str) -> Any:
        return ctx.index, own, common

    assert world(parties).run(protocol, list(range(10, 10 + parties)), "x") == [
        (i, 10 + i, "x") for i in range(parties)
    ]


async def uneven(ctx: Context, x: Shared) -> Shared:
    return await truncate(ctx, x, 8) if ctx.first else x


async def different(ctx: Context, x: Shared) -> Any:
    from mpcinfer.protocol.context import together

    parts = [truncate(ctx.scope(str(i)), x, 8) for i in range(1 if ctx.first else 2)]
    return await together(*parts)


@pytest.mark.parametrize("protocol", [uneven, different])
def test_parties_out_of_step_are_noticed(world: Worlds, parties: int, protocol: Any) -> None:
    w = world(parties)
    with pytest.raises(ProtocolError, match="out of step"):
        w.run(protocol, w.share(X))


def test_a_correlation_is_drawn_once(world: Worlds) -> None:
    async def twice(ctx: Context, x: Shared) -> None:
        item = Truncation(x.shape, 8)
        ctx.correlation(item)
        ctx._ordinal = 0
        ctx.correlation(item)

    w = world(2)
    with pytest.raises(ProtocolError, match="drawn twice"):
        w.run(twice, w.share(X))


def test_an_error_at_one_party_ends_the_run(world: Worlds, parties: int) -> None:
    async def fails(ctx: Context, x: Shared) -> None:
        if not ctx.first:
            raise ProtocolError("here")
        await truncate(ctx, x, 8)

    w = world(parties)
    with pytest.raises(ProtocolError, match="here"):
        w.run(fails, w.share(X))
    assert torch.equal(w.reveal(w.run(relu, w.share(X))), X.clamp(min=0))
