"""Powers of e in integers: of public numbers, by tables, and of masked ones from dealt powers of the mask. Kernels.

All arithmetic is mod 2^64, and the same on every host.
"""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit

from mpcinfer.ring.domain import array

_TOP_BITS = 6  # fraction bits of the first table
_LOWEST, _HIGHEST = -16, 21  # what it goes from and to

_Table = npt.NDArray[np.int64]


@cache
def _exact(numerators: range, denominator: int) -> tuple[_Table, _Table]:
    """e^(n / denominator) as 31-bit mantissas (2^30 to 2^31) and exponents, by decimal arithmetic: no host differs."""
    mantissas, exponents = [], []
    with localcontext(prec=50, rounding=ROUND_HALF_EVEN):
        for n in numerators:
            value = int(((Decimal(n) / denominator).exp() * (1 << 64)).to_integral_value())
            spare = value.bit_length() - 31
            mantissas.append((value + (1 << (spare - 1))) >> spare)
            exponents.append(value.bit_length() - 65)
    return np.array(mantissas, np.int64), np.array(exponents, np.int64)


@cache
def _tables(frac_bits: int, scale: int) -> tuple[int, int, _Table, _Table, _Table, _Table]:
    """Bits below the first table's and the second one's; mantissas and shifts of the first; two tables of factors."""
    rest = frac_bits - _TOP_BITS
    fine = rest // 2
    mantissas, exponents = _exact(range(_LOWEST << _TOP_BITS, _HIGHEST << _TOP_BITS), 1 << _TOP_BITS)
    middle, _ = _exact(range(1 << (rest - fine)), 1 << (frac_bits - fine))
    low, _ = _exact(range(1 << fine), 1 << frac_bits)
    return rest, fine, mantissas, np.minimum(60 - scale - exponents, 63), middle, low


@njit(
    "int64(int64, int64, int64, int64[::1], int64[::1], int64[::1], int64[::1])",
    nogil=True,
    cache=True,
    inline="always",
)
def _power(x: Any, rest: Any, fine: Any, mantissas: Any, shifts: Any, middle: Any, low: Any) -> Any:
    # three factors at scale 2^30: every product is below 2^62
    tail = middle[(x >> fine) & ((1 << (rest - fine)) - 1)] * low[x & ((1 << fine) - 1)]
    top = (x >> rest) - (_LOWEST << _TOP_BITS)
    shift = shifts[top]
    return (mantissas[top] * ((tail + (1 << 29)) >> 30) + (1 << (shift - 1))) >> shift


@njit(
    "void(int64[::1], int64, int64, int64[::1], int64[::1], int64[::1], int64[::1], int64[::1])",
    nogil=True,
    cache=True,
)
def _powers(x: Any, rest: Any, fine: Any, mantissas: Any, shifts: Any, middle: Any, low: Any, out: Any) -> None:
    for i in range(x.size):
        out[i] = _power(x[i], rest, fine, mantissas, shifts, middle, low)


@njit(
    "void(int64[::1], int64, uint8[:, ::1], int64[:, :, ::1], int64[::1], int64, boolean, int64, int64, int64[::1], "
    "int64[::1], int64[::1], int64[::1], int64[::1])",
    nogil=True,
    cache=True,
)
def _masked(
    x: Any, window: Any, e: Any, powers: Any, under: Any, limit: Any, first: Any, rest: Any, fine: Any,
    mantissas: Any, shifts: Any, middle: Any, low: Any, out: Any,
) -> None:  # fmt: skip
    for i in range(x.size):
        up = _power(x[i], rest, fine, mantissas, shifts, middle, low)
        down = _power(x[i] - window, rest, fine, mantissas, shifts, middle, low)
        # the multiplier is `at` + beta `step`
        at, step = (up, down - up) if e[0, i] else (down, up - down)
        whole = at * powers[0, 0, i] + step * powers[1, 0, i]
        clipped = at * powers[0, 1, i] + step * powers[1, 1, i]
        y = clipped - whole if e[1, i] else -clipped
        if under.size == 0:
            out[i] = whole + y
            continue
        kept = at * powers[0, 2, i] + step * powers[1, 2, i]
        if e[2, i]:
            out[i] = y + whole - kept + limit * under[i]
        else:
            out[i] = y + kept - limit * under[i] + (limit if first else 0)


def scaled_exp(x: torch.Tensor, frac_bits: int, scale: int) -> torch.Tensor:
    """e^(x / 2^frac_bits) 2^scale to within 1/2 + 2^-29 of its value, in integers only, the same on every host.

    x: int64 with -16 <= x / 2^frac_bits < 21, frac_bits >= 8; the result must be below 2^47.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.device.type != "meta":
        n = x.numel()
        _powers(array(x, n), *_tables(frac_bits, scale), out.numpy().reshape(n))
    return out


def masked_exp(
    x: torch.Tensor,
    frac_bits: int,
    scale: int,
    window: int,
    e: torch.Tensor,
    powers: torch.Tensor,
    ceiling: tuple[torch.Tensor, int] | None,
    first: bool,
) -> torch.Tensor:
    """This party's share of e^(x' - m) 2^scale, or of 0 or of a limit, int64 [*S], where m is masked.

    x' is x or, unless [wraps], x - window: public [*S]. powers: shares of e^-m times 1, the beta of [clip], and that of
    [under], and all of these times the beta of [wraps], [2, 2 or 3, *S]. e: uint8 [2 or 3, *S], [wraps], [clip] and
    [under] xor their betas. 0 where [clip]. ceiling: shares of [under]'s beta [*S], and the limit elsewhere.
    """
    out = torch.empty(x.shape, dtype=torch.int64, device=x.device)
    if out.device.type == "meta":
        return out
    n, k = x.numel(), powers.shape[1]
    under, limit = (np.empty(0, np.int64), 0) if ceiling is None else (array(ceiling[0], n), ceiling[1])
    _masked(
        array(x, n), window, array(e, len(e), n), array(powers, 2, k, n), under, limit, first,
        *_tables(frac_bits, scale), out.numpy().reshape(n),
    )  # fmt: skip
    return out
