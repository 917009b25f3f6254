"""The context: names, openings, and protocols run side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mpcinfer.errors import ProtocolError
from mpcinfer.protocol.context import Context, Opening, drive, together
from mpcinfer.protocol.correlation import Field, Kind, Tensors
from mpcinfer.protocol.local import LocalWorld
from mpcinfer.protocol.types import Shared, SharedBits
from mpcinfer.ring.domain import BIT, Z64, Ring
from tests.openings import seed


class Masks(Kind):
    """One mask over each of some rings."""

    def __init__(self, *rings: Ring, shape: tuple[int, ...] = (2,)) -> None:
        self.fields = {f"m{i}": Field(shape, ring) for i, ring in enumerate(rings)}

    def free(self) -> dict[str, Field]:
        return self.fields


class Zeros:
    """A source whose masks are all zero, and that remembers what was asked."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def draw(self, name: str, item: Kind) -> Tensors:
        self.names.append(name)
        return {n: torch.zeros(f.shape, dtype=f.ring.dtype) for n, f in item.free().items()}


def alone(source: Zeros | None = None) -> Context:
    return Context(0, 2, source or Zeros())


def echo(batch: list[Opening]) -> list[torch.Tensor]:
    """An exchange of one party with itself."""
    return [o.masked for o in batch]


def test_correlations_are_named_by_path_and_ordinal() -> None:
    source = Zeros()
    ctx = alone(source)
    ctx.correlation(Masks(Z64))
    ctx.correlation(Masks(Z64))
    inner = ctx.scope("layer1")
    inner.correlation(Masks(Z64))
    inner.scope("relu").correlation(Masks(Z64))
    assert ctx.scope("layer2").correlation(Masks(Z64)).mask("m0").label == "layer2#0:Masks.m0"
    ctx.correlation(Masks(Z64))
    assert source.names == ["#0", "#1", "layer1#0", "layer1/relu#0", "layer2#0", "#2"]


def test_a_scope_is_entered_once() -> None:
    ctx = alone()
    ctx.scope("a").scope("a")
    with pytest.raises(ProtocolError, match="used twice"):
        ctx.scope("a")


def test_only_party_0_is_first() -> None:
    assert alone().first and not Context(1, 2, Zeros()).first


@pytest.mark.parametrize("bits", [1, 32, 36, 48, 63])
def test_a_number_under_a_narrow_mask_is_reduced_first(bits: int) -> None:
    ctx, ring = alone(), Ring(bits)
    x = Shared(torch.tensor([-1, 2**62 + 5]))
    opened = drive(ctx.open(x, ctx.correlation(Masks(ring)).mask("m0")), echo)
    assert opened.ring == ring and opened.value.tolist() == [2**bits - 1, (2**62 + 5) % 2**bits]


@pytest.mark.parametrize("ring", [BIT, Ring(64, xor=True)])
def test_a_number_is_not_opened_under_xor(ring: Ring) -> None:
    ctx = alone()
    with pytest.raises(ProtocolError, match="would leak"):
        drive(ctx.open(Shared(torch.tensor([1, 2])), ctx.correlation(Masks(ring)).mask("m0")), echo)


@pytest.mark.parametrize("ring", [Z64, Ring(1), Ring(8, xor=True)])
def test_bits_are_not_opened_over_another_ring(ring: Ring) -> None:
    ctx = alone()
    bits = SharedBits(torch.tensor([1, 0], dtype=torch.uint8), BIT)
    with pytest.raises(ProtocolError, match="would leak"):
        drive(ctx.open(bits, ctx.correlation(Masks(ring)).mask("m0")), echo)


@pytest.mark.parametrize("again", ["open", "open_masked"])
def test_a_mask_hides_one_opening(again: str) -> None:
    ctx = alone()
    mask = ctx.correlation(Masks(Z64)).mask("m0")
    x = torch.tensor([1, 2])
    drive(ctx.open(Shared(x), mask), echo)
    with pytest.raises(ProtocolError, match="used already"):
        drive(ctx.open(Shared(x), mask) if again == "open" else ctx.open_masked(x, mask), echo)


def test_shapes_of_openings_are_those_of_their_masks() -> None:
    ctx = alone()
    for method in (ctx.open, ctx.open_masked):
        with pytest.raises(ProtocolError, match="shape"):
            drive(method(torch.zeros(3, dtype=torch.int64), ctx.correlation(Masks(Z64)).mask("m0")), echo)


@pytest.mark.parametrize("ring", [Z64, Ring(36), BIT, Ring(7, xor=True), Ring(15, xor=True)])
def test_what_is_opened_is_value_plus_mask(world: Callable[..., LocalWorld], parties: int, ring: Ring) -> None:
    w = world(parties)
    masks: list[torch.Tensor] = []

    async def protocol(ctx: Context, own: torch.Tensor) -> Any:
        mask = ctx.correlation(Masks(ring, shape=(2,))).mask("m0")
        masks.append(mask.share)
        return (await ctx.open(own, mask)).value

    own = [torch.tensor([i & 1, 1], dtype=ring.dtype) for i in range(parties)]
    opened = w.run(protocol, own)
    expected = own[0]
    for share in [*own[1:], *masks]:
        expected = ring.add(expected, share)
    assert all(torch.equal(v, expected) for v in opened)


def steps(ctx: Context, name: str, count: int, log: list[str]) -> Any:
    async def protocol() -> str:
        for i in range(count):
            mask = ctx.correlation(Masks(Z64)).mask("m0")
            value = (await ctx.open(Shared(torch.full((2,), 10 * i + count)), mask)).value
            log.append(f"{name}{i}")
            assert value.tolist() == [10 * i + count] * 2
        return name

    return protocol()


def test_together_shares_rounds_and_keeps_order() -> None:
    log: list[str] = []
    sizes: list[int] = []
    ctx = alone()

    def exchange(batch: list[Opening]) -> list[torch.Tensor]:
        sizes.append(len(batch))
        return echo(batch)

    parts = [steps(ctx.scope(n), n, c, log) for n, c in (("a", 1), ("b", 3), ("c", 0), ("d", 2))]
    assert drive(together(*parts), exchange) == ["a", "b", "c", "d"]
    assert sizes == [3, 2, 1]
    assert log == ["a0", "b0", "d0", "b1", "d1", "b2"]


def test_together_nests() -> None:
    log: list[str] = []
    ctx = alone()

    async def inner() -> Any:
        return await together(steps(ctx.scope("x"), "x", 2, log), steps(ctx.scope("y"), "y", 1, log))

    assert drive(together(inner(), steps(ctx.scope("z"), "z", 2, log)), echo) == [["x", "y"], "z"]
    assert log == ["x0", "y0", "z0", "x1", "z1"]


def test_together_of_nothing() -> None:
    assert drive(together(), echo) == []


def test_one_that_raises_ends_the_others() -> None:
    ended: list[str] = []
    ctx = alone()

    async def waits() -> None:
        try:
            await ctx.open(Shared(torch.zeros(2, dtype=torch.int64)), ctx.correlation(Masks(Z64)).mask("m0"))
        finally:
            ended.append("waits")

    async def fails() -> None:
        raise ProtocolError("broken")

    with pytest.raises(ProtocolError, match="broken"):
        drive(together(waits(), fails(), waits()), echo)
    assert ended == ["waits"]  # the third had not begun; that it was closed shows in the absence of a warning


def test_drive_closes_what_it_leaves() -> None:
    ended: list[str] = []
    ctx = alone()

    async def waits() -> None:
        try:
            await ctx.open(Shared(torch.zeros(2, dtype=torch.int64)), ctx.correlation(Masks(Z64)).mask("m0"))
        finally:
            ended.append("waits")

    def broken(_: list[Opening]) -> list[torch.Tensor]:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        drive(waits(), broken)
    assert ended == ["waits"]


def test_side_by_side_is_as_one_after_the_other() -> None:
    from mpcinfer.protocol.select import relu
    from mpcinfer.protocol.truncate import truncate

    async def both(ctx: Context, x: Shared) -> Any:
        return await together(relu(ctx.scope("r"), x), truncate(ctx.scope("t"), x, 4))

    w = LocalWorld(3, seed("both"))
    x = torch.tensor([-64, 64, 0])
    results = w.run(both, w.share(x))
    assert w.reveal([r[0] for r in results]).tolist() == [0, 64, 0]
    assert w.reveal([r[1] for r in results]).tolist() == [-4, 4, 0]
    assert w.transcript.rounds == 4
