"""Models of crypten.nn as torch modules: exactly what they compute, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mpcinfer.errors import InputError, UnsupportedError
from mpcinfer.graph.capture import capture
from mpcinfer.interop.crypten import from_crypten
from tests.interop import networks
from tests.models_local import assert_agrees

# of CrypTen's converter, about arrays that nobody writes to
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")


@pytest.mark.parametrize("name", networks.BUILDERS)
def test_a_model_computes_exactly_what_its_twin_in_torch_does(name: str, crypten: Any) -> None:
    model, x = networks.example(name)
    converted = from_crypten(networks.in_crypten(crypten, name))
    assert not any(module.training for module in converted.modules())
    assert torch.equal(converted(x), model(x))


def test_all_weights_are_secret_when_deployed(crypten: Any) -> None:
    model, x = networks.example("cnn")
    converted = from_crypten(networks.in_crypten(crypten, "cnn"))
    assert not list(converted.buffers())
    program = capture(converted, [x]).program
    assert program.size == sum(p.numel() for p in model.parameters())
    assert not program.constants


class Net(nn.Module):
    """With what CrypTen's converter reads: norms, a computed shape, GELU as exporters write it, a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)  # with equal parameters: ONNX writes Identity
        self.pool, self.drop = nn.MaxPool2d(2), nn.Dropout(0.5)
        self.first, self.second = nn.Linear(36, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.norm(self.conv(x))))
        x = self.drop(x.view(x.size(0), -1))
        return torch.softmax(self.second(nn.functional.gelu(self.first(x))), -1)


def test_a_model_that_crypten_converted_from_torch_agrees_with_torch(crypten: Any) -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 1, 8, 8)
    converted = from_crypten(crypten.nn.from_pytorch(model, x))
    assert torch.allclose(converted(x), model(x), atol=1e-6)
    captured = capture(converted, [x])
    assert {"aten.gelu.default", "mpc.softmax"} <= {node.op for node in captured.program.nodes}
    assert_agrees(model, captured, [x], 2, 8.0)


def own(crypten: Any) -> Any:
    """A class with a forward of its own, with parts, parameters, buffers, attributes and a method."""

    class Own(crypten.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = crypten.nn.ModuleList([crypten.nn.Linear(4, 4), crypten.nn.Linear(4, 2)])
            self.named = crypten.nn.ModuleDict({"act": crypten.nn.Sequential(crypten.nn.Sigmoid())})
            self.register_parameter("gain", torch.tensor([2.0, 3.0]))
            self.register_buffer("shift", torch.tensor([0.5, -0.5]))
            self.times = 2

        def twice(self, x: Any) -> Any:
            return x.mul(self.times)

        def forward(self, x: Any) -> Any:
            x = self.named["act"](self.layers[0](x).relu())
            return self.twice(self.layers[1](x)).mul(self.gain).add(self.shift)

    return Own()


def test_a_forward_of_its_own_runs_as_it_is(crypten: Any) -> None:
    torch.manual_seed(0)
    model, x = own(crypten).eval(), torch.randn(3, 4)
    converted = from_crypten(model)
    first, second = model.layers[0], model.layers[1]
    y = torch.sigmoid((x @ first.weight.t() + first.bias).relu())
    y = (y @ second.weight.t() + second.bias) * 2 * torch.tensor([2.0, 3.0]) + torch.tensor([0.5, -0.5])
    assert torch.allclose(converted(x), y, atol=1e-6)
    captured = capture(converted, [x])
    assert not captured.program.constants
    assert_agrees(converted, captured, [x], 2, 24.0)  # the last products have factors of up to 6


def test_a_graph_may_be_out_of_order_and_have_several_inputs_and_results(crypten: Any) -> None:
    graph = crypten.nn.Graph(["a", "b"], ["sum", "last"])
    graph.add_module("last", crypten.nn.ReLU(), ["sum"])
    graph.add_module("sum", crypten.nn.Add(), ["a", "b"])
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    total, last = from_crypten(graph.eval())(a, b)
    assert torch.equal(total, a + b) and torch.equal(last, (a + b).relu())


def encrypted(crypten: Any) -> Any:
    """A model that looks to us as if its parties had encrypted it."""
    model = crypten.nn.Sequential(crypten.nn.ReLU(), crypten.nn.Linear(2, 2)).eval()
    for module in model.modules():
        module.encrypted = True
    return model


def wired(crypten: Any, name: str) -> Any:
    """A graph whose only module has an input of this name."""
    graph = crypten.nn.Graph("input", "output")
    graph.add_module("output", crypten.nn.ReLU(), [name])
    return graph.eval()


REFUSED: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "training": (lambda c: c.nn.Sequential(c.nn.ReLU()), InputError, "training mode: call model.eval"),
    "encrypted": (encrypted, InputError, "encrypted. Convert the model before .* decrypt=True"),
    "torch": (lambda c: nn.Linear(2, 2).eval(), InputError, "Linear; a torch module deploys as it is"),
    "loss": (lambda c: c.nn.Sequential(c.nn.ReLU(), c.nn.MSELoss()).eval(), UnsupportedError, "MSELoss at 1"),
    "two": (
        lambda c: c.nn.Sequential(c.nn.Sequential(c.nn.Where()), c.nn.Where(), c.nn.Equal()).eval(),
        UnsupportedError,
        "Equal at 2; Where at 0.0, 1",
    ),
    "alone": (lambda c: c.nn.Range().eval(), UnsupportedError, "Range at the model"),
    "arguments": (lambda c: c.nn.Sequential(c.nn.Add()).eval(), UnsupportedError, r"Add \(missing .*\) at 0"),
    "ceil": (lambda c: c.nn.Sequential(c.nn.AvgPool2d(2, ceil_mode=True)).eval(), UnsupportedError, "ceil_mode.* at 0"),
    "no size": (
        lambda c: c.nn.Sequential(c.nn.Reshape()).eval(),
        UnsupportedError,
        r"Reshape \(missing .*shape.* at 0",
    ),
    "own inside": (lambda c: c.nn.Sequential(own(c)).eval(), UnsupportedError, r"Own \(a forward of its own.*\) at 0"),
    "unconnected": (lambda c: wired(c, "missing"), InputError, "not connected"),
    "circle": (lambda c: wired(c, "output"), InputError, "not connected"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_named_with_its_place(case: str, crypten: Any) -> None:
    make, kind, says = REFUSED[case]
    with pytest.raises(kind, match=says) as caught:
        from_crypten(make(crypten))
    if isinstance(caught.value, UnsupportedError):
        assert caught.value.missing


def test_a_forward_that_needs_crypten_is_refused_when_it_runs(crypten: Any) -> None:
    class Pools(crypten.nn.Module):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return x.max_pool2d(2)

    class Whole(crypten.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.part = Pools()

        def forward(self, x: Any) -> Any:
            return self.part(x)

    with pytest.raises(UnsupportedError, match="Pools at part: .* no attribute 'max_pool2d'"):
        capture(from_crypten(Whole().eval()), [torch.randn(1, 1, 4, 4)])
