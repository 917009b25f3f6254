"""Look-ups: by secret index at the cost of a product with the table, by public index at none."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mpcinfer.errors import UnsupportedError
from mpcinfer.graph.capture import capture
from tests.models_local import Outputs, grid, run_local
from tests.nn.operators import check


def test_agrees(parties: int) -> None:
    check("embedding", parties)


def test_costs() -> None:
    captured = capture(nn.Embedding(300, 4).eval(), [torch.zeros(1, 16, dtype=torch.int64)])
    _, seen = run_local(captured, [torch.arange(16)[None]], 2)
    assert (seen.rounds, seen.bytes_sent) == (2, 16 * 9 // 8 + 16 * 300 * 8)
    public = {
        "positions": lambda m, x: m.table(torch.arange(x.shape[0])) + x[0, 0],
        "gather": lambda m, x: x[:, [0, 1, 1]].masked_fill(torch.arange(4) > 1, 0.0),
    }
    _, seen = run_local(capture(Outputs(public, table=nn.Embedding(9, 4)).eval(), [grid(2, 3, 4)]), [grid(2, 3, 4)], 2)
    assert seen.rounds == 0


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda m, x: x[:, x[0].argmax(-1)], "takes no secret integers"),
        (lambda m, x: F.embedding(x.argmax(-1), m.public), "a public table is indexed|is indexed by"),
    ],
)
def test_refusals(function: object, why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        capture(Outputs({"f": function}, public=grid(4, 3)).eval(), [grid(2, 3, 4)])
