"""The networks that both systems run: torch.nn and crypten.nn have modules of the same names and arguments."""

from __future__ import annotations

from typing import Any

import torch


def mlp(nn: Any) -> Any:
    """Two hidden layers; of rows of 64."""
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))


def cnn(nn: Any) -> Any:
    """Two convolutions with both kinds of pools; of images 1 x 12 x 12."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


BUILDERS = {"mlp": mlp, "cnn": cnn}
SHAPES = {"mlp": (8, 64), "cnn": (8, 1, 12, 12)}


def example(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """The torch module, with weights that are always the same, and inputs for it."""
    generator = torch.Generator().manual_seed(7)
    model = BUILDERS[name](torch.nn).eval()
    with torch.no_grad():
        for p in model.parameters():
            fan = p[0].numel() if p.dim() > 1 else 1
            p.copy_(torch.randn(p.shape, generator=generator) / fan**0.5)
    return model, torch.randn(SHAPES[name], generator=generator)


def in_crypten(crypten: Any, name: str) -> Any:
    """The same as a model of crypten.nn."""
    model = BUILDERS[name](crypten.nn)
    weights = dict(example(name)[0].named_parameters())
    for place, module in model.named_modules():
        for key in list(module._parameters):
            module.set_parameter(key, weights[f"{place}.{key}"].detach().clone())
    return model.eval()


def zoo(nn: Any) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Small models of crypten.nn that have all modules it can run between them, with a shape of inputs for each."""
    torch.manual_seed(0)  # CrypTen's modules take their weights from torch's
    image, row = (2, 4, 6, 6), (3, 8)

    def chain(*modules: Any) -> Any:
        return nn.Sequential(*modules)

    def joined(op: Any, value: Any) -> Any:
        graph = nn.Graph("input", "output")
        graph.add_module("value", value, [])
        graph.add_module("output", op, ["input", "value"])
        return graph

    numbers = torch.linspace(0.5, 2, 8)
    norm = nn.BatchNorm2d(4)
    norm.set_buffer("running_mean", torch.tensor([0.5, -1.0, 0.0, 2.0]))
    norm.set_buffer("running_var", torch.tensor([1.0, 2.0, 0.5, 1.5]))
    norm.set_parameter("weight", torch.tensor([1.0, -0.5, 2.0, 1.0]))
    reshaped = nn.Graph("input", "output")  # as exporters write x.view(x.size(0), -1)
    reshaped.add_module("shape", nn.Shape(), ["input"])
    reshaped.add_module("first", nn.Constant(torch.tensor(0)), [])
    reshaped.add_module("size", nn.Gather(0), ["shape", "first"])
    reshaped.add_module("axes", nn.Constant(torch.tensor([0])), [])
    reshaped.add_module("sizes", nn.Unsqueeze(None), ["size", "axes"])
    reshaped.add_module("rest", nn.Constant(torch.tensor([-1])), [])
    reshaped.add_module("to", nn.Concat(0), ["sizes", "rest"])
    reshaped.add_module("output", nn.Reshape(), ["input", "to"])
    return {
        "norm": (chain(norm, nn.ReLU6(), nn.AdaptiveAvgPool2d(2)), image),
        "norm1d": (nn.BatchNorm1d(8), row),
        "strides": (chain(nn.Conv2d(4, 4, (3, 2), stride=(2, 1), padding=(1, 0), groups=2, bias=False)), image),
        "dilated": (nn.Conv2d(4, 2, 3, dilation=2), image),
        "conv1d": (nn.Conv1d(4, 3, 3, stride=2, padding=1), (2, 4, 9)),
        "pads": (chain(nn.ConstantPad2d((1, 2, 0, 1), 0.5), nn.AvgPool2d(3, stride=2, padding=1)), image),
        "maxima": (chain(nn.MaxPool2d(3, stride=2, padding=1), nn.Dropout(0.5), nn.AdaptiveMaxPool2d((1, 3))), image),
        "global": (chain(nn.GlobalAveragePool(), nn.Flatten()), image),
        "sigmoid": (chain(nn.Linear(8, 4, bias=False), nn.Sigmoid()), row),
        "softmax": (nn.Softmax(-1), row),
        "log_softmax": (nn.LogSoftmax(1), row),
        "clipped": (chain(nn.Hardtanh(-0.25, 0.5), nn.Exp()), row),
        "deep": (nn.Linear(8, 4), (2, 3, 8)),
        "moved": (chain(nn.Transpose([0, 2, 3, 1]), nn.Mean([1], keepdim=True), nn.Sum([3]), nn.Squeeze(1)), image),
        "reshaped": (reshaped, image),
        "given": (chain(nn.Reshape((2, -1, 4)), nn.Unsqueeze(1), nn.Slice([0, 1], [1, 3], [2, 3])), image),
        "gathered": (nn.Gather(1, torch.tensor([5, 0, 0])), row),
        "matmul": (nn.MatMul(torch.randn(8, 3)), row),
        "nested": (chain(chain(nn.Linear(8, 8), nn.ReLU()), chain(nn.Linear(8, 2))), row),
        "add": (joined(nn.Add(), nn.Parameter(numbers)), row),
        "sub": (joined(nn.Sub(), nn.Constant(numbers)), row),
        "mul": (joined(nn.Mul(), nn.Parameter(numbers)), row),
        "div": (joined(nn.Div(), nn.Constant(torch.tensor(4.0))), row),
        "pow": (joined(nn.Pow(), nn.Constant(torch.tensor(2))), row),
    }


def zoo_input(shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers for a model of the zoo."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))
