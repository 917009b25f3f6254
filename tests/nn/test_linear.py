"""Linear layers, matrix products, convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mpcinfer.errors import UnsupportedError
from mpcinfer.graph.capture import Captured, capture
from mpcinfer.protocol.local import Transcript
from tests.models_local import Outputs, assert_agrees, grid, on_grid, run_local
from tests.nn.operators import check


@pytest.mark.parametrize("group", ["linear", "conv", "conv1d"])
def test_agrees(group: str, parties: int) -> None:
    check(group, parties)


@pytest.mark.parametrize("frac_bits", [8, 12, 20, 24])
def test_other_scales(frac_bits: int) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(48, 5))
    model, x = on_grid(model, frac_bits), grid(2, 2, 4, 4, frac_bits=frac_bits)
    # the convolution's last unit, times 48 weights below 1
    assert_agrees(model, capture(model, [x], frac_bits=frac_bits), [x], 2, ulps=49)


def cost(model: nn.Module, x: torch.Tensor) -> tuple[Captured, Transcript]:
    captured = capture(on_grid(model), [x])
    return captured, run_local(captured, [x], 2)[1]


def opened(transcript: Transcript) -> list[tuple[str, int]]:
    return [(label.partition(":")[2], value.numel()) for label, _, value in transcript.openings]


def test_a_linear_layer_opens_its_input_and_its_output() -> None:
    _, transcript = cost(nn.Linear(30, 7), grid(4, 30))
    assert opened(transcript) == [("FixedProduct.a", 4 * 30), ("Truncation.r", 4 * 7)]
    assert (transcript.rounds, transcript.bytes_sent) == (2, 8 * 4 * (30 + 7))


@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_a_convolution_opens_its_input_and_its_output_whatever_its_kernel(kernel: int) -> None:
    captured, transcript = cost(nn.Conv2d(3, 5, kernel, padding="same"), grid(2, 3, 8, 8))
    assert captured.program.size == 5 * (3 * kernel**2 + 1)
    assert opened(transcript) == [("FixedProduct.a", 2 * 3 * 64), ("Truncation.r", 2 * 5 * 64)]


def test_products_with_a_parameter_open_nothing_of_it() -> None:
    functions = {
        "x @ W": lambda m, x: x @ m.w,
        "x @ W.T": lambda m, x: x @ m.w.t(),
        "mm": lambda m, x: torch.mm(x, m.w),
    }
    for function in functions.items():
        _, transcript = cost(Outputs(dict([function]), w=nn.Parameter(torch.ones(50, 50))), grid(1, 50))
        assert opened(transcript) == [("FixedProduct.a", 50), ("Truncation.r", 50)]


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda m, x: F.conv2d(x, m.even, padding="same"), "even kernel"),
        (lambda m, x: F.conv3d(x[:, None], m.even[:, :, None]), "no protocol for: aten.conv3d"),
        (lambda m, x: torch.einsum("nchw,cd->ndhw", x, m.even[0, :, 0]), "no protocol for: aten.einsum"),
    ],
)
def test_refusals(function: object, why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        capture(Outputs({"f": function}, even=nn.Parameter(torch.ones(1, 1, 2, 2))).double().eval(), [grid(2, 1, 6, 6)])
