"""Activations and gates that take products as they are: which do, fewer rounds and bytes, the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from mpcinfer.graph.capture import Captured, capture
from mpcinfer.graph.plan import plan_inference
from mpcinfer.graph.program import Program
from tests.models_local import on_grid, plaintext, run_local

SIZE = 8


class Mlp(nn.Module):
    """One that is gated, as in Llama."""

    def __init__(self, activation: nn.Module, *, swapped: bool = False, inputs: int = 1) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(SIZE, SIZE) for _ in range(3))
        self.activation, self.swapped, self.inputs = activation, swapped, inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.activation(self.gate(x)), self.up(x * 2 if self.inputs > 1 else x)
        return self.down(up * gate if self.swapped else gate * up)


class Plain(Mlp):
    """Without a gate."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.gate(x)))


class Twice(Mlp):
    """What goes into the activation is used by itself, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate(x)
        return self.down(functional.silu(gate) * self.up(x)) + gate


class UpTwice(Mlp):
    """What is gated is used by itself, too: the joined layer is truncated, and the gate takes the usual numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self.up(x)
        return self.down(functional.silu(self.gate(x)) * up) + up


class Shown(Mlp):
    """The product is an output."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate = self.gate(x)
        return functional.silu(gate) * self.up(x), gate


def captured(model: nn.Module) -> tuple[Captured, torch.Tensor]:
    torch.manual_seed(3)
    x = torch.round(torch.randn(5, SIZE).double() * 2**16) / 2**16
    return capture(on_grid(model), [x], reveal="logits"), x


def wide_layers(program: Program) -> int:
    return sum(node.op == "mpc.linear" and "wide" in node.kwargs for node in program.nodes)


CASES = {
    "silu": (Mlp(nn.SiLU()), True, 1),
    "swapped": (Mlp(nn.SiLU(), swapped=True), True, 1),
    "gelu": (Mlp(nn.GELU()), True, 1),
    "gelu_tanh": (Mlp(nn.GELU("tanh")), True, 1),
    "two layers": (Mlp(nn.Sigmoid(), inputs=2), True, 2),
    "plain": (Plain(nn.GELU()), False, 1),
    "plain tanh": (Plain(nn.Tanh()), False, 1),
    "relu": (Mlp(nn.ReLU()), False, 0),
    "twice": (Twice(nn.SiLU()), False, 0),
    "up twice": (UpTwice(nn.SiLU()), False, 0),
    "shown": (Shown(nn.SiLU()), False, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_who_takes_products(name: str, parties: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, gated, wide = CASES[name]
    ours, x = captured(model)
    assert any(node.op == "mpc.gate" for node in ours.program.nodes) == gated
    got, run = run_local(ours, [x], parties)
    for value, expected in zip(got, plaintext(on_grid(model), [x]), strict=True):
        assert float((value - expected).abs().max()) < 1e-3
    monkeypatch.setattr("mpcinfer.graph.bounds.merge_activations", lambda program: program)
    plain = captured(model)[0].program
    assert wide_layers(ours.program) - wide_layers(plain) == wide
    before = plan_inference(plain, [tuple(x.shape)], parties=parties)[1]
    assert before.rounds - run.rounds == (1 if wide else 0)
    assert (before.bytes_sent > run.bytes_sent) == bool(wide)


def test_other_scales_stay_as_they_are() -> None:
    torch.manual_seed(3)
    x = torch.randn(5, SIZE).double()
    program = capture(on_grid(Mlp(nn.SiLU())), [x], frac_bits=14).program
    assert wide_layers(program) == 0 and not any(node.op == "mpc.gate" for node in program.nodes)
