"""What operators make of intervals: it holds everything that float64 and the parties make of what is inside."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mpcinfer.graph import bounds
from mpcinfer.graph.capture import capture
from mpcinfer.graph.intervals import RULES, Evaluation, Exceeded, Interval
from mpcinfer.nn import supported
from tests.models_local import Outputs, grid, on_grid, plaintext, run_local
from tests.nn.operators import GROUPS, prepared

UNIT = 2.0**-16


def test_every_operator_has_bounds() -> None:
    assert bounds.transfer.RULES is RULES
    # programs have these once they have been evaluated: graph.gate and graph.postpone write them
    assert sorted([*RULES, "mpc.gate", "mpc.narrow"]) == supported()


def below(limit: float, *shape: int, seed: int) -> list[torch.Tensor]:
    """Corners of the box, and numbers of all sizes in it."""
    uniform = grid(*shape, scale=limit, seed=seed)
    corner = torch.where(uniform < 0, -1.0, 1.0).double() * (limit - UNIT)
    sizes = torch.exp2(-30 * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return [corner, torch.full(shape, limit - UNIT, dtype=torch.float64), torch.round(uniform * sizes / UNIT) * UNIT]


def assert_inside(results: list[torch.Tensor], intervals: list[Interval], names: list[str], slack: float) -> None:
    for got, box, name in zip(results, intervals, names, strict=True):
        assert got.shape == box.low.shape, name
        error = slack * (1 + box.magnitude())
        assert bool(((box.low - error <= got) & (got <= box.high + error)).all()), name


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.slow
def test_operators_stay_inside_up_to_the_limit_of_their_inputs(group: str) -> None:
    """Over shares and in float64. Nothing wraps around, or it would be far outside."""
    cases, model, captured = prepared(group)
    program = captured.program
    assert all(v.proven for v in program.inputs)
    (limit,) = {v.limit for v in program.inputs}
    ends = [torch.full(shape, limit - UNIT, dtype=torch.float64) for shape in cases.shapes]
    boxes = [Interval(-end, end) for end in ends]
    results = Evaluation(program, captured.weights, rounding=True).run(boxes)
    candidates = [below(limit, *shape, seed=i) for i, shape in enumerate(cases.shapes)]
    for inputs in zip(*candidates, strict=True):
        # the model's parameters aren't rounded where they are computed from others, as in weight norm
        assert_inside(plaintext(model, inputs), results, list(cases.functions), 1e-4)
        assert_inside(run_local(captured, inputs, 2)[0], results, list(cases.functions), 1e-12)


@pytest.mark.parametrize("group", GROUPS)
def test_operators_stay_inside_of_small_intervals(group: str) -> None:
    """Of all sizes, one for each element: a bound that is loose at the limit may be wrong near by."""
    cases, model, captured = prepared(group)
    centres = cases.inputs()
    widths = [torch.exp2(-16 + 18 * torch.rand(x.shape, generator=seeded(i))) for i, x in enumerate(centres)]
    ends = [[torch.round((x + s * w) / UNIT) * UNIT for x, w in zip(centres, widths, strict=True)] for s in (-1, 1)]
    boxes = [Interval(low, high) for low, high in zip(*ends, strict=True)]
    results = Evaluation(captured.program, captured.weights, rounding=True).run(boxes)
    for inputs in (centres, *ends):
        assert_inside(plaintext(model, inputs), results, list(cases.functions), 1e-4)
        assert_inside(run_local(captured, inputs, 2)[0], results, list(cases.functions), 1e-12)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("group", GROUPS)
def test_points_are_the_plain_forward_pass(group: str) -> None:
    cases, model, captured = prepared(group)
    inputs = cases.inputs()
    results = Evaluation(captured.program, captured.weights, rounding=False).run([Interval.of(x) for x in inputs])
    for x, want, name in zip(results, plaintext(model, inputs), cases.functions, strict=True):
        if captured.program.frac_bits and not torch.equal(want, want.round()):  # indices are bounded by their number
            if name in FROM_INDICES:
                assert bool(((x.low <= want + UNIT) & (want - UNIT <= x.high)).all()), name
                continue
            assert x.point, name
            assert float((x.low - want).abs().max()) <= 16 * UNIT, name


# what depends on indices that were found, which are bounded by their number only
FROM_INDICES = ("secret index", "secret index in a computed table", "index as a number", "places as numbers")

# the strictest domain on the way of each, at its edge
EDGES = {
    "linear": (lambda m, x: F.linear(x, m.four), 2.0**28),
    "square": (lambda m, x: x * x, 2.0**15),
    "product": (lambda m, x: x[:, :1] * x[:, 1:], 2.0**15),
    "fraction": (lambda m, x: x * (2 / 3), 2.0**22),
    "leaky ReLU": (lambda m, x: F.leaky_relu(x, 1 / 3), 2.0**22),
    "mean of 3": (lambda m, x: x.mean(1), 2.0**14),
    "mean of 768": (lambda m, x: x.repeat(1, 256).mean(1), 2.0**14),
    "average pool of 3": (lambda m, x: F.avg_pool1d(x, 3), 2.0**14),
    "adaptive average": (lambda m, x: F.adaptive_avg_pool1d(x.repeat(1, 2)[:, :5], 3), 2.0**14),
    "public tensor": (lambda m, x: x * m.public, 2.0**27),
}


@pytest.mark.parametrize("name", EDGES)
def test_the_edge_of_a_domain_is_where_numbers_wrap_around(name: str) -> None:
    """Right just below the limit that is declared; a planted fault, three times as large, is wrong."""
    function, limit = EDGES[name]
    four, public = torch.nn.Parameter(torch.full((1, 3), 4.0 / 3)), torch.tensor([8.0, 3.0, -7.5], dtype=torch.float64)
    model = on_grid(Outputs({name: function}, four=four, public=public))
    if name == "linear":
        model.four.data = torch.tensor([[4.0, 0.0, 0.0]], dtype=torch.float64)
    captured = capture(model, [torch.ones(1, 3)])
    (declared,) = captured.program.inputs
    assert (declared.limit, declared.proven) == (limit, True)

    def right(size: float) -> bool:
        x = torch.full((1, 3), size, dtype=torch.float64)
        (got,), (want,) = run_local(captured, [x], 2)[0], plaintext(model, [x])
        return torch.allclose(got, want, rtol=2.0**-20, atol=4 * UNIT)

    assert right(limit - UNIT) and right(UNIT - limit)
    beyond = min(3 * limit, 2.0**30 - 1)
    assert not (right(beyond) and right(-beyond))


def test_numbers_stay_below_what_comparisons_can_tell_apart() -> None:
    """Products have room for 2^30 with 16 fraction bits, and so have all numbers: their differences need 48 bits."""
    model = Outputs({"softmax": lambda m, x: torch.softmax(8192 * x, -1)}).eval()
    assert capture(model, [torch.ones(1, 3)]).program.inputs[0].limit == 2.0**13  # small ones are compared coarsely
    captured = capture(model, [torch.full((1, 3), 2.0**12)])
    assert captured.program.inputs[0].limit == 2.0**17
    run = Evaluation(captured.program, captured.weights, rounding=True)
    for size, fits in ((2.0**17 - 1, True), (2.0**17 + 1, False)):
        end = torch.full((1, 3), size, dtype=torch.float64)
        if fits:
            (y,) = run.run([Interval(-end, end)])
            assert float(y.low.min()) <= 0 and float(y.high.max()) >= 1
        else:
            with pytest.raises(Exceeded):
                run.run([Interval(-end, end)])
            assert run.node.op == "aten.mul.Tensor"
