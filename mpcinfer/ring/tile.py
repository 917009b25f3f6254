"""Products of matrices over Z_2^64, in tiles that stay in vector registers while the inner dimension goes by.

Of loops over such a tile LLVM keeps the sums in memory, so what is in the innermost one is written in its own terms: 16
vectors of eight sums, to each of which one instruction multiplies and one adds, where the processor has AVX-512.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_LANES = 8
_VECTORS = 2
ROWS, COLUMNS = 8, _LANES * _VECTORS  # of a tile
# of w, at a time: put side by side as tiles want them, they stay in the second cache for all rows of x
_AT_ONCE, _DEPTH = 8 * COLUMNS, 256

_I64 = ir.IntType(64)
_VECTOR = ir.VectorType(_I64, _LANES)


def _vector(builder: Any, start: Any, index: int) -> Any:
    """The address of the vector that many vectors after `start`."""
    at = builder.gep(start, [ir.Constant(_I64, index * _LANES)])
    return builder.bitcast(at, _VECTOR.as_pointer())


def _data(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    return context.make_array(array_type)(context, builder, array).data


def _multiplied(typing: Any, x: Any, at: Any, stride: Any, last: Any, w: Any, depth: Any, out: Any) -> Any:
    """out[r, j] = sum_p x[at + min(r, last) * stride + p] w[p, j] for p < depth; x, w [depth, COLUMNS], out flat."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, at, stride, last, w, depth, out = arguments
        x, w, out = (_data(context, builder, signature.args[i], a) for i, a in ((0, x), (4, w), (6, out)))
        first, rows = builder.gep(x, [at]), []
        for r in range(ROWS):
            number = ir.Constant(_I64, r)
            number = builder.select(builder.icmp_signed("<", number, last), number, last)
            rows.append(builder.gep(first, [builder.mul(number, stride)]))
        sums = [[cgutils.alloca_once_value(builder, _VECTOR([0] * _LANES)) for _ in range(_VECTORS)] for _ in rows]
        with cgutils.for_range(builder, depth) as loop:
            row = builder.gep(w, [builder.mul(loop.index, ir.Constant(_I64, COLUMNS))])
            columns = [builder.load(_vector(builder, row, v), align=8) for v in range(_VECTORS)]
            for r, start in enumerate(rows):
                one = builder.load(builder.gep(start, [loop.index]))
                alone = builder.insert_element(_VECTOR(ir.Undefined), one, ir.IntType(32)(0))
                lanes = ir.VectorType(ir.IntType(32), _LANES)([0] * _LANES)
                same = builder.shuffle_vector(alone, _VECTOR(ir.Undefined), lanes)
                for total, column in zip(sums[r], columns, strict=True):
                    builder.store(builder.add(builder.load(total), builder.mul(same, column)), total)
        for i, total in enumerate(total for row in sums for total in row):
            builder.store(builder.load(total), _vector(builder, out, i), align=8)
        return context.get_dummy_value()

    return types.void(x, at, stride, last, w, depth, out), generate


_tile: Any = intrinsic(_multiplied)


def _copied(typing: Any, source: Any, at: Any, out: Any, to: Any) -> Any:
    """out[to : to + COLUMNS] = source[at : at + COLUMNS], both flat."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, at, out, to = arguments
        begin = builder.gep(_data(context, builder, signature.args[0], source), [at])
        end = builder.gep(_data(context, builder, signature.args[2], out), [to])
        for v in range(_VECTORS):
            builder.store(builder.load(_vector(builder, begin, v), align=8), _vector(builder, end, v), align=8)
        return context.get_dummy_value()

    return types.void(source, at, out, to), generate


_copy: Any = intrinsic(_copied)


@njit("void(int64[::1], int64, int64, int64, int64, int64[::1])", nogil=True, cache=True)
def _pack(w: Any, at: Any, stride: Any, depth: Any, count: Any, out: Any) -> None:
    """`count` columns of w, those of a tile side by side: out [count / COLUMNS, depth, COLUMNS], zeros at the end."""
    whole, size = count // COLUMNS, depth * COLUMNS
    for p in range(depth):
        row, to = at + p * stride, p * COLUMNS
        for q in range(whole):
            _copy(w, row + q * COLUMNS, out, q * size + to)
        if whole * COLUMNS < count:
            for j in range(COLUMNS):
                of = whole * COLUMNS + j
                out[whole * size + to + j] = w[row + of] if of < count else 0


@njit("void(int64[:, :, ::1], int64[:, :, ::1], int64[:, :, ::1])", nogil=True, cache=True)
def products(x: Any, w: Any, out: Any) -> None:
    """out[b] = x[b] @ w[b], or x[b] @ w[0] if there is one w. Worth it from ROWS rows and half of COLUMNS on."""
    _, m, k = x.shape
    n = w.shape[2]
    out[:] = 0
    packed, tile = np.empty(min(k, _DEPTH) * _AT_ONCE, np.int64), np.empty(ROWS * COLUMNS, np.int64)
    for b in range(x.shape[0]):
        xb, wb = x[b].reshape(-1), (w[b] if w.shape[0] > 1 else w[0]).reshape(-1)
        for j in range(0, n, _AT_ONCE):
            count = min(n - j, _AT_ONCE)
            for p in range(0, k, _DEPTH):
                depth = min(k - p, _DEPTH)
                _pack(wb, p * n + j, n, depth, count, packed)
                for i in range(0, m, ROWS):
                    rows = min(m - i, ROWS)
                    for q in range(0, count, COLUMNS):
                        _tile(xb, i * k + p, k, rows - 1, packed[q * depth :], depth, tile)
                        columns = min(count - q, COLUMNS)
                        for r in range(rows):
                            for c in range(columns):
                                out[b, i + r, j + q + c] += tile[r * COLUMNS + c]
