"""Products with the model's weights, whose masks are fixed for a deployment: nothing grows with the weights online."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mpcinfer.protocol.context import Context
from mpcinfer.protocol.correlation import Field, FixedMasks, Kind, Tensors, kind
from mpcinfer.protocol.types import Shared, Weight
from mpcinfer.ring.domain import Z64
from mpcinfer.ring.kernels import Bilinear


@kind
@dataclass(frozen=True)
class WeightMask(Kind):
    """B, uniform: masks a weight for the life of a deployment. The dealer keeps it for the products below."""

    weight: str
    shape: tuple[int, ...]
    lasting: ClassVar[bool] = True

    def free(self) -> dict[str, Field]:
        """b masks the weight."""
        return {"b": Field(self.shape, Z64)}


@kind
@dataclass(frozen=True)
class FixedProduct(Kind):
    """A mask a of the input and c = op(a, B), B the weight's lasting mask; w is the shape in which B is taken."""

    op: Bilinear
    weight: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    common: ClassVar[bool] = True

    def free(self) -> dict[str, Field]:
        """a masks x."""
        return {"a": Field(self.x, Z64)}

    def batched(self, count: int) -> Kind | None:
        """Rows of all, times one matrix."""
        if self.op.name not in ("matmul", "matmul_t") or len(self.w) != 2:
            return None
        return FixedProduct(self.op, self.weight, (count, *self.x), self.w)

    def derived(self) -> dict[str, Field]:
        """c = op(a, B)."""
        return {"c": Field(self.op.shape(self.x, self.w), Z64)}

    def derive(self, free: Tensors, fixed: FixedMasks) -> Tensors:
        """See `derived`."""
        return {"c": self.op(free["a"], fixed(self.weight).reshape(self.w))}

    def prepare(self, shares: Tensors, opened: FixedMasks) -> Tensors:
        """c becomes this party's share of -op(a, W) = op(a, B) - op(a, F)."""
        a = shares["a"]
        return {"a": a, "c": shares["c"] - self.op(a, opened(self.weight).reshape(self.w))}

    def multiply_adds(self) -> tuple[int, int]:
        """op(e, W) online; op(a, B) and op(a, F) before."""
        product = self.op.multiply_adds(self.x, self.w)
        return product, 2 * product


async def mask_weight(ctx: Context, name: str, w: Shared) -> Weight:
    """Open F = W + B and keep it with the share: once per deployment and mesh session.

    Opened: W + B over Z_2^64, B uniform there and used for this opening only; any number of products under fresh
    input masks then leaks nothing, since each needs only c = op(a, B) in shares. F must not reach the dealer, who
    knows B. Rounds 1; online 8 bytes per weight and peer; correlation `WeightMask`.
    """
    correlation = ctx.correlation(WeightMask(name, w.shape))
    f = await ctx.open(w, correlation.mask("b"))
    return Weight(name, w.share, f.value, w.frac_bits)


async def fixed_product(ctx: Context, x: Shared, w: Weight, op: Bilinear) -> Shared:
    """Shares of op(x, W) over Z_2^64; scales add up, nothing is truncated. Exact.

    Opened: e = x + a over Z_2^64, a uniform there. Then op(x, W) = op(e, W) - op(a, W): one local product of a public
    tensor with the weight's share, plus what `FixedProduct.prepare` made before the input was there.
    Rounds 1; online 8 bytes per element of x and peer, nothing per weight; offline 8 bytes per element of the result;
    correlation `FixedProduct`. Source: Beaver 1991 with a reused mask (as SPU's BeaverCache); the split of op(x, W)
    into one online product is our own.
    """
    correlation = ctx.correlation(FixedProduct(op, w.name, x.shape, w.shape))
    e = (await ctx.open(x, correlation.mask("a"))).value
    return Shared(op(e, w.share) + correlation["c"], x.frac_bits + w.frac_bits)
