"""What leaves: logits, probabilities, the k best classes, or the best one only."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mpcinfer.errors import InputError, UnsupportedError
from mpcinfer.graph.capture import Captured, capture
from tests.models_local import Outputs, grid, plaintext, run_local
from tests.nn.operators import check

IDENTITY = Outputs({"logits": lambda m, x: x * 1}).eval()
TIES = torch.tensor([[1.0, 3, 3, 0, 3], [0, 0, 0, 0, 0], [-1, -2, -1, -3, -1], [0, 0, 0, 0, 2.0**-16]])


@cache
def reduced(classes: int, reveal: str, k: int = 5) -> Captured:
    """The identity on that many classes, captured once."""
    return capture(IDENTITY, [grid(2, classes)], reveal=reveal, k=k)


def test_argmax_operator_agrees(parties: int) -> None:
    check("indices", parties)


@pytest.mark.parametrize("classes", [1, 2, 3, 10])
def test_argmax(classes: int, parties: int) -> None:
    x = grid(20, classes)
    captured = reduced(classes, "argmax")
    assert [(v.shape, v.frac_bits) for v in captured.program.outputs] == [((-1,), 0)]
    (got,), _ = run_local(captured, [x], parties)
    assert torch.equal(got, x.argmax(-1).double())


def test_argmax_of_equals_is_the_lowest_index() -> None:
    (got,), _ = run_local(reduced(5, "argmax"), [TIES], 2)
    assert got.tolist() == [1, 0, 0, 4]


@pytest.mark.parametrize(("classes", "k"), [(10, 1), (10, 3), (10, 10), (5, 2), (1, 1)])
def test_top_k(classes: int, k: int, parties: int) -> None:
    x = grid(20, classes)
    (got,), _ = run_local(reduced(classes, "top-k", k), [x], parties)
    assert torch.equal(got, x.topk(k).indices.double())


def test_top_k_among_equals_are_k_different_indices_of_the_largest() -> None:
    (got,), _ = run_local(reduced(5, "top-k", 3), [TIES], 2)
    assert [sorted(row) for row in got.tolist()[::2]] == [[1, 2, 4], [0, 2, 4]]
    assert all(len(set(row)) == 3 for row in got.tolist())


def test_probabilities(parties: int) -> None:
    x = grid(20, 10, scale=8)
    (got,), _ = run_local(reduced(10, "probabilities"), [x], parties)
    assert float((got - F.softmax(x, -1)).abs().max()) <= 1e-4


def test_only_the_revealed_values_are_outputs() -> None:
    model, x = nn.Linear(6, 4).eval(), grid(3, 6)
    captured = capture(model, [x], reveal="argmax")
    program = captured.program
    assert [r.name for r in program.results] == ["mpc.reveal"] and program.reveal == "argmax"
    assert [node.path for node in program.nodes][-1] == "reveal=argmax"
    (got,), _ = run_local(captured, [x], 2)
    assert torch.equal(got, plaintext(model, [x])[0].argmax(-1).double())


@pytest.mark.parametrize("k", [0, -1, 11])
def test_impossible_k_is_refused(k: int) -> None:
    with pytest.raises(UnsupportedError, match=f"reveal=top-k: top-k with k = {k} of 10 classes"):
        capture(IDENTITY, [grid(2, 10)], reveal="top-k", k=k)


@pytest.mark.parametrize(
    ("functions", "why"),
    [
        ({"a": lambda m, x: x + 1, "b": lambda m, x: x - 1}, "needs a model with one output; this one has 2"),
        ({"index": lambda m, x: x.argmax(-1)}, "this one returns indices"),
    ],
)
def test_what_cannot_be_reduced_is_refused(functions: dict[str, Callable[..., torch.Tensor]], why: str) -> None:
    exported = torch.export.export(Outputs(functions).eval(), (grid(2, 10),))
    for reveal in ("argmax", "top-k", "probabilities"):
        with pytest.raises(InputError, match=why):
            capture(exported, [], reveal=reveal)


def test_an_unknown_reveal_is_refused() -> None:
    with pytest.raises(InputError, match="reveal must be one of logits, probabilities, top-k, argmax"):
        capture(IDENTITY, [grid(2, 10)], reveal="everything")


def test_indices_are_not_computed_with() -> None:
    for function in (lambda m, x: x.argmax(-1) + 1, lambda m, x: x.argmax(-1) * 0.5):
        with pytest.raises(UnsupportedError, match="takes no secret integers or truth values"):
            capture(Outputs({"f": function}).eval(), [grid(2, 10)])
