"""A secret index as a one-hot vector: what selects a row of a table without saying which. And such rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from mpcinfer.protocol.context import Context
from mpcinfer.protocol.correlation import Field, FixedMasks, Kind, Tensors, kind
from mpcinfer.protocol.linear import fixed_product
from mpcinfer.protocol.multiply import multiply
from mpcinfer.protocol.types import Shared, Weight
from mpcinfer.ring.domain import Z64, Ring
from mpcinfer.ring.kernels import MATMUL

MAX_BITS = 24
# what a round more must save: as much as a link of 1 Gbit/s carries in 0.5 ms
_ROUND_BYTES = 1 << 16


@kind
@dataclass(frozen=True)
class OneHot(Kind):
    """r uniform on Z_2^bits, and the vector of 2^bits numbers that is 1 at r and 0 elsewhere."""

    shape: tuple[int, ...]
    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MAX_BITS:
            raise ValueError(f"an index has 1 to {MAX_BITS} bits, not {self.bits}")

    def free(self) -> dict[str, Field]:
        """r masks the index."""
        return {"r": Field(self.shape, Ring(self.bits))}

    def derived(self) -> dict[str, Field]:
        """table[..., u] = [u = r]."""
        return {"table": Field((*self.shape, 1 << self.bits), Z64)}

    def derive(self, free: Tensors, fixed: FixedMasks) -> Tensors:
        """See `derived`."""
        table = torch.zeros((*self.shape, 1 << self.bits), dtype=torch.int64)
        return {"table": table.scatter_(-1, free["r"].unsqueeze(-1), 1)}


def index_bits(count: int) -> int:
    """The fewest bits that number `count` things."""
    return max(1, (count - 1).bit_length())


async def one_hot(ctx: Context, index: Shared, count: int) -> Shared:
    """Shares of [index = v] for v = 0 .. count - 1: [*S] -> [*S, count], integers. Exact.

    Input: integers (frac_bits 0) in [0, count). Any other index gives zeros or the vector of another index (it is
    taken mod 2^bits): whoever shares one learns no more by it.
    Opened: index + r over Z_2^bits, bits = ceil(log2 count), r uniform there. As c = index + r is public and the
    vector of r is dealt, [index = v] = [r = c - v]: each party rotates its share.
    Rounds 1; online bits / 8 bytes per index and peer; offline 8 * 2^bits bytes per index; correlation `OneHot`.
    Source: DESIGN's general principle for functions of c - r; one-hot tables as in the one-time truth tables of
    Ishai et al. 2013.
    """
    bits = index_bits(count)
    correlation = ctx.correlation(OneHot(index.shape, bits))
    c = (await ctx.open(index, correlation.mask("r"))).value
    return Shared(_rotated(correlation["table"], c, count))


def block_size(count: int, width: int, indices: int) -> int:
    """By how many rows at a time `row_of` goes through a table [count, width]; 1 if looking twice saves too little."""
    best = _cheapest(count, width)
    saved = 8 * indices * (count - _opened(count, width, best))
    return best if saved >= _ROUND_BYTES else 1


@cache
def _cheapest(count: int, width: int) -> int:
    sizes = (size for size in range(2, count // 2 + 1) if count % size == 0)
    return min(sizes, key=lambda size: _opened(count, width, size), default=1)


def _opened(count: int, width: int, size: int) -> int:
    """How many numbers are opened for an index: one for each block, all of a block, which of its rows it is."""
    return count // size + size * width + size


async def row_of(ctx: Context, index: Shared, table: Weight) -> Shared:
    """table[index]: [V, d], [*S] -> [*S, d], at the table's scale. Exact. What is an index: see `one_hot`.

    The product of a one-hot vector with the table opens V numbers. A large table is taken as V / g blocks of g rows
    instead, g a divisor of V: the vector's sums over blocks say which block it is, its sums over the places in a block
    which row of that. The first selects a block, g d shared numbers, by a product with the same weight under the same
    mask; the second selects the row.
    Opened: as in `one_hot`, then e = selection + a as in `fixed_product`; with blocks then both operands of `multiply`.
    Rounds 2; online 8 V bytes and those of `one_hot` per index and peer, offline 8 (2^bits + d) per index. With blocks
    rounds 3, online 8 (V / g + g d + g) instead of 8 V, offline 8 g d more. They are taken where that saves enough.
    Correlations `OneHot`, `FixedProduct`, `Triple`. Source: splitting an index in two is Chor et al.'s (1998), from
    private information retrieval; with a secret table by a product with a reused mask it is our own.
    """
    count, width = table.shape
    selection = await one_hot(ctx, index, count)
    size = block_size(count, width, index.share.numel())
    if size == 1:
        return await fixed_product(ctx, selection, table, MATMUL)
    parts = selection.map(lambda t: t.reshape(*index.shape, count // size, size))
    blocks = table.reshape(count // size, size * width)
    block = await fixed_product(ctx, parts.map(lambda t: t.sum(-1)), blocks, MATMUL)
    place = parts.map(lambda t: t.sum(-2).unsqueeze(-2))
    row = await multiply(ctx, place, block.map(lambda t: t.reshape(*index.shape, size, width)), MATMUL)
    return row.map(lambda t: t.squeeze(-2))


def _rotated(table: torch.Tensor, c: torch.Tensor, count: int) -> torch.Tensor:
    """out[..., v] = table[..., (c - v) mod 2^bits] for v < count."""
    size = table.shape[-1]
    out = torch.empty((*c.shape, count), dtype=torch.int64, device=table.device)
    if table.device.type == "meta":
        return out
    # one index after the other, so that no tensor of positions as large as the result is needed
    rows = zip(out.reshape(-1, count), table.reshape(-1, size), c.reshape(-1).tolist(), strict=True)
    down = -torch.arange(count)
    for row, values, at in rows:
        torch.index_select(values, 0, (down + at) & (size - 1), out=row)
    return out
