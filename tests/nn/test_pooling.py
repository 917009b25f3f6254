"""Maxima and averages over windows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mpcinfer.errors import UnsupportedError
from mpcinfer.graph.capture import capture
from tests.models_local import Outputs, assert_agrees, grid, run_local
from tests.nn.operators import check


@pytest.mark.parametrize("group", ["max_pool", "avg_pool"])
def test_agrees(group: str, parties: int) -> None:
    check(group, parties)


def test_a_padded_maximum_of_very_negative_numbers_is_not_the_padding() -> None:
    x = torch.full((1, 1, 4, 4), -(2.0**29), dtype=torch.float64)
    model = nn.MaxPool2d(3, 2, 1).eval()
    assert_agrees(model, capture(model, [x]), [x], 2, ulps=0)


def test_costs() -> None:
    x = grid(2, 3, 8, 8)
    _, transcript = run_local(capture(nn.MaxPool2d(2).eval(), [x]), [x], 2)
    # one comparison of neighbours along each axis: half of the numbers, then half of those that are left
    assert transcript.rounds == 2 * 4
    assert transcript.bytes_sent <= 16 * (x.numel() // 2 + x.numel() // 4)
    _, transcript = run_local(capture(nn.AvgPool2d(2).eval(), [x]), [x], 2)
    assert (transcript.rounds, transcript.bytes_sent) == (1, 8 * x.numel() // 4)


def test_averages_of_equal_numbers_at_other_scales() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d((3, 2))).eval()
    for frac_bits in (8, 12, 20, 24):
        x = grid(2, 2, 7, 5, frac_bits=frac_bits)
        ulps = 1.01 if frac_bits < 20 else 4
        assert_agrees(model, capture(model, [x], frac_bits=frac_bits), [x], 2, ulps)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda m, x: F.adaptive_max_pool2d(x, 3), "aten.adaptive_max_pool2d.default at .*unequal size"),
        (lambda m, x: F.adaptive_max_pool1d(x[:, 0], 2), "aten.adaptive_max_pool1d.default at .*unequal size"),
        (lambda m, x: F.max_pool2d(x, 2, return_indices=True)[0], "no protocol for: aten.max_pool2d_with_indices"),
        (lambda m, x: F.adaptive_max_pool2d(x, (7, 1), return_indices=True)[1], "indices of a maximum"),
        (lambda m, x: F.fractional_max_pool2d(x, 2, output_size=2), "no protocol for|draws random"),
        (lambda m, x: F.max_pool3d(x[:, None], 2), "no protocol for: aten.max_pool3d"),
    ],
)
def test_refusals(function: object, why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        capture(Outputs({"f": function}).eval(), [grid(2, 3, 7, 5)])
