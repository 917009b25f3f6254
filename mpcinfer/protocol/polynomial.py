"""Polynomials of a secret that is truncated first, both by one opening."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import torch

from mpcinfer.protocol.context import Context
from mpcinfer.protocol.correlation import Field, FixedMasks, Kind, Tensors, kind
from mpcinfer.protocol.truncate import logical_shift, offset, truncated_parts
from mpcinfer.protocol.types import Shared
from mpcinfer.ring.domain import Z64, Ring


@kind
@dataclass(frozen=True)
class TruncatedPowers(Kind):
    """r uniform on Z_2^64 and the powers 1..degree of m = r >> d and of m - 2^(64-d) msb(r).

    The truncated value is a public number minus one or the other, as the opened number's top bit says. Powers of the
    two differ by multiples of 2^(64-d), so the second set is dealt as a difference of d bits.
    """

    shape: tuple[int, ...]
    d: int
    degree: int

    def free(self) -> dict[str, Field]:
        """The mask r."""
        return {"r": Field(self.shape, Z64)}

    def derived(self) -> dict[str, Field]:
        """powers = m^j; wrap = what takes them to the other set, divided by 2^(64-d)."""
        many = (self.degree, *self.shape)
        return {"powers": Field(many, Z64), "wrap": Field(many, Ring(self.d))}

    def derive(self, free: Tensors, fixed: FixedMasks) -> Tensors:
        """See `derived`."""
        m = logical_shift(free["r"], self.d)
        powers = _powers(m, self.degree)
        wrapped = _powers(m - (logical_shift(free["r"], 63) << (64 - self.d)), self.degree)
        return {"powers": powers, "wrap": logical_shift(wrapped - powers, 64 - self.d)}


def _powers(x: torch.Tensor, degree: int) -> torch.Tensor:
    found = [x]
    for _ in range(degree - 1):
        found.append(found[-1] * x)
    return torch.stack(found)


async def polynomials(
    ctx: Context, x: Shared, d: int, coefficients: tuple[tuple[int, ...], ...], frac_bits: tuple[int, ...]
) -> list[Shared]:
    """Shares of several polynomials a_0 + a_1 y + a_2 y^2 + ... over Z_2^64, of y = x / 2^d truncated, a_j integers.

    Input: -2^62 <= x < 2^62, 0 < d < 62. y = floor(x / 2^d) or one more, as `truncate` has it, the same for all; a
    polynomial of y is exact mod 2^64, so any bound below 2^63 on its value (not on its terms) will do. The results are
    labelled with `frac_bits`, which the coefficients must have been made for.
    Opened: x + 2^62 + r over Z_2^64, r uniform there.
    Rounds 1; online 8 bytes per element and peer; offline 8 + d/8 bytes per element and degree of the highest;
    correlation `TruncatedPowers`.
    Source: powers of a masked value by the binomial theorem as in HoneyBadgerMPC (PowerMix); doing so on the
    truncated value, with the wrap taken from the top bits as in EGK+20, is our own.
    """
    correlation = ctx.correlation(TruncatedPowers(x.shape, d, max(map(len, coefficients)) - 1))
    c = (await ctx.open(offset(ctx, x), correlation.mask("r"))).value
    public, wrapped = truncated_parts(c, d)
    powers = correlation["powers"] + wrapped * correlation["wrap"]
    return [
        Shared(_evaluated(ctx.first, public, powers, a), bits) for a, bits in zip(coefficients, frac_bits, strict=True)
    ]


def _evaluated(first: bool, public: torch.Tensor, powers: torch.Tensor, a: tuple[int, ...]) -> torch.Tensor:
    """This party's share of the polynomial of public - m, from shares of the powers of m."""
    degree = len(a) - 1

    def factor(i: int) -> torch.Tensor:
        """What multiplies (-m)^i: the sum over j >= i of a_j binomial(j, i) public^(j - i), by Horner's rule."""
        total = torch.full_like(public, a[degree] * comb(degree, i))
        for j in range(degree - 1, i - 1, -1):
            total = total * public + a[j] * comb(j, i)
        return total

    y = factor(0) if first else torch.zeros_like(public)
    for i in range(1, degree + 1):
        y = y + (-1) ** i * factor(i) * powers[i - 1]
    return y


async def polynomial(ctx: Context, x: Shared, d: int, coefficients: tuple[int, ...], frac_bits: int) -> Shared:
    """Shares of one polynomial of y = x / 2^d truncated; see `polynomials`."""
    return (await polynomials(ctx, x, d, (coefficients,), (frac_bits,)))[0]
