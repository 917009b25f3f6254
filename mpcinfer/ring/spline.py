"""Cubics of a masked value, one for each of many pieces, combined by shared bits: the kernel.

With c = x + r public, a polynomial q(x) = q(c - r) is sum_i q_i (-r)^i, where q_i = q^(i)(c) / i! is public and shares
of the powers of r are dealt. For b = e xor beta, with e public, b q(x) = e q(x) + (1 - 2 e) beta q(c - r), for which
shares of beta r^i are dealt. All arithmetic is mod 2^64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit

COEFFICIENTS = 4


@njit(
    "void(int64[::1], uint8[:, ::1], int64[::1], int64[:, ::1], int64[:, ::1], int64[:, ::1], int64[:, :, ::1], "
    "int64[:, ::1], boolean, int64[::1])",
    nogil=True,
    cache=True,
)
def _spline(
    c: Any, e: Any, r: Any, powers: Any, bit: Any, bit_r: Any, bit_powers: Any, steps: Any, first: Any, out: Any
) -> None:
    for i in range(c.size):
        at = c[i]
        q0, q1, q2, q3 = 0, 0, 0, 0
        total = 0
        for k in range(steps.shape[0]):
            s0, s1, s2, s3 = steps[k, 0], steps[k, 1], steps[k, 2], steps[k, 3]
            t2 = s2 + 3 * s3 * at
            t1 = s1 + (2 * s2 + 3 * s3 * at) * at
            t0 = s0 + (s1 + (s2 + s3 * at) * at) * at
            masked = t0 * bit[k, i] - t1 * bit_r[k, i] + t2 * bit_powers[0, k, i] - s3 * bit_powers[1, k, i]
            if e[k, i]:
                total -= masked
                q0 += t0
                q1 += t1
                q2 += t2
                q3 += s3
            else:
                total += masked
        total += q2 * powers[0, i] - q1 * r[i] - q3 * powers[1, i]
        out[i] = total + q0 if first else total


def spline(
    c: torch.Tensor,
    e: torch.Tensor,
    r: torch.Tensor,
    powers: torch.Tensor,
    bit: torch.Tensor,
    bit_r: torch.Tensor,
    bit_powers: torch.Tensor,
    steps: tuple[tuple[int, ...], ...],
    first: bool,
) -> torch.Tensor:
    """This party's share of sum_k b_k q_k(x), int64 [*S], where b_k = e_k xor beta_k and x = c - r.

    c: [*S]; e: uint8 [T, *S]; shares of r [*S], of r^2 and r^3 as powers [2, *S], of beta as bit [T, *S], of beta r as
    bit_r [T, *S], of beta r^2 and beta r^3 as bit_powers [2, T, *S]. steps: the 4 integer coefficients of each q_k,
    lowest first.
    """
    out = torch.empty(c.shape, dtype=torch.int64, device=c.device)
    if c.device.type == "meta":
        return out
    n, t = c.numel(), len(steps)
    _spline(
        c.contiguous().numpy().reshape(n),
        e.contiguous().numpy().reshape(t, n),
        r.contiguous().numpy().reshape(n),
        powers.contiguous().numpy().reshape(2, n),
        bit.contiguous().numpy().reshape(t, n),
        bit_r.contiguous().numpy().reshape(t, n),
        bit_powers.contiguous().numpy().reshape(2, t, n),
        np.array(steps, np.int64),
        first,
        out.numpy().reshape(n),
    )
    return out
