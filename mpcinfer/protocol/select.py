"""Products of a comparison's outcome with numbers: step functions, ReLU, clamps, maxima."""

from __future__ import annotations

from functools import cache

import torch

from mpcinfer.protocol.compare import Comparison, below
from mpcinfer.protocol.context import Context, together
from mpcinfer.protocol.types import Masked, Shared
from mpcinfer.ring.domain import Z64, Ring
from mpcinfer.ring.steps import added


def bit_product(
    first: bool, e: torch.Tensor, bit: torch.Tensor, c: torch.Tensor, r: torch.Tensor, bit_r: torch.Tensor
) -> torch.Tensor:
    """This party's share of b * x, where b = e xor beta and x = c - r; `bit`, `bit_r` are shares of beta, beta r."""
    beta_x = bit * c - bit_r
    return torch.where(e != 0, (c if first else 0) - r - beta_x, beta_x)


def bit_number(first: bool, e: torch.Tensor, bit: torch.Tensor) -> torch.Tensor:
    """This party's share of b = e xor beta as a number."""
    return torch.where(e != 0, (1 if first else 0) - bit, bit)


Values = tuple[int, ...]


async def piecewise_linear(
    ctx: Context, x: Shared, thresholds: Values, slopes: Values, offsets: Values, width: int = 64
) -> Shared:
    """Shares of one function; see `piecewise_linears`. ReLU is thresholds (0,), slopes (0, 1): 12.4 bytes (11.25)."""
    return (await piecewise_linears(ctx, x, thresholds, ((slopes, offsets),), width))[0]


async def piecewise_linears(
    ctx: Context, x: Shared, thresholds: Values, functions: tuple[tuple[Values, Values], ...], width: int = 64
) -> list[Shared]:
    """Shares of piecewise linear functions with integer slopes and the same thresholds; x's scale stays.

    For T increasing thresholds t_j (integers at x's scale), T + 1 slopes and offsets each: slopes[0] x + offsets[0]
    below t_0, slopes[j] x + offsets[j] on [t_(j-1), t_j), and so on. Exact for
    -2^(width-1) <= x - t < 2^(width-1); a narrower comparison is cheaper.
    Opened: x + r over Z_2^64; the words of `below`; the outcome bits xor beta.
    Rounds 4; online 8 + 4.4 T bytes per element and peer (8 + 3.25 T for width 48); correlation `Comparison` with
    products.
    """
    correlation = ctx.correlation(Comparison(x.shape, width, len(thresholds), products=True))
    c = await ctx.open(x, correlation.mask("r"))
    bits = await below(ctx, c, thresholds, correlation, width)
    e = (await ctx.open(bits, correlation.mask("beta"))).value
    # above the last threshold, and what going down to the piece below each one adds
    last = torch.stack([x.share * slopes[-1] + (offsets[-1] if ctx.first else 0) for slopes, offsets in functions])
    steep, high = (_going_down(tuple(function[part] for function in functions)) for part in (0, 1))
    of = (c.value, correlation["r"], correlation["bit_r"])
    return [Shared(y, x.frac_bits) for y in added(last, ctx.first, e, correlation["bit"], high, steep, of)]


@cache
def _going_down(values: tuple[Values, ...]) -> torch.Tensor:
    """The differences from each piece to the one above, [K, T]."""
    rows = [[a - b for a, b in zip(row, row[1:], strict=False)] for row in values]
    return torch.tensor([[(x + (1 << 63)) % (1 << 64) - (1 << 63) for x in row] for row in rows], dtype=torch.int64)


async def step(ctx: Context, x: Shared, thresholds: Values, values: Values, width: int = 64) -> Shared:
    """Shares of one step function; see `steps`."""
    return (await steps(ctx, x, thresholds, (values,), width))[0]


async def steps(
    ctx: Context, x: Shared, thresholds: Values, functions: tuple[Values, ...], width: int = 64, d: int = 0
) -> list[Shared]:
    """Shares of step functions: the integers values[j] on [t_(j-1), t_j), T + 1 of them for T thresholds.

    x / 2^d is compared, its floor or one more; thresholds (of x / 2^d), width and exactness as `piecewise_linears`.
    Opened: x + r over Z_2^(width + d); the words of `below`; the outcome bits xor beta.
    Rounds 4 (3 up to width 17); online (width + d) / 8 + 4.4 T bytes per element and peer (0.875 T up to width 17);
    correlation `Comparison` with numbers.
    """
    e, bit = await _outcomes(ctx, x, thresholds, width, d)
    last = torch.stack([torch.full_like(x.share, values[-1] if ctx.first else 0) for values in functions])
    return [Shared(y) for y in added(last, ctx.first, e, bit, _going_down(functions))]


async def indicators(ctx: Context, x: Shared, thresholds: Values, width: int = 64) -> Shared:
    """Shares of [x < t] for each of T increasing thresholds (integers at x's scale), as integers: [T, *S].

    Exact, valid and opened as in `steps`, at the same cost.
    """
    e, bit = await _outcomes(ctx, x, thresholds, width, 0)
    return Shared(bit_number(ctx.first, e, bit), 0)


async def _outcomes(
    ctx: Context, x: Shared, thresholds: Values, width: int, d: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[x / 2^d < t] xor beta, opened, and shares of beta."""
    correlation = ctx.correlation(Comparison(x.shape, width, len(thresholds), numbers=True, d=d))
    c = (await ctx.open(x, correlation.mask("r"))).value
    bits = await below(ctx, Masked(c >> d, Ring(width)), thresholds, correlation, width)
    return (await ctx.open(bits, correlation.mask("beta"))).value, correlation["bit"]


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
