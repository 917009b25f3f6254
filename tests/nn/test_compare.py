"""Comparisons and choices: of neighbours, of numbers between two representable ones, of truth values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from mpcinfer.errors import UnsupportedError
from mpcinfer.graph.capture import capture
from tests.models_local import Outputs, assert_agrees, grid, run_local
from tests.nn.operators import check

COMPARISONS: dict[str, Callable[..., torch.Tensor]] = {
    "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge, "eq": torch.eq, "ne": torch.ne,
}  # fmt: skip


@pytest.mark.parametrize("group", ["compare", "choice"])
def test_agrees(group: str, parties: int) -> None:
    check(group, parties)


@pytest.mark.parametrize("frac_bits", [8, 16, 24])
def test_public_numbers_between_two_representable_ones(frac_bits: int) -> None:
    unit = 2.0**-frac_bits
    x = torch.tensor([[-1.0, 0, 1, 2, 3, -1000]], dtype=torch.float64) * unit
    numbers = (0.0, 1.0, 1.25, -0.5, 2.0**40)
    functions = {
        f"{name} {number}": lambda m, x, f=f, n=number * unit: f(x, n)
        for name, f in COMPARISONS.items()
        for number in numbers
    }
    model = Outputs(functions).double().eval()
    assert_agrees(model, capture(model, [x], frac_bits=frac_bits), [x], 2, 0, list(functions))


def test_numbers_beyond_all_secrets(parties: int) -> None:
    x = torch.tensor([[0.0, 2.0**28, -(2.0**28)]], dtype=torch.float64)
    functions = {
        f"{name} {number}": lambda m, x, f=f, n=number: f(x, n)
        for name, f in COMPARISONS.items()
        for number in (1e30, -1e30, 2.0**45)
    }
    model = Outputs(functions).double().eval()
    transcript = assert_agrees(model, capture(model, [x]), [x], parties, 0, list(functions))
    assert transcript.rounds == 0


def test_the_largest_secrets(parties: int) -> None:
    end = 2.0**27
    x, y = torch.tensor([[end, -end, end, -end]]).double(), torch.tensor([[-end, end, end, -end]]).double()
    model = Outputs({name: lambda m, x, y, f=f: f(x, y) for name, f in COMPARISONS.items()}).double().eval()
    assert_agrees(model, capture(model, [x, y]), [x, y], parties, 0, list(COMPARISONS))


class Rules(nn.Module):
    """What a rule-based model does with truth values."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inside = (x > -1) & (x <= 1.00001) & ~(x == 0.5)
        either = inside | (y >= x) ^ (y < 0)
        return (
            torch.where(either, x * 0.5, y),
            x.masked_fill(~either, -7.5),
            either.double().mean(-1),
            torch.where(either.transpose(0, 1)[:, :1].transpose(0, 1), x, 1.0).sum(-1),
            (either & either.flip(-1))[:, None],
        )


def test_truth_values_combined(parties: int) -> None:
    x, y = grid(4, 9, seed=1, scale=2), grid(4, 9, seed=2, scale=2)
    x[0, :3] = torch.tensor([0.5, 1.0, -1.0])
    model = Rules().double().eval()
    assert_agrees(model, capture(model, [x, y]), [x, y], parties, 12, exceptions={"4": 0})


def test_shapes() -> None:
    functions = {
        "0-d": lambda m, x: x[0, 0] > 0,
        "0-d choice": lambda m, x: torch.where(x[0, 0] > 0, x[0, 0], 1.0),
        "one element": lambda m, x: torch.maximum(x[:1, :1], x[:1, 1:2]),
        "max of one": lambda m, x: x[:, :1].max(1).values,
        "place of one": lambda m, x: x[:, :1].max(1).indices,
        "top of one": lambda m, x: x[:, :1].topk(1).values,
        "column and row": lambda m, x: x[:3, :1] < x[:1, :3],
        "kept": lambda m, x: x.max(0, keepdim=True).values,
        "an index or half": lambda m, x: torch.where(x[:, 0] > 0, x.argmax(-1), 0.5),
    }
    x = grid(3, 4)
    model = Outputs(functions).double().eval()
    captured = capture(model, [x], dynamic_shapes=({},))
    assert_agrees(model, captured, [x], 2, 0, list(functions))


@pytest.mark.parametrize(
    ("function", "rounds", "sent"),
    [
        (lambda m, x, y: x < y, 4, 9.25),
        (lambda m, x, y: x == y, 4, 12.5),
        (lambda m, x, y: x < 1e-7, 4, 9.25),
        (lambda m, x, y: torch.where(x < y, x, y), 5, 25.25),
        (lambda m, x, y: torch.where(x < y, 1.0, 0.25), 4, 9.25),
        (lambda m, x, y: torch.maximum(x, y), 4, 11.25),
    ],
)
def test_costs(function: Callable[..., torch.Tensor], rounds: int, sent: float) -> None:
    x = grid(4, 8)
    _, seen = run_local(capture(Outputs({"f": function}).double().eval(), [x, x]), [x, x], 2)
    assert (seen.rounds, seen.bytes_sent) == (rounds, sent * x.numel())


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda m, x: torch.logical_not(x), "logical_not.default at .*truth values of numbers"),
        (lambda m, x: torch.logical_and(x > 0, x), "logical_and.default at .*truth values of numbers"),
        (lambda m, x: ~x.argmax(-1), "bitwise_not.default at .*truth values of numbers"),
        (lambda m, x: x.argmax(-1).bool(), "_to_copy.default at .*truth values of numbers"),
        (lambda m, x: (x > 0) * x, "mul.Tensor at .*takes no secret integers or truth values"),
        (lambda m, x: (x > 0) & m.mask, "truth values of parameters"),
        (lambda m, x: x[x > 0], "export|nonzero|index"),
        (lambda m, x: x.sort(stable=True).values, "aten.sort.stable"),
    ],
)
def test_refusals(function: Callable[..., torch.Tensor], why: str) -> None:
    model = Outputs({"f": function}).double().eval()
    model.register_buffer("mask", torch.tensor([True, False] * 4))
    with pytest.raises(UnsupportedError, match=why):
        capture(model, [grid(2, 8)])
