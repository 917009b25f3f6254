"""What the openings of whole networks show: nothing, whatever the input. The four tests of tests/openings.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional

from mpcinfer.graph.capture import Captured, capture
from mpcinfer.graph.interpret import interpret
from mpcinfer.graph.plan import plan_inference, plan_masks
from mpcinfer.models.encoder import Attention
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.types import Shared
from mpcinfer.ring.codec import FixedPoint
from mpcinfer.ring.domain import Ring
from mpcinfer.ring.kernels import conv
from tests.graph.conftest import Digits
from tests.models_local import deploy_local
from tests.openings import (
    View,
    assert_differences,
    assert_each_mask_opens_once,
    assert_indistinguishable,
    assert_uniform,
    faulty_masks,
    observe,
    seed,
)

CODEC = FixedPoint()
BATCH, TEXTS = 128, 1024
ROWS, LENGTH, WIDTH = 16, 4, 8


class Transformer(nn.Module):
    """Secret ids, attention in which a public mask hides some, layer norms and GELU: three numbers for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.attention = nn.Embedding(ROWS, WIDTH), Attention(WIDTH, 2)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.up, self.down, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        q, k, v = (p.unflatten(-1, (2, -1)).transpose(-2, -3) for p in self.attention.qkv(x).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        x = self.norms[0](x + self.attention.out(mixed.transpose(-2, -3).flatten(-2)))
        return self.head(self.norms[1](x + self.down(functional.gelu(self.up(x)))))


@dataclass(frozen=True)
class Network:
    """A captured network, as many inputs of each kind, and what its first openings hide, as a linear map of inputs."""

    captured: Captured
    inputs: dict[str, torch.Tensor]
    hidden: Callable[[torch.Tensor], list[torch.Tensor]]

    def encoded(self, x: torch.Tensor) -> torch.Tensor:
        """An input as the parties share it."""
        return CODEC.encode(x) if x.is_floating_point() else x


def cnn(digits: Digits) -> Network:
    captured = capture(digits.cnn, [digits.images[:1]])
    layer = next(node for node in captured.program.nodes if node.op == "aten.conv2d.default")
    weight = captured.weights[layer.args[1].name]
    inputs = {
        "real": digits.images[:BATCH],
        "zero": torch.zeros(BATCH, 1, 8, 8),
        # beyond the range in which the network is right; what it opens is uniform all the same
        "maximal": torch.full((BATCH, 1, 8, 8), CODEC.limit - 1, dtype=torch.float64),
        "random": torch.randn(BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 4,
    }
    return Network(captured, inputs, lambda x: [x, conv(x, weight, (1, 1), (1, 1), (1, 1), 1)])


def transformer() -> Network:
    torch.manual_seed(0)
    model = Transformer().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "real": (torch.arange(TEXTS)[:, None] + torch.arange(LENGTH)) % ROWS,
        "zero": torch.zeros(TEXTS, LENGTH, dtype=torch.int64),
        "maximal": torch.full((TEXTS, LENGTH), ROWS - 1),
        "random": torch.randint(0, ROWS, (TEXTS, LENGTH), generator=generator),
    }
    captured = capture(model, [inputs["real"][:2]])
    return Network(captured, inputs, lambda ids: [ids, functional.one_hot(ids, ROWS)])


@pytest.fixture(scope="module", params=["cnn", "transformer"])
def network(request: pytest.FixtureRequest, digits: Digits) -> Network:
    return cnn(digits) if request.param == "cnn" else transformer()


def view(network: Network, x: torch.Tensor, parties: int, key: bytes) -> View:
    """Party 0's view of a request by a model that was deployed for it; `key` determines all correlations."""
    program = network.captured.program
    world, holdings = deploy_local(network.captured, parties, key)

    async def request(ctx: Context, *own: Shared) -> list[Shared]:
        inputs = [Shared(s.share, v.frac_bits) for s, v in zip(own, program.inputs, strict=True)]
        return await interpret(program, ctx, holdings[ctx.index], inputs)

    return observe(request, network.encoded(x), parties=parties, key=key, world=world, weights=holdings)


def views(network: Network, name: str, parties: int = 2) -> list[View]:
    """Of nine runs under different seeds."""
    return [view(network, network.inputs[name], parties, seed(name, parties, run)) for run in range(9)]


# (i)


def test_each_mask_hides_one_opening(network: Network, parties: int) -> None:
    program, shape = network.captured.program, tuple(network.inputs["zero"].shape)
    plan, cost, _ = plan_inference(program, [shape], parties=parties)
    assert_each_mask_opens_once(plan, cost, parties)
    assert_each_mask_opens_once(*plan_masks(program, parties=parties, deployment=""), parties)


# (ii)


def test_openings_differ_by_what_the_values_differ(network: Network, parties: int) -> None:
    """With equal seeds, two inputs' first openings differ by what they hide."""
    inputs = [network.inputs[name][:4] for name in ("real", "random")]
    first, second = (view(network, x, parties, seed("same")) for x in inputs)
    pairs = zip(*(network.hidden(network.encoded(x)) for x in inputs), strict=True)
    assert_differences(first, second, [a - b for a, b in pairs])


def test_equal_inputs_under_other_seeds_share_nothing(network: Network) -> None:
    first, second = (view(network, network.inputs["real"][:8], 2, seed("other", run)) for run in range(2))
    for a, b in zip(first.opened, second.opened, strict=True):
        assert a.label == b.label and (a.value.numel() < 16 or not torch.equal(a.value, b.value))


# (iii)


@pytest.mark.parametrize(
    "name", ["zero", pytest.param("maximal", marks=pytest.mark.slow), pytest.param("random", marks=pytest.mark.slow)]
)
def test_openings_of_a_network_are_uniform(network: Network, name: str) -> None:
    assert_uniform(views(network, name))


@pytest.mark.slow
def test_openings_of_three_parties_are_uniform(network: Network) -> None:
    assert_uniform(views(network, "zero", 3))


def one_bit_short(mask: torch.Tensor, ring: Ring) -> torch.Tensor:
    return mask & ((1 << 63) - 1) if ring.bits == 64 else mask


def below_rows(mask: torch.Tensor, ring: Ring) -> torch.Tensor:
    """Masks of ids that are ids themselves, but the last."""
    return mask % (ROWS - 1) if ring == Ring(4) else mask


@pytest.mark.slow
def test_a_mask_that_is_one_bit_short_shows(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty_masks(monkeypatch, change=one_bit_short)
    with pytest.raises(AssertionError, match="not uniform"):
        assert_uniform(views(network, "zero"))


@pytest.mark.slow
def test_ids_masked_by_ids_show(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    if network.captured.program.inputs[0].frac_bits:
        pytest.skip("it has no ids")
    faulty_masks(monkeypatch, change=below_rows)
    with pytest.raises(AssertionError, match="not uniform"):
        assert_uniform(views(network, "zero"))


# (iv)

RUNS = 1000


def two_inputs(network: Network) -> tuple[View, View]:
    """RUNS runs on one input and RUNS on another, each one batch, and as different as two inputs are."""
    real = network.inputs["real"]
    a, b = (x.expand(RUNS, *real.shape[1:]).clone() for x in (network.inputs["zero"][:1], network.inputs["random"][:1]))
    return view(network, a, 2, seed("a")), view(network, b, 2, seed("b"))


@pytest.mark.slow
def test_two_inputs_cannot_be_told_apart(network: Network) -> None:
    assert_indistinguishable(*two_inputs(network), RUNS)


@pytest.mark.slow
def test_short_masks_tell_them_apart(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty_masks(monkeypatch, change=lambda mask, ring: mask & 0xFFFFFFFF if ring.bits == 64 else mask)
    with pytest.raises(AssertionError, match="distinguishable"):
        assert_indistinguishable(*two_inputs(network), RUNS)
