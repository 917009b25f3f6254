"""What the openings of whole networks show: nothing, whatever the input."""

from __future__ import annotations

import pytest
import torch

from mpcinfer.graph.capture import Captured, capture
from mpcinfer.graph.interpret import interpret
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.types import Shared
from mpcinfer.ring.codec import FixedPoint
from mpcinfer.ring.kernels import conv
from tests.graph.conftest import Digits
from tests.models_local import deploy_local
from tests.openings import View, assert_differences, assert_uniform, faulty_masks, observe, seed

CODEC = FixedPoint()
BATCH = 128


@pytest.fixture(scope="module")
def cnn(digits: Digits) -> Captured:
    return capture(digits.cnn, [digits.images[:1]])


def view(captured: Captured, x: torch.Tensor, parties: int, key: bytes) -> View:
    """Party 0's view of a request by a model that was deployed for it; `key` determines all correlations."""
    world, holdings = deploy_local(captured, parties, key)

    async def request(ctx: Context, *own: Shared) -> list[Shared]:
        inputs = [Shared(s.share, CODEC.frac_bits) for s in own]
        return await interpret(captured.program, ctx, holdings[ctx.index], inputs)

    return observe(request, CODEC.encode(x), parties=parties, key=key, world=world, weights=holdings)


INPUTS = {
    "zero": lambda images: torch.zeros(BATCH, 1, 8, 8),
    # beyond the range in which the network is right; what it opens is uniform all the same
    "maximal": lambda images: torch.full((BATCH, 1, 8, 8), CODEC.limit - 1, dtype=torch.float64),
    "random": lambda images: torch.randn(BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 4,
}


@pytest.mark.parametrize("name", INPUTS)
def test_openings_of_a_network_are_uniform(digits: Digits, cnn: Captured, name: str) -> None:
    x = INPUTS[name](digits.images)
    assert_uniform([view(cnn, x, 2, seed(name, run)) for run in range(4)])


def test_openings_of_three_parties_are_uniform(digits: Digits, cnn: Captured) -> None:
    assert_uniform([view(cnn, INPUTS["zero"](digits.images), 3, seed("three", run)) for run in range(4)])


@pytest.mark.parametrize("parties", [2, 3])
def test_openings_differ_by_what_the_values_differ(digits: Digits, cnn: Captured, parties: int) -> None:
    """With equal seeds, two inputs' first openings differ by the inputs, the next by the convolutions of them."""
    a, b = digits.images[:4], INPUTS["random"](digits.images)[:4]
    first, second = (view(cnn, x, parties, seed("same")) for x in (a, b))
    layer = next(node for node in cnn.program.nodes if node.op == "aten.conv2d.default")
    weight = cnn.weights[layer.args[1].name]
    difference = CODEC.encode(a) - CODEC.encode(b)
    assert_differences(first, second, [difference, conv(difference, weight, (1, 1), (1, 1), (1, 1), 1)])


def test_equal_inputs_under_other_seeds_share_nothing(digits: Digits, cnn: Captured) -> None:
    first, second = (view(cnn, digits.images[:8], 2, seed("other", run)) for run in range(2))
    for a, b in zip(first.opened, second.opened, strict=True):
        assert a.label == b.label and not torch.equal(a.value, b.value)


def test_a_mask_that_is_one_bit_short_shows(digits: Digits, cnn: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty_masks(monkeypatch, change=lambda mask, ring: mask & ((1 << 63) - 1) if ring.bits == 64 else mask)
    with pytest.raises(AssertionError, match="not uniform"):
        assert_uniform([view(cnn, INPUTS["zero"](digits.images), 2, seed("faulty", run)) for run in range(4)])
