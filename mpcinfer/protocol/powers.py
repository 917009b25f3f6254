"""e^x of numbers that are not positive and not far below zero either: as `exponential`, in fewer bits and a round less.

Where the range of x is known, whether it is above -16 is a question about a few bits: are all above the window 1?
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpcinfer.protocol.compare import folded_short, opened_short, short_masks, short_tables, short_values
from mpcinfer.protocol.context import Context, together
from mpcinfer.protocol.correlation import Correlation, Field, FixedMasks, Kind, Tensors, kind
from mpcinfer.protocol.exponential import DEALT_BITS, PUBLIC_BITS, SLACK_BITS, WINDOW_BITS
from mpcinfer.protocol.truncate import logical_shift, truncate
from mpcinfer.protocol.types import Shared, SharedBits
from mpcinfer.ring import digits, short
from mpcinfer.ring.domain import BIT, Z64, Ring
from mpcinfer.ring.power import scaled_exp

# of x as its power is taken: those of the window are as many digits as are compared in one step
FRAC_BITS = short.BITS - WINDOW_BITS
_MOST_DIGITS = 5


@kind
@dataclass(frozen=True)
class BoundedPower(Kind):
    """r uniform on Z_2^(width + drop), and for m = r >> drop what e^(c - m) takes; m modulo 16 is its lowest 20 bits.

    Tables of m's digits, a mask to compare the low bits, two to compare the others with public numbers; a bit beta for
    each of these outcomes; e^-m times 1, either of the last two betas, and all these times the first.
    """

    shape: tuple[int, ...]
    width: int
    drop: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.drop <= 64 - self.width and 0 < self.width - short.BITS <= _MOST_DIGITS * short.DIGIT_BITS):
            raise ValueError("powers are of numbers of a few bits more than the window's")

    def _ends(self) -> tuple[int, digits.Block]:
        """How many digits m has above the window (at least two, where a block begins), and what they are folded by."""
        count = max(2, -(-(self.width - short.BITS) // short.DIGIT_BITS))
        return count, short.conjunction(count)

    @property
    def block(self) -> digits.Block:
        """What the digits above the window are folded by."""
        return self._ends()[1]

    def free(self) -> dict[str, Field]:
        """r; masks of the words; beta, of the borrow and of both ends."""
        return {
            "r": Field(self.shape, Ring(self.width + self.drop)),
            **short_masks(self.shape),
            "ends": Field((2, *self.shape), Ring(self.block.width, xor=True)),
            "beta": Field((3, *self.shape), BIT),
        }

    def derived(self) -> dict[str, Field]:
        """lt tables, products of the masks of words; e^-m times 1 and an end's beta, and these times the borrow's."""
        fields = short_tables(self.shape)
        del fields["msb"]
        return fields | {
            "lt": Field((*self.shape, short.LEAVES + self._ends()[0]), Ring(short.TABLE_BITS, xor=True)),
            "end_products": Field((2, *self.shape), Ring(self.block.products, xor=True)),
            "powers": Field((2, 3, *self.shape), Z64),
        }

    def derive(self, free: Tensors, fixed: FixedMasks) -> Tensors:
        """See `derived`."""
        m = logical_shift(free["r"], self.drop) if self.drop else free["r"]
        power = scaled_exp(-(m & ((1 << short.BITS) - 1)), FRAC_BITS, DEALT_BITS)
        borrow, *ends = free["beta"].to(torch.int64)
        powers = torch.stack([power, *(end * power for end in ends)])
        return {
            "leaf_products": short_values(m, free)["leaf_products"],
            "lt": short.tables(m, short.LEAVES + self._ends()[0]),
            "end_products": digits.products(free["ends"], self.block),
            "powers": torch.stack([powers, borrow * powers]),
        }


async def _ends(
    ctx: Context, high: torch.Tensor, correlation: Correlation, item: BoundedPower
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is opened to compare m above the window with public numbers [2, *S]: the words, and shares of the masks."""
    mask = correlation.mask("ends")
    lt = correlation["lt"][..., short.LEAVES :]
    words = short.equal(high, lt.expand(2, *lt.shape), ctx.first, mask.share)
    return (await ctx.open_masked(words, mask)).value, mask.share


async def bounded_power(ctx: Context, x: Shared, reach: int, frac_bits: int = 24) -> Shared:
    """Shares of e^x for -2^reach < x < 2^-4 less a unit of FRAC_BITS, reach >= 4, with `frac_bits` fraction bits.

    Input: x modulo 2^(reach + 1) at its scale, whatever is above; at least FRAC_BITS fraction bits, and at most
    63 - reach (ValueError otherwise). It is cut to FRAC_BITS of them, to the floor or one more, as the opening decides.
    Output: error below 1.3e-6 plus one unit in the last place; 0 for x below 2^-4 - 16, and from 2^-4 on.
    How: as `exponential.exp_nonpositive`: c = x - 2^-4 + r, both cut. Modulo 16, x is c - m or c - m - 16, as
    w = [c < m mod 16] says; it is within the window if c - m - w, of what lies above, is -1: if m there is the public
    c + 1 or, with w, c. So e^x = [m = c + 1] (1 - w) e^(c - 16) e^-m + [m = c] w e^c e^-m.
    Opened: x - 2^-4 + r over Z_2^(reach + 1 + x.frac_bits); the 6 bits of `below_short`, and for each of the two
    equalities a bit a digit, of 5 bits; w and both equalities xor beta; what `truncate` opens.
    Rounds 4; online (reach + 1 + x.frac_bits + 9 + 2 n) / 8 + 8 bytes per element and peer, n = max(2, (reach - 3) / 5)
    rounded up; offline 86 bytes for n = 2, 4.6 for a third digit, 5.6 for a fourth; correlations `BoundedPower` and
    `Truncation`.
    Source: as `exp_nonpositive`; equality of digits by the same tables is our own.
    """
    width, drop = reach + 1 + FRAC_BITS, x.frac_bits - FRAC_BITS
    if drop < 0 or width + drop > Z64.bits or reach < WINDOW_BITS:
        raise ValueError(f"no powers of numbers of {x.frac_bits} fraction bits down to -2^{reach}")
    item = BoundedPower(x.shape, width, drop)
    correlation = ctx.correlation(item)
    slack = 1 << (FRAC_BITS - SLACK_BITS)
    below_slack = Shared(x.share - (slack << drop) if ctx.first else x.share)
    c = (await ctx.open(below_slack, correlation.mask("r"))).value
    c = logical_shift(c, drop) if drop else c
    low, high = c & ((1 << short.BITS) - 1), logical_shift(c, short.BITS)
    above = torch.stack([high + 1, high]) & ((1 << (width - short.BITS)) - 1)
    lt = correlation["lt"][..., : short.LEAVES]
    (word, tops), (ends, masks) = await together(
        opened_short(ctx, low, correlation, lt), _ends(ctx, above, correlation, item)
    )
    no_sign = torch.zeros_like(word)
    borrow = folded_short(ctx, word, tops, low, correlation, no_sign)
    equal = digits.finish(
        ends, masks, correlation["end_products"], torch.zeros_like(ends), ctx.first, item.block, low, (0, 0),
        short.BITS + 1, no_sign,
    )  # fmt: skip
    bits = SharedBits(torch.cat([borrow.share.unsqueeze(0), equal]), BIT)
    e = (await ctx.open(bits, correlation.mask("beta"))).value != 0
    powers, borrowed = correlation["powers"]

    def chosen(which: int, whole: torch.Tensor) -> torch.Tensor:
        """Of shares of a number and its products with the betas, its product with an equality."""
        return torch.where(e[which], whole[0] - whole[which], whole[which])

    above_zero, times_beta = chosen(1, powers), chosen(1, borrowed)
    as_it_is = torch.where(e[0], times_beta, above_zero - times_beta)
    below_zero, times_beta = chosen(2, powers), chosen(2, borrowed)
    with_borrow = torch.where(e[0], below_zero - times_beta, times_beta)
    down, up = (scaled_exp(low + slack + by, FRAC_BITS, PUBLIC_BITS) for by in (-(1 << short.BITS), 0))
    y = Shared(down * as_it_is + up * with_borrow, DEALT_BITS + PUBLIC_BITS)  # below 1.07 * 2^61
    return await truncate(ctx, y, y.frac_bits - frac_bits)
