"""Free sizes: one Program for every length, positions and masks made of sizes, and token ids that stay secret."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from mpcinfer.errors import DtypeError, InputError, RangeError, ShapeError, UnsupportedError
from mpcinfer.graph.capture import Captured, capture
from mpcinfer.graph.interpret import check_inputs
from mpcinfer.graph.plan import plan_inference
from mpcinfer.graph.program import Program
from mpcinfer.graph.sizes import Size, agrees, filled, solve
from tests.models_local import Outputs, assert_agrees, grid, on_grid

BATCH, LENGTH = Size("batch"), Size("length", 2, 16)
ROWS = 50


class Encoder(nn.Module):
    """One layer of a transformer, as far as its operators matter here: ids, positions, a causal mask, a pooled end."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(ROWS, 8, padding_idx=0), nn.Embedding(16, 8)
        self.offsets = nn.Parameter(torch.zeros(16, 8))
        self.register_buffer("order", torch.arange(16)[None], persistent=False)
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        n = ids.shape[1]
        x = self.tokens(ids) + self.positions(torch.arange(n)) + self.offsets[:n] + self.positions(self.order[:, :n])
        scores = self.query(x) @ x.transpose(1, 2) / math.sqrt(8)
        mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)
        scores = scores + mask
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf)
        y = torch.softmax(scores, -1) @ self.value(x)
        return y.mean(1), y


@pytest.fixture(scope="module")
def encoder() -> tuple[nn.Module, Captured]:
    model = on_grid(Encoder()).float()
    dims = {"ids": {0: Dim("batch"), 1: Dim("length", min=2, max=16)}}
    return model, capture(model, [torch.tensor([[7, 0, 49, 3, 3]])], dynamic_shapes=dims)


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, ROWS, shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_what_is_declared(encoder: tuple[nn.Module, Captured]) -> None:
    program = encoder[1].program
    assert program.sizes == (BATCH, LENGTH)
    ((name, shape, frac_bits, limit),) = [(v.name, v.shape, v.frac_bits, v.limit) for v in program.inputs]
    assert (name, shape, frac_bits, limit) == ("ids", (-1, -2), 0, ROWS)
    assert [v.shape for v in program.outputs] == [(-1, 8), (-1, -2, 8)]
    assert Program.from_bytes(program.to_bytes()) == program


@pytest.mark.parametrize("shape", [(1, 2), (3, 7), (1, 16)])
def test_one_program_serves_every_length(
    encoder: tuple[nn.Module, Captured], parties: int, shape: tuple[int, ...]
) -> None:
    assert_agrees(*encoder, [ids(*shape)], parties, 40)


@pytest.mark.parametrize(("shape", "why"), [((1, 1), "length from 2 to 16"), ((1, 17), r"\[batch, length\]")])
def test_lengths_out_of_range_are_refused(
    encoder: tuple[nn.Module, Captured], shape: tuple[int, int], why: str
) -> None:
    with pytest.raises(ShapeError, match=why):
        plan_inference(encoder[1].program, [shape], parties=2)


def test_cost_depends_on_the_length_alone(encoder: tuple[nn.Module, Captured]) -> None:
    program = encoder[1].program
    costs = {n: plan_inference(program, [(1, n)], parties=2) for n in (4, 8)}
    again = plan_inference(program, [(1, 4)], parties=2)
    assert again[0].digest() == costs[4][0].digest() != costs[8][0].digest()
    assert costs[4][1].bytes_sent < costs[8][1].bytes_sent


@pytest.mark.parametrize(
    "dims",
    [({0: Dim("rows"), 1: Dim("columns")},), ({0: Dim.AUTO, 1: Dim.DYNAMIC},), {"inputs": ((Dim("rows"), Dim.AUTO),)}],
    ids=["tuple", "automatic", "named"],
)
def test_ways_to_write_dynamic_shapes(dims: Any) -> None:
    model = Outputs({"f": lambda m, x: x.transpose(0, 1) * x.shape[0], "g": lambda m, x: torch.cat([x, x])}).eval()
    captured = capture(model, [grid(1, 3)], dynamic_shapes=(dims if isinstance(dims, dict) else (dims,)))
    program = captured.program
    assert [v.shape for v in program.inputs] == [(-1, -2)]
    assert [v.shape for v in program.outputs] == [(-2, -1), (0, -2)]
    assert all((s.low, s.high) == (1, 0) and s.name != "batch" for s in program.sizes)
    for shape in ((1, 1), (4, 2)):
        assert_agrees(model, captured, [grid(*shape)], 2, 1.01)


def test_a_size_that_two_inputs_share() -> None:
    model = Outputs({"f": lambda m, x, y: x @ y}).eval()
    n = Dim("n", max=9)
    program = capture(model, [grid(2, 3), grid(3, 4)], dynamic_shapes=(({1: n}, {0: n}),)).program
    assert program.sizes == (Size("n", 1, 9),)
    assert [v.shape for v in program.inputs] == [(2, -1), (-1, 4)]
    with pytest.raises(ShapeError, match=r"different sizes n: \[3, 5\]"):
        check_inputs(program, [(2, 3), (5, 4)])


@pytest.mark.parametrize(
    ("dims", "error", "why"),
    [
        ((), InputError, "one entry for each argument"),
        ({"y": {0: Dim("n")}}, InputError, "must name the arguments of the model: inputs"),
        ((({1: Dim("n")},),), UnsupportedError, r"Suggested: n = 3|n = 3"),
    ],
)
def test_dynamic_shapes_that_are_refused(dims: Any, error: type[Exception], why: str) -> None:
    model = Outputs({"f": lambda m, x: x @ m.w}, w=nn.Parameter(torch.ones(3, 2))).eval()
    with pytest.raises(error, match=why):
        capture(model, [grid(2, 3)], dynamic_shapes=dims)


def test_a_size_that_depends_on_another_is_refused() -> None:
    n = Dim("n", max=9)
    exported = export(nn.ReLU().eval(), (torch.zeros(2, 4),), dynamic_shapes=({0: n, 1: 2 * n},))
    with pytest.raises(UnsupportedError, match="has a size that depends on another"):
        capture(exported, [])


# indices


class Table(nn.Module):
    def __init__(self, rows: int, *more: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, 3) for n in (rows, *more))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.stack([table(ids.unsqueeze(-1)[..., 0]) for table in self.tables])


def test_the_smallest_table_is_the_limit() -> None:
    model = Table(9, 7, 12).eval()
    captured = capture(model, [torch.tensor([[0, 6]])])
    (declared,) = captured.program.inputs
    assert (declared.limit, declared.frac_bits, declared.proven) == (7, 0, True)
    assert_agrees(model, captured, [torch.tensor([[6, 3], [0, 0]])], 2, 0.51)


@pytest.mark.parametrize("bad", [[[7]], [[-1]]])
def test_example_ids_out_of_range(bad: list[list[int]]) -> None:
    with pytest.raises((RangeError, UnsupportedError)):
        capture(Table(7).eval(), [torch.tensor(bad)])


def test_example_ids_that_are_no_integers() -> None:
    exported = export(Table(7).eval(), (torch.zeros(2, 3, dtype=torch.int64),))
    with pytest.raises(DtypeError, match="pass integers"):
        capture(exported, [torch.zeros(2, 3)])
    with pytest.raises(RangeError, match="not from 0 to 6"):
        capture(exported, [torch.full((2, 3), 7)])


def test_a_table_that_is_too_large_for_the_scale_is_refused() -> None:
    model = nn.Sequential(Table(3), nn.Linear(3, 1)).double().eval()
    model[0].tables[0].weight.data[:] = torch.tensor([0.0, 1.0, 2.0**29]).reshape(3, 1).double()
    model[1].weight.data[:] = 1.0
    assert not capture(model, [torch.tensor([[0, 1]])]).program.inputs[0].proven  # the examples avoid the large one
    with pytest.raises(RangeError, match="too large for 16 fraction bits"):
        capture(model, [torch.tensor([[0, 2]])])


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda m, x: x + 1, "takes no secret integers"),
        (lambda m, x: x == 0, "is no index of an embedding"),
        (lambda m, x: x, "input 'inputs_0' has integers, but is no index"),
        (
            lambda m, x: torch.relu(m.table(x) * torch.sin(torch.arange(x.shape[0])[:, None, None])),
            "make a table of them",
        ),
        (lambda m, x: m.table(x[:, 0]) + m.table(m.order[: x.shape[0]]), "no secret if `public` names it"),
    ],
)
def test_what_cannot_be_done_with_integers(function: Callable[..., Any], why: str) -> None:
    model = Outputs({"f": function}, table=nn.Embedding(9, 3))
    nn.Module.register_buffer(model, "order", torch.arange(9), persistent=True)
    with pytest.raises(UnsupportedError, match=why):
        capture(model.eval(), [torch.tensor([[1, 2]])], dynamic_shapes=(({0: Dim("n", max=9)},),))


def test_positions_beyond_a_table_are_refused_at_deploy() -> None:
    model = Outputs({"f": lambda m, x: x + m.table(torch.arange(x.shape[1]))}, table=nn.Embedding(9, 3)).eval()
    with pytest.raises(ShapeError, match="beyond the end of a table"):
        capture(model, [torch.zeros(1, 4, 3)], dynamic_shapes=(({1: Dim("n", max=12)},),))
    program = capture(model, [torch.zeros(1, 4, 3)], dynamic_shapes=(({1: Dim("n")},),)).program
    with pytest.raises(ShapeError, match="beyond the end of a table"):
        plan_inference(program, [(1, 10, 3)], parties=2)


# the arithmetic of shapes


def test_solving_for_the_sizes() -> None:
    declared = [("a", (-1, -2, 3)), ("b", (-2,))]
    assert solve((BATCH, LENGTH), declared, [(4, 5, 3), (5,)]) == (4, 5)
    assert filled((-2, 7, -1, 0), (4, 5)) == (5, 7, 4, 0)
    assert agrees((5, 0), (5, 9)) and not agrees((5, 0), (4, 9)) and not agrees((5, 0), (5,))
    with pytest.raises(InputError, match="takes 2 inputs, not 1"):
        solve((BATCH, LENGTH), declared, [(4, 5, 3)])
    for shapes in ([(4, 5), (5,)], [(4, 17, 3), (17,)], [(0, 5, 3), (5,)], [(4, 5, 3), (6,)]):
        with pytest.raises(ShapeError):
            solve((BATCH, LENGTH), declared, shapes)


class Centred(nn.Module):
    """Each number as it differs from the others of its column, or of its row."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(self.axis, keepdim=True)


class Raised(nn.Module):
    """Each number, and the largest of its column added."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.amax(0, keepdim=True)


class Counting(nn.Module):
    """Answers otherwise each time."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x / self.calls


class Places(nn.Module):
    """A text without a batch: what is known of its tokens, and of their places."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(7, 3), nn.Embedding(9, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.words(ids) + self.places(torch.arange(ids.shape[0]))
        return x


@pytest.mark.parametrize(
    ("model", "x", "name"),
    [
        (Centred(1), torch.randn(4, 3), "batch"),
        (Centred(1), torch.randn(1, 3), "batch"),
        (Centred(0), torch.randn(4, 3), "rows"),
        (Centred(0), torch.randn(1, 3), "rows"),
        (Centred(0), torch.randn(8, 1), "rows"),
        (Centred(0), torch.randn(1, 1), "rows"),
        (Centred(0), torch.ones(8, 3), "rows"),
        (Raised(), torch.zeros(4, 2), "rows"),
        (Centred(1), torch.zeros(4, 3), "batch"),
        (nn.Embedding(7, 3), torch.zeros(2, 4, dtype=torch.int64), "batch"),
        (nn.Softmax(0), torch.randn(4, 3), "rows"),
        (nn.Embedding(7, 3), torch.tensor([1, 5, 2]), "batch"),
        (Places(), torch.tensor([1, 5, 2]), "rows"),
    ],
)
def test_a_batch_is_of_rows_that_do_not_influence_each_other(model: nn.Module, x: torch.Tensor, name: str) -> None:
    """Only then may a large request be cut."""
    program = capture(model.eval(), [x]).program
    assert [size.name for size in program.sizes] == [name]


def test_a_model_is_captured_as_it_was_given() -> None:
    """What it keeps of the rows that are tried is not what it has seen."""
    x, model = torch.randn(4, 3), Counting().eval()
    captured = capture(model, [x])
    assert [size.name for size in captured.program.sizes] == ["batch"] and model.calls <= 1
    assert not captured.weights and all(node.op != "aten.mul.Tensor" for node in captured.program.nodes)
