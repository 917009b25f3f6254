"""Models that the tests of this folder share; what takes seconds to make is made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mpcinfer.graph.capture import Captured, capture


@pytest.fixture(params=[2, pytest.param(3, marks=pytest.mark.slow)], ids="n={}".format)
def parties(request: pytest.FixtureRequest) -> int:
    return int(request.param)


class Residual(nn.Module):
    """A network with about everything that is in image classifiers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.left = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4), nn.ReLU6(inplace=True))
        self.right = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.norm = nn.BatchNorm2d(4)  # after a sum, so it cannot be folded
        self.head = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(36, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = F.leaky_relu(self.norm(self.left(x) + self.right(x) + x), 0.125)
        return self.head(x)


def trained(model: nn.Module) -> nn.Module:
    """The model in eval mode, with batch norms that have seen something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                size = module.num_features
                module.running_mean = torch.randn(size, generator=generator)
                module.running_var = torch.rand(size, generator=generator) * 1.5 + 0.5
                if module.affine:
                    module.weight.copy_(torch.randn(size, generator=generator))
                    module.bias.copy_(torch.randn(size, generator=generator))
    return model.eval()


@dataclass(frozen=True)
class Case:
    """A model, captured, and an input of a given batch size."""

    model: nn.Module
    captured: Captured
    inputs: Callable[[int], list[torch.Tensor]]


@pytest.fixture(scope="session")
def residual() -> Case:
    torch.manual_seed(0)
    model = trained(Residual())
    captured = capture(model, [torch.zeros(1, 2, 6, 6)])

    def inputs(batch: int) -> list[torch.Tensor]:
        return [torch.randn(batch, 2, 6, 6, generator=torch.Generator().manual_seed(batch))]

    return Case(model, captured, inputs)


@dataclass(frozen=True)
class Digits:
    """scikit-learn's digits, 8 x 8 pixels from 0 to 1: 240 of them, and networks trained on the others."""

    images: torch.Tensor
    labels: torch.Tensor
    mlp: nn.Module
    cnn: nn.Module


def fit(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> None:
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimiser.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimiser.step()


@pytest.fixture(scope="session")
def digits() -> Digits:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    torch.manual_seed(0)
    order = torch.randperm(len(images))
    test, train = order[:240], order[240:]
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    cnn = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 10),
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster for tensors this small, most of all on a busy machine
    fit(mlp, images[train], labels[train], epochs=8)
    fit(cnn, images[train], labels[train], epochs=4)
    torch.set_num_threads(threads)
    return Digits(images[test], labels[test], mlp.eval(), cnn.eval())
