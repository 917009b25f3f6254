"""A small model with one output for each way to call an operator, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.models_local import Outputs, grid, on_grid


@dataclass(frozen=True)
class Group:
    """Functions of one kind, what they are called with, and how far off they may be, in units in the last place."""

    functions: dict[str, Callable[..., Any]]
    shapes: Sequence[tuple[int, ...]]
    ulps: float
    state: Callable[[], dict[str, Any]] = dict
    exceptions: dict[str, float] = field(default_factory=dict)

    def model(self) -> nn.Module:
        return on_grid(Outputs(self.functions, **self.state()))

    def inputs(self) -> list[torch.Tensor]:
        xs = [grid(*shape, seed=i) for i, shape in enumerate(self.shapes)]
        for x in xs:  # thresholds, their neighbours, zeros, equals
            x.reshape(-1)[:8] = torch.tensor([0, 2.0**-16, -(2.0**-16), 1, 1, 6, -1, 0.5], dtype=torch.float64)
        return xs
