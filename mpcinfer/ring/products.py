"""Matrix products over Z_2^64. On many processors torch's, of integers, use no vectors: 20 times the time of these."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit

from mpcinfer.ring import tile

_COLUMNS = 1024  # of a block: four rows of w stay in the cache while they are used
_THIN = 8  # fewer columns than this do not fill vectors: the transposed product is taken


@njit("void(" + "int64[::1], " * 5 + "int64, int64, int64, int64)", nogil=True, cache=True)
def _add_four(out: Any, w0: Any, w1: Any, w2: Any, w3: Any, a: Any, b: Any, c: Any, d: Any) -> None:
    """out += a w0 + b w1 + c w2 + d w3. Arrays of one dimension: only of these LLVM sees that they fill vectors."""
    for j in range(out.shape[0]):
        out[j] += a * w0[j] + b * w1[j] + c * w2[j] + d * w3[j]


@njit("void(int64[:, :, ::1], int64[:, :, ::1], int64[:, :, ::1])", nogil=True, cache=True)
def _products(x: Any, w: Any, out: Any) -> None:
    """out[b] = x[b] @ w[b], or x[b] @ w[0] if there is one w: one pass over w, four of its rows at a time."""
    _, m, k = x.shape
    n = w.shape[2]
    out[:] = 0
    for b in range(x.shape[0]):
        wb = w[b] if w.shape[0] > 1 else w[0]
        for j in range(0, n, _COLUMNS):
            end = min(n, j + _COLUMNS)
            for p in range(0, k, 4):
                # rows beyond the last are the last, times zero
                p1, p2, p3 = min(p + 1, k - 1), min(p + 2, k - 1), min(p + 3, k - 1)
                w0, w1, w2, w3 = wb[p, j:end], wb[p1, j:end], wb[p2, j:end], wb[p3, j:end]
                for i in range(m):
                    a1 = x[b, i, p1] if p + 1 < k else np.int64(0)
                    a2 = x[b, i, p2] if p + 2 < k else np.int64(0)
                    a3 = x[b, i, p3] if p + 3 < k else np.int64(0)
                    _add_four(out[b, i, j:end], w0, w1, w2, w3, x[b, i, p], a1, a2, a3)


@njit("int64(int64[::1], int64[::1])", nogil=True, cache=True)
def _dot(x: Any, w: Any) -> Any:
    total = np.int64(0)
    for p in range(x.shape[0]):
        total += x[p] * w[p]
    return total


@njit("void(int64[:, ::1], int64[:, ::1], int64[:, ::1])", nogil=True, cache=True)
def _dots(x: Any, w: Any, out: Any) -> None:
    """out = x @ w.T for very few rows: one pass over w."""
    for j in range(w.shape[0]):
        for i in range(x.shape[0]):
            out[i, j] = _dot(x[i], w[j])


def matmul(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x @ w mod 2^64 with torch's shape rules; fastest with both contiguous."""
    if x.device.type == "meta":
        return x @ w
    if x.dim() == 1 or w.dim() == 1:
        rows, columns = x.unsqueeze(0) if x.dim() == 1 else x, w.unsqueeze(-1) if w.dim() == 1 else w
        whole = matmul(rows, columns)
        whole = whole.squeeze(-1) if w.dim() == 1 else whole
        return whole.squeeze(-1 if w.dim() == 1 else -2) if x.dim() == 1 else whole
    lead = np.broadcast_shapes(x.shape[:-2], w.shape[:-2])
    m, k, n = x.shape[-2], x.shape[-1], w.shape[-1]
    if w.shape[-2] != k:
        raise ValueError(f"matrices of {tuple(x.shape[-2:])} and {tuple(w.shape[-2:])} have no product")
    if w.dim() == 2 or w.numel() == k * n:  # one w: all rows of all x are rows of one product
        return _batched(x.reshape(1, _rows(x), k), w.reshape(1, k, n)).reshape(*lead, m, n)
    batch = math.prod(lead)
    xs, ws = x.expand(*lead, m, k).reshape(batch, m, k), w.expand(*lead, k, n).reshape(batch, k, n)
    return _batched(xs, ws).reshape(*lead, m, n)


def matmul_t(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x @ w.T mod 2^64, w [n, k] contiguous."""
    if x.device.type == "meta":
        return x @ w.t()
    flat = x.reshape(_rows(x), x.shape[-1])
    if flat.shape[0] < tile.ROWS:
        out = torch.empty((flat.shape[0], w.shape[0]), dtype=torch.int64)
        _dots(flat.contiguous().numpy(), w.contiguous().numpy(), out.numpy())
    else:
        out = matmul(w, flat.t()).t()
    return out.reshape(*x.shape[:-1], w.shape[0])


def _rows(x: torch.Tensor) -> int:
    return math.prod(x.shape[:-1])


def _batched(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x [B, m, k] @ w [B or 1, k, n]."""
    (batch, m, _), n = x.shape, w.shape[2]
    if n < min(m, _THIN):
        return _batched(w.transpose(1, 2).expand(batch, -1, -1), x.transpose(1, 2)).transpose(1, 2).contiguous()
    out = torch.empty((batch, m, n), dtype=torch.int64)
    multiply = tile.products if m >= tile.ROWS and n >= _THIN else _products
    multiply(x.contiguous().numpy(), w.contiguous().numpy(), out.numpy())
    return out
