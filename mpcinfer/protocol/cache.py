"""Rows that many later products share, such as the keys and values of a text: each is opened under a mask once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional

from mpcinfer.errors import ProtocolError
from mpcinfer.protocol.context import Begun, Context
from mpcinfer.protocol.correlation import Field, FixedMasks, Kind, Tensors, kind
from mpcinfer.protocol.types import Cached, Shared
from mpcinfer.ring.domain import Z64
from mpcinfer.ring.products import matmul

MOST_TIMES = 16  # that a plan is run from one tape


class RowStore:
    """Rows [*S, d] numbered from 0 as they are appended; a number is never given to another row.

    Whoever reads rows names runs of numbers, [first, end). So a text that is changed, or continued in two ways, shares
    the rows of what stayed, and all that is new has new numbers, hence new masks.
    """

    def __init__(self) -> None:
        self.count = 0
        self._rows: torch.Tensor | None = None

    def append(self, rows: torch.Tensor) -> None:
        """Add rows [*S, k, d]."""
        end = self.count + rows.shape[-2]
        if self._rows is None or end > self._rows.shape[-2]:
            larger = rows.new_zeros((*rows.shape[:-2], max(64, 2 * end), rows.shape[-1]))
            if self._rows is not None:
                larger[..., : self.count, :] = self._rows[..., : self.count, :]
            self._rows = larger
        self._rows[..., self.count : end, :] = rows
        self.count = end

    def skip(self, count: int) -> None:
        """Give the next numbers to no rows."""
        if self._rows is None:
            self.count += count
        else:
            self.append(self._rows.new_zeros((*self._rows.shape[:-2], count, self._rows.shape[-1])))

    def read(self, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
        """The rows of these runs, one after the other: [*S, m, d]; a view if it is one run."""
        if self._rows is None or any(not 0 <= first <= end <= self.count for first, end in runs):
            raise ProtocolError("a cache was asked for rows that it does not have")
        parts = [self._rows[..., first:end, :] for first, end in joined(runs)]
        return parts[0] if len(parts) == 1 else torch.cat([self._rows[..., :0, :], *parts], dim=-2)


def joined(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same rows in as few runs."""
    found: list[tuple[int, int]] = []
    for first, end in runs:
        if found and found[-1][1] == first:
            found[-1] = found[-1][0], end
        else:
            found.append((first, end))
    return found


@dataclass(frozen=True)
class CacheUse:
    """Which rows the cached products of a tape are of: public, and the same from all parties.

    slot: whose caches, 16 bytes. runs: their rows; what the tape appends comes after them. count: how many rows have
    been appended to each of them before. times: how often the plan is run, each time with the rows appended before.
    beside: those of other texts, where one run is for several; the plan's rows then have an axis more, in front.
    """

    slot: bytes
    runs: tuple[tuple[int, int], ...]
    count: int
    times: int = 1
    beside: tuple[CacheUse, ...] = ()

    @property
    def all(self) -> tuple[CacheUse, ...]:
        """That of each text."""
        return self, *self.beside

    def after(self, rows: int, times: int = 1) -> CacheUse:
        """The same, once so many rows more have been appended to each."""
        grown = tuple(joined([*self.runs, (self.count, self.count + rows)])) if rows else self.runs
        beside = tuple(other.after(rows, times) for other in self.beside)
        return CacheUse(self.slot, grown, self.count + rows, times, beside)

    def digest(self, plan: bytes) -> bytes:
        """SHA-256 of this and of the digest of a plan: what all parties must mean when they ask for a tape."""
        numbers = [self.times, self.count, *(n for run in self.runs for n in run)]
        parts = [plan, self.slot, *(n.to_bytes(8, "little") for n in numbers)]
        parts += [other.digest(plan) for other in self.beside]
        return hashlib.sha256(b"caches" + b"".join(len(p).to_bytes(4, "little") + p for p in parts)).digest()


def side_by_side(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows [*S, m, d] of several texts as one tensor with an axis in front; zeros stand before those that are fewer."""
    most = max(each.shape[-2] for each in rows)
    found = rows[0].new_zeros((len(rows), *rows[0].shape[:-2], most, rows[0].shape[-1]))
    for i, each in enumerate(rows):
        found[i, ..., most - each.shape[-2] :, :] = each
    return found


@kind
@dataclass(frozen=True)
class RowMask(Kind):
    """B, uniform: masks new rows of a cache for as long as it lives. The dealer keeps it for the products below."""

    cache: str
    shape: tuple[int, ...]
    growing: ClassVar[bool] = True

    def free(self) -> dict[str, Field]:
        """b masks the rows."""
        return {"b": Field(self.shape, Z64)}


@kind
@dataclass(frozen=True)
class CachedProduct(Kind):
    """A mask a of x and c = a B, or a B^T, for the masks B of all rows of a cache; zero where it has none yet.

    rows: shape of the cache, with its capacity for their number.
    """

    cache: str
    x: tuple[int, ...]
    rows: tuple[int, ...]
    transposed: bool

    def free(self) -> dict[str, Field]:
        """a masks x."""
        return {"a": Field(self.x, Z64)}

    def derived(self) -> dict[str, Field]:
        """c = a B or a B^T."""
        return {"c": Field((*self.x[:-1], self.rows[-2 if self.transposed else -1]), Z64)}

    def derive(self, free: Tensors, fixed: FixedMasks) -> Tensors:
        """See `derived`."""
        return {"c": product(free["a"], fixed(self.cache), self.rows[-2], self.transposed)}

    def multiply_adds(self) -> tuple[int, int]:
        """op(e, rows) and op(a, F) online, op(a, B) before."""
        total = self.rows[-2] * self.rows[-1]
        for size in self.x[:-1]:
            total *= size
        return 2 * total, total


def product(x: torch.Tensor, rows: torch.Tensor, capacity: int, transposed: bool) -> torch.Tensor:
    """x rows^T, with zeros for rows that are not there, [*S, l, d] -> [*S, l, capacity]; or x rows, the other way."""
    count = rows.shape[-2]
    if transposed:
        return functional.pad(matmul(x, rows.transpose(-1, -2)), (0, capacity - count))
    return matmul(x[..., :count], rows)


async def append(ctx: Context, cache: Cached, rows: Shared) -> Cached:
    """The cache with more rows [*S, k, d].

    Opened: rows + b over Z_2^64, b uniform there, dealt for these rows and used for this opening only. Any number of
    products under fresh masks of the other operand then leaks nothing, since each needs only c = a B in shares. What
    is opened must not reach the dealer, who keeps B. Rounds 1; online 8 bytes per element and peer; offline nothing;
    correlation `RowMask`.
    """
    begun = appending(ctx, cache, rows)
    await begun.rest
    grown: Cached = begun.value
    return grown


def text_count(item: Kind) -> int | None:
    """Of how many texts side by side a correlation has rows, if it has any."""
    if isinstance(item, RowMask):
        return item.shape[0]
    return item.x[0] if isinstance(item, CachedProduct) else None


def appending(ctx: Context, cache: Cached, rows: Shared) -> Begun:
    """As `append`, but its opening is only begun: a product with the rows opens its other operand in the same round."""
    if rows.frac_bits != cache.frac_bits or rows.shape[-2] + cache.shape[-2] > cache.capacity:
        raise ProtocolError(f"cache {cache.name!r} has no room for more rows, or they have another scale")
    mask = ctx.correlation(RowMask(cache.name, rows.shape)).mask("b")
    grown = Cached(cache.name, torch.cat([cache.share, rows.share], dim=-2), None, cache.capacity, cache.frac_bits)

    async def rest() -> None:
        opened = (await ctx.open(rows, mask)).value
        grown.complete(torch.cat([cache.masked, opened], dim=-2))

    return Begun(grown, rest())


async def cached_product(ctx: Context, x: Shared, cache: Cached, *, transposed: bool) -> Shared:
    """Shares of x rows^T, [*S, l, d] -> [*S, l, capacity], or of x rows, [*S, l, capacity] -> [*S, l, d]. Exact.

    Columns of rows that the cache does not have yet are zero; entries of x for such rows count for nothing. Scales
    add up, nothing is truncated.
    Opened: e = x + a over Z_2^64, a uniform there. As rows = F - B, x rows = e rows + a B - a F.
    The cache's rows may be under way until x is open.
    Rounds 1; online 8 bytes per element of x and peer, nothing for the cache; offline 8 bytes per element of the
    result; correlation `CachedProduct`. Source: as `linear.fixed_product`, with a mask that grows row by row.
    """
    shape = (*cache.shape[:-2], cache.capacity, cache.shape[-1])
    correlation = ctx.correlation(CachedProduct(cache.name, x.shape, shape, transposed))
    e = (await ctx.open(x, correlation.mask("a"))).value
    y = product(e, cache.share, cache.capacity, transposed) + correlation["c"]
    y = y - product(correlation["a"], cache.masked, cache.capacity, transposed)
    return Shared(y, x.frac_bits + cache.frac_bits)
