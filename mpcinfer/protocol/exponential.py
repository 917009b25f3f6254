"""e^x with one opening of x: of numbers that are not positive, and of all numbers up to a ceiling."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpcinfer.protocol.compare import Comparison, below
from mpcinfer.protocol.context import Context, together
from mpcinfer.protocol.correlation import Correlation, Field, FixedMasks, Kind, Tensors, kind
from mpcinfer.protocol.polynomial import polynomial
from mpcinfer.protocol.truncate import logical_shift, truncate
from mpcinfer.protocol.types import Masked, Shared, SharedBits
from mpcinfer.ring import digits
from mpcinfer.ring.codec import MAX_FRAC_BITS, MIN_FRAC_BITS
from mpcinfer.ring.domain import BIT, Z64, Ring
from mpcinfer.ring.power import masked_exp, scaled_exp

# x is taken modulo 16; up to 2^-4 above zero is let through, so that a maximum taken coarsely does no harm
WINDOW_BITS = 4
SLACK_BITS = 4
# the scales of the dealt e^-r and of the public e^c: rounding costs 2^-20 at either end of the window, less between
DEALT_BITS, PUBLIC_BITS = 42, 19
# with a ceiling e^(x/2) is computed, up to e^4, and then squared: relative errors are below 2^-17 from x = 0 on
CEILING = 8
_HALF_DEALT_BITS, _HALF_PUBLIC_BITS, _SQUARED_BITS = 39, 17, 25


def _low_layout(bits: int) -> tuple[int, int]:
    """Blocks, and leaves of a block, for comparing numbers of `bits` bits; spare leading digits are zero."""
    return (2, 3) if bits <= 24 else (2, 4)


@kind
@dataclass(frozen=True)
class Exponential(Kind):
    """A `Comparison` with one threshold, block masks to compare the low bits of m, outcome masks, and e^-m.

    m = r >> d, uniform on Z_2^width as r is on Z_2^(width + d), masks a number that has lost d bits. `frac_bits`, its
    own, is a multiple of 4, so that the low `frac_bits` + 4 bits (m modulo 16) are whole digits. `ceiling`: one more
    threshold, for what is too large.
    """

    shape: tuple[int, ...]
    frac_bits: int
    dealt_bits: int
    ceiling: bool = False
    width: int = 64
    d: int = 0

    def __post_init__(self) -> None:
        if self.d < 0:
            raise ValueError("numbers lose bits, or they don't")

    def _comparison(self) -> Comparison:
        return Comparison(self.shape, self.width, 2 if self.ceiling else 1)

    def free(self) -> dict[str, Field]:
        """r and block masks of the ends; block masks of the low bits; beta for all outcomes: wrap, clip, below."""
        blocks, leaves = _low_layout(self.frac_bits + WINDOW_BITS)
        one = (1, *self.shape)
        return self._comparison().free() | {
            "r": Field(self.shape, Ring(self.width + self.d)),
            "low_leaf": Field((blocks, *one), Ring(digits.block(leaves, True).width, xor=True)),
            "low_top": Field(one, Ring(digits.block(blocks, False).width, xor=True)),
            "beta": Field((3 if self.ceiling else 2, *self.shape), BIT),
        }

    def derived(self) -> dict[str, Field]:
        """Tables and products of both comparisons; e^-m times 1, clip, below, and these times wrap; below."""
        blocks, leaves = _low_layout(self.frac_bits + WINDOW_BITS)
        one = (1, *self.shape)
        fields = self._comparison().derived() | {
            "low_leaf_products": Field((blocks, *one), Ring(digits.block(leaves, True).products, xor=True)),
            "low_top_products": Field(one, Ring(digits.block(blocks, False).products, xor=True)),
            "powers": Field((2, 3 if self.ceiling else 2, *self.shape), Z64),
        }
        return fields | {"below": Field(self.shape, Z64)} if self.ceiling else fields

    def derive(self, free: Tensors, fixed: FixedMasks) -> Tensors:
        """See `derived`."""
        blocks, leaves = _low_layout(self.frac_bits + WINDOW_BITS)
        m = _shifted(free["r"], self.d)
        low = m & ((1 << (self.frac_bits + WINDOW_BITS)) - 1)
        power = scaled_exp(-low, self.frac_bits, self.dealt_bits)
        wraps, *ends = free["beta"].to(torch.int64)
        powers = torch.stack([power, *(end * power for end in ends)])
        values = self._comparison().derive({**free, "r": m}, fixed) | {
            "low_leaf_products": digits.products(free["low_leaf"], digits.block(leaves, True)),
            "low_top_products": digits.products(free["low_top"], digits.block(blocks, False)),
            "powers": torch.stack([powers, wraps * powers]),
        }
        return values | {"below": ends[1]} if self.ceiling else values


async def _wrapped(ctx: Context, low: torch.Tensor, correlation: Correlation, bits: int) -> SharedBits:
    """XOR shares of [low < m mod 2^bits], [1, *shape]: the borrow of a subtraction mod 2^bits. As `below`, no sign."""
    blocks, leaves = _low_layout(bits)
    inner, outer = digits.block(leaves, True), digits.block(blocks, False)
    leaf, top = correlation.mask("low_leaf"), correlation.mask("low_top")
    count = bits // digits.DIGIT_BITS
    lt = correlation["lt"][:count]
    lt = torch.cat([lt, lt.new_zeros(blocks * leaves - count, *lt.shape[1:])])
    words, tops = digits.leaves(low, (0,), 64, lt, ctx.first, leaf.share)
    opened = (await ctx.open_masked(words, leaf)).value
    words, high = digits.fold_blocks(
        opened, leaf.share, correlation["low_leaf_products"], tops, ctx.first, inner, top.share
    )
    opened = (await ctx.open_masked(words, top)).value
    no_sign = torch.zeros_like(correlation["msb"])
    bit = digits.finish(
        opened, top.share, correlation["low_top_products"], high, ctx.first, outer, low, (0,), 64, no_sign
    )
    return SharedBits(bit, BIT)


def _check(frac_bits: int) -> None:
    if not MIN_FRAC_BITS <= frac_bits <= MAX_FRAC_BITS:
        raise ValueError(f"no exponentials of numbers with {frac_bits} fraction bits")


def _shifted(x: torch.Tensor, d: int) -> torch.Tensor:
    return logical_shift(x, d) if d else x


async def _power(
    ctx: Context, x: Shared, top: int, dealt_bits: int, public_bits: int, *, ceiling: bool, width: int = 64, d: int = 0
) -> Shared:
    """Shares of e^(x + top), untruncated, for x <= 2^-4; with a ceiling e^(top + 2^-4) for larger x.

    x is truncated by d bits, and then has a multiple of 4 of them if d > 0.
    """
    f = -(-(x.frac_bits - d) // digits.DIGIT_BITS) * digits.DIGIT_BITS
    x, window = x.rescaled(f + d), f + WINDOW_BITS
    slack = 1 << (f - SLACK_BITS)
    correlation = ctx.correlation(Exponential(x.shape, f, dealt_bits, ceiling, width, d))
    below_slack = Shared(x.share - (slack << d) if ctx.first else x.share)
    c = _shifted((await ctx.open(below_slack, correlation.mask("r"))).value, d)
    low = c & ((1 << window) - 1)
    wraps, ends = await together(
        _wrapped(ctx, low, correlation, window),
        below(ctx, Masked(c), (-(1 << window), 0)[: 2 if ceiling else 1], correlation, width),
    )
    bits = SharedBits(torch.cat([wraps.share, ends.share]), BIT)
    e = (await ctx.open(bits, correlation.mask("beta"))).value
    shift = slack + (top << f)
    end = None
    if ceiling:
        end = correlation["below"], int(scaled_exp(torch.tensor([shift]), f, public_bits)) << dealt_bits
    y = masked_exp(low + shift, f, public_bits, 1 << window, e, correlation["powers"], end, ctx.first)
    return Shared(y, dealt_bits + public_bits)


async def exp_nonpositive(ctx: Context, x: Shared, frac_bits: int | None = None, width: int = 64, d: int = 0) -> Shared:
    """Shares of e^(x / 2^d) for x <= 0, with `frac_bits` fraction bits (default: those that d leaves x).

    Input: x / 2^d at a scale of 8 to 24 fraction bits (ValueError otherwise: the tables and the digits of the low bits
    are made for these), a multiple of 4 if d > 0 (ValueError, too), with -2^(width-5) <= x / 2^d < 2^(width-5) (in
    units of its last place; 2^(width-1) where its scale is a multiple of 4); width + d is at most 64. Numbers below
    2^-4 less a unit of x / 2^d are right too; larger ones give some number in [0, 1.07). x / 2^d is its floor or one
    more, which the opening decides, at no cost: the mask loses as many bits, and what that carries is gone modulo
    2^width.
    Output: error below 1.3e-6 plus one unit in the last place of the output; 0 for x below 2^-4 - 16 (e^x = 1.2e-7
    there).
    How: c = x + r; both lose d bits, r becomes m. Modulo 16, x is c - m or c - m - 16, as w = [c < m mod 16] says, so
    e^x is the dealt e^-m times the public e^c or e^(c - 16). A scale that isn't a multiple of 4 bits is first refined
    to one (local, exact).
    Opened: x - 2^-4 + r over Z_2^(width + d); the words of `below` for the clip and those of the 20 low bits (2 blocks
    of 3 digits: 5 bits each, then 2); w and the clip xor beta.
    Rounds 5; online 22 bytes per element and peer (22.5 above 20 fraction bits; for width 48 3.1 less, and d / 8 more);
    offline 91 bytes at f = 16; correlations `Exponential` and `Truncation`.
    Source: DESIGN, section 3; e^x from dealt powers of the mask as in Kelkar et al. 2022 (secure Poisson regression),
    with the borrow computed instead of a failure probability.
    """
    left = x.frac_bits - d
    _check(left)
    if d and (left % digits.DIGIT_BITS or width + d > Z64.bits):
        raise ValueError(f"no exponentials of numbers that lose {d} of {x.frac_bits} fraction bits")
    # below 1.07 * 2^61, so it truncates safely
    y = await _power(ctx, x, 0, DEALT_BITS, PUBLIC_BITS, ceiling=False, width=width, d=d)
    return await truncate(ctx, y, y.frac_bits - (left if frac_bits is None else frac_bits))


async def exp(ctx: Context, x: Shared) -> Shared:
    """Shares of e^x at x's scale, for x up to 8; above, e^8 (to within 13 %: the ceiling begins at 8.125).

    Input: as `exp_nonpositive`, without its limit above. Output: error below 2e-5 max(e^x, e^(x/2) / 2) plus one unit
    in the last place.
    How: e^(x/2), with its own ceiling, squared by the opening that truncates it.
    Opened: as in `exp_nonpositive`, with one more threshold; the opening of `polynomial`.
    Rounds 6; online 34.4 bytes per element and peer (34.9 from 20 fraction bits on); offline 150 bytes at f = 16;
    correlations `Exponential`, `TruncatedPowers`, `Truncation`.
    """
    _check(x.frac_bits)
    half = Shared(x.share - (CEILING << x.frac_bits) if ctx.first else x.share, x.frac_bits + 1)
    y = await _power(ctx, half, CEILING // 2, _HALF_DEALT_BITS, _HALF_PUBLIC_BITS, ceiling=True)
    square = await polynomial(ctx, y, y.frac_bits - _SQUARED_BITS, (0, 0, 1), 2 * _SQUARED_BITS)
    return await truncate(ctx, square, square.frac_bits - x.frac_bits)
