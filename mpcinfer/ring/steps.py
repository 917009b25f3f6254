"""Step functions and piecewise linear ones on shares, from opened outcomes and dealt bits: the kernel.

For b = e xor beta, with e public, and x = c - r, c public: shares of b are those of beta, or 1 minus them; shares of
b x are those of beta x = beta c - beta r, or x minus them. All arithmetic is mod 2^64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit

from mpcinfer.ring.domain import array

_CHUNK = 1024  # elements whose numbers stay in the cache while all thresholds are added


@njit(
    "void(uint8[:, ::1], int64[:, ::1], int64[:, ::1], int64[::1], int64[::1], boolean, int64[:, ::1], int64[:, ::1], "
    "int64[:, ::1])",
    nogil=True,
    cache=True,
)
def _added(e: Any, bit: Any, bit_r: Any, c: Any, r: Any, first: Any, slopes: Any, offsets: Any, out: Any) -> None:
    one = 1 if first else 0
    for start in range(0, out.shape[1], _CHUNK):
        end = min(out.shape[1], start + _CHUNK)
        for k in range(out.shape[0]):
            for j in range(e.shape[0]):
                slope, offset = slopes[k, j], offsets[k, j]
                if slope != 0:
                    for i in range(start, end):
                        product = bit[j, i] * c[i] - bit_r[j, i]
                        out[k, i] += slope * (one * c[i] - r[i] - product if e[j, i] else product)
                if offset != 0:
                    for i in range(start, end):
                        out[k, i] += offset * (one - bit[j, i] if e[j, i] else bit[j, i])


def added(
    out: torch.Tensor, first: bool, e: torch.Tensor, bit: torch.Tensor, offsets: torch.Tensor,
    slopes: torch.Tensor | None = None, of: tuple[torch.Tensor, ...] = (),
) -> torch.Tensor:  # fmt: skip
    """out [K, *S], to which is added, for each threshold j, offsets[k, j] b_j and slopes[k, j] b_j x; int64.

    e: uint8 [T, *S]; bit: shares of beta, [T, *S]; offsets and slopes: [K, T]; of: c and r, [*S], and shares of beta r,
    [T, *S], where there are slopes.
    """
    if out.device.type == "meta" or out.numel() == 0:
        return out
    t, n = e.shape[0], out[0].numel()
    c, r, bit_r = (array(x, -1, n) for x in of) if of else [np.zeros((1, 0), np.int64)] * 3
    by = torch.zeros_like(offsets) if slopes is None else slopes
    _added(array(e, t, n), array(bit, t, n), bit_r, c[0], r[0], first, by.numpy(), offsets.numpy(), array(out, -1, n))
    return out
