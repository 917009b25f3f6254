"""Products of a comparison's outcome with numbers: step functions, ReLU, clamps, maxima."""

from __future__ import annotations

import torch

from mpcinfer.protocol.compare import Comparison, below
from mpcinfer.protocol.context import Context, together
from mpcinfer.protocol.types import Masked, Shared
from mpcinfer.ring.domain import Z64


def bit_product(
    first: bool, e: torch.Tensor, bit: torch.Tensor, c: torch.Tensor, r: torch.Tensor, bit_r: torch.Tensor
) -> torch.Tensor:
    """This party's share of b * x, where b = e xor beta and x = c - r; `bit`, `bit_r` are shares of beta, beta r."""
    beta_x = bit * c - bit_r
    return torch.where(e != 0, (c if first else 0) - r - beta_x, beta_x)


def bit_number(first: bool, e: torch.Tensor, bit: torch.Tensor) -> torch.Tensor:
    """This party's share of b = e xor beta as a number."""
    return torch.where(e != 0, (1 if first else 0) - bit, bit)


async def piecewise_linear(
    ctx: Context,
    x: Shared,
    thresholds: tuple[int, ...],
    slopes: tuple[int, ...],
    offsets: tuple[int, ...],
    width: int = 64,
) -> Shared:
    """Shares of a piecewise linear function with integer slopes; x's scale stays.

    For T increasing thresholds t_j (integers at x's scale), T + 1 slopes and offsets: slopes[0] x + offsets[0] below
    t_0, slopes[j] x + offsets[j] on [t_(j-1), t_j), and so on. Exact for
    -2^(width-1) <= x - t < 2^(width-1); a narrower comparison is cheaper.
    Opened: x + r over Z_2^64; the words of `below`; the outcome bits xor beta.
    Rounds 4; online 8 + 4.4 T bytes per element and peer (8 + 3.25 T for width 48); correlation `Comparison` with
    products. ReLU is thresholds (0,), slopes (0, 1): 12.4 bytes (11.25).
    """
    correlation = ctx.correlation(Comparison(x.shape, width, len(thresholds), products=True))
    c = await ctx.open(x, correlation.mask("r"))
    bits = await below(ctx, c, thresholds, correlation, width)
    e = (await ctx.open(bits, correlation.mask("beta"))).value
    y = x.share * slopes[-1]
    if ctx.first:
        y = y + offsets[-1]
    for j in range(len(thresholds)):  # below t_j, go back from piece j + 1 to piece j
        slope, offset = slopes[j] - slopes[j + 1], offsets[j] - offsets[j + 1]
        if slope:
            y = y + slope * bit_product(
                ctx.first, e[j], correlation["bit"][j], c.value, correlation["r"], correlation["bit_r"][j]
            )
        if offset:
            y = y + offset * bit_number(ctx.first, e[j], correlation["bit"][j])
    return Shared(y, x.frac_bits)


async def step(
    ctx: Context, x: Shared, thresholds: tuple[int, ...], values: tuple[int, ...], width: int = 64
) -> Shared:
    """Shares of the integers values[j] on [t_(j-1), t_j), T + 1 of them for T thresholds (see `piecewise_linear`)."""
    y = await piecewise_linear(ctx, x, thresholds, (0,) * len(values), values, width)
    return Shared(y.share, 0)


async def indicators(ctx: Context, x: Shared, thresholds: tuple[int, ...], width: int = 64) -> Shared:
    """Shares of [x < t] for each of T increasing thresholds (integers at x's scale), as integers: [T, *S].

    Exact, valid and opened as in `piecewise_linear`, at the same cost.
    """
    correlation = ctx.correlation(Comparison(x.shape, width, len(thresholds), products=True))
    c = await ctx.open(x, correlation.mask("r"))
    e = (await ctx.open(await below(ctx, c, thresholds, correlation, width), correlation.mask("beta"))).value
    return Shared(bit_number(ctx.first, e, correlation["bit"]), 0)


async def sign_and_absolute(ctx: Context, x: Shared, width: int = 64) -> tuple[Shared, Shared]:
    """Shares of [x < 0] (an integer) and of abs(x); exact. Rounds, bytes and openings as `relu`."""
    correlation = ctx.correlation(Comparison(x.shape, width, 1, products=True))
    c = await ctx.open(x, correlation.mask("r"))
    e = (await ctx.open(await below(ctx, c, (0,), correlation, width), correlation.mask("beta"))).value[0]
    bit = correlation["bit"][0]
    negative = bit_product(ctx.first, e, bit, c.value, correlation["r"], correlation["bit_r"][0])
    return Shared(bit_number(ctx.first, e, bit), 0), Shared(x.share - 2 * negative, x.frac_bits)


async def relu(ctx: Context, x: Shared, width: int = 64) -> Shared:
    """Shares of max(x, 0); exact. Cost and openings: `piecewise_linear` with one threshold (4 rounds, 12.4 bytes)."""
    return await piecewise_linear(ctx, x, (0,), (0, 1), (0, 0), width)


async def maximum(
    ctx: Context,
    left: Shared,
    right: Shared,
    carried: tuple[tuple[Shared, Shared], ...] = (),
    width: int = 64,
    *,
    bits: int = 64,
    placed: bool = False,
) -> list[Shared]:
    """max(left, right) and, for each pair carried along, the member on the winner's side. Left wins ties. Exact.

    Valid where -2^(width-1) <= left - right < 2^(width-1). Every pair has left's shape. bits: of carried numbers only
    so many are meant, here and in what is found of them. placed: at the end, [the right one has won], an integer, which
    takes no opening.
    Opened: d = left - right + r; for pairs l - r + s; the words of `below`; the outcome bit xor beta.
    Rounds 4; online 12.4 + bits / 8 per pair bytes per element and peer; correlation `Comparison` with products and
    others.
    """
    d = left - right
    kind = Comparison(d.shape, width, 1, products=True, others=len(carried), other_bits=bits)
    correlation = ctx.correlation(kind)
    if carried:
        differences = torch.stack([(a - b).share for a, b in carried])
        c, u = await together(ctx.open(d, correlation.mask("r")), ctx.open(Shared(differences), correlation.mask("s")))
    else:
        c, u = await ctx.open(d, correlation.mask("r")), Masked(torch.empty(0), Z64)
    outcome = await below(ctx, c, (0,), correlation, width)
    e = (await ctx.open(outcome, correlation.mask("beta"))).value[0]
    bit = correlation["bit"][0]
    # the left one, minus the difference where it is below the right one
    lost = bit_product(ctx.first, e, bit, c.value, correlation["r"], correlation["bit_r"][0])
    results = [Shared(left.rescaled(d.frac_bits).share - lost, d.frac_bits)]
    for i, (a, b) in enumerate(carried):
        lost = bit_product(ctx.first, e, bit, u.value[i], correlation["s"][i], correlation["bit_s"][i])
        frac_bits = max(a.frac_bits, b.frac_bits)
        results.append(Shared(a.rescaled(frac_bits).share - lost, frac_bits))
    if placed:
        results.append(Shared(bit_number(ctx.first, e, bit)))
    return results
