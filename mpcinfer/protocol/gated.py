"""A smooth function of one product times another product, such as SiLU(gate) * up: neither is truncated before."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpcinfer.protocol.context import Context, together
from mpcinfer.protocol.correlation import Field, FixedMasks, Kind, Tensors, kind
from mpcinfer.protocol.piecewise import ARGUMENT_BITS, Pieces, Spline, evaluated
from mpcinfer.protocol.truncate import logical_shift, offset, truncated_parts
from mpcinfer.protocol.types import Shared
from mpcinfer.ring.domain import Z64, Ring

# what both factors lose, and what is left for comparisons
D = ARGUMENT_BITS
_WIDTH = 64 - D


@kind
@dataclass(frozen=True)
class GatedPieces(Kind):
    """`Pieces` of a truncated number, a mask t of the other factor, and products of what hides the two.

    That is for n = t >> 16 and msb(t); m = r >> 16 and msb(r); h = s >> cut and msb(s); and for 1, the beta of where
    the asymptotes change (in products with m) and that of the outer knots (with h). Products of two top bits are not
    needed: they would be multiplied by a multiple of 2^64. What is multiplied by 2^(64 - k) has k bits.
    """

    shape: tuple[int, ...]
    thresholds: int
    cut: int

    def __post_init__(self) -> None:
        if self.cut + D > 64:
            raise ValueError("a residual that is truncated by so many bits needs one more product")

    def _pieces(self) -> Pieces:
        return Pieces(self.shape, _WIDTH, self.thresholds, self.cut, D)

    def free(self) -> dict[str, Field]:
        """Those of `Pieces`; t."""
        return self._pieces().free() | {"t": Field(self.shape, Z64)}

    def derived(self) -> dict[str, Field]:
        """Those of `Pieces`; n and msb(t) times 1, beta, inside; products of m and n, of h and n, times 1 and a bit."""
        two, three = (2, *self.shape), (3, *self.shape)
        return self._pieces().derived() | {
            "n": Field(three, Z64),
            "n_wrap": Field(three, Ring(D)),
            "mn": Field(two, Z64),
            "m_wrap_n": Field(two, Ring(D)),
            "m_n_wrap": Field(two, Ring(D)),
            "hn": Field(two, Z64),
            "h_wrap_n": Field(two, Ring(self.cut)),
            "h_n_wrap": Field(two, Ring(D)),
        }

    def derive(self, free: Tensors, fixed: FixedMasks) -> Tensors:
        """See `derived`."""
        one = torch.ones(self.shape, dtype=torch.int64)
        inside, beta = free["beta"][:2].to(torch.int64)
        m, m_wrap = logical_shift(free["r"], D), logical_shift(free["r"], 63)
        n, n_wrap = logical_shift(free["t"], D), logical_shift(free["t"], 63)
        h, h_wrap = logical_shift(free["s"], self.cut), logical_shift(free["s"], 63)
        each, switch, ends = torch.stack([one, beta, inside]), torch.stack([one, beta]), torch.stack([one, inside])
        return self._pieces().derive(free, fixed) | {
            "n": each * n,
            "n_wrap": each * n_wrap,
            "mn": switch * (m * n),
            "m_wrap_n": switch * (m_wrap * n),
            "m_n_wrap": switch * (m * n_wrap),
            "hn": ends * (h * n),
            "h_wrap_n": ends * (h_wrap * n),
            "h_n_wrap": ends * (h * n_wrap),
        }


async def gated(ctx: Context, x: Shared, u: Shared, spline: Spline) -> Shared:
    """Shares of f(x) u, element by element, with 32 fraction bits, for a fitted function f.

    Input: x and u of one shape with 32 fraction bits each, those of products (ValueError otherwise), and
    -2^62 <= x, u < 2^62. Output: f as `piecewise` has it, of x truncated to 16 fraction bits, with 16 of its own, times
    u truncated to 16; exact but for these. abs(f(x) u) < 2^62 as well for what truncates it.
    How: as `piecewise`, whose value is (asymptote) + [x between the outer knots] (residual): every term is a product
    of numbers and bits that are public but for their masks, and so is its product with u, of which the products of
    masks are dealt. So u is opened once, its truncation and f(x) need no opening of their own.
    Opened: those of `piecewise` from 32 fraction bits; u + 2^62 + t over Z_2^64.
    Rounds 5; online 45 bytes per element and peer for SiLU (T = 10), 8 of them for u; offline about 250 + 41 T;
    correlation `GatedPieces`.
    Source: as `piecewise`; products of more than two masked values by dealt products of masks as in ABY2.0.
    """
    if x.frac_bits != 2 * ARGUMENT_BITS or u.frac_bits != 2 * ARGUMENT_BITS:
        raise ValueError("a gate takes two products that were not truncated")
    cut = spline.frac_bits - ARGUMENT_BITS
    correlation = ctx.correlation(GatedPieces(x.shape, len(spline.thresholds), cut))
    at, other = await together(
        evaluated(ctx, offset(ctx, x), spline, correlation, _WIDTH, D),
        ctx.open(offset(ctx, u), correlation.mask("t")),
    )
    c_s, by_s = truncated_parts((await ctx.open(offset(ctx, at.residual), correlation.mask("s"))).value, cut)
    c_u, by_u = truncated_parts(other.value, D)
    # for 1, beta, inside: shares of what u = c_u - n is a public number minus
    n, beta_n, inside_n = correlation["n"] - by_u * correlation["n_wrap"]
    mn, beta_mn = correlation["mn"] - at.wrapped * correlation["m_wrap_n"] - by_u * correlation["m_n_wrap"]
    hn, inside_hn = correlation["hn"] - by_s * correlation["h_wrap_n"] - by_u * correlation["h_n_wrap"]
    h, inside_h = correlation["high"] - by_s * correlation["wrap"]

    def product(
        c: torch.Tensor, one: torch.Tensor | int, m: torch.Tensor, n: torch.Tensor, mn: torch.Tensor
    ) -> torch.Tensor:
        """A share of (c - m) (c_u - n), all times a bit."""
        return (c * one) * c_u - c * n - c_u * m + mn

    def chosen(e: torch.Tensor, whole: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """A share of a number times e xor beta, from shares of the number and of it times beta."""
        return torch.where(e != 0, whole - masked, masked)

    one = 1 if ctx.first else 0
    inside = chosen(
        at.e[0], product(c_s, one, h, n, hn), product(c_s, correlation["inside"], inside_h, inside_n, inside_hn)
    )
    (slope, constant), (right, last) = spline.left, spline.right
    xu, switched_xu = product(at.c, one, at.m, n, mn), product(at.c, at.bit, at.bit_m, beta_n, beta_mn)
    only_u, switched_u = one * c_u - n, at.bit * c_u - beta_n
    z = inside + right * xu + (slope - right) * chosen(at.e[1], xu, switched_xu)
    z = (
        z
        + (last << ARGUMENT_BITS) * only_u
        + ((constant - last) << ARGUMENT_BITS) * chosen(at.e[1], only_u, switched_u)
    )
    return Shared(z, 2 * ARGUMENT_BITS)
