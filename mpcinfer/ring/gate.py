"""A spline of one masked value times another one: the kernel, of what is opened and what is dealt.

Every summand is a public number times a product of at most two masked values and a bit, y = c - m (or m's other value,
as public bits say), u = c_u - n, a residual c_s - h, b = e xor beta: a sum of products of masks, which are dealt, times
public numbers. All arithmetic is mod 2^64.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numba import njit

from mpcinfer.ring.domain import array

_DEALT = ("n", "n_wrap", "mn", "m_wrap_n", "m_n_wrap", "hn", "h_wrap_n", "h_n_wrap", "high", "wrap")


class Dealt(Protocol):
    """Shares of products, by name."""

    def __getitem__(self, name: str) -> torch.Tensor: ...


@njit(
    f"void(boolean, uint8[:, ::1], {10 * 'int64[::1], '} {len(_DEALT) * 'int64[:, ::1], '} int64[::1], int64[::1])",
    nogil=True,
    cache=True,
)
def _gate(
    first: Any, e: Any, c_y: Any, by_y: Any, c_s: Any, by_s: Any, c_u: Any, by_u: Any, m: Any, bit: Any, bit_m: Any,
    ends: Any, n: Any, n_wrap: Any, mn: Any, m_wrap_n: Any, m_n_wrap: Any, hn: Any,
    h_wrap_n: Any, h_n_wrap: Any, high: Any, wrap: Any, asymptotes: Any, out: Any,
) -> None:  # fmt: skip
    one = 1 if first else 0
    slope, constant, right, last = asymptotes[0], asymptotes[1], asymptotes[2], asymptotes[3]
    for i in range(out.size):
        c, by, cs, by_h, cu, by_n = c_y[i], by_y[i], c_s[i], by_s[i], c_u[i], by_u[i]
        n0, n1, n2 = n[0, i] - by_n * n_wrap[0, i], n[1, i] - by_n * n_wrap[1, i], n[2, i] - by_n * n_wrap[2, i]
        mn0 = mn[0, i] - by * m_wrap_n[0, i] - by_n * m_n_wrap[0, i]
        mn1 = mn[1, i] - by * m_wrap_n[1, i] - by_n * m_n_wrap[1, i]
        hn0 = hn[0, i] - by_h * h_wrap_n[0, i] - by_n * h_n_wrap[0, i]
        hn1 = hn[1, i] - by_h * h_wrap_n[1, i] - by_n * h_n_wrap[1, i]
        h0, h1 = high[0, i] - by_h * wrap[0, i], high[1, i] - by_h * wrap[1, i]
        inside = cs * ends[i] * cu - cs * n2 - cu * h1 + hn1
        if e[0, i]:
            inside = cs * one * cu - cs * n0 - cu * h0 + hn0 - inside
        yu, only_u = c * one * cu - c * n0 - cu * m[i] + mn0, one * cu - n0
        switched_yu, switched_u = c * bit[i] * cu - c * n1 - cu * bit_m[i] + mn1, bit[i] * cu - n1
        if e[1, i]:
            switched_yu, switched_u = yu - switched_yu, only_u - switched_u
        out[i] = inside + right * yu + (slope - right) * switched_yu + last * only_u + (constant - last) * switched_u


def gate(
    first: bool,
    e: torch.Tensor,
    public: tuple[torch.Tensor, ...],
    own: tuple[torch.Tensor, ...],
    dealt: Dealt,
    asymptotes: tuple[int, int, int, int],
) -> torch.Tensor:
    """This party's share of ([inside] (c_s - h) + a y + b) u, int64 [*S].

    e: uint8 [2 or more, *S], [inside] and [y is left of where the asymptotes change] xor their betas. public: c, what
    is added to m's wrap, and the same of c_s, h and of c_u, n. own: shares of m (of which wrap it is), beta, beta m,
    and of the beta of [inside], each [*S]. dealt: shares of products, [1 to 3, *S], by the names that
    `protocol.gated.GatedPieces` gives them. asymptotes: a and b to the left, then to the right.
    """
    out = torch.empty(own[0].shape, dtype=torch.int64, device=own[0].device)
    if out.device.type == "meta":
        return out
    size = out.numel()
    arrays: list[Any] = [array(x, size) for x in (*public, *own)]
    arrays += [array(dealt[name], len(dealt[name]), size) for name in _DEALT]
    numbers = np.array(asymptotes, np.int64)
    _gate(*[first, array(e, len(e), size), *arrays, numbers, out.numpy().reshape(size)])
    return out
