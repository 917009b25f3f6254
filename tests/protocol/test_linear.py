"""Products with weights: exact, one opening of the input, nothing that grows with the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from mpcinfer.errors import ProtocolError
from mpcinfer.protocol.context import Context, together
from mpcinfer.protocol.linear import FixedProduct, WeightMask, fixed_product, mask_weight
from mpcinfer.protocol.local import LocalWorld
from mpcinfer.protocol.types import Shared, Weight
from mpcinfer.ring.kernels import MATMUL, MUL, Bilinear
from tests.openings import seed

Worlds = Callable[..., LocalWorld]
RNG = torch.Generator().manual_seed(1)
# op, x, w
PRODUCTS = {
    "matmul": (MATMUL, (6, 7), (7, 5)),
    "one row": (MATMUL, (1, 7), (7, 300)),
    "batched": (MATMUL, (2, 3, 7), (7, 5)),
    "no rows": (MATMUL, (0, 7), (7, 5)),
    "conv1d": (Bilinear("conv", ((2,), (1,), (1,), 1)), (2, 3, 9), (4, 3, 3)),
    "conv2d": (Bilinear("conv", ((1, 2), (1, 0), (2, 1), 1)), (2, 3, 6, 7), (4, 3, 2, 3)),
    "grouped": (Bilinear("conv", ((1, 1), (1, 1), (1, 1), 2)), (2, 4, 5, 5), (6, 2, 3, 3)),
    "depthwise": (Bilinear("conv", ((1, 1), (1, 1), (1, 1), 4)), (2, 4, 5, 5), (4, 1, 3, 3)),
    "empty batch": (Bilinear("conv", ((1, 1), (1, 1), (1, 1), 1)), (0, 4, 5, 5), (2, 4, 3, 3)),
    "element-wise": (MUL, (3, 5), (5,)),
}


def large(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=RNG)


def deployed(world: LocalWorld, frac_bits: int = 0, **weights: torch.Tensor) -> list[Mapping[str, Weight]]:
    """Weights as each party holds them after a deployment."""
    out: list[dict[str, Weight]] = [{} for _ in range(world.parties)]
    for name, w in weights.items():
        for own, weight in zip(
            out, world.run(lambda ctx, s, n=name: mask_weight(ctx, n, s), world.share(w, frac_bits)), strict=True
        ):
            own[name] = weight
    return list(out)


@pytest.mark.parametrize("name", PRODUCTS)
def test_exact_and_cheap(run_in: Any, world: Worlds, parties: int, name: str) -> None:
    op, xs, ws = PRODUCTS[name]
    world_ = world(parties)
    x, w = large(*xs), large(*ws)
    weights = deployed(world_, 16, w=w)
    ran = run_in(world_, lambda ctx, s: fixed_product(ctx, s, ctx.weights["w"], op), (x, 10), weights=weights)
    assert torch.equal(ran.value, op(x, w)) and ran.frac_bits == 26
    ran.costs(rounds=1, sent=8 * x.numel(), dealt=8 * op(x, w).numel())
    assert ran.opened() == [("FixedProduct.a", 64)]


def test_online_bytes_do_not_grow_with_the_weights(run_in: Any, world: Worlds, parties: int) -> None:
    for width in (1, 10, 1000):
        w = world(parties, width)
        weights = deployed(w, w=large(8, width))
        ran = run_in(w, lambda ctx, s: fixed_product(ctx, s, ctx.weights["w"], MATMUL), large(2, 8), weights=weights)
        ran.costs(rounds=1, sent=8 * 16, dealt=8 * 2 * width)


def test_one_deployment_serves_many_requests_and_layers(run_in: Any, world: Worlds, parties: int) -> None:
    w = world(parties)
    one, two = large(6, 4), large(6, 3)
    weights = deployed(w, one=one, two=two)

    async def heads(ctx: Context, x: Shared) -> Any:
        return await together(
            fixed_product(ctx.scope("1"), x, ctx.weights["one"], MATMUL),
            fixed_product(ctx.scope("2"), x, ctx.weights["two"], MATMUL),
            fixed_product(ctx.scope("1 again"), x.times(3), ctx.weights["one"], MATMUL),
        )

    for _ in range(3):
        x = large(5, 6)
        ran = run_in(w, heads, x, weights=weights)
        for value, expected in zip(ran.value, (x @ one, x @ two, 3 * x @ one), strict=True):
            assert torch.equal(value, expected)
        ran.costs(rounds=1, sent=3 * 8 * 30, dealt=8 * 5 * 11)


def test_masking_a_weight(run: Any, world: Worlds, parties: int) -> None:
    w = large(10, 20)

    async def shape_only(ctx: Context, s: Shared) -> Shared:
        weight = await mask_weight(ctx, "w", s)
        assert weight.name == "w" and weight.shape == (10, 20) and weight.frac_bits == 16
        return s

    ran = run(shape_only, (w, 16))
    ran.costs(rounds=1, sent=8 * 200, dealt=0)
    assert ran.opened() == [("WeightMask.b", 64)]
    world_ = world(parties)
    masked = [own["w"].masked for own in deployed(world_, w=w)]
    assert all(torch.equal(f, masked[0]) for f in masked) and not torch.equal(masked[0], w)
    assert torch.equal(masked[0] - w, world_._fixed["w"])  # F = W + B, B known to the dealer alone


def test_another_deployment_is_another_mask(parties: int) -> None:
    one, two = large(10, 20), large(10, 20)
    first = deployed(LocalWorld(parties, seed("deployment 1")), w=one)[0]["w"].masked
    second = deployed(LocalWorld(parties, seed("deployment 2")), w=two)[0]["w"].masked
    assert not bool((first - second == one - two).any())
    again = deployed(LocalWorld(parties, seed("deployment 1")), w=two)[0]["w"].masked
    assert torch.equal(first - again, one - two)  # the planted fault: one mask for two deployments


def test_repeating_a_deployment_in_one_world_renews_the_mask(world: Worlds, parties: int) -> None:
    w, x = large(4, 3), large(2, 4)
    world_ = world(parties)
    first, second = deployed(world_, w=w), deployed(world_, w=w)
    assert not torch.equal(first[0]["w"].masked, second[0]["w"].masked)
    results = world_.run(
        lambda ctx, s: fixed_product(ctx, s, ctx.weights["w"], MATMUL), world_.share(x), weights=second
    )
    assert torch.equal(world_.reveal(results), x @ w)


def test_lasting_masks_are_marked() -> None:
    assert WeightMask.lasting and not FixedProduct.lasting


def test_a_lasting_mask_hides_the_weight_once(world: Worlds) -> None:
    async def twice(ctx: Context, w: Shared) -> None:
        correlation = ctx.correlation(WeightMask("w", w.shape))
        await ctx.open(w, correlation.mask("b"))
        await ctx.open(w.times(2), correlation.mask("b"))

    w = world(2)
    with pytest.raises(ProtocolError, match="used already"):
        w.run(twice, w.share(large(3)))
