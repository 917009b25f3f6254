"""Norms of rows: layer, group, instance and RMS normalisation, variances, Euclidean norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mpcinfer.errors import UnsupportedError
from mpcinfer.nn.elementwise import FACTOR_BITS, add_public, scale
from mpcinfer.nn.functions import INVERSE_BITS
from mpcinfer.nn.registry import operator
from mpcinfer.nn.shape import rows
from mpcinfer.protocol import root
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.polynomial import polynomials
from mpcinfer.protocol.scaled import squared_and_scaled
from mpcinfer.protocol.truncate import truncate
from mpcinfer.protocol.types import Shared

# bits that rows lose before they are squared, unless deploy has found that they need more or less room
SHIFT = 0
# of a sum of squares, below 2^62, before its octave is found: what that needs to fit
_SUM_BITS = 8
# more fraction bits than its result has, of a product with a root's leading part, and what those leave for the rest
_MORE_BITS, _LEAST_FACTOR_BITS = 6, 18
# of such a sum, that its product with a public factor does without at first
_HALF_BITS = 24


async def _squares(
    ctx: Context, x: Shared, shift: int, centred: bool, gain: Shared | None = None
) -> tuple[Shared, Shared, float]:
    """Shares of y = rho (x - mean) (the mean only if `centred`), of sum y^2 over the last axis (kept), and rho.

    The sum is below 2^62: what needs room truncates it by _SUM_BITS. With a gain, y is times that, and not truncated.

    y has x.frac_bits - shift fraction bits; rho is between 1/2 and 1. Centring costs nothing: y is n x - sum(x), an
    exact difference, divided by the power of two above n by the opening that also squares it.
    """
    n = x.shape[-1]
    bits = (n - 1).bit_length() if centred else 0
    z = x.map(lambda t: n * t - t.sum(-1, keepdim=True)) if centred else x
    extra = max(0, 1 - bits - shift)  # the opening drops one bit at least
    d, y_bits = bits + shift + extra, x.frac_bits - shift
    z = Shared(z.share << extra, y_bits + d)
    if gain is None:
        y, square = await polynomials(ctx, z, d, ((0, 1), (0, 0, 1)), (y_bits, 2 * y_bits))
    else:
        _, square, y = await squared_and_scaled(ctx, z, d, gain)
    total = square.map(lambda t: t.sum(-1, keepdim=True))
    return y, total, n / 2.0**bits if centred else 1.0


def _octaves(total: Shared) -> dict[str, int]:
    """The widest range of a sum of squares that loses _SUM_BITS."""
    high = 62 - total.frac_bits
    return {"low": max(_SUM_BITS - total.frac_bits, high - root.MAX_OCTAVES), "high": high}


def room(count: int, frac_bits: int) -> int:
    """Fraction bits with which what a norm of `count` numbers makes of them must fit, times its gain and more."""
    return max(frac_bits + INVERSE_BITS, 50 - (count.bit_length() - 1) // 2)


async def standardise(
    ctx: Context,
    x: Shared,
    eps: float,
    gain: Shared | None,
    bias: Shared | None,
    *,
    centred: bool,
    shift: int = SHIFT,
    frac_bits: int | None = None,
    down: int = 0,
) -> Shared:
    """(x - mean) / sqrt(variance + eps) * gain + bias over the last axis, [*S, n]; without `centred`, x / rms(x).

    frac_bits: of the result; x may have more (see `graph.postpone`), which it loses when it is squared.
    down: the result is 2^-down of it, where `graph.gain` has given the gain to the next layers.

    Input: sum (x - mean)^2 < 2^(62 - 2 (frac_bits - shift)), and rows whose deviation is below
    2^(shift - frac_bits + 8) lose precision; with gain or bias, results below 2^(62 - room). The variance itself may be
    anything, zero too, where the result is `bias`.
    Rounds 7: the opening that centres, truncates, squares and multiplies by the gain; the quotient by the root (5); a
    truncation. Bytes 32 per element, and about 190 per row; for more than 4,096 rows 6 rounds more, and 150.
    """
    frac_bits = x.frac_bits if frac_bits is None else frac_bits
    y, total, rho = await _squares(ctx, x, shift + x.frac_bits - frac_bits, centred, gain)
    n = x.shape[-1]
    total = add_public(ctx, total, round(n * rho**2 * eps * 2.0**total.frac_bits))
    drop = 0 if gain is None else gain.frac_bits
    scale = y.frac_bits - drop + root.entry_bits(-1, **_octaves(total), over=n)
    if gain is None and bias is None:  # no number is above the root of n
        most = 60 - n.bit_length() // 2
    else:
        most = max(room(n, frac_bits), scale) - 1
    kept = min(frac_bits + _MORE_BITS - down, scale - 1, most - _LEAST_FACTOR_BITS)
    z = await root.over_root(
        ctx.scope("rsqrt"), y, drop, total, **_octaves(total), over=n, d=_SUM_BITS, kept=kept, frac_bits=most
    )
    if bias is not None:
        z = z + bias.rescaled(z.frac_bits)
    return Shared((await truncate(ctx, z, z.frac_bits - frac_bits + down)).share, frac_bits)


def _joined(x: Shared, count: int) -> Shared:
    """The last `count` axes as one."""
    return x.map(lambda t: t.reshape(*t.shape[: t.dim() - count], -1))


def _row(x: Shared | None) -> Shared | None:
    return None if x is None else x.map(lambda t: t.reshape(-1))


@operator("aten.layer_norm.default")
async def layer_norm(
    ctx: Context,
    x: Shared,
    shape: Sequence[int],
    weight: Shared | None = None,
    bias: Shared | None = None,
    eps: float = 1e-5,
    cudnn: bool = True,
    *,
    shift: int = SHIFT,
    frac_bits: int | None = None,
    down: int = 0,
) -> Shared:
    """torch.layer_norm; see `standardise`."""
    row = _joined(x, len(shape))
    gain, offset = _row(weight), _row(bias)
    y = await standardise(ctx, row, eps, gain, offset, centred=True, shift=shift, frac_bits=frac_bits, down=down)
    return y.map(lambda t: t.reshape(x.shape))


@operator("aten.rms_norm.default")
async def rms_norm(
    ctx: Context,
    x: Shared,
    shape: Sequence[int],
    weight: Shared | None = None,
    eps: float | None = None,
    *,
    shift: int = SHIFT,
    frac_bits: int | None = None,
    down: int = 0,
) -> Shared:
    """torch.rms_norm; see `standardise`. Without eps, torch's own for float32."""
    eps = 2.0**-23 if eps is None else eps
    row = _joined(x, len(shape))
    y = await standardise(ctx, row, eps, _row(weight), None, centred=False, shift=shift, frac_bits=frac_bits, down=down)
    return y.map(lambda t: t.reshape(x.shape))


@operator("aten.group_norm.default")
async def group_norm(
    ctx: Context,
    x: Shared,
    groups: int,
    weight: Shared | None = None,
    bias: Shared | None = None,
    eps: float = 1e-5,
    cudnn: bool = True,
    *,
    shift: int = SHIFT,
) -> Shared:
    """torch.group_norm on [N, C, *S]; see `standardise`."""
    n, channels, *rest = x.shape
    rows = x.map(lambda t: t.reshape(n, groups, -1))

    def per_element(t: Shared | None) -> Shared | None:
        area = math.prod(rest)
        return None if t is None else t.map(lambda s: s.reshape(groups, -1, 1).expand(-1, -1, area).reshape(groups, -1))

    y = await standardise(ctx, rows, eps, per_element(weight), per_element(bias), centred=True, shift=shift)
    return y.map(lambda t: t.reshape(x.shape))


@operator("aten.instance_norm.default")
async def instance_norm(
    ctx: Context,
    x: Shared,
    weight: Shared | None,
    bias: Shared | None,
    mean: Any,
    variance: Any,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn: bool,
    *,
    shift: int = SHIFT,
) -> Shared:
    """torch.instance_norm by the statistics of the input: a group norm with a group for each channel."""
    if not use_input_stats:
        raise UnsupportedError("instance norm by running statistics: write it as a batch norm")
    return await group_norm(ctx, x, x.shape[1], weight, bias, eps, shift=shift)


@operator("aten.linalg_vector_norm.default")
async def vector_norm(
    ctx: Context, x: Shared, ord: float = 2, dim: Any = None, keepdim: bool = False, *, shift: int = SHIFT
) -> Shared:
    """The Euclidean norm along `dim` (all axes if None)."""
    if ord != 2:
        raise UnsupportedError("norms are Euclidean, of order 2")
    joined, place = rows(x, dim)
    _, total, _ = await _squares(ctx, joined, shift, centred=False)
    return place(await root.sqrt(ctx, total, **_octaves(total), frac_bits=x.frac_bits, d=_SUM_BITS), keepdim)


@operator("aten.var.dim", "aten.var.correction")
async def var(
    ctx: Context, x: Shared, dim: Any = None, unbiased: Any = True, keepdim: bool = False, *, correction: Any = None,
    shift: int = SHIFT,
) -> Shared:  # fmt: skip
    """The variance along `dim` (all axes if None)."""
    joined, place = rows(x, dim)
    _, total, rho = await _squares(ctx, joined, shift, centred=True)
    count = joined.shape[-1] - (int(unbiased) if correction is None else correction)
    factor = 1 / (rho**2 * count)
    d = FACTOR_BITS - math.frexp(factor)[1]
    n = round(math.ldexp(factor, d))
    total = await truncate(ctx, total, _SUM_BITS)
    # there is no room for the factor's 24 bits next to the sum's 54, so each half of the sum is multiplied by itself
    high = await truncate(ctx, total, _HALF_BITS)
    low = Shared(total.share - (high.share << _HALF_BITS), total.frac_bits)
    y = high.times(n) + (await truncate(ctx, low.times(n), _HALF_BITS))
    y = Shared(y.share, y.frac_bits + d).rescaled(max(y.frac_bits + d, x.frac_bits))
    return place(await truncate(ctx, y, y.frac_bits - x.frac_bits), keepdim)


@operator("aten.std.dim", "aten.std.correction")
async def std(
    ctx: Context, x: Shared, dim: Any = None, unbiased: Any = True, keepdim: bool = False, *, correction: Any = None,
    shift: int = SHIFT,
) -> Shared:  # fmt: skip
    """The standard deviation along `dim` (all axes if None)."""
    joined, place = rows(x, dim)
    _, total, rho = await _squares(ctx, joined, shift, centred=True)
    count = joined.shape[-1] - (int(unbiased) if correction is None else correction)
    y = await root.sqrt(ctx, total, **_octaves(total), frac_bits=x.frac_bits + 4, d=_SUM_BITS)
    y = await scale(ctx, y, 1 / (rho * math.sqrt(count)))
    return place(await truncate(ctx, y, 4), keepdim)
