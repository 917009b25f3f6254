"""Attention against torch's: masks, scores that are equal or nearly so, and what masked pairs cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch.nn import functional as F

from mpcinfer.errors import UnsupportedError
from mpcinfer.graph.capture import capture
from tests.models_local import Outputs, assert_agrees, grid, run_local
from tests.nn.operators import check

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
    assert saved >= 12 + 20
    diagonal = torch.eye(n, dtype=torch.bool)
    rounds, one_each = run(lambda m, q, k, v: attend(q, k, v, diagonal), tensors)
    assert (full - one_each) / (2 * n * (n - 1)) == pytest.approx(saved, rel=0.02)
    assert rounds <= 15  # no maximum is needed


@pytest.mark.parametrize(("length", "rounds"), [(2, 16), (16, 20)])
def test_rounds(length: int, rounds: int) -> None:
    assert run(lambda m, q, k, v: attend(q, k, v), inputs(1, 1, length, 4))[0] == rounds


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
