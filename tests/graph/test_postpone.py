"""Sums that are truncated once: fewer rounds and bytes, the same numbers, and never where there is no room."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpcinfer.graph import postpone
from mpcinfer.graph.capture import Captured, capture
from mpcinfer.graph.plan import plan_inference
from mpcinfer.graph.program import Program
from tests.models_local import on_grid, plaintext, run_local

SIZE = 8


class Block(nn.Module):
    """Two residual branches, as a transformer's layer has them."""

    def __init__(self, norm: type[nn.Module], size: int = SIZE) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm(size) for _ in range(2))
        self.layers = nn.ModuleList(nn.Linear(size, size) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return x


class PostNorm(Block):
    """As in BERT."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = norm(x + layer(x))
        return x


class Branching(Block):
    """What is added is used by itself, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers[0](self.norms[0](x))
        return self.norms[1](x + y) * y


def captured(model: nn.Module, size: int = SIZE) -> tuple[Captured, torch.Tensor]:
    x = torch.round(torch.randn(3, size, generator=torch.Generator().manual_seed(2)).double() * 2**16) / 2**16
    return capture(on_grid(model), [x]), x


def marked(program: Program) -> list[str]:
    return [node.op for node in program.nodes if {"wide", "frac_bits"} & node.kwargs.keys()]


LINEAR, ADD = "mpc.linear", "aten.add.Tensor"
LAYER, RMS = "aten.layer_norm.default", "aten.rms_norm.default"


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(Block(nn.LayerNorm), Block(nn.LayerNorm)), [LINEAR, ADD, LAYER] * 3 + [LINEAR, ADD]),
        (Block(nn.RMSNorm), [LINEAR, RMS, LINEAR, ADD]),
        (PostNorm(nn.LayerNorm), [LINEAR, LAYER] * 2),
    ],
    ids=["layer", "rms", "post"],
)
def test_residual_streams(model: nn.Module, expected: list[str], parties: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, x = captured(model)
    found = marked(ours.program)
    assert [op for op in found if op != ADD] == [op for op in expected if op != ADD]
    (got,), run = run_local(ours, [x], parties)
    assert float((got - plaintext(on_grid(model), [x])[0]).abs().max()) < 2e-3
    monkeypatch.setattr("mpcinfer.graph.bounds.postpone_truncations", lambda program: program)
    plain, _ = captured(model)
    _, before, _ = plan_inference(plain.program, [tuple(x.shape)], parties=parties)
    wide = sum(op == LINEAR for op in found)
    ended = sum(n.op == ADD and "frac_bits" in n.kwargs for n in ours.program.nodes)
    assert run.rounds == before.rounds - wide + ended
    assert run.bytes_sent == before.bytes_sent - 8 * x.numel() * (wide - ended) * (parties - 1)


def test_what_is_used_otherwise_is_truncated() -> None:
    ours, _ = captured(Branching(nn.LayerNorm))
    assert not marked(ours.program)


def test_rows_for_whose_mean_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postpone, "_CENTRED_BITS", -100)
    ours, _ = captured(PostNorm(nn.LayerNorm))
    assert marked(ours.program) == [LINEAR, ADD] * 2  # the sum is truncated before the norm
    ours, _ = captured(Block(nn.RMSNorm))
    assert RMS in marked(ours.program)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_large_numbers(norm: type[nn.Module]) -> None:
    """As large as rows of squares may be: what is twice as fine must still fit."""
    model = Block(norm, 64)
    with torch.no_grad():
        for layer in model.layers:
            layer.weight.mul_(50)
            layer.bias.mul_(4000)
    ours, x = captured(model, 64)
    (got,), _ = run_local(ours, [x], 2)
    want = plaintext(on_grid(model), [x])[0]
    assert float((got - want).abs().max()) < 2e-5 * float(want.abs().max()) + 2e-3
