"""Norms: rows of all sizes, rows without variance, very large channels, and what they cost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mpcinfer.errors import UnsupportedError
from mpcinfer.graph.capture import capture
from tests.models_local import Outputs, assert_agrees, grid, on_grid, plaintext, run_local
from tests.nn.operators import check

# of layer_norm and rms_norm
TOLERANCE = 2e-3


def test_agrees(parties: int) -> None:
    check("norm", parties)


def error(model: nn.Module, x: torch.Tensor, frac_bits: int = 16, parties: int = 2) -> float:
    """The largest one, with the shift that the example itself calls for."""
    captured = capture(model, [x], frac_bits=frac_bits)
    pairs = zip(run_local(captured, [x], parties)[0], plaintext(model, [x]), strict=True)
    return max(float((got - want).abs().max()) for got, want in pairs)


def norms(size: int) -> nn.Module:
    functions = {"layer": lambda m, x: m.layer(x), "rms": lambda m, x: m.rms(x)}
    return on_grid(Outputs(functions, layer=nn.LayerNorm(size), rms=nn.RMSNorm(size, eps=1e-5)))


@pytest.mark.parametrize(("spread", "frac_bits"), [(0.05, 16), (30.0, 16), (1.0, 12), (0.02, 20)])
def test_rows_of_all_sizes(spread: float, frac_bits: int) -> None:
    x = grid(6, 48, frac_bits=frac_bits, scale=spread)
    assert error(norms(48), x, frac_bits) <= max(TOLERANCE, 2.0 ** (4 - frac_bits))


def test_twenty_thousand_in_some_channels(parties: int) -> None:
    """The row's deviation is large, and then what is left of the other channels is small."""
    x = grid(4, 64, scale=3)
    x[:, 5], x[1:, 40] = 20_000.0, -20_000.0
    x[3] = grid(64, scale=3, seed=9)  # an ordinary row next to them
    model = norms(64)
    captured = capture(model, [x])
    assert any(node.kwargs.get("shift", 0) > 0 for node in captured.program.nodes)
    assert error(model, x, parties=parties) <= TOLERANCE


def test_rows_without_variance(parties: int) -> None:
    x = torch.stack([torch.full((48,), v, dtype=torch.float64) for v in (0.0, 1.0, -300.0, 2.0**-16)])
    layer, rms = (nn.LayerNorm(48), nn.RMSNorm(48, eps=1e-5))
    model = on_grid(Outputs({"layer": lambda m, x: m.layer(x), "rms": lambda m, x: m.rms(x)}, layer=layer, rms=rms))
    (got, root), _ = run_local(capture(model, [x]), [x], parties)
    assert float((got - layer.bias.detach()).abs().max()) <= TOLERANCE
    assert float((root - plaintext(model, [x])[1])[:3].abs().max()) <= TOLERANCE


def test_layer_norm_of_768_takes_at_most_20_rounds() -> None:
    x = grid(2, 768)
    model = on_grid(nn.LayerNorm(768))
    transcript = assert_agrees(model, capture(model, [x]), [x], 2, 60)
    assert transcript.rounds <= 7
    assert transcript.bytes_sent <= (40 * 768 + 472 + 768 * 8) * 2


@pytest.mark.parametrize("count", [1, 2, 3, 5, 1000])
def test_variances(count: int) -> None:
    functions = {
        "var": lambda m, x: x.var(-1, correction=0),
        "std": lambda m, x: x.std(-1, correction=0, keepdim=True),
        "norm": lambda m, x: x.norm(dim=-1),
    }
    for scale in (2.0, 100.0):
        x = grid(3, count, scale=scale)
        x[1] = x[1, 0]
        got, _ = run_local(capture(Outputs(functions).eval(), [x]), [x], 2)
        for y, want in zip(got, plaintext(Outputs(functions).eval(), [x]), strict=True):
            # a root of what is nearly nothing is not precise
            assert float((y - want).abs().max()) <= 2e-3 * scale


def test_normalised_vectors(parties: int) -> None:
    x = grid(5, 24)
    x[1] = 0
    model = Outputs({"normalize": lambda m, x: F.normalize(x, dim=-1)}).eval()
    assert_agrees(model, capture(model, [x]), [x], parties, 40)


def test_shapes() -> None:
    functions = {
        "of one": lambda m, x: F.layer_norm(x[:, :1, :1, 0], (1,)),
        "one row": lambda m, x: F.layer_norm(x[0, 0, 0], (3,)),
        "groups of one": lambda m, x: F.group_norm(x, 4),
        "one group": lambda m, x: F.group_norm(x[..., 0], 1),
        "instances": lambda m, x: F.instance_norm(x[..., 0]),
        "norm of all": lambda m, x: x.norm(),
        "norm of a number": lambda m, x: x[0, 0, 0, 0].norm(),
    }
    x = grid(2, 4, 5, 3)
    model = Outputs(functions).eval()
    assert_agrees(model, capture(model, [x], dynamic_shapes=({},)), [x], 2, 40, list(functions), {"norm of all": 80})


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda m, x: torch.linalg.vector_norm(x, 1, dim=-1), "linalg_vector_norm.default at .*order 2"),
        (lambda m, x: m.tracking(x), "instance_norm.default at .*running statistics"),
    ],
)
def test_refusals(function: Callable[..., torch.Tensor], why: str) -> None:
    tracking = nn.InstanceNorm1d(4, track_running_stats=True)
    with pytest.raises(UnsupportedError, match=why):
        capture(Outputs({"f": function}, tracking=tracking).eval(), [torch.ones(2, 4, 8)])
