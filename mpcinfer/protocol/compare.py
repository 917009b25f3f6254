"""Comparison of a secret with public thresholds, and of two secrets, by digit tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpcinfer.protocol.context import Context
from mpcinfer.protocol.correlation import Correlation, Field, FixedMasks, Kind, Tensors, kind
from mpcinfer.protocol.types import Masked, Shared, SharedBits
from mpcinfer.ring import digits, flat, short
from mpcinfer.ring.domain import BIT, Z64, Ring

# the width of comparisons of numbers that are near: below 2^24 from each other
NEAR = 25
# low digits of a wider comparison's tables, which are those of the near one too
_NEAR_DIGITS = digits.LAYOUTS[NEAR][0] * digits.LAYOUTS[NEAR][1]


def block_masks(many: tuple[int, ...], width: int) -> dict[str, Field]:
    """The masks of the AND blocks of all levels, for comparisons of shape `many`: what `below` opens under."""
    blocks, leaves = digits.layout(width)
    if blocks == 1:
        return {"top": Field(many, Ring(digits.block(leaves, False).width, xor=True))}
    return {
        "leaf": Field((blocks, *many), Ring(digits.block(leaves, True).width, xor=True)),
        "top": Field(many, Ring(digits.block(blocks, False).width, xor=True)),
    }


def digit_tables(shape: tuple[int, ...], many: tuple[int, ...], width: int) -> dict[str, Field]:
    """What `below` needs of masks of `shape`: lt tables and sign; and the products of the block masks."""
    blocks, leaves = digits.layout(width)
    tables = {
        "lt": Field((blocks * leaves, *shape), Ring(digits.TABLE_BITS, xor=True)),
        "msb": Field(shape, BIT),
    }
    if blocks == 1:
        return {**tables, "top_products": Field(many, Ring(digits.block(leaves, False).products, xor=True))}
    return {
        **tables,
        "leaf_products": Field((blocks, *many), Ring(digits.block(leaves, True).products, xor=True)),
        "top_products": Field(many, Ring(digits.block(blocks, False).products, xor=True)),
    }


def digit_values(r: torch.Tensor, free: Tensors, width: int) -> Tensors:
    """The values of `digit_tables` for masks r."""
    blocks, leaves = digits.layout(width)
    tables = {"lt": digits.tables(r, width), "msb": (r >> (width - 1)) & 1}
    if blocks == 1:
        return {**tables, "top_products": digits.products(free["top"], digits.block(leaves, False))}
    return {
        **tables,
        "leaf_products": digits.products(free["leaf"], digits.block(leaves, True)),
        "top_products": digits.products(free["top"], digits.block(blocks, False)),
    }


def near_masks(many: tuple[int, ...]) -> dict[str, Field]:
    """As `block_masks`, of near comparisons: what `below_near` opens under."""
    return {f"near_{name}": field for name, field in block_masks(many, NEAR).items()}


def near_tables(shape: tuple[int, ...], many: tuple[int, ...]) -> dict[str, Field]:
    """What `below_near` needs beside the tables of `digit_tables`: the bit above the low digits, and products."""
    fields = {f"near_{name}": field for name, field in digit_tables(shape, many, NEAR).items()}
    del fields["near_lt"]
    return fields


def near_values(r: torch.Tensor, free: Tensors) -> Tensors:
    """The values of `near_tables` for masks r."""
    return {
        "near_msb": (r >> (NEAR - 1)) & 1,
        "near_leaf_products": digits.products(free["near_leaf"], digits.block(digits.LAYOUTS[NEAR][1], True)),
        "near_top_products": digits.products(free["near_top"], digits.block(digits.LAYOUTS[NEAR][0], False)),
    }


@kind
@dataclass(frozen=True)
class Comparison(Kind):
    """A mask r of x, tables of r's digits below `width` bits, and AND-block masks for each of `thresholds` thresholds.

    r is uniform on Z_2^width. With `numbers` there is also for each threshold a bit beta that masks the outcome, and
    beta as a number; then r may have `d` bits more, which are not compared. With `products` r is on Z_2^64, and there
    are beta, that as a number and beta r, for bit * x; with `others` = k (and one threshold) masks s of k further
    values and beta s, for bit * value, both modulo 2^other_bits.
    """

    shape: tuple[int, ...]
    width: int = 64
    thresholds: int = 1
    products: bool = False
    others: int = 0
    other_bits: int = 64
    numbers: bool = False
    d: int = 0

    def __post_init__(self) -> None:
        if self.d < 0 or self.d and (self.products or self.others or not self.numbers):
            raise ValueError("only of what is not multiplied are bits left out")
        if self.others and self.thresholds != 1:
            raise ValueError("further values are multiplied by the outcome of one threshold")

    @property
    def _outcomes(self) -> bool:
        return self.numbers or self.products or self.others > 0

    def free(self) -> dict[str, Field]:
        """r; the block masks; beta; s."""
        many = (self.thresholds, *self.shape)
        fields = {
            # products with the outcome need all of x: a narrower mask doesn't hide that
            "r": Field(self.shape, Z64 if self.products or self.others else Ring(self.width + self.d)),
            **block_masks(many, self.width),
        }
        if self._outcomes:
            fields["beta"] = Field(many, BIT)
        if self.others:
            fields["s"] = Field((self.others, *self.shape), Ring(self.other_bits))
        return fields

    def derived(self) -> dict[str, Field]:
        """lt tables and sign of r; block products; beta, beta r, beta s as numbers."""
        many = (self.thresholds, *self.shape)
        fields = digit_tables(self.shape, many, self.width)
        if self._outcomes:
            fields["bit"] = Field(many, Z64)
        if self.products:
            fields["bit_r"] = Field(many, Z64)
        if self.others:
            fields["bit_s"] = Field((self.others, *self.shape), Ring(self.other_bits))
        return fields

    def derive(self, free: Tensors, fixed: FixedMasks) -> Tensors:
        """See `derived`."""
        r = free["r"]
        values = digit_values(r >> self.d, free, self.width)
        if self._outcomes:
            values["bit"] = free["beta"].to(torch.int64)
        if self.products:
            values["bit_r"] = values["bit"] * r
        if self.others:
            values["bit_s"] = values["bit"] * free["s"]
        return values


async def below(
    ctx: Context, c: Masked, thresholds: tuple[int, ...], correlation: Correlation, width: int
) -> SharedBits:
    """XOR shares of [x < t] for every public t, [T, *shape], given x opened as c under the correlation's r.

    Valid where -2^(width-1) <= x - t < 2^(width-1). Exact. Opened: 7 bits (5 for width 36) per block of 4 (3) digits
    and then 6 (4, 4, 2) bits, each under a dealt mask word of exactly these bits; up to width 17 only 6 bits.
    Rounds 2 (up to width 17, 1); online 4.25 bytes per threshold, element and peer (width 64), 3.1 (48), 2.4 (36), 2.0
    (32), 0.75 (17), between them as the next wider; offline 30 bytes per element and 13 per threshold (width 64).
    Source: msb(c - t) xor msb(r) xor [low(c - t) < low(r)] as in Rabbit and edaBits; digit tables as in ABY2.0 and
    one-time truth tables; the folding of blocks by dealt products of masks is ABY2.0's multi-input AND.
    """
    return await _below(ctx, c, thresholds, correlation, width, correlation["lt"], "")


async def below_near(ctx: Context, c: Masked, thresholds: tuple[int, ...], correlation: Correlation) -> SharedBits:
    """As `below`, valid only where -2^24 <= x - t < 2^24; elsewhere any bit. By the lowest digits of the same tables.

    Opened: 5 bits per block of 3 digits and then 2 bits, under masks of their own (`near_masks`).
    Rounds 2; online 1.5 bytes per threshold, element and peer; offline 2.1 per threshold.
    """
    return await _below(ctx, c, thresholds, correlation, NEAR, correlation["lt"][:_NEAR_DIGITS], "near_")


async def _below(
    ctx: Context,
    c: Masked,
    thresholds: tuple[int, ...],
    correlation: Correlation,
    width: int,
    lt: torch.Tensor,
    which: str,
) -> SharedBits:
    blocks, leaves = digits.layout(width)
    top = correlation.mask(f"{which}top")
    # the kernels mask what they compute in the same pass, hence open_masked
    if blocks == 1:
        outer = digits.block(leaves, False)
        words, high = (
            part.squeeze(0) for part in digits.leaves(c.value, thresholds, width, lt, ctx.first, top.share.unsqueeze(0))
        )
    else:
        inner, outer = digits.block(leaves, True), digits.block(blocks, False)
        leaf = correlation.mask(f"{which}leaf")
        words, tops = digits.leaves(c.value, thresholds, width, lt, ctx.first, leaf.share)
        opened = (await ctx.open_masked(words, leaf)).value
        words, high = digits.fold_blocks(
            opened, leaf.share, correlation[f"{which}leaf_products"], tops, ctx.first, inner, top.share
        )
    opened = (await ctx.open_masked(words, top)).value
    bits = digits.finish(
        opened,
        top.share,
        correlation[f"{which}top_products"],
        high,
        ctx.first,
        outer,
        c.value,
        thresholds,
        width,
        correlation[f"{which}msb"],
    )
    return SharedBits(bits, BIT)


def flat_masks(many: tuple[int, ...]) -> dict[str, Field]:
    """The mask words of comparisons of shape `many`: what `below_flat` opens under."""
    return {"leaf": Field(many, Ring(flat.WIDTH, xor=True))}


def flat_tables(shape: tuple[int, ...], many: tuple[int, ...]) -> dict[str, Field]:
    """What `below_flat` needs of masks of `shape`: lt tables and sign; and the products of the mask words."""
    return {
        "lt": Field((*shape, flat.DIGITS, flat.TABLE_WORDS), Ring(64, xor=True)),
        "msb": Field(shape, BIT),
        "leaf_products": Field((*many, flat.PRODUCT_WORDS), Ring(flat.PRODUCT_BITS, xor=True)),
    }


def flat_values(r: torch.Tensor, free: Tensors) -> Tensors:
    """The values of `flat_tables` for masks r."""
    return {"lt": flat.tables(r), "msb": (r >> 63) & 1, "leaf_products": flat.products(free["leaf"])}


async def below_flat(ctx: Context, c: Masked, thresholds: tuple[int, ...], correlation: Correlation) -> SharedBits:
    """As `below` for width 64, in one round, for few elements: a table of theirs is 448 bytes.

    Opened: 12 bits for each threshold and element, under a dealt mask word of exactly these bits.
    Rounds 1; online 1.5 bytes per threshold, element and peer; offline 448 bytes per element and 22.1 per threshold.
    Source: as `below`, whose second level the larger digits save (see `ring.flat`).
    """
    leaf = correlation.mask("leaf")
    words, tops = flat.leaves(c.value, thresholds, correlation["lt"], ctx.first, leaf.share)
    opened = (await ctx.open_masked(words, leaf)).value
    dealt, msb = correlation["leaf_products"], correlation["msb"]
    return SharedBits(flat.finish(opened, leaf.share, dealt, tops, ctx.first, c.value, thresholds, msb), BIT)


def short_masks(shape: tuple[int, ...]) -> dict[str, Field]:
    """The mask words of short comparisons of this shape: what `below_short` opens under."""
    return {"leaf": Field(shape, Ring(short.COMPARED.width, xor=True))}


def short_tables(shape: tuple[int, ...]) -> dict[str, Field]:
    """What `below_short` needs of masks of this shape: lt tables and sign; and the products of the mask words."""
    return {
        "lt": Field((*shape, short.LEAVES), Ring(short.TABLE_BITS, xor=True)),
        "msb": Field(shape, BIT),
        "leaf_products": Field(shape, Ring(short.COMPARED.products, xor=True)),
    }


def short_values(r: torch.Tensor, free: Tensors) -> Tensors:
    """The values of `short_tables` for masks r."""
    return {
        "lt": short.tables(r, short.LEAVES),
        "msb": (r >> short.BITS) & 1,
        "leaf_products": digits.products(free["leaf"], short.COMPARED),
    }


async def below_short(ctx: Context, c: Masked, correlation: Correlation) -> SharedBits:
    """XOR shares of [x < 0], [*S], given words x of 21 bits opened as c under the correlation's r. Exact.

    Valid where -2^20 <= x < 2^20. Opened: 6 bits for each word, under a dealt mask word of exactly these bits.
    Rounds 1; online 0.75 bytes per word and peer; offline 17.6. Source: as `below`, with one block of larger digits
    (see `ring.short`).
    """
    word, tops = await opened_short(ctx, c.value, correlation, correlation["lt"])
    return folded_short(ctx, word, tops, c.value, correlation, correlation["msb"])


async def opened_short(
    ctx: Context, c: torch.Tensor, correlation: Correlation, lt: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `below_short` opens, uint8 [*S], and the linear top bits, given the tables of the lowest digits."""
    leaf = correlation.mask("leaf")
    words, tops = short.leaves(c, lt, ctx.first, leaf.share)
    return (await ctx.open_masked(words, leaf)).value, tops


def folded_short(
    ctx: Context,
    opened: torch.Tensor,
    tops: torch.Tensor,
    c: torch.Tensor,
    correlation: Correlation,
    msb: torch.Tensor,
) -> SharedBits:
    """What `below_short` makes of these: local."""
    masks, dealt = correlation.mask("leaf").share.unsqueeze(0), correlation["leaf_products"].unsqueeze(0)
    word, top, sign = opened.unsqueeze(0), tops.unsqueeze(0), short.BITS + 1
    bits = digits.finish(word, masks, dealt, top, ctx.first, short.COMPARED, c, (0,), sign, msb)
    return SharedBits(bits[0], BIT)


async def less_than(ctx: Context, x: Shared, thresholds: tuple[int, ...], width: int = 64) -> SharedBits:
    """XOR shares of [x < t] for public integers t at x's scale: [len(thresholds), *shape].

    Valid where -2^(width-1) <= x - t < 2^(width-1); exact there. width: 64, 48, 36 or 32.
    Opened: x + r over Z_2^width, then as in `below`. Rounds 3; online width/8 + what `below` costs;
    correlation `Comparison`.
    """
    correlation = ctx.correlation(Comparison(x.shape, width, len(thresholds)))
    c = await ctx.open(x, correlation.mask("r"))
    return await below(ctx, c, thresholds, correlation, width)
