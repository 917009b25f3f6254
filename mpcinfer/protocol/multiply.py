"""Products of two secrets (Beaver), of any bilinear map, and squares."""

from __future__ import annotations

from dataclasses import dataclass

from mpcinfer.protocol.context import Context, together
from mpcinfer.protocol.correlation import Field, FixedMasks, Kind, Tensors, kind
from mpcinfer.protocol.types import Shared
from mpcinfer.ring.domain import Z64
from mpcinfer.ring.kernels import MATMUL, MUL, Bilinear


@kind
@dataclass(frozen=True)
class Triple(Kind):
    """Masks a, b of the operands and c = op(a, b)."""

    op: Bilinear
    x: tuple[int, ...]
    y: tuple[int, ...]

    def free(self) -> dict[str, Field]:
        """a masks x, b masks y."""
        return {"a": Field(self.x, Z64), "b": Field(self.y, Z64)}

    def derived(self) -> dict[str, Field]:
        """c = op(a, b)."""
        return {"c": Field(self.op.shape(self.x, self.y), Z64)}

    def derive(self, free: Tensors, fixed: FixedMasks) -> Tensors:
        """See `derived`."""
        return {"c": self.op(free["a"], free["b"])}

    def batched(self, count: int) -> Kind | None:
        """Of products and matrix products, which broadcast."""
        if self.op not in (MUL, MATMUL) or (self.op == MATMUL and min(len(self.x), len(self.y)) < 2):
            return None
        rank = max(len(self.x), len(self.y))
        x, y = ((count, *[1] * (rank - len(shape)), *shape) for shape in (self.x, self.y))
        return Triple(self.op, x, y)

    def multiply_adds(self) -> tuple[int, int]:
        """op(a, f), op(e, b) and op(e, f) online, op(a, b) before."""
        product = self.op.multiply_adds(self.x, self.y)
        return 3 * product, product


@kind
@dataclass(frozen=True)
class SquarePair(Kind):
    """A mask a and its square."""

    shape: tuple[int, ...]

    def free(self) -> dict[str, Field]:
        """a masks x."""
        return {"a": Field(self.shape, Z64)}

    def derived(self) -> dict[str, Field]:
        """aa = a * a."""
        return {"aa": Field(self.shape, Z64)}

    def derive(self, free: Tensors, fixed: FixedMasks) -> Tensors:
        """See `derived`."""
        return {"aa": free["a"] * free["a"]}


async def multiply(ctx: Context, x: Shared, y: Shared, op: Bilinear = MUL) -> Shared:
    """Shares of op(x, y) over Z_2^64; scales add up, nothing is truncated. Exact.

    Opened: x + a and y + b over Z_2^64, a and b uniform there; both in one message.
    Rounds 1; online 8 bytes per element of x and of y and peer; offline 8 bytes per element of the result;
    correlation `Triple`. Source: Beaver 1991, with masks added instead of subtracted.
    """
    triple = ctx.correlation(Triple(op, x.shape, y.shape))
    e, f = (m.value for m in await together(ctx.open(x, triple.mask("a")), ctx.open(y, triple.mask("b"))))
    z = triple["c"] - op(triple["a"], f) - op(e, triple["b"])
    if ctx.first:
        z = z + op(e, f)
    return Shared(z, x.frac_bits + y.frac_bits)


async def square(ctx: Context, x: Shared) -> Shared:
    """Shares of x * x; the scale doubles, nothing is truncated. Exact.

    Opened: x + a over Z_2^64, a uniform there. Rounds 1; online 8 bytes per element and peer; offline 8 bytes;
    correlation `SquarePair`. Source: Beaver 1991, one operand.
    """
    pair = ctx.correlation(SquarePair(x.shape))
    e = (await ctx.open(x, pair.mask("a"))).value
    z = pair["aa"] - 2 * e * pair["a"]
    if ctx.first:
        z = z + e * e
    return Shared(z, 2 * x.frac_bits)
