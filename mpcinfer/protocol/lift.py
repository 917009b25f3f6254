"""Numbers that are shared modulo a small power of two, shared modulo 2^64."""

from __future__ import annotations

from dataclasses import dataclass

from mpcinfer.protocol.context import Context
from mpcinfer.protocol.correlation import Field, FixedMasks, Kind, Tensors, kind
from mpcinfer.protocol.types import Shared
from mpcinfer.ring.domain import Z64, Ring


@kind
@dataclass(frozen=True)
class Lift(Kind):
    """r uniform on Z_2^bits, as a number, and its top bit, which will be multiplied by 2^bits."""

    shape: tuple[int, ...]
    bits: int

    def free(self) -> dict[str, Field]:
        """r masks what is lifted."""
        return {"r": Field(self.shape, Ring(self.bits))}

    def derived(self) -> dict[str, Field]:
        """number = r; wrap = msb(r)."""
        return {"number": Field(self.shape, Z64), "wrap": Field(self.shape, Ring(64 - self.bits))}

    def derive(self, free: Tensors, fixed: FixedMasks) -> Tensors:
        """See `derived`."""
        return {"number": free["r"], "wrap": free["r"] >> (self.bits - 1)}


async def lift(ctx: Context, x: Shared, bits: int) -> Shared:
    """Shares over Z_2^64 of numbers x of which these are shares modulo 2^bits, whatever is above. Exact.

    Input: 0 <= x < 2^(bits - 1). Opened: x + r over Z_2^bits, r uniform there. The sum has wrapped around if r's top
    bit is 1 and that of what was opened is 0.
    Rounds 1; online bits / 8 bytes per element and peer; offline 16 - bits / 8; correlation `Lift`.
    Source: the wrap from top bits as in EGK+20's truncation.
    """
    correlation = ctx.correlation(Lift(x.shape, bits))
    c = (await ctx.open(x, correlation.mask("r"))).value
    wrapped = (1 - (c >> (bits - 1))) << bits
    y = wrapped * correlation["wrap"] - correlation["number"]
    return Shared(y + c if ctx.first else y, x.frac_bits)
