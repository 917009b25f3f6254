"""A secret index as a one-hot vector: what selects a row of a table without saying which."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpcinfer.protocol.context import Context
from mpcinfer.protocol.correlation import Field, FixedMasks, Kind, Tensors, kind
from mpcinfer.protocol.types import Shared
from mpcinfer.ring.domain import Z64, Ring

MAX_BITS = 24


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
