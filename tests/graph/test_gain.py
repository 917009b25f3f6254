"""Gains that linear layers take over from norms: which ones, what that saves, and that small ones cost no precision."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mpcinfer.graph.capture import Captured, capture
from mpcinfer.graph.plan import plan_inference
from mpcinfer.graph.program import Node
from tests.models_local import Outputs, assert_agrees, grid, on_grid, plaintext, run_local

WIDTH = 24
ULPS = 60
NORMS = ("aten.layer_norm.default", "aten.rms_norm.default")


class Layers(nn.Module):
    """Linear layers of a norm; `also` is what else is made of it."""

    def __init__(
        self,
        norm: Callable[[int], nn.Module],
        layers: int = 2,
        also: Callable[[Layers, torch.Tensor], torch.Tensor] | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.norm = norm(WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 6 + i, bias=bias and i != 1) for i in range(layers))
        self.also = also

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        made = [layer(y) for layer in self.layers]
        return torch.cat(made if self.also is None else [*made, self.also(self, y)], -1)


def with_gains(model: nn.Module, size: float) -> nn.Module:
    """Gains of this root mean square, of both signs and some of them a hundred times smaller, and biases like them."""
    model = on_grid(model)  # but for half a unit at most, so that weights are rounded either way
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += torch.rand(p.shape, generator=generator) * 2**-17
            if "norm" in name:
                p.copy_(torch.randn(p.shape, generator=generator))
                p[::5] *= 0.01
                p *= size / p.square().mean().sqrt()
    return model


def norm_of(captured: Captured) -> Node:
    (found,) = [node for node in captured.program.nodes if node.op in NORMS]
    return found


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (Layers(nn.LayerNorm), 0.03),
        (Layers(nn.RMSNorm, 3, bias=False), 20.0),
        (Layers(lambda width: nn.LayerNorm(width, bias=False), 1), 0.3),
        (Layers(nn.LayerNorm, 1, bias=False), 0.3),
    ],
    ids=["layer", "rms", "no bias", "bias of the norm only"],
)
def test_layers_take_gains_over(model: nn.Module, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As precise as with a norm that multiplies by itself: but for a third, which chance may make of one example."""
    module, x = with_gains(model, size), grid(32, WIDTH, scale=2)
    want = plaintext(module, [x])[0]

    def error(captured: Captured) -> float:
        (got,), _ = run_local(captured, [x], 2)
        return float((got - want).square().mean().sqrt())

    folded = capture(module, [x])
    norm = norm_of(folded)
    assert not {p.name for p in folded.program.parameters} & set(norm.references)
    assert abs(norm.kwargs["down"] + math.log2(size)) <= 0.5
    monkeypatch.setattr("mpcinfer.graph.capture.fold_gains", lambda nodes, *rest: nodes)
    plain = capture(module, [x])
    assert set(norm_of(plain).references) & {p.name for p in plain.program.parameters}
    assert error(folded) < 4 / 3 * max(error(plain), 2.0**-16)
    _, cost, _ = plan_inference(folded.program, [tuple(x.shape)], parties=2)
    _, before, _ = plan_inference(plain.program, [tuple(x.shape)], parties=2)
    # the gain is not opened
    assert before.bytes_sent - cost.bytes_sent == 8 * WIDTH
    assert before.rounds == cost.rounds


def test_agrees(parties: int) -> None:
    module, x = with_gains(Layers(nn.LayerNorm), 0.3), grid(3, WIDTH)
    assert_agrees(module, capture(module, [x]), [x], parties, ULPS)


@pytest.mark.parametrize(
    "model",
    [
        Layers(nn.LayerNorm, also=lambda model, y: y),
        Layers(nn.LayerNorm, also=lambda model, y: F.linear(y, y[0, None])),
        Layers(lambda width: nn.LayerNorm(width, elementwise_affine=False)),
        Layers(lambda width: nn.LayerNorm([3, width])),
        nn.Sequential(nn.LayerNorm(WIDTH)),
    ],
    ids=["an output", "a weight", "no gain", "two axes", "alone"],
)
def test_norms_that_keep_what_they_have(model: nn.Module) -> None:
    module, x = with_gains(model, 0.5), grid(3, WIDTH)
    captured = capture(module, [x], dynamic_shapes=({},))
    assert_agrees(module, captured, [x], 2, ULPS)
    assert "down" not in norm_of(captured).kwargs


def test_one_weight_behind_two_norms() -> None:
    functions = {"a": lambda m, x: m.layer(m.a(x)), "b": lambda m, x: m.layer(m.b(x))}
    model = Outputs(functions, layer=nn.Linear(WIDTH, 5), a=nn.RMSNorm(WIDTH), b=nn.RMSNorm(WIDTH))
    x = grid(3, WIDTH)
    captured = capture(on_grid(model.eval()), [x])
    assert_agrees(model, captured, [x], 2, ULPS)
    assert captured.program.size < 2 * 5 * WIDTH


def test_gains_that_are_all_zero() -> None:
    module, x = with_gains(Layers(nn.LayerNorm), 0.0), grid(3, WIDTH)
    assert_agrees(module, capture(module, [x]), [x], 2, ULPS)
