"""Truncation: divide by a power of two, wrong by less than one unit in the last place, always.

Local truncation of shares is not offered: it fails by 2^(64-d) with probability 2^(bits + 1 - 64) per element.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpcinfer.protocol.context import Context
from mpcinfer.protocol.correlation import Field, FixedMasks, Kind, Tensors, kind
from mpcinfer.protocol.types import Shared
from mpcinfer.ring.domain import Z64, Ring

OFFSET_BITS = 62
_LOW_BITS, _FAR = 32, 8


def logical_shift(x: torch.Tensor, d: int) -> torch.Tensor:
    """x >> d of the unsigned 64-bit word, 0 < d < 64."""
    return (x >> d) & ((1 << (64 - d)) - 1)


def offset(ctx: Context, x: Shared) -> Shared:
    """x + 2^62, which is what is opened where a number loses bits: not negative, so that its top bits tell the wrap."""
    return Shared(x.share + (1 << OFFSET_BITS), x.frac_bits) if ctx.first else x


def truncated_parts(c: torch.Tensor, d: int, without: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Of an opened c = x + 2^62 + r: p and q with x / 2^d = p - ((r >> d) - q msb(r)). q is 0 or 2^(64 - d).

    Where c and r are `without` low bits: 2^(62 - without), r >> (d - without), 2^(64 - d) as before.
    """
    low = c >= 0 if not without else c < 1 << (63 - without)
    return logical_shift(c, d - without) - (1 << (OFFSET_BITS - d)), low.to(torch.int64) << (64 - d)


def unopened_bits(d: int) -> int:
    """How many low bits of a number that is truncated by d bits may be left out of what is opened: half of them all,
    where what they carry is far below the last place that stays."""
    return _LOW_BITS if d >= _LOW_BITS + _FAR else 0


def without_low_bits(x: Shared, count: int) -> Shared:
    """x / 2^count, modulo 2^(64 - count): floor(x / 2^count) or less, by at most one for each party but the first.

    Local: every party forgets the lowest bits of its share, and with them what they carry. So a number must not be the
    least of a domain.
    """
    return Shared(logical_shift(x.share, count), x.frac_bits - count) if count else x


@kind
@dataclass(frozen=True)
class Truncation(Kind):
    """r uniform on Z_2^64, r >> d, and msb(r) mod 2^d."""

    shape: tuple[int, ...]
    d: int

    def free(self) -> dict[str, Field]:
        """The mask r."""
        return {"r": Field(self.shape, Z64)}

    def derived(self) -> dict[str, Field]:
        """high = r >> d; wrap = msb(r)."""
        return {"high": Field(self.shape, Z64), "wrap": Field(self.shape, Ring(self.d))}

    def derive(self, free: Tensors, fixed: FixedMasks) -> Tensors:
        """See `derived`."""
        r = free["r"]
        return {"high": logical_shift(r, self.d), "wrap": logical_shift(r, 63)}


async def truncate(ctx: Context, x: Shared, d: int) -> Shared:
    """Shares of x / 2^d.

    Input: x over Z_2^64 with -2^62 <= x < 2^62. Output: floor(x / 2^d) + b, b in {0, 1}: error below 1 ULP, never
    more inside the domain. frac_bits fall by d.
    Opened: x + 2^62 + r over Z_2^64, r uniform there.
    Functionality, stated: draws rho uniform on Z_2^d, tells the parties rho, outputs floor + [x mod 2^d > rho]; the
    mean error is 0.
    Rounds 1; online 8 bytes per element and peer; offline 8 + d/8 bytes; correlation `Truncation`.
    Source: Escudero et al. 2020 (EGK+20), fig. 10, with the wrap taken from the top bits, for a public power of two.
    """
    if d == 0:
        return x
    if not 0 < d < OFFSET_BITS:
        raise ValueError(f"cannot truncate by {d} bits")
    correlation = ctx.correlation(Truncation(x.shape, d))
    c = (await ctx.open(offset(ctx, x), correlation.mask("r"))).value
    public, wrapped = truncated_parts(c, d)
    y = wrapped * correlation["wrap"] - correlation["high"]
    return Shared(y + public if ctx.first else y, x.frac_bits - d)
