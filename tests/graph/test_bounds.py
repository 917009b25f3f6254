"""The limits of inputs: proven where that leaves enough room, else calibrated, and refused where neither fits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from mpcinfer.errors import InputError, RangeError, ShapeError
from mpcinfer.graph.bounds import with_limits
from mpcinfer.graph.capture import Captured, capture
from mpcinfer.graph.program import Program
from mpcinfer.nn.softmax import LEAST_POWER_BITS, count_bits
from tests.decoders_local import captured_decoder, tiny_decoder
from tests.graph.conftest import Digits
from tests.models_local import Outputs, plaintext, run_local


def linear(*rows: list[float]) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight.data = torch.tensor(rows)
    return layer.double().eval()


def declared(captured: Captured) -> list[tuple[float, bool]]:
    return [(v.limit, v.proven) for v in captured.program.inputs]


def test_what_wrapped_around_is_beyond_the_limit() -> None:
    """Before, an input of 2^29 was allowed whatever the model, and four times it was -2^31."""
    model = linear([4.0])
    captured = capture(model, [torch.ones(1, 1)])
    assert declared(captured) == [(2.0**28, True)]
    for x in (2.0**28 - 2.0**-16, -(2.0**28) + 2.0**-16):
        (y,), _ = run_local(captured, [torch.tensor([[x]], dtype=torch.float64)], 2)
        assert abs(float(y) - 4 * x) <= 2.0**-16
    (y,), _ = run_local(captured, [torch.tensor([[2.0**29]])], 2)
    assert float(y) == -(2.0**31)


@pytest.mark.parametrize("frac_bits", [8, 12, 16, 20, 24])
def test_at_any_scale(frac_bits: int) -> None:
    captured = capture(linear([2.0, 1.0]), [torch.full((1, 2), 2.0**-4)], frac_bits=frac_bits)
    assert declared(captured) == [(2.0 ** (60 - 2 * frac_bits), True)]
    captured = capture(nn.Identity().eval(), [torch.ones(1, 2)], frac_bits=frac_bits)
    assert declared(captured) == [(2.0 ** (62 - 2 * frac_bits), True)]


def test_real_networks_have_proven_limits_that_their_outputs_bear_out(digits: Digits) -> None:
    for model in (digits.mlp, digits.cnn):
        captured = capture(model, [digits.images[:1]])
        ((limit, proven),) = declared(captured)
        assert proven and limit >= 2**8
        x = digits.images[:4].sign() * (limit - 2.0**-16) * torch.tensor([1.0, -1.0, 0.5, 0.001]).reshape(4, 1, 1, 1)
        (y,), _ = run_local(captured, [x], 2)
        (want,) = plaintext(model, [x])
        assert bool(((y - want).abs() <= 1e-3 + want.abs().max() * 2.0**-10).all())


def test_a_deep_network_is_calibrated_to_a_quarter_of_the_room() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(32, 32, bias=False) for _ in range(30)]
    for layer in layers:
        layer.weight.data = torch.nn.init.orthogonal_(layer.weight.data) * 1.5
    model = nn.Sequential(*layers).double().eval()
    x = torch.randn(5, 32, dtype=torch.float64)
    captured = capture(model, [x])
    ((limit, proven),) = declared(captured)
    # without biases the network is homogeneous: the largest value on the way is known for every multiple of x
    largest, value = 0.0, x
    for layer in layers:
        value = layer(value).detach()
        largest = max(largest, float(value.abs().max()))
    per_unit = largest / float(x.abs().max())
    assert not proven
    assert limit * per_unit * 4 < 2.0**30 <= 2 * limit * per_unit * 4


def test_products_of_secrets_keep_a_sixteenth() -> None:
    a = 2.0**13  # in the worst case they add up, in the example they nearly cancel
    model = Outputs({"square": lambda m, x: m.linear(x) * m.linear(x)}, linear=linear([a, -a])).eval()
    x = torch.tensor([[1.0, 1.0 - 2.0**-6]], dtype=torch.float64)
    # y = 2^7, squared 2^14; at 2^5 that is 2^24, times 16 below 2^30, and at 2^6 no longer
    assert declared(capture(model, [x])) == [(2.0**5, False)]


def test_inputs_of_different_sizes_have_limits_of_their_own() -> None:
    a = 2.0**20
    functions = {"difference": lambda m, x, y: m.left(x) + m.right(y)}
    model = Outputs(functions, left=linear([a, -a]), right=linear([a, -a])).eval()
    x, y = torch.ones(1, 2, dtype=torch.float64), torch.full((1, 2), 700.0, dtype=torch.float64)
    (small, large), (bigger, proven) = declared(capture(model, [x, y]))
    assert (small, bigger, large, proven) == (2.0**21, 2.0**30, False, False)


def test_a_proven_limit_that_calibration_does_not_exceed_is_kept() -> None:
    assert declared(capture(linear([1.0]), [torch.tensor([[2.0**28]])])) == [(2.0**29, True)]


def test_what_does_not_fit_is_refused_with_the_layer_and_a_remedy() -> None:
    model = nn.Sequential(linear([2.0**12]), nn.ReLU(), linear([2.0**12]))
    x = torch.tensor([[2.0**10]])
    with pytest.raises(RangeError, match=r"mpc.linear at 2: .*16 fraction bits.*use fewer frac_bits, or scale"):
        capture(model.eval(), [x])
    assert capture(model.eval(), [x], frac_bits=8).program.inputs[0].limit >= 2.0**11
    assert capture(model.eval(), [x / 2**12]).program.inputs[0].limit >= 2.0**-1


def test_examples_of_zeros_will_do_for_networks_with_a_proof() -> None:
    assert declared(capture(linear([4.0]), [torch.zeros(1, 1)])) == [(2.0**28, True)]
    deep = nn.Sequential(*(linear([64.0, 64.0], [64.0, 64.0]) for _ in range(8))).eval()
    with pytest.raises(RangeError, match="all zero"):
        capture(deep, [torch.zeros(1, 2)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 2.0**30])
def test_examples_are_numbers_that_can_be_shared(bad: float) -> None:
    with pytest.raises(RangeError, match="example input 'input' contains"):
        capture(nn.ReLU().eval(), [torch.tensor([[1.0, bad]])])


def test_examples_that_do_not_fit_an_exported_program() -> None:
    program = capture(nn.ReLU().eval(), [torch.ones(1, 3)]).program
    with pytest.raises(ShapeError):
        with_limits(program, {}, [torch.ones(1, 4)])
    with pytest.raises(InputError, match="takes 1 inputs"):
        with_limits(program, {}, [])


def test_nothing_but_powers_of_two_is_kept_of_the_examples() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    x, y = torch.rand(2, 4), torch.rand(5, 4)
    first, second = (capture(model, [v]).program for v in (x, y))
    assert first.to_bytes() == second.to_bytes()
    assert Program.from_bytes(first.to_bytes()) == first


def test_scores_whose_scale_queries_must_take_have_fewer_bits_above() -> None:
    """Where products have no room for a scale above 1, queries are scaled, to more fraction bits than were checked."""
    values = nn.Parameter(torch.tensor([1.0, 0.0], dtype=torch.float64).reshape(1, 1, 2, 1))

    def chosen(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        q = x.reshape(1, 1, 1, 1)
        return functional.scaled_dot_product_attention(q, torch.cat([q, -q], -2), m.values, scale=3.0)

    captured = capture(Outputs({"chosen": chosen}, values=values).double().eval(), [torch.ones(1, 1).double()])
    ((limit, proven),) = declared(captured)
    assert proven and limit == 2.0**12
    for x in (limit - 2.0**-16, 2.0**-16 - limit):  # q meets q and -q: the first is its own
        (y,), _ = run_local(captured, [torch.full((1, 1), x, dtype=torch.float64)], 2)
        assert abs(float(y) - 1) <= 2.0**-14


def group_norm(gain: float) -> nn.GroupNorm:
    norm = nn.GroupNorm(1, 4).double().eval()
    norm.weight.data = torch.full((4,), gain, dtype=torch.float64)
    return norm


def test_what_groups_are_normalised_to_must_have_room() -> None:
    """As of rows, of which it was always asked: with a gain of 2^13 the result would have wrapped around."""
    x = torch.tensor([1.0, -1.0, 1.0, -1.0]).reshape(1, 4, 1)
    trial = nn.Sequential(group_norm(2.0**13)).double().eval()
    with pytest.raises(RangeError, match="group_norm"):
        capture(trial, [x * 2.0**9])
    with pytest.raises(RangeError, match="instance_norm"):
        norm = nn.InstanceNorm1d(1, affine=True).double().eval()
        norm.weight.data = torch.full((1,), 2.0**13, dtype=torch.float64)
        capture(norm, [torch.tensor([[[1.0, -1.0, 1.0, -1.0]]]) * 2.0**9])
    fitting = capture(group_norm(2.0**8), [x])
    (y,), _ = run_local(fitting, [x], 2)
    (want,) = plaintext(group_norm(2.0**8), [x])
    assert float((y - want).abs().max()) < 2.0**-4


def room_for_sums(size: float, context: int) -> int:
    """The room that attention has for powers, of a decoder whose values are about so large, for texts so long."""
    model = tiny_decoder(layers=1, context=context)
    attention = model.blocks[0].attention
    attention.v.weight *= size / float(attention.v.weight.abs().sum(1).max())
    attention.out.weight /= size
    nodes = captured_decoder(model).program.nodes
    (found,) = (node.kwargs["sum_bits"] for node in nodes if node.op == "aten.scaled_dot_product_attention.default")
    return int(found)


def test_sums_of_values_have_room_however_long_a_text_becomes() -> None:
    """Examples are of 12 tokens; before, room was asked for as many."""
    assert room_for_sums(4096, 64) == room_for_sums(4096, 2048) == 33 >= LEAST_POWER_BITS + count_bits(2048)
    assert room_for_sums(16_384, 64) == 31
    with pytest.raises(RangeError, match="scaled_dot_product_attention"):
        room_for_sums(16_384, 2048)
