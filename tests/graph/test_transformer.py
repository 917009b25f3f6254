"""Transformers at their extremes, beside float64, and what one of BERT-base's size costs."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional

from mpcinfer.graph.capture import Captured, capture
from mpcinfer.graph.explain import explain
from mpcinfer.graph.plan import plan_inference
from mpcinfer.models.encoder import Attention, Encoder, EncoderConfig
from tests.models_local import assert_agrees, grid, plaintext, run_local

LENGTH = 8
TINY = EncoderConfig(vocabulary=40, positions=12, width=32, layers=2, heads=4, hidden=64, activation="gelu", eps=1e-5)
IDS = torch.tensor([3, 39, 0, 17, 17, 8, 25, 11])
QUANTUM = 2.0**-16


def tiny() -> Encoder:
    """Two layers; its outputs, of a LayerNorm, reach about 3."""
    torch.manual_seed(0)
    model = Encoder(TINY, nn.Identity()).eval().requires_grad_(False)
    nn.init.normal_(model.positions)
    return model


@functools.cache
def captured_tiny() -> Captured:
    """For every length."""
    return capture(tiny(), [IDS], dynamic_shapes=[{0: Dim("length", max=TINY.positions)}])


def compare(model: nn.Module, ids: torch.Tensor, tolerance: float) -> None:
    """Every output for `ids` is within `tolerance` of float64, with two parties and with three."""
    captured = capture(model, [ids])
    for parties in (2, 3):
        assert_agrees(model, captured, [ids], parties, tolerance / QUANTUM)


@contextmanager
def seen(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """What goes into a module."""
    inputs: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].double()))
    yield inputs
    hook.remove()


def scores(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    """The scores of the attention, [heads, length, length], in float64."""
    qkv = functional.linear(x, attention.qkv.weight.double(), attention.qkv.bias.double())
    q, k, _ = (part.unflatten(-1, (attention.heads, -1)).transpose(0, 1) for part in qkv.chunk(3, -1))
    return q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])


def test_an_ordinary_one() -> None:
    compare(tiny(), IDS, 1e-3)


def test_activations_of_20000_in_some_channels() -> None:
    """In hidden channels, where they pass GELU, and from there in the sums that are normalised."""
    model = tiny()
    for block in model.blocks:
        block.up.weight[:4] *= 40_000
        block.down.weight[:, :4] = 0
        for channel in range(4):
            block.down.weight[7 * channel, channel] = (-1) ** channel
    with seen(model.blocks[1].activation) as hidden, seen(model.blocks[1].norm) as sums:
        model(IDS)
    for x in (*hidden, *sums):
        assert 20_000 <= x.abs().max() <= 100_000 and x.abs().median() < 10
    assert hidden[0].min() <= -20_000
    compare(model, IDS, 2e-3)


@pytest.mark.parametrize("which", ["none of them sees a difference", "the same word everywhere"])
def test_rows_of_identical_scores(which: str) -> None:
    model, ids = tiny(), IDS
    if which == "the same word everywhere":
        model.positions.zero_()
        ids = torch.full_like(IDS, 17)
    else:
        for block in model.blocks:
            block.attention.qkv.weight[32:64] = 0  # keys are their bias
    with seen(model.blocks[0].attention) as x:
        model(ids)
    rows = scores(model.blocks[0].attention, x[0])
    assert rows.abs().min() > QUANTUM and (rows - rows[..., :1]).abs().max() < 1e-6
    compare(model, ids, 1e-3)


@pytest.mark.parametrize("level", [0.0, 50.0])
def test_scores_within_one_quantum(level: float) -> None:
    """All scores of a row are about `level`, and differ by less than the last place of fixed point."""
    model = tiny()
    for block in model.blocks:
        block.attention.qkv.weight[:64] *= 1e-6 if level else 1e-3
        block.attention.qkv.bias[:64] = math.sqrt(level / math.sqrt(8))
    with seen(model.blocks[0].attention) as x:
        model(IDS)
    rows = scores(model.blocks[0].attention, x[0])
    assert (rows - level).abs().max() < 1e-3
    assert 0 < (rows.amax(-1) - rows.amin(-1)).max() <= QUANTUM
    compare(model, IDS, 1e-3)


class Masked(nn.Module):
    """A layer of attention in which a public mask says who may look at whom."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.words, self.inner = nn.Embedding(TINY.vocabulary, TINY.width), Attention(TINY.width, TINY.heads)
        self.norm = nn.LayerNorm(TINY.width)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        for _ in range(2):
            q, k, v = (p.unflatten(-1, (TINY.heads, -1)).transpose(-2, -3) for p in self.inner.qkv(x).chunk(3, -1))
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
            x = self.norm(x + self.inner.out(mixed.transpose(-2, -3).flatten(-2)))
        return x


def test_a_fully_masked_row() -> None:
    """It mixes nothing, as in torch, and the other rows are right."""
    torch.manual_seed(0)
    mask = torch.rand(LENGTH, LENGTH) < 0.5
    mask[3], mask[5] = False, True
    model = Masked(mask).eval().requires_grad_(False)
    q = torch.ones(1, LENGTH, 4)
    assert functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)[0, 3].tolist() == [0.0] * 4
    compare(model, IDS, 1e-3)


@pytest.mark.parametrize("length", [1, 5, 12])
def test_a_run_costs_what_the_trace_says(length: int, parties: int) -> None:
    """Also for lengths other than that of the example it was captured with."""
    captured = captured_tiny()
    _, run = run_local(captured, [torch.arange(length)], parties)
    plan, cost, _ = plan_inference(captured.program, [(length,)], parties=parties)
    assert (run.rounds, run.bytes_sent, run.dealer_bytes) == (cost.rounds, cost.bytes_sent, plan.correction_bytes())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_bert_base_of_128_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    """12 layers, width 768, 12 heads, 3,072 hidden units, a vocabulary of 30,522: two parties, both together."""
    torch.manual_seed(0)
    config = EncoderConfig(30_522, 512, 768, layers=12, heads=12, hidden=3072, activation="gelu", eps=1e-12)
    model = Encoder(config, nn.Identity()).eval().requires_grad_(False)
    program = capture(model, [torch.arange(128)]).program
    explained = explain(program, [(128,)], parties=2)
    total, words = explained.total, next(layer.price for layer in explained.layers if layer.path == "words")
    online, before = 2 * total.online_bytes, total.offline_bytes
    with capsys.disabled():
        sys.stdout.write(
            f"\nBERT-base, 128 tokens, 2 parties: {total.rounds} rounds, {online / 1e9:.3f} GB online in all "
            f"({2 * words.online_bytes / 1e9:.3f} GB of it to look words up), {before / 1e9:.3f} GB from the dealer\n"
        )
    assert total.rounds <= 600
    assert online <= 1e9


class Biased(nn.Module):
    """Attention whose scores get secret numbers added to them, such as relative positions."""

    def __init__(self, low: float) -> None:
        super().__init__()
        bias = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
        bias[..., 3:] = low
        self.bias = nn.Parameter(bias)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(torch.tanh(q), torch.tanh(k), v, self.bias)


@pytest.mark.parametrize("low", [-4.0, -40.0, -10_000.0])
def test_secret_masks_have_room_beside_a_factor(low: float) -> None:
    """32 dimensions: the root is no power of two, and its bits take all the room that products leave."""
    model = Biased(low).eval()
    inputs = [grid(1, 1, 6, 32, scale=0.3, seed=seed) for seed in range(3)]
    (got,), _ = run_local(capture(model, inputs), inputs, 2)
    assert float((got - plaintext(model, inputs)[0]).abs().max()) < 1e-3
