"""Attention against torch's: masks, scores that are equal or nearly so, and what masked pairs cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mpcinfer.errors import UnsupportedError
from mpcinfer.graph.capture import capture
from mpcinfer.nn.attention import attention
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.local import LocalWorld
from mpcinfer.protocol.types import Shared
from tests.models_local import Outputs, assert_agrees, grid, run_local
from tests.nn.operators import check
from tests.openings import seed

attend = F.scaled_dot_product_attention
# of a softmax, 5e-4, in units in the last place
SOFTMAX = 33


def inputs(*shape: int, scale: float = 2.0) -> list[torch.Tensor]:
    return [grid(*shape, scale=scale, seed=i) for i in range(3)]


def run(
    function: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor], parties: int = 2, ulps: float = SOFTMAX
) -> tuple[int, int]:
    """Rounds and bytes of a call that is right."""
    model = Outputs({"attention": function}).double().eval()
    seen = assert_agrees(model, capture(model, tensors), tensors, parties, ulps)
    return seen.rounds, seen.bytes_sent


def test_agrees(parties: int) -> None:
    check("attention", parties)


def test_identical_and_neighbouring_scores(parties: int) -> None:
    q, k, v = inputs(1, 1, 8, 4)
    k[..., 1:, :] = k[..., :1, :]  # all scores of a row are equal
    k[..., 4, 0] += 2.0**-16  # and this one is hardly another
    run(lambda m, q, k, v: attend(q, k, v), [q, k, v], parties)
    run(lambda m, q, k, v: attend(q, k, v, is_causal=True), [q, k, v], parties)


def test_large_scores_choose_one_value(parties: int) -> None:
    q, k, v = inputs(1, 2, 6, 4, scale=60)
    run(lambda m, q, k, v: attend(q, k, v), [q, k, v / 16], parties, ulps=200)


def test_a_row_that_masks_all_gives_zeros(parties: int) -> None:
    mask = torch.tensor([[False] * 4, [True] * 4, [False, True, True, False], [False] * 4])
    function = Outputs({"attention": lambda m, q, k, v: attend(q, k, v, mask)}).double().eval()
    tensors = inputs(2, 2, 4, 4)
    (got,), _ = run_local(capture(function, tensors), tensors, parties)
    assert float(got[..., [0, 3], :].abs().max()) == 0
    run(lambda m, q, k, v: attend(q, k, v, mask), tensors, parties)


def test_a_mask_of_nothing_but_false(parties: int) -> None:
    mask = torch.zeros(3, 3, dtype=torch.bool)
    tensors = inputs(1, 1, 3, 4)
    function = Outputs({"attention": lambda m, q, k, v: attend(q, k, v, mask)}).double().eval()
    (got,), _ = run_local(capture(function, tensors), tensors, parties)
    assert float(got.abs().max()) == 0


def test_a_masked_pair_costs_eight_bytes() -> None:
    n = 8
    tensors = inputs(1, 2, n, 4)
    _, full = run(lambda m, q, k, v: attend(q, k, v), tensors)
    _, causal = run(lambda m, q, k, v: attend(q, k, v, is_causal=True), tensors)
    skipped = 2 * n * (n - 1) // 2
    # beyond its masked zero: the maximum, the exponential
    saved = (full - causal) / skipped
    assert saved >= 8 + 16
    diagonal = torch.eye(n, dtype=torch.bool)
    rounds, one_each = run(lambda m, q, k, v: attend(q, k, v, diagonal), tensors)
    assert (full - one_each) / (2 * n * (n - 1)) == pytest.approx(saved, rel=0.08)  # contests are of other sizes
    assert rounds == 12  # no maximum is needed


@pytest.mark.parametrize(("length", "rounds"), [(2, 15), (16, 19)])
def test_rounds(length: int, rounds: int) -> None:
    """Of scores as large as the proven limit of the inputs lets them be: of long words."""
    assert run(lambda m, q, k, v: attend(q, k, v), inputs(1, 1, length, 4))[0] == rounds


async def attended(ctx: Context, q: Shared, k: Shared, v: Shared, **how: Any) -> Shared:
    return await attention(ctx, q, k, v, **how)


@pytest.mark.parametrize(("reach", "rounds"), [(None, 20), (26, 19), (13, 19), (12, 17), (11, 17), (3, 17)])
@pytest.mark.parametrize("causal", [False, True])
def test_how_large_scores_may_be(parties: int, reach: int | None, rounds: int, causal: bool) -> None:
    """Up to the very ends of what they are said to reach, and all the smaller ones; fewer rounds where that is near."""
    end = 2.0 ** (25 if reach is None else reach) - 2.0**-10
    q, k, v = grid(1, 1, 16, 2, scale=2.0, seed=1), grid(1, 1, 16, 2, seed=2), grid(1, 1, 16, 3, seed=3)
    q[..., 1, :], q[..., 2:4, 1] = torch.tensor([1.0, 0.0]), 0
    k[..., 0, :], k[..., 5, :], k[..., 6, :] = (torch.tensor([x, 0.0]) for x in (-end, end, end - 2.0**-7))
    q[..., 2, 0], q[..., 3, 0] = -1, 2.0**-8
    q[..., 4:, 0] = 0
    world = LocalWorld(parties, seed("reach"))
    shares = [world.share(torch.round(x * 2**16).long(), 16) for x in (q, k, v)]
    got = world.reveal(world.run(partial(attended, scale=1.0, reach=reach, causal=causal), *shares)).double() / 2**16
    assert float((got - attend(q, k, v, scale=1.0, is_causal=causal)).abs().max()) <= SOFTMAX * 2.0**-16
    assert world.transcript.rounds == rounds


def test_scores_beyond_what_they_are_said_to_reach_are_wrong() -> None:
    """The bound is needed: four times as far, they wrap around."""
    q, k, v = (
        torch.tensor(x, dtype=torch.float64).reshape(1, 1, -1, 1) for x in ([1.0], [-8191.0, 8191.0], [1.0, 0.0])
    )
    world = LocalWorld(2, seed("beyond"))
    shares = [world.share(torch.round(x * 2**16).long(), 16) for x in (q, k, v)]
    got = world.reveal(world.run(partial(attended, scale=1.0, reach=11), *shares)).double() / 2**16
    assert abs(float(got)) > 0.5


def test_masks_that_are_added() -> None:
    """Numbers that hide nothing, and, secret, some that do."""
    added = grid(1, 2, 6, 6, scale=8.0, seed=4)
    added[..., ::2, 3] = -(2.0**15)
    tensors = inputs(1, 2, 6, 4)
    assert run(lambda m, q, k, v: attend(q, k, v, added), tensors)[0] == 15

    async def masked(ctx: Context, q: Shared, k: Shared, v: Shared, mask: Shared) -> Shared:
        return await attention(ctx, q, k, v, mask, reach=16)

    world = LocalWorld(2, seed("added"))
    shares = [world.share(torch.round(x * 2**16).long(), 16) for x in (*tensors, added)]
    got = world.reveal(world.run(masked, *shares)).double() / 2**16
    assert float((got - attend(*tensors, added)).abs().max()) <= SOFTMAX * 2.0**-16
    assert world.transcript.rounds == 15


@pytest.mark.parametrize("frac_bits", [12, 16, 20])
def test_other_scales(frac_bits: int) -> None:
    tensors = [torch.round(x * 2**frac_bits) / 2**frac_bits for x in inputs(1, 2, 5, 4)]
    model = Outputs({"attention": lambda m, q, k, v: attend(q, k, v, is_causal=True)}).double().eval()
    captured = capture(model, tensors, frac_bits=frac_bits)
    assert_agrees(model, captured, tensors, 2, max(4, 1e-4 * 2**frac_bits))


@pytest.mark.parametrize("factor", [2.0**-30, 2.0**-13, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("frac_bits", [13, 16])
def test_factors(factor: float, frac_bits: int) -> None:
    """However many fraction bits scores have before they are truncated, some of them too many for e^x to take."""
    tensors = [torch.round(x * 2**frac_bits) / 2**frac_bits for x in inputs(1, 2, 5, 4)]
    model = Outputs({"attention": lambda m, q, k, v: attend(q, k, v, scale=factor)}).double().eval()
    captured = capture(model, tensors, frac_bits=frac_bits)
    assert_agrees(model, captured, tensors, 2, max(4, 1e-4 * 2**frac_bits))


def test_free_lengths(parties: int) -> None:
    """One program serves all lengths, of queries and of keys."""
    length, keys = torch.export.Dim("length", max=16), torch.export.Dim("keys", max=16)
    q, k = grid(1, 2, 5, 4, seed=1), grid(1, 2, 7, 4, seed=2)
    model = Outputs({"attention": lambda m, q, k: attend(q, k, k)}).double().eval()
    captured = capture(model, [q, k], dynamic_shapes={"inputs": ({2: length}, {2: keys})})
    for rows, columns in ((5, 7), (1, 1), (9, 2)):
        xs = [grid(1, 2, rows, 4, seed=3), grid(1, 2, columns, 4, seed=4)]
        assert_agrees(model, captured, xs, parties, SOFTMAX)


def test_refusals() -> None:
    model = Outputs({"attention": lambda m, q, k, v: attend(q, k, v, q @ k.transpose(-1, -2) > 0)}).double().eval()
    with pytest.raises(UnsupportedError, match="scaled_dot_product_attention.default at .*truth values"):
        capture(model, inputs(1, 1, 4, 4))
