"""The workloads of `scripts/bench ops`: single operations."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from bench_cases import Workload
from torch import nn
from torch.nn import functional


def linear(m: int, k: int, n: int, rng: np.random.Generator | None = None) -> Workload:
    """A product with a private matrix."""
    draw = (rng or np.random.default_rng(1)).normal
    x, w = draw(0, 1, (m, k)), draw(0, 0.04, (k, n))
    layer = nn.Linear(k, n, bias=False)
    _set(layer, w.T)
    return Workload(f"matmul {m}x{k} @ {k}x{n}", "matmul", {"x": x, "w": w}, layer, x @ w)


def workloads(tiny: bool) -> list[Workload]:
    """The fixed list; `tiny`: the same operations on sizes that only show that everything works."""
    sizes: tuple[tuple[int, int, int], ...] = ((16, 768, 3072), (128, 768, 768))
    channels, image, elements, pooled, classes = 64, 56, 100_000, (64, 112), 1000
    if tiny:
        sizes, channels, image, elements, pooled, classes = ((4, 32, 16), (8, 16, 16)), 3, 8, 100, (2, 8), 10
    rng = np.random.default_rng(1)
    draw = rng.normal
    found = [linear(*size, rng) for size in sizes]
    x, w = draw(0, 1, (1, channels, image, image)), draw(0, 0.04, (channels, channels, 3, 3))
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    _set(conv, w)
    expected = functional.conv2d(torch.from_numpy(x), torch.from_numpy(w), padding=1).numpy()
    name = f"conv 3x3 {channels}->{channels} on {image}x{image}"
    found.append(Workload(name, "conv", {"x": x, "w": w}, conv, expected))
    x = draw(0, 2, (1, elements))
    found.append(Workload(f"ReLU {elements:,}", "relu", {"x": x}, nn.ReLU(), np.maximum(x, 0)))
    depth, side = pooled
    x = draw(0, 2, (1, depth, side, side))
    expected = x.reshape(1, depth, side // 2, 2, side // 2, 2).max((3, 5))
    found.append(Workload(f"max pool 2x2 {depth}x{side}x{side}", "maxpool", {"x": x}, nn.MaxPool2d(2), expected))
    x = draw(0, 4, (1, classes))
    found.append(Workload(f"argmax {classes:,}", "argmax", {"x": x}, nn.Identity(), x.argmax(-1), reveal="argmax"))
    return found


def _set(module: nn.Linear | nn.Conv2d, weight: np.ndarray[Any, Any]) -> None:
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight)))
