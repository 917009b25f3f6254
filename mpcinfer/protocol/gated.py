"""A smooth function of one product times another product, such as SiLU(gate) * up: neither is truncated before."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpcinfer.protocol.context import Context, together
from mpcinfer.protocol.correlation import Field, FixedMasks, Kind, Tensors, kind
from mpcinfer.protocol.piecewise import ARGUMENT_BITS, Pieces, Spline, evaluated, open_residual, opens_coefficients
from mpcinfer.protocol.truncate import logical_shift, offset, truncated_parts
from mpcinfer.protocol.types import Shared
from mpcinfer.ring.domain import Z64, Ring
from mpcinfer.ring.gate import gate

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
    coefficients: bool = False

    def __post_init__(self) -> None:
        if self.cut + D > 64:
            raise ValueError("a residual that is truncated by so many bits needs one more product")

    def _pieces(self) -> Pieces:
        return Pieces(self.shape, _WIDTH, self.thresholds, self.cut, D, self.coefficients)

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
        h, h_wrap = self._pieces().truncated(free["s"])
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
    Of many numbers the cubic that is chosen is opened under masks, too, so that products of masks are dealt for one.
    Opened: those of `piecewise` from 32 fraction bits, of more than 4,096 numbers with those of coefficients; u + 2^62
    + t over Z_2^64.
    Rounds 5; online 41 bytes per element and peer for SiLU (T = 10), 8 of them for u; offline about 119 + 40 T; of more
    numbers (and from 7 thresholds on) rounds 6, 24 bytes more online and 30 T - 100 fewer offline; correlation
    `GatedPieces`.
    Source: as `piecewise`; products of more than two masked values by dealt products of masks as in ABY2.0.
    """
    if x.frac_bits != 2 * ARGUMENT_BITS or u.frac_bits != 2 * ARGUMENT_BITS:
        raise ValueError("a gate takes two products that were not truncated")
    cut = spline.frac_bits - ARGUMENT_BITS
    correlation = ctx.correlation(GatedPieces(x.shape, len(spline.thresholds), cut, opens_coefficients(x, spline)))
    at, other = await together(
        evaluated(ctx, offset(ctx, x), spline, correlation, _WIDTH, D),
        ctx.open(offset(ctx, u), correlation.mask("t")),
    )
    c_s, by_s = await open_residual(ctx, at.residual, correlation, cut)
    c_u, by_u = truncated_parts(other.value, D)
    (slope, constant), (right, last) = spline.left, spline.right
    z = gate(
        ctx.first,
        at.e,
        (at.c, at.wrapped, c_s, by_s, c_u, by_u),
        (at.m, at.bit, at.bit_m, correlation["inside"]),
        correlation,
        (slope, constant << ARGUMENT_BITS, right, last << ARGUMENT_BITS),
    )
    return Shared(z, 2 * ARGUMENT_BITS)
