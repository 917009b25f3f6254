"""A truncated number, its square and its product with a factor: of one and the same neighbour."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mpcinfer.errors import ProtocolError
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.local import LocalWorld
from mpcinfer.protocol.scaled import TruncatedScaling, squared_and_scaled
from mpcinfer.protocol.tracing import trace
from mpcinfer.protocol.types import Shared
from tests.openings import assert_hides
from tests.protocol.conftest import Ran

Worlds = Callable[..., LocalWorld]


def by(d: int) -> Callable[[Context, Shared, Shared], object]:
    return lambda ctx, x, factor: squared_and_scaled(ctx, x, d, factor)


@pytest.mark.parametrize("d", [1, 16, 47, 61])
@pytest.mark.parametrize("shape", [(600, 5), (5,), (600, 1)])
def test_values(world: Worlds, parties: int, d: int, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(d)
    x = torch.randint(-(2**62), 2**62, (600, 5), generator=generator)
    x[0, :4] = torch.tensor([0, -1, 2**62 - 1, -(2**62)])
    factor = torch.randint(-(2**63), 2**63 - 1, shape, generator=generator)
    used = world(parties)
    found = used.run(by(d), used.share(x, 20), used.share(factor, 3))
    assert [part.frac_bits for part in found[0]] == [20 - d, 2 * (20 - d), 23 - d]  # type: ignore[attr-defined]
    y, square, scaled = (used.reveal(part) for part in zip(*found, strict=True))  # type: ignore[call-overload]
    assert bool(((y == x >> d) | (y == (x >> d) + 1)).all())
    assert torch.equal(square, y * y) and torch.equal(scaled, y * factor)


def test_costs(run: Callable[..., Ran]) -> None:
    ran = run(by(10), torch.arange(24).reshape(4, 6), torch.arange(6))
    ran.costs(1, 8 * (24 + 6), 3 * (24 * 8 + 24 * 10 // 8))
    assert ran.opened() == [("TruncatedScaling.r", 64), ("TruncatedScaling.b", 64)]
    assert run(by(10), torch.zeros((0, 3), dtype=torch.int64), torch.arange(3)).value[0].shape == (0, 3)


def test_openings(monkeypatch: pytest.MonkeyPatch) -> None:
    async def twice(ctx: Context, x: Shared) -> None:
        for d in (20, 9):
            await squared_and_scaled(ctx, x, d, Shared(x.share * 3))

    x = torch.arange(-7000, 7000) << 40
    assert_hides(monkeypatch, twice, x, torch.zeros_like(x))


def test_a_factor_has_a_mask_of_its_own() -> None:
    """The factor under the other number's mask: the trace refuses it."""

    async def fault(ctx: Context, x: Shared) -> None:
        correlation = ctx.correlation(TruncatedScaling(x.shape, x.shape, 4))
        await ctx.open(x, correlation.mask("r"))
        await ctx.open(x, correlation.mask("r"))

    with pytest.raises(ProtocolError, match="used already"):
        trace(lambda ctx: fault(ctx, Shared(torch.empty(4, dtype=torch.int64, device="meta"))), parties=2)


def test_a_factor_that_is_larger_is_refused() -> None:
    with pytest.raises(ValueError, match="broadcasts"):
        TruncatedScaling((3,), (2, 3), 4)
