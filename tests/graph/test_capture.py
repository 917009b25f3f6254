"""Models in all the ways they are written, handed over and refused."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, export
from torch.nn import functional as F

from mpcinfer.errors import InputError, RangeError, UnsupportedError
from mpcinfer.graph.capture import capture
from mpcinfer.graph.sizes import Size
from mpcinfer.nn import supported
from tests.graph.conftest import Case
from tests.models_local import Outputs, assert_agrees, grid, plaintext, run_local

ULPS = 16  # for weights of at most 1, rounded to 2^-17, and inputs of a few units


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_residual_network_at_any_batch_size(residual: Case, parties: int, batch: int) -> None:
    assert [v.shape for v in residual.captured.program.inputs] == [(-1, 2, 6, 6)]
    assert [v.shape for v in residual.captured.program.outputs] == [(-1, 5)]
    assert_agrees(residual.model, residual.captured, residual.inputs(batch), parties, 64)


@pytest.mark.parametrize(("frac_bits", "error"), [(8, 0.15), (12, 0.01), (20, 4e-5), (24, 3e-6)])
def test_other_scales(residual: Case, frac_bits: int, error: float) -> None:
    captured = capture(residual.model, [torch.zeros(1, 2, 6, 6)], frac_bits=frac_bits)
    assert captured.program.frac_bits == frac_bits
    assert_agrees(residual.model, captured, residual.inputs(3), 2, error * 2**frac_bits)


class Fixed(nn.Module):
    """Sees its batch size as part of its shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.reshape(1, 12))


def test_a_model_that_fixes_its_batch_size() -> None:
    model, x = Fixed().eval(), torch.randn(4, 3)
    captured = capture(model, [x])
    assert [v.shape for v in captured.program.inputs] == [(4, 3)]
    assert_agrees(model, captured, [x], 2, ULPS)


def test_inputs_without_a_common_first_size_keep_their_sizes() -> None:
    model = Outputs({"product": lambda m, x, y: x @ y, "scaled": lambda m, x, y: x * y.sum()}).eval()
    x, y = torch.randn(2, 3), torch.randn(3, 4)
    captured = capture(model, [x, y])
    assert [v.shape for v in captured.program.inputs] == [(2, 3), (3, 4)]
    assert_agrees(model, captured, [x, y], 2, ULPS)


def test_an_input_without_axes() -> None:
    model = Outputs({"scaled": lambda m, x: x * m.w}, w=nn.Parameter(torch.randn(3))).eval()
    x = torch.tensor(1.5)
    captured = capture(model, [x])
    assert [v.shape for v in captured.program.inputs] == [()]
    assert_agrees(model, captured, [x], 2, ULPS)


class Two(nn.Module):
    """Two inputs, one of them by name, three outputs of a dictionary's kind of order."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor, flag: bool = True) -> tuple[torch.Tensor, ...]:
        left, right = self.a(x), self.b(y)
        return (left * right, torch.cat([left, right], 1) if flag else left, left - right)


def test_several_inputs_and_outputs(parties: int) -> None:
    model = Two().eval()
    inputs = [torch.randn(3, 4), torch.randn(3, 5)]
    captured = capture(model, inputs)
    assert [v.name for v in captured.program.inputs] == ["x", "y"]
    assert [v.shape for v in captured.program.outputs] == [(-1, 3), (-1, 6), (-1, 3)]
    assert_agrees(model, captured, inputs, parties, ULPS)


def test_one_example_tensor_for_two_inputs_leaves_them_two() -> None:
    model = Outputs({"difference": lambda m, x, y: x - y}).eval()
    x = torch.ones(2, 3)
    captured = capture(model, [x, x])
    assert_agrees(model, captured, [grid(2, 3, seed=1), grid(2, 3, seed=2)], 2, 0)


def test_an_output_may_be_an_input_or_occur_twice() -> None:
    functions = {"input": lambda m, x: x, "twice": lambda m, x: x + 1}
    model = Outputs(functions).eval()
    model.forward = lambda x: (x, y := x + 1, y)  # type: ignore[method-assign]
    x = grid(2, 3)
    captured = capture(model, [x])
    assert len(captured.program.outputs) == 3
    assert_agrees(model, captured, [x], 2, 0)


def test_a_model_of_no_operators_and_one_of_one() -> None:
    x = grid(2, 3)
    for model in (nn.Identity().eval(), nn.Linear(3, 2).eval(), nn.Dropout().eval()):
        assert_agrees(model, capture(model, [x]), [x], 2, ULPS)


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (lambda m, x: m.w, "output 0 of the model does not depend on its inputs"),
        (lambda m, x: (x + 1, m.w * 2), "output 1 of the model does not depend on its inputs"),
        (lambda m, x: torch.ones(3), "output 0 of the model does not depend on its inputs"),
        (lambda m, x: (x, 3.0), "output 1 of the model does not depend on its inputs"),
        (lambda m, x: (x, x.shape[0]), "output 1 of the model is a size"),
        (lambda m, x: None, "no output"),
    ],
)
def test_outputs_that_are_constant_are_refused(forward: Callable[..., Any], why: str) -> None:
    model = Outputs({}, w=nn.Parameter(torch.ones(3))).eval()
    model.forward = lambda x: forward(model, x)  # type: ignore[method-assign]
    with pytest.raises(UnsupportedError, match=why):
        capture(model, [torch.zeros(2, 3)])


# exported programs


def test_an_exported_program_with_a_free_batch_size(parties: int) -> None:
    model = mlp()
    exported = export(model, (torch.zeros(2, 6),), dynamic_shapes=({0: Dim("n")},))
    nodes = len(exported.graph.nodes)
    captured = capture(exported, [])
    assert [v.shape for v in captured.program.inputs] == [(-1, 6)]
    assert len(exported.graph.nodes) == nodes  # the caller's own is left alone
    assert_agrees(model, captured, [torch.randn(5, 6)], parties, ULPS)


@pytest.mark.filterwarnings(r"ignore:.*treespec, LeafSpec:FutureWarning")
def test_an_exported_program_with_fixed_sizes_or_decomposed() -> None:
    model, x = mlp(), torch.randn(2, 6)
    assert [v.shape for v in capture(export(model, (x,)), [x]).program.inputs] == [(2, 6)]
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Hardtanh(), nn.Flatten()).eval()
    x = grid(2, 3, 4, 4)
    table = {torch.ops.aten.hardtanh.default: lambda x, low, high: x.clamp(low, high)}
    decomposed = export(model, (x,)).run_decompositions(table)
    assert_agrees(model, capture(decomposed, []), [x], 2, 1.01)


def test_an_exported_program_with_other_free_sizes(parties: int) -> None:
    exported = export(nn.ReLU().eval(), (torch.zeros(2, 6),), dynamic_shapes=({1: Dim("length", min=3, max=9)},))
    captured = capture(exported, [])
    assert captured.program.sizes == (Size("size1", 3, 9),)
    assert [v.shape for v in (*captured.program.inputs, *captured.program.outputs)] == [(2, -1), (2, -1)]
    assert_agrees(nn.ReLU().eval(), captured, [grid(2, 9)], parties, 0)
    with pytest.raises(InputError, match="has its dynamic shapes already"):
        capture(exported, [], dynamic_shapes=({1: Dim("length")},))


def test_arguments_that_export_makes_constant() -> None:
    exported = export(Two().eval(), (torch.zeros(2, 4), torch.zeros(2, 5), False))
    assert [v.name for v in capture(exported, []).program.inputs] == ["x", "y"]


# parameters


class Tied(nn.Module):
    """One matrix as the weight of two layers, as a factor, and as a summand; one bias twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.second.bias = self.first.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.first.weight
        y = self.second(torch.relu(self.first(x)))
        return y * w[0] + (x @ w) * self.first.bias + w[1] + y.unsqueeze(-1).expand(-1, -1, 4).sum(-1) * w.sum()


def test_shared_parameters_in_several_roles(parties: int) -> None:
    torch.manual_seed(2)
    model = Tied().eval()
    captured = capture(model, [torch.zeros(1, 4)])
    names = [p.name for p in captured.program.parameters]
    assert len(names) == len(set(names))
    assert_agrees(model, captured, [torch.randn(3, 4)], parties, 40)


def test_what_is_secret_and_what_is_public() -> None:
    model = nn.Module()
    model.secret = nn.Parameter(torch.ones(3))
    model.register_buffer("persistent", torch.ones(3))
    model.register_buffer("transient", torch.ones(3), persistent=False)
    model.forward = lambda x: x * model.secret + model.persistent + model.transient  # type: ignore[assignment]
    model.eval()
    x = torch.zeros(1, 3)
    program = capture(model, [x]).program
    assert [p.name for p in program.parameters] == ["b_persistent", "p_secret.weight"]
    assert [c.name for c in program.constants] == ["b_transient"]
    program = capture(model, [x], public=["persistent", "secret"]).program
    assert not program.parameters
    assert {c.name for c in program.constants} == {"b_persistent", "b_transient", "p_secret"}
    with pytest.raises(InputError, match="no parameter or buffer named persistant"):
        capture(model, [x], public=["persistant"])


def test_public_weights_of_layers_work_as_secrets() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)).eval()
    x = torch.randn(2, 2, 4, 4)
    captured = capture(model, [x], public=list(model.state_dict()))
    assert_agrees(model, captured, [x], 2, ULPS)


def test_weights_are_not_in_the_repr(residual: Case) -> None:
    captured = residual.captured
    assert repr(captured) == f"Captured({len(captured.program.nodes)} nodes, {captured.program.size} parameters)"


def test_unused_parameters_and_operators_are_left_out() -> None:
    model = nn.Module()
    model.used, model.unused = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(x: torch.Tensor) -> torch.Tensor:
        F.gelu(model.unused(x))  # has no protocol, and need not
        return model.used(x)

    model.forward = forward  # type: ignore[assignment]
    program = capture(model.eval(), [torch.zeros(1, 3)]).program
    assert len(program.nodes) == 1 and program.size == 3 * 2 + 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2.0**30])
def test_weights_that_do_not_fit_are_a_range_error(bad: float) -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[1, 1] = bad
    with pytest.raises(RangeError, match=r"parameter p_2_weight"):
        capture(model, [torch.zeros(1, 6)])


# refusals


class Counter(nn.Module):
    """Remembers how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


class Conditional(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


class Failing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError


def test_training_mode_is_refused_with_the_module() -> None:
    with pytest.raises(InputError, match=r"the model is in training mode: call model.eval\(\)"):
        capture(nn.Linear(3, 2).train(), [torch.zeros(1, 3)])
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout()).eval()
    model[1].train()
    with pytest.raises(InputError, match="1 is in training mode"):
        capture(model, [torch.zeros(1, 3)])


class Call(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def test_every_unsupported_operator_is_named_with_its_module_and_the_supported_ones() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), Call(torch.lgamma), nn.Sequential(Call(torch.erfinv), Call(torch.lgamma)), nn.RReLU()
    ).eval()
    with pytest.raises(UnsupportedError) as caught:
        capture(model, [torch.zeros(1, 4)])
    message = str(caught.value)
    assert "aten.lgamma.default at 1, 2.1" in message
    assert "aten.erfinv.default at 2.0" in message
    assert "aten.rrelu.default at 3" in message
    assert message.endswith(f"Supported: {', '.join(supported())}")


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Counter(), "the model changes 'calls' while it runs"),
        (Branching(), "torch.export cannot capture this model; does it branch on values"),
        (Conditional(), "no protocol for: .*cond"),
        (Failing(), "torch.export cannot capture this model.*AssertionError: no message"),
        (nn.Embedding(5, 3), "torch.export cannot capture"),
        (nn.GRUCell(3, 3), "no protocol for"),
        (nn.MultiheadAttention(3, 1), "torch.export cannot capture"),
        (nn.BatchNorm1d(3, track_running_stats=False), "no protocol for: aten._native_batch_norm"),
    ],
)
def test_models_that_are_refused(model: nn.Module, why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        capture(model.eval(), [torch.randn(2, 3)])


@pytest.mark.parametrize("dtype", [torch.int16, torch.bool, torch.complex64])
def test_inputs_are_floating_point_or_indices(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedError, match=f"input 'input' has dtype {dtype}: inputs are floating point or"):
        capture(nn.Identity().eval(), [torch.zeros(2, 3, dtype=dtype)])


@pytest.mark.parametrize("inputs", [[], [[1.0, 2.0]], [torch.zeros(1, 6), 3], torch.zeros(1, 6)])
def test_example_inputs_are_tensors(inputs: Any) -> None:
    with pytest.raises(InputError, match="one tensor per argument"):
        capture(mlp(), inputs)


def test_the_wrong_number_or_shape_of_inputs_is_refused() -> None:
    for inputs in ([torch.zeros(1, 6), torch.zeros(1, 6)], [torch.zeros(1, 7)]):
        with pytest.raises(UnsupportedError, match="torch.export cannot capture this model"):
            capture(mlp(), inputs)


def test_frac_bits_out_of_range_are_refused() -> None:
    for frac_bits in (7, 25):
        with pytest.raises(RangeError, match="frac_bits must be 8 to 24"):
            capture(mlp(), [torch.zeros(1, 6)], frac_bits=frac_bits)


def test_overwriting_an_input_in_place_changes_nothing_for_the_caller() -> None:
    model, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)).eval(), grid(2, 3)
    captured = capture(model, [x])
    assert operator.eq(x.tolist(), grid(2, 3).tolist())
    want = plaintext(model, [x.clone()])
    (got,), _ = run_local(captured, [x], 2)
    assert float((got - want[0]).abs().max()) <= ULPS * 2**-16
