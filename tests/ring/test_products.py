"""Matrix products: against float64 on small integers, and against numpy's unsigned words on large ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpcinfer.ring.kernels import MATMUL, MATMUL_T
from mpcinfer.ring.products import matmul, matmul_t

RNG = torch.Generator().manual_seed(1)
SHAPES = [
    ((1, 7), (7, 5)), ((2, 8), (8, 300)), ((3, 8), (8, 5)), ((16, 33), (33, 9)), ((7,), (7, 5)), ((1, 1, 6), (6, 257)),
    ((2, 3, 4), (4, 5)), ((2, 3, 4), (2, 4, 5)), ((1, 4), (4, 1)), ((0, 4), (4, 3)), ((1, 0), (0, 3)), ((4, 7), (7,)),
    ((7,), (7,)), ((2, 3, 4), (4,)), ((4,), (2, 4, 5)), ((2, 1, 3, 4), (5, 4, 6)), ((3, 4), (5, 4, 6)),
    ((2, 3, 4), (1, 4, 5)), ((0, 3, 4), (0, 4, 5)), ((2, 0, 4), (2, 4, 5)), ((17, 6), (6, 2)), ((3, 17, 6), (3, 6, 2)),
    ((3, 5), (5, 2049)),
    # in tiles: whole ones and what is over, rows, columns and depth
    ((8, 1), (1, 16)), ((8, 0), (0, 16)), ((9, 512), (512, 17)), ((16, 513), (513, 64)), ((23, 1100), (1100, 79)),
    ((3, 16, 20), (3, 20, 48)), ((2, 9, 30), (30, 65)), ((2, 1, 8, 5), (4, 5, 31)), ((0, 8, 4), (0, 4, 16)),
    ((8, 30), (30, 8)), ((30, 30), (30, 13)),
]  # fmt: skip


def ints(shape: tuple[int, ...], bits: int = 64) -> torch.Tensor:
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, shape, generator=RNG)


@pytest.mark.parametrize(("xs", "ws"), SHAPES)
def test_matmul(xs: tuple[int, ...], ws: tuple[int, ...]) -> None:
    x, w = ints(xs, 10), ints(ws, 10)
    assert torch.equal(matmul(x, w), (x.double() @ w.double()).long())
    x, w = ints(xs), ints(ws)
    with np.errstate(over="ignore"):
        expected = x.numpy().view(np.uint64) @ w.numpy().view(np.uint64)
    assert (matmul(x, w).numpy() == expected.view(np.int64)).all()
    assert MATMUL.shape(xs, ws) == tuple(expected.shape)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 1100), st.integers(0, 2**31))
def test_any_shape(m: int, k: int, n: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, w = (torch.randint(-(2**63), 2**63 - 1, s, generator=g) for s in ((m, k), (k, n)))
    expected = x @ w
    assert torch.equal(matmul(x, w), expected)
    assert torch.equal(matmul_t(x, w.t().contiguous()), expected)
    assert torch.equal(matmul_t(x[None], w.t().contiguous()), expected[None])


def test_strided_operands() -> None:
    x, w = ints((9, 12)).T, ints((5, 9)).T
    assert torch.equal(matmul(x, w), x @ w)
    assert torch.equal(matmul(x[::2], w[:, 1:]), x[::2] @ w[:, 1:])
    assert torch.equal(matmul_t(x, w.T), x @ w)


def test_matrices_that_do_not_fit() -> None:
    for device in ("cpu", "meta"):
        x, w = (torch.empty(s, dtype=torch.int64, device=device) for s in ((2, 3), (4, 5)))
        with pytest.raises((ValueError, RuntimeError), match="product|reduction dim"):
            matmul(x, w)


def test_shapes_of_transposed_products() -> None:
    for rows in ((), (1,), (20,), (2, 3), (0,)):
        assert MATMUL_T.shape((*rows, 6), (5, 6)) == (*rows, 5) == tuple(matmul_t(ints((*rows, 6)), ints((5, 6))).shape)
