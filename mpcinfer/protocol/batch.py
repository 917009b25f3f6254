"""Correlations of one kind are dealt together: a small one costs what its names and calls cost, hardly its numbers.

The layers of a network ask for the same kinds again and again. What is equal in a plan becomes one correlation with
one more axis, of which each member is a slice. What a member is, and what is sent for it, stays as it was; only the
streams that it is expanded from are its batch's, named after the first member.

A large correlation is dealt in slices, each of some of its rows and a correlation of its own: what the dealer works
on stays small, however large a request is. Whoever expands them puts them side by side.

A large plan is dealt in portions, one after the other in the order in which they are drawn, each with batches of its
own: whoever expands them holds a few at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch

from mpcinfer.errors import ProtocolError
from mpcinfer.protocol.correlation import (
    FixedMasks,
    Kind,
    Tensors,
    correction_bytes,
    corrections,
    deal,
    expand,
    fields_of,
    streams,
)

# of all fields of a batch: what is worked on at a time stays in the cache
_MOST_ELEMENTS = 1 << 17
_MOST_IN_COMMON = 64  # of a kind whose members share an operand
SLICE_BYTES = 64 << 20  # of a slice, expanded
PORTION_BYTES = 64 << 20  # of a portion, expanded, unless one correlation has more
_PROBE = 1_000_003  # the extent of the new axis while it is looked for: no other axis is as long


@dataclass(frozen=True)
class Slice:
    """Rows of a larger correlation: `count` of them, from `first` on, where its leading axes make `of` rows, each of
    which is a `row`."""

    name: str
    whole: Kind
    row: Kind
    first: int
    count: int
    of: int

    @property
    def item(self) -> Kind:
        """They are a correlation."""
        found = self.row.batched(self.count)
        assert found is not None
        return found

    def put(self, shares: Tensors, into: Tensors) -> None:
        """A party's shares of them to where they belong among those of the whole."""
        axes = _axes(self.row)
        for n, share in shares.items():
            axis, shape = axes[n], share.shape
            rows = into[n].view(*shape[:axis], self.of, *shape[axis + 1 :])
            rows.narrow(axis, self.first, self.count).copy_(share)


@dataclass(frozen=True)
class Batch:
    """Members of a plan, by name: correlations of one kind. Or a slice of one, which then is its only member."""

    names: tuple[str, ...]
    item: Kind
    slice: Slice | None = None

    @property
    def drawn(self) -> tuple[str, ...]:
        """By what name a party draws them, or what they are a slice of."""
        return self.names if self.slice is None else (self.slice.name,)

    def give(self, expanded: Sequence[Tensors], to: dict[str, tuple[Kind, Tensors]]) -> None:
        """What `expand` has made, by name; all slices of a correlation together are there once the last one is."""
        if self.slice is None:
            to |= {name: (self.item, member) for name, member in zip(self.names, expanded, strict=True)}
            return
        if self.slice.first == 0:
            fields = (f for fields in fields_of(self.slice.whole) for f in fields.items())
            to[self.slice.name] = self.slice.whole, {n: torch.empty(f.shape, dtype=f.ring.dtype) for n, f in fields}
        self.slice.put(expanded[0], to[self.slice.name][1])

    @property
    def correction_bytes(self) -> int:
        """What the dealer sends for all members: as much as if they were dealt one by one."""
        return len(self.names) * correction_bytes(self.item)

    def deal(self, keys: Sequence[bytes], fixed: FixedMasks) -> Iterator[memoryview]:
        """The corrections for the last party, by field, of each field the members' one after the other."""
        if len(self.names) == 1:
            yield from deal(self.item, self.names[0], keys, fixed)
            return
        derived, axes = fields_of(self.item)[1], _axes(self.item)
        for n, share in corrections(_whole(self), self.names[0], keys, fixed):
            yield derived[n].ring.pack_rows(share.movedim(axes[n], 0).reshape(len(self.names), -1))

    def expand(
        self,
        key: bytes,
        *,
        last: bool,
        correction: memoryview | bytes | None = None,
        opened: FixedMasks | None = None,
    ) -> list[Tensors]:
        """One party's shares of each member, from its tape key (and the corrections, if last).

        opened: gives the public F of a weight; with it the shares are prepared too.
        """
        if len(self.names) == 1:
            alone = expand(self.item, self.names[0], key, last=last, correction=correction)
            return [alone if opened is None else self.item.prepare(alone, opened)]
        whole, axes = _whole(self), _axes(self.item)
        free, derived = fields_of(whole)
        shares = streams(whole, self.names[0], key, free if last else {**free, **derived})
        if last:
            rest = memoryview(b"" if correction is None else correction)
            if len(rest) != self.correction_bytes:
                raise ProtocolError(
                    f"the dealer sent {len(rest)} bytes where the plan asks for {self.correction_bytes}"
                )
            for n, f in fields_of(self.item)[1].items():
                size = f.packed_bytes * len(self.names)
                rows = f.ring.unpack_rows(rest[:size], (len(self.names), f.count))
                ones = derived[n].shape
                shape = (len(self.names), *ones[: axes[n]], *ones[axes[n] + 1 :])
                shares[n] = rows.reshape(shape).movedim(0, axes[n])
                rest = rest[size:]
        if opened is not None:
            shares = whole.prepare(shares, opened)
        shapes = {n: f.shape for fields in fields_of(self.item) for n, f in fields.items()}
        parts = {n: share.unbind(axes[n]) for n, share in shares.items()}
        return [{n: part[i].reshape(shapes[n]) for n, part in parts.items()} for i in range(len(self.names))]


def expanded_bytes(item: Kind) -> int:
    """What a party's shares of all fields take of memory."""
    return sum(f.count * f.ring.width // 8 for fields in fields_of(item) for f in fields.values())


def portions(entries: Sequence[tuple[str, Kind]]) -> list[Sequence[tuple[str, Kind]]]:
    """The entries of a plan in runs, none of which is larger than it may be: the same for all who have the plan."""
    cuts, size = [0], 0
    for at, (_, item) in enumerate(entries):
        own = expanded_bytes(item)
        if size and size + own > PORTION_BYTES:
            cuts.append(at)
            size = 0
        size += own
    return [entries[first:end] for first, end in zip(cuts, [*cuts[1:], len(entries)], strict=True)]


def batches(entries: Sequence[tuple[str, Kind]]) -> list[Batch]:
    """The entries of a plan, in batches, by their first members' places: the same for all who have the plan."""
    open_: dict[Kind, list[str]] = {}
    found: list[tuple[list[str], Kind | Slice]] = []
    for name, item in entries:
        if parts := slices(name, item):
            found += [([f"{name}/{part.first}"], part) for part in parts]
            continue
        most = _most(item)
        if item not in open_ or len(open_[item]) >= most:
            open_[item] = []
            found.append((open_[item], item))
        open_[item].append(name)
    return [
        Batch(tuple(names), of.item, of) if isinstance(of, Slice) else Batch(tuple(names), of) for names, of in found
    ]


def slices(name: str, item: Kind) -> list[Slice]:
    """Those that a large correlation is dealt in; none if it is dealt whole.

    That are kinds whose leading axes are rows side by side, as where equal ones are dealt together.
    """
    size = expanded_bytes(item)
    rows = type(item).batched is Kind.batched and type(item).prepare is Kind.prepare and item.batched(1) is not None
    if size <= SLICE_BYTES or not rows:
        return []
    shape: tuple[int, ...] = item.shape  # type: ignore[attr-defined]
    axes = next((n for n in range(len(shape)) if 16 * size <= SLICE_BYTES * prod(shape[:n])), len(shape))
    row, of = dataclasses.replace(item, shape=shape[axes:]), prod(shape[:axes])  # type: ignore[type-var]
    # in eights, so that no bits are left over between them
    count = 8 * -(-of // (8 * -(-size // SLICE_BYTES)))
    return [Slice(name, item, row, first, min(count, of - first), of) for first in range(0, of, count)]


@lru_cache(maxsize=4096)
def _most(item: Kind) -> int:
    """How many of a kind are dealt together."""
    if item.common and item.batched(2) is not None:
        return _MOST_IN_COMMON
    count = sum(f.count for fields in fields_of(item) for f in fields.values())
    if 2 * count > _MOST_ELEMENTS or item.batched(2) is None:
        return 1
    return _MOST_ELEMENTS // max(1, count)


def _whole(batch: Batch) -> Kind:
    whole = batch.item.batched(len(batch.names))
    assert whole is not None
    return whole


@lru_cache(maxsize=4096)
def _axes(item: Kind) -> dict[str, int]:
    """Of each field, which axis the members lie along."""
    whole = item.batched(_PROBE)
    assert whole is not None
    return {n: f.shape.index(_PROBE) for fields in fields_of(whole) for n, f in fields.items()}
