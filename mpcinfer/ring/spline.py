"""Cubics of a masked value, one for each of many pieces, combined by shared bits: the kernel.

With y = c - m, c public, a polynomial q(y) is sum_i q_i (-m)^i, where q_i = q^(i)(c) / i! is public and shares of the
powers of m are dealt. For b = e xor beta, with e public, b q(y) = e q(y) + (1 - 2 e) beta q(c - m), for which shares of
beta m^i are dealt. Where y is what a truncation leaves, m is one of two numbers, as a public bit says: the powers of
the second are those of the first plus a public number times what else is dealt. All arithmetic is mod 2^64.

Or the sum's coefficients q_i are found first, as shares: sums of the b's times public numbers. Once they are opened
under masks s_i, q_i (-m)^i takes a dealt s_i m^i only, one for all pieces.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit

from mpcinfer.ring.domain import array

COEFFICIENTS = 4
_AT_ONCE = 1024  # numbers: what belongs to them stays in the cache


@njit(
    "void(int64[::1], int64[::1], uint8[:, ::1], int64[:, ::1], int64[:, ::1], int64[:, :, ::1], int64[:, :, ::1], "
    "int64[::1], int64[:, ::1], boolean, int64[::1])",
    nogil=True,
    cache=True,
)
def _spline(
    c: Any, wrapped: Any, e: Any, powers: Any, wraps: Any, bits: Any, bit_wraps: Any, base: Any, steps: Any,
    first: Any, out: Any,
) -> None:  # fmt: skip
    for i in range(c.size):
        at = c[i]
        by = wrapped[i] if wrapped.size else 0
        q0 = base[0] + (base[1] + (base[2] + base[3] * at) * at) * at
        q1 = base[1] + (2 * base[2] + 3 * base[3] * at) * at
        q2 = base[2] + 3 * base[3] * at
        q3 = base[3]
        total = 0
        for k in range(steps.shape[0]):
            s0, s1, s2, s3 = steps[k, 0], steps[k, 1], steps[k, 2], steps[k, 3]
            t2 = s2 + 3 * s3 * at
            t1 = s1 + (2 * s2 + 3 * s3 * at) * at
            t0 = s0 + (s1 + (s2 + s3 * at) * at) * at
            masked = t0 * bits[0, k, i] - t1 * bits[1, k, i] + t2 * bits[2, k, i] - s3 * bits[3, k, i]
            if by:
                masked += by * (t2 * bit_wraps[1, k, i] - t1 * bit_wraps[0, k, i] - s3 * bit_wraps[2, k, i])
            if e[k, i]:
                total -= masked
                q0 += t0
                q1 += t1
                q2 += t2
                q3 += s3
            else:
                total += masked
        total += q2 * powers[1, i] - q1 * powers[0, i] - q3 * powers[2, i]
        if by:
            total += by * (q2 * wraps[1, i] - q1 * wraps[0, i] - q3 * wraps[2, i])
        out[i] = total + q0 if first else total


# inner loops, of arrays of one dimension: only of these LLVM sees that they fill vectors
@njit(
    "void(uint8[::1], int64[::1], int64[::1], int64, int64[::1], int64[::1], int64[::1], int64[::1])",
    nogil=True,
    cache=True,
)
def _add_chosen(e: Any, beta: Any, step: Any, one: Any, q0: Any, q1: Any, q2: Any, q3: Any) -> None:
    s0, s1, s2, s3 = step[0], step[1], step[2], step[3]
    for i in range(q0.size):
        flip = np.int64(e[i])
        bit = beta[i] * (1 - 2 * flip) + one * flip
        q0[i] += bit * s0
        q1[i] += bit * s1
        q2[i] += bit * s2
        q3[i] += bit * s3


@njit("void(int64[::1], int64[::1], int64[::1], int64[::1], int64[::1])", nogil=True, cache=True)
def _move(c: Any, q0: Any, q1: Any, q2: Any, q3: Any) -> None:
    """A cubic's coefficients to those of its powers of y - c."""
    for i in range(c.size):
        at, a1, a2, a3 = c[i], q1[i], q2[i], q3[i]
        q0[i] += (a1 + (a2 + a3 * at) * at) * at
        q1[i] = a1 + (2 * a2 + 3 * a3 * at) * at
        q2[i] = a2 + 3 * a3 * at


@njit(
    "void(int64[::1], uint8[:, ::1], int64[:, ::1], int64[::1], int64[:, ::1], boolean, int64[:, ::1])",
    nogil=True,
    cache=True,
)
def _coefficients(c: Any, e: Any, betas: Any, base: Any, steps: Any, first: Any, out: Any) -> None:
    one = np.int64(1 if first else 0)
    for start in range(0, c.size, _AT_ONCE):
        end = min(c.size, start + _AT_ONCE)
        q0, q1, q2, q3 = out[0, start:end], out[1, start:end], out[2, start:end], out[3, start:end]
        q0[:], q1[:], q2[:], q3[:] = one * base[0], one * base[1], one * base[2], one * base[3]
        for k in range(steps.shape[0]):
            _add_chosen(e[k, start:end], betas[k, start:end], steps[k], one, q0, q1, q2, q3)
        _move(c[start:end], q0, q1, q2, q3)


@njit(
    "void(int64[::1], int64[::1], int64[:, ::1], int64[:, ::1], int64[:, ::1], int64[:, ::1], int64[:, ::1], "
    "int64[::1])",
    nogil=True,
    cache=True,
)
def _polynomial(
    q0: Any, wrapped: Any, opened: Any, powers: Any, wraps: Any, products: Any, product_wraps: Any, out: Any
) -> None:
    for i in range(q0.size):
        a1, a2, a3 = opened[0, i], opened[1, i], opened[2, i]
        total = q0[i] - a1 * powers[0, i] + a2 * powers[1, i] - a3 * powers[2, i]
        total += products[0, i] - products[1, i] + products[2, i]
        if wrapped[i]:
            more = a2 * wraps[1, i] - a1 * wraps[0, i] - a3 * wraps[2, i]
            more += product_wraps[0, i] - product_wraps[1, i] + product_wraps[2, i]
            total += wrapped[i] * more
        out[i] = total


def spline(
    c: torch.Tensor,
    wrapped: torch.Tensor,
    e: torch.Tensor,
    powers: torch.Tensor,
    wraps: torch.Tensor,
    bits: torch.Tensor,
    bit_wraps: torch.Tensor,
    base: tuple[int, ...],
    steps: tuple[tuple[int, ...], ...],
    first: bool,
) -> torch.Tensor:
    """This party's share of base(y) + sum_k b_k q_k(y), int64 [*S], where b_k = e_k xor beta_k and y = c - m.

    c: [*S]; e: uint8 [T, *S]; shares of m, m^2 and m^3 as powers [3, *S], of beta times 1, m, m^2 and m^3 as bits
    [4, T, *S]. base, steps: the 4 integer coefficients of the first summand and of each q_k, lowest first.
    wrapped: empty, or public [*S], which times wraps [3, *S] and bit_wraps [3, T, *S] is added to the powers.
    """
    out = torch.empty(c.shape, dtype=torch.int64, device=c.device)
    if c.device.type == "meta":
        return out
    n, t = c.numel(), len(steps)
    more = n if wrapped.numel() else 0
    _spline(
        array(c, n), array(wrapped, more), array(e, t, n), array(powers, 3, n), array(wraps, 3, more),
        array(bits, 4, t, n), array(bit_wraps, 3, t, more), np.array(base, np.int64),
        np.array(steps, np.int64).reshape(t, COEFFICIENTS), first, out.numpy().reshape(n),
    )  # fmt: skip
    return out


def coefficients(
    c: torch.Tensor,
    e: torch.Tensor,
    betas: torch.Tensor,
    base: tuple[int, ...],
    steps: tuple[tuple[int, ...], ...],
    first: bool,
) -> torch.Tensor:
    """This party's shares of the q_i, int64 [4, *S], of base + sum_k b_k q_k at c, where b_k = e_k xor beta_k.

    c: [*S]; e: uint8 [T, *S]; betas: shares of the beta_k as numbers [T, *S]; base, steps as in `spline`.
    """
    out = torch.empty((COEFFICIENTS, *c.shape), dtype=torch.int64, device=c.device)
    if c.device.type == "meta":
        return out
    n, t = c.numel(), len(steps)
    _coefficients(
        array(c, n), array(e, t, n), array(betas, t, n), np.array(base, np.int64),
        np.array(steps, np.int64).reshape(t, COEFFICIENTS), first, out.numpy().reshape(COEFFICIENTS, n),
    )  # fmt: skip
    return out


def polynomial(
    q0: torch.Tensor,
    wrapped: torch.Tensor,
    opened: torch.Tensor,
    powers: torch.Tensor,
    wraps: torch.Tensor,
    products: torch.Tensor,
    product_wraps: torch.Tensor,
) -> torch.Tensor:
    """This party's share of sum_i q_i (-m)^i, int64 [*S]: of q_0 it has a share, q_i + s_i are opened [3, *S].

    powers, wraps: as in `spline`; products [3, *S] of the s_i and m^i, and product_wraps [3, *S] of s_i and wraps.
    wrapped: public [*S], what the wraps are multiplied by.
    """
    out = torch.empty(q0.shape, dtype=torch.int64, device=q0.device)
    if q0.device.type == "meta":
        return out
    n = q0.numel()
    _polynomial(
        array(q0, n), array(wrapped, n), array(opened, 3, n), array(powers, 3, n), array(wraps, 3, n),
        array(products, 3, n), array(product_wraps, 3, n), out.numpy().reshape(n),
    )  # fmt: skip
    return out
