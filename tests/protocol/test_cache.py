"""Rows that grow: exact products over any runs of them, and each row opened once under a mask of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpcinfer.errors import ProtocolError
from mpcinfer.protocol.cache import (
    CachedProduct,
    CacheUse,
    RowMask,
    RowStore,
    append,
    appending,
    cached_product,
    joined,
    side_by_side,
)
from mpcinfer.protocol.context import Context, together
from mpcinfer.protocol.correlation import from_json, to_json
from mpcinfer.protocol.local import LocalWorld, Transcript
from mpcinfer.protocol.tracing import trace
from mpcinfer.protocol.types import Cached, Shared
from tests.openings import assert_each_mask_opens_once, assert_hides, assert_uniform, faulty_masks, observe, seed

Runs = Sequence[tuple[int, int]]
RNG = torch.Generator().manual_seed(1)
LEAD, WIDTH = (2,), 3


def large(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=RNG)


class Masks(dict[str, torch.Tensor]):
    """A dealer's masks of caches, of which those of `runs`, and what was appended last, are to be used."""

    runs: Runs = ()
    first = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        rows = super().__getitem__(name)
        return torch.cat([rows[..., a:b, :] for a, b in [*self.runs, (self.first, rows.shape[-2])]], dim=-2)


class Text:
    """All parties' rows, and products with runs of them, as a session makes them."""

    def __init__(self, parties: int, *name: object) -> None:
        self.world = LocalWorld(parties, seed("text", parties, *name))
        self.world._fixed = self.masks = Masks()
        self.stores = [(RowStore(), RowStore()) for _ in range(parties)]
        self.plain = torch.empty(*LEAD, 0, WIDTH, dtype=torch.int64)

    def caches(self, runs: Runs, capacity: int) -> list[Cached]:
        empty = torch.zeros(*LEAD, 0, WIDTH, dtype=torch.int64)
        if not self.plain.shape[-2]:
            return [Cached("k", empty, empty, capacity, 16) for _ in self.stores]
        return [Cached("k", shares.read(runs), masked.read(runs), capacity, 16) for shares, masked in self.stores]

    def step(self, runs: Runs, new: torch.Tensor, x: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows after those of `runs`; x rows^T, and then rows of it: the products of both orientations."""
        count, more = self.plain.shape[-2], new.shape[-2]
        self.masks.runs, self.masks.first = runs, count
        self.world.transcript = Transcript()

        async def protocol(ctx: Context, cache: Cached, rows: Shared, x: Shared) -> Any:
            grown = await append(ctx, cache, rows)
            scores = await cached_product(ctx.scope("scores"), x, grown, transposed=True)
            back = await cached_product(ctx.scope("back"), scores, grown, transposed=False)
            return grown, scores, back

        results = self.world.run(
            protocol, self.caches(runs, capacity), self.world.share(new, 16), self.world.share(x, 10)
        )
        for (shares, masked), (grown, _, _) in zip(self.stores, results, strict=True):
            shares.append(grown.share[..., -more:, :])
            masked.append(grown.masked[..., -more:, :])
        self.plain = torch.cat([self.plain, new], dim=-2)
        assert {(r[1].frac_bits, r[2].frac_bits) for r in results} == {(26, 42)}
        return self.world.reveal([r[1] for r in results]), self.world.reveal([r[2] for r in results])

    def check(self, runs: Runs, more: int, length: int, capacity: int) -> None:
        """A step, against plain products."""
        new, x = large(*LEAD, more, WIDTH), large(*LEAD, length, WIDTH)
        scores, back = self.step(runs, new, x, capacity)
        rows = torch.cat([*(self.plain[..., a:b, :] for a, b in runs), new], dim=-2)
        expected = torch.zeros(*LEAD, length, capacity, dtype=torch.int64)
        expected[..., : rows.shape[-2]] = x @ rows.transpose(-1, -2)
        assert torch.equal(scores, expected)
        assert torch.equal(back, expected[..., : rows.shape[-2]] @ rows)


def test_a_text_that_grows_is_edited_and_forked(parties: int) -> None:
    text = Text(parties)
    text.check((), 5, 5, 32)
    text.check(((0, 5),), 1, 1, 6)  # as much room as rows
    text.check(((0, 6),), 2, 2, 64)
    text.check(((0, 3),), 4, 2, 32)  # an edit: rows 3 to 7 are of no use here
    text.check(((0, 8),), 1, 1, 32)  # and still are to the text before
    text.check(((0, 3), (8, 12)), 1, 3, 32)
    text.check(((1, 2), (9, 10), (13, 14)), 1, 1, 32)


@settings(max_examples=15, deadline=None)
@given(data=st.data(), parties=st.sampled_from([2, 3, 5]))
def test_any_runs(data: st.DataObject, parties: int) -> None:
    text = Text(parties)
    for _ in range(data.draw(st.integers(1, 4))):
        count = text.plain.shape[-2]
        cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=6, unique=True)))
        runs = tuple(zip(cuts[::2], cuts[1::2], strict=False))
        more, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
        rows = sum(b - a for a, b in runs) + more
        text.check(runs, more, length, rows + data.draw(st.integers(0, 5)))


def test_cost_depends_on_the_capacity_alone(parties: int) -> None:
    text = Text(parties)
    for runs, more, capacity in (((), 7, 32), (((0, 7),), 1, 32), (((0, 8),), 1, 64)):
        text.check(runs, more, 2, capacity)
        seen = text.world.transcript
        rows, x, scores = (8 * LEAD[0] * n for n in (more * WIDTH, 2 * WIDTH, 2 * capacity))
        assert seen.rounds == 3
        assert seen.bytes_sent == (rows + x + scores) * (parties - 1)
        assert seen.dealer_bytes == scores + x
        labels = [(label.partition(":")[2], bits) for label, bits, _ in seen.openings]
        assert labels == [("RowMask.b", 64), ("CachedProduct.a", 64), ("CachedProduct.a", 64)]


def test_rows_are_opened_beside_what_is_multiplied_by_them(parties: int) -> None:
    world = LocalWorld(parties, seed("beside"))
    rows, x = large(2, 3), large(4, 3)

    async def protocol(ctx: Context, rows: Shared, x: Shared) -> Any:
        none = rows.share[:0]
        begun = appending(ctx, Cached("k", none, none, 8, 0), rows)
        assert begun.value.shape == rows.shape
        with pytest.raises(ProtocolError, match="before its rows have been opened"):
            _ = begun.value.masked
        product = cached_product(ctx.scope("scores"), x, begun.value, transposed=True)
        return (await together(begun.rest, product))[1]

    scores = world.reveal(world.run(protocol, world.share(rows), world.share(x)))
    assert torch.equal(scores[:, :2], x @ rows.T) and world.transcript.rounds == 1
    with pytest.raises(ProtocolError, match="other rows than were opened"):
        Cached("k", rows, rows, 8, 0).complete(rows)


@pytest.mark.parametrize("before", [0, 3, 30])
def test_on_meta_tensors(before: int, parties: int) -> None:
    """The plan is that of any other number of rows with that much room."""

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, device="meta")

    async def protocol(ctx: Context) -> Any:
        rows = meta(2, before, 3)
        grown = await append(ctx, Cached("k", rows, rows, 32, 16), Shared(meta(2, 2, 3), 16))
        x = await cached_product(ctx, Shared(meta(2, 4, 3), 16), grown, transposed=True)
        return grown, x, await cached_product(ctx, x, grown, transposed=False)

    plan, cost, (grown, scores, back) = trace(protocol, parties=parties)
    assert (grown.shape, scores.shape, back.shape) == ((2, before + 2, 3), (2, 4, 32), (2, 4, 3))
    assert_each_mask_opens_once(plan, cost, parties)
    assert [item for _, item in plan.entries] == [
        RowMask("k", (2, 2, 3)),
        CachedProduct("k", (2, 4, 3), (2, 32, 3), True),
        CachedProduct("k", (2, 4, 32), (2, 32, 3), False),
    ]
    assert all(from_json(to_json(item)) == item for _, item in plan.entries)
    assert plan.entries[1][1].multiply_adds() == (2 * 32 * 3 * 2 * 4, 32 * 3 * 2 * 4)


def test_a_row_mask_is_the_dealers_alone(parties: int) -> None:
    text = Text(parties)
    text.check((), 4, 1, 32)
    masked = [held.read([(0, 4)]) for _, held in text.stores]
    assert all(torch.equal(m, masked[0]) for m in masked)
    assert torch.equal(masked[0] - text.plain, dict.__getitem__(text.masks, "k"))
    assert RowMask.growing and not RowMask.lasting and not CachedProduct.growing


@pytest.mark.parametrize(("rows", "frac_bits"), [(5, 16), (4, 12)])
def test_rows_that_do_not_fit_are_refused(rows: int, frac_bits: int) -> None:
    world, none = LocalWorld(2, seed("refusal")), torch.zeros(0, WIDTH, dtype=torch.int64)
    cache = Cached("k", none, none, 4, 16)
    with pytest.raises(ProtocolError, match="no room"):
        world.run(lambda ctx, x: append(ctx, cache, x), world.share(large(rows, WIDTH), frac_bits))


@pytest.mark.parametrize(("share", "masked"), [(5, 5), (3, 2)])
def test_a_cache_has_room_for_its_rows_and_all_are_opened(share: int, masked: int) -> None:
    with pytest.raises(ProtocolError, match="more rows|other rows"):
        Cached("k", large(share, 2), large(masked, 2), 4, 16)


# --- openings ------------------------------------------------------------------------------------------------------


async def edited(ctx: Context, x: Shared) -> Any:
    """Rows of a text, and then others at their positions, which two queries meet."""
    none = x.map(lambda t: t[:0])
    old = await append(ctx, Cached("old", none.share, none.share, 1 << 20, 0), x)
    new = await append(ctx, Cached("new", none.share, none.share, 1 << 20, 0), x.times(3))
    ones = torch.ones(8, x.shape[0], dtype=torch.int64) * ctx.first
    old, new = (Cached(c.name, c.share, c.masked, x.shape[0], 0) for c in (old, new))
    return await together(
        cached_product(ctx.scope("first"), Shared(ones), old, transposed=False),
        cached_product(ctx.scope("second"), Shared(ones), new, transposed=False),
    )


ROWS = 1700, 8


def test_openings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that a mask which names are not part of, so that two rows share it, shows."""
    assert_hides(monkeypatch, edited, torch.zeros(ROWS, dtype=torch.int64), large(*ROWS))


def test_a_mask_for_two_rows_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.full(ROWS, 5)
    faulty_masks(monkeypatch, lambda x, ring: x[:1].expand(x.shape).contiguous() if x.dim() == 2 else x)
    with pytest.raises(AssertionError, match="not uniform"):
        assert_uniform([observe(edited, x, key=seed(i)) for i in range(5)])


def at_position(name: str, field: str) -> tuple[str, ...]:
    """The planted fault: a mask of a row is named by its place in the text, not by when it was appended."""
    return ("position 0", field) if field == "b" else (name, field)


def test_masks_by_position_open_one_mask_twice_after_an_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(ROWS[0] * ROWS[1]).reshape(ROWS)

    def difference() -> torch.Tensor:
        old, new = observe(edited, x, key=seed("edit")).opened[:2]
        assert (old.label, new.label) == ("#0:RowMask.b", "#1:RowMask.b")
        return new.value - old.value

    assert (difference() != 2 * x).all()
    assert_uniform([observe(edited, x, key=seed(i)) for i in range(5)])
    faulty_masks(monkeypatch, name=at_position)
    assert torch.equal(difference(), 2 * x)  # it tells by how much the text was changed
    with pytest.raises(AssertionError, match="not uniform"):
        assert_uniform([observe(edited, x, key=seed(i)) for i in range(5)])


def test_no_mask_of_a_text_is_used_twice_whatever_happens_to_it(parties: int) -> None:
    """Words opened in steps on the same rows, forks and edits: all differ."""
    text, words = Text(parties), list[int]()
    same = torch.ones(*LEAD, 2, WIDTH, dtype=torch.int64)
    for runs in ((), ((0, 2),), ((0, 1),), ((0, 2),), ((0, 1), (4, 5)), ()):
        text.step(runs, same, same, 32)
        words += [int(w) for _, _, value in text.world.transcript.openings for w in value.reshape(-1)]
    assert len(set(words)) == len(words) > 500


# --- rows at rest --------------------------------------------------------------------------------------------------


def test_a_store_grows_and_keeps_what_it_has() -> None:
    store, rows = RowStore(), large(2, 300, 3)
    for first, end in ((0, 1), (1, 64), (64, 65), (65, 200), (200, 300)):
        store.append(rows[:, first:end])
        assert store.count == end and torch.equal(store.read([(0, end)]), rows[:, :end])
    assert store.read([(5, 9)]).untyped_storage().data_ptr() == store.read([(7, 300)]).untyped_storage().data_ptr()
    assert torch.equal(store.read([(0, 2), (2, 5), (7, 9)]), rows[:, [0, 1, 2, 3, 4, 7, 8]])
    assert torch.equal(store.read([(7, 9), (0, 1)]), rows[:, [7, 8, 0]])
    assert store.read([]).shape == (2, 0, 3) and store.read([(4, 4)]).shape == (2, 0, 3)


@pytest.mark.parametrize("runs", [[(0, 5)], [(-1, 2)], [(3, 2)], [(0, 1), (4, 5)]])
def test_a_store_has_only_what_was_appended(runs: Runs) -> None:
    store = RowStore()
    with pytest.raises(ProtocolError):
        store.read([])
    store.append(large(4, 3))
    with pytest.raises(ProtocolError, match="does not have"):
        store.read(runs)


def test_joined() -> None:
    assert joined([(0, 2), (2, 3), (4, 5), (5, 9), (1, 2)]) == [(0, 3), (4, 9), (1, 2)] and joined([]) == []


def test_rows_of_several_texts_end_side_by_side() -> None:
    first, second = torch.arange(6).reshape(1, 3, 2), 10 + torch.arange(2).reshape(1, 1, 2)
    both = side_by_side([first, second])
    assert both.shape == (2, 1, 3, 2) and torch.equal(both[0], first)
    assert both[1].tolist() == [[[0, 0], [0, 0], [10, 11]]]


def test_a_use_is_told_from_every_other() -> None:
    use = CacheUse(b"s" * 16, ((0, 3), (5, 9)), 12)
    others = [
        replace(use, slot=b"t" * 16),
        replace(use, slot=b"s" * 15),
        replace(use, count=13),
        replace(use, times=2),
        replace(use, runs=((0, 3),)),
        replace(use, runs=((0, 3), (5, 8))),
        replace(use, runs=((0, 9),)),
        replace(use, runs=((0, 3), (5, 9), (9, 9))),
        replace(use, runs=()),
        replace(use, runs=((12, 0), (3, 5)), count=9),
        replace(use, beside=(CacheUse(b"t" * 16, (), 0),)),
        replace(use, beside=(CacheUse(b"t" * 16, (), 1),)),
        replace(use, beside=(CacheUse(b"t" * 16, (), 0), CacheUse(b"u" * 16, (), 0))),
        CacheUse(b"t" * 16, (), 0, beside=(use,)),
    ]
    digests = [u.digest(b"p" * 32) for u in (use, *others)] + [use.digest(b"q" * 32)]
    # what moves from one part to the next
    digests += [
        replace(use, slot=b"x" + use.slot).digest(b"p" * 31),
        replace(use, slot=use.slot[1:]).digest(b"p" * 32 + b"s"),
    ]
    assert len(set(digests)) == len(digests) and all(len(d) == 32 for d in digests)
    assert use.digest(b"p" * 32) == CacheUse(b"s" * 16, ((0, 3), (5, 9)), 12).digest(b"p" * 32)


def test_a_cache_is_sealed() -> None:
    cache = Cached("k", torch.tensor([[987654321]]), torch.tensor([[987654321]]), 32, 16)
    assert repr(cache) == "Cached('k', shape=(1, 1), capacity=32)"


def test_products_need_their_masks(world: Callable[..., LocalWorld]) -> None:
    """A product with a cache that the dealer never saw grow."""
    rows = large(4, WIDTH)
    with pytest.raises(KeyError):
        w = world(2)
        w.run(
            lambda ctx, x: cached_product(ctx, x, Cached("k", rows, rows, 32, 0), transposed=True),
            w.share(large(1, WIDTH)),
        )
