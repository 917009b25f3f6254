"""Operators that move elements."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mpcinfer.errors import UnsupportedError
from mpcinfer.graph.capture import capture
from mpcinfer.nn.shape import moves
from tests.models_local import Outputs, grid, run_local
from tests.nn.operators import check, prepared


def test_agrees_exactly(parties: int) -> None:
    check("shape", parties)


@pytest.mark.parametrize("batch", [1, 7])
def test_follows_the_batch_size(batch: int) -> None:
    group, model, captured = prepared("shape")
    x = grid(batch, 6, 5, 4, seed=batch)
    results, _ = run_local(captured, [x], 2)
    for name, got, want in zip(group.functions, results, model(x), strict=True):
        assert torch.equal(got, want), name


def test_costs_nothing() -> None:
    group, _, captured = prepared("shape")
    _, transcript = run_local(captured, group.inputs(), 2)
    assert (transcript.rounds, transcript.bytes_sent) == (0, 0)


def test_moves() -> None:
    assert moves("aten.permute.default") and moves("aten.unbind.int") and moves("_operator.getitem")
    assert not moves("aten.relu.default") and not moves("aten.no_such.default")


def overwritten(m: object, x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, 0] = 0
    return y


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda m, x: x.int(), "aten._to_copy.default at .*torch.int32; secrets are floating point"),
        (lambda m, x: x.to(torch.bool), "truth values of numbers; compare them with 0"),
        (lambda m, x: x.take(torch.tensor([0, 2])), "no protocol for: aten.take"),
        (lambda m, x: x.kthvalue(2, 1).values, "no protocol for: aten.kthvalue"),
        (overwritten, "no protocol for: .*scatter"),
    ],
)
def test_refusals(function: Callable[..., torch.Tensor], why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        capture(Outputs({"f": function}, public=grid(1, 3, 5)).eval(), [grid(2, 3, 5)])
