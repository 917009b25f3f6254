"""Beaver products and squares: exact mod 2^64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mpcinfer.protocol.multiply import multiply, square
from mpcinfer.ring.kernels import MATMUL, Bilinear

Run = Callable[..., Any]
EDGES = [0, 1, -1, 2, -2, 2**31, -(2**31), 2**62, 2**63 - 1, -(2**63), 12345, -12345]
RNG = torch.Generator().manual_seed(1)


def large(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=RNG)


def test_every_pair_of_edges(run: Run) -> None:
    x, y = torch.cartesian_prod(torch.tensor(EDGES), torch.tensor(EDGES)).T
    assert torch.equal(run(multiply, x, y).value, x * y)


def test_random(run: Run) -> None:
    x, y = large(50, 7), large(50, 7)
    assert torch.equal(run(multiply, x, y).value, x * y)


def test_scales_add_up(run: Run) -> None:
    ran = run(multiply, (torch.tensor([-3 << 4]), 4), (torch.tensor([5 << 6]), 6))
    assert ran.value.tolist() == [-15 << 10] and ran.frac_bits == 10


def test_costs_and_openings(run: Run) -> None:
    ran = run(multiply, large(1000), large(1000))
    ran.costs(rounds=1, sent=16_000, dealt=8000)
    assert ran.opened() == [("Triple.a", 64), ("Triple.b", 64)]


@pytest.mark.parametrize(("xs", "ys"), [((), ()), ((0,), (0,)), ((3, 1), (4,)), ((2, 3), (3,)), ((5,), ())])
def test_broadcasting_masks_operands_in_their_own_shapes(run: Run, xs: tuple[int, ...], ys: tuple[int, ...]) -> None:
    x, y = large(*xs), large(*ys)
    ran = run(multiply, x, y)
    assert torch.equal(ran.value, x * y)
    ran.costs(rounds=1, sent=8 * (x.numel() + y.numel()), dealt=8 * (x * y).numel())


@pytest.mark.parametrize(("xs", "ys"), [((1, 7), (7, 5)), ((4, 7), (7, 5)), ((2, 3, 4), (2, 4, 5))])
def test_matrix_products(run: Run, xs: tuple[int, ...], ys: tuple[int, ...]) -> None:
    x, y = large(*xs), large(*ys)
    ran = run(lambda ctx, a, b: multiply(ctx, a, b, MATMUL), x, y)
    assert torch.equal(ran.value, x @ y)
    ran.costs(rounds=1, sent=8 * (x.numel() + y.numel()), dealt=8 * (x @ y).numel())


def test_convolutions(run: Run) -> None:
    op = Bilinear("conv", ((2, 1), (1, 0), (1, 2), 2))
    x, w = large(2, 4, 6, 7), large(6, 2, 3, 2)
    ran = run(lambda ctx, a, b: multiply(ctx, a, b, op), x, w)
    assert torch.equal(ran.value, op(x, w))
    ran.costs(rounds=1, sent=8 * (x.numel() + w.numel()), dealt=8 * op(x, w).numel())


def test_square(run: Run) -> None:
    x = torch.cat([torch.tensor(EDGES), large(988)])
    ran = run(square, (x, 16))
    assert torch.equal(ran.value, x * x) and ran.frac_bits == 32
    ran.costs(rounds=1, sent=8000, dealt=8000)
    assert ran.opened() == [("SquarePair.a", 64)]


def test_a_product_of_one_secret_with_itself(run: Run) -> None:
    x = large(9)

    async def both(ctx: Any, s: Any) -> Any:
        return [await multiply(ctx, s, s), await square(ctx, s)]

    product, squared = run(both, x).value
    assert torch.equal(product, x * x) and torch.equal(squared, x * x)
