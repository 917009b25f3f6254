"""The functions of `scripts/bench accuracy`: on which points each is evaluated, and which results are right.

Points are float32 numbers on the grid of 16 fraction bits. Every system encodes those without an error, so that what
is compared with float64 is the value at the decoded input, the same for all. Nothing here knows of any system.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

Array = np.ndarray[Any, Any]

POINTS, TINY = 100_000, 200
RANGES = ("ordinary", "wide")
PEER_SLACK = 10.0  # another system is right if its errors are within this many tolerances
GRID_BITS = 16
_SEED = 11
_ROW = 1_000  # points in a row of an elementwise function's input


@dataclass(frozen=True)
class Tolerance:
    """What an error may be at most, given x, the value y, and the ULP of the output's scale; `text` says it."""

    text: str
    allowed: Callable[[Array, Array, float], Array]
    relative: Callable[[Array, Array], Array] | None = None  # where the relative error is what counts, if anywhere


@dataclass(frozen=True)
class Function:
    """A function as the module a user would deploy, with its points in both ranges, float64."""

    name: str
    operation: str  # as the peers' runners know it
    model: nn.Module
    tolerance: Tolerance
    points: dict[str, Array]
    described: dict[str, str]

    def arrays(self, within: str) -> dict[str, Array]:
        """What a peer is given: x, and the private gain (`weight`) and `bias` if there are any."""
        parameters = {name: p.detach().double().numpy() for name, p in self.model.named_parameters()}
        return {"x": self.points[within], **parameters}

    def reference(self, within: str) -> Array:
        """The module itself, in float64."""
        with torch.no_grad():
            value = copy.deepcopy(self.model).double()(torch.from_numpy(self.points[within]))
        return np.asarray(value.numpy(), np.float64)

    def judged(self, within: str, got: Array, ulp: float, slack: float = 1.0) -> dict[str, Any]:
        """How far `got` is off. Infinite errors, which JSON does not know, are None. Right: within `slack` tolerances.

        The worst point is the one with the largest error in units of its tolerance.
        """
        x, y = self.points[within].reshape(-1), self.reference(within).reshape(-1)
        if got.size != y.size:
            raise ValueError(f"{got.size} results for {y.size} points of {self.name}")
        got = np.asarray(got, np.float64).reshape(-1)
        error = np.where(np.isfinite(got), np.abs(got - y), np.inf)
        share = error / self.tolerance.allowed(x, y, ulp)
        worst = int(share.argmax())
        relative = None
        if self.tolerance.relative is not None:
            counted = self.tolerance.relative(x, y)
            if counted.any():
                relative = _known(float((error[counted] / np.abs(y[counted])).max()))
        return {
            "points": int(y.size),
            "max_abs_error": _known(float(error.max())),
            "max_relative_error": relative,
            "max_error_in_tolerances": _known(float(share.max())),
            "worst": {"x": float(x[worst]), "expected": float(y[worst]), "got": _known(float(got[worst]))},
            "right": bool(share.max() <= slack),
        }


def _known(value: float) -> float | None:
    return value if np.isfinite(value) else None


def behind(own: dict[str, Any], others: dict[str, dict[str, Any]]) -> list[str]:
    """Where our largest error is not below that of a system that is right on both ranges: "spu wide max_abs_error"."""
    found = []
    for name, other in others.items():
        if not other.get("right"):
            continue
        for within in RANGES:
            for measure in ("max_abs_error", "max_relative_error"):
                ours, theirs = own.get(within, {}).get(measure), other[within][measure]
                if theirs is None:  # this measure does not apply: a right result is finite
                    continue
                if ours is None or ours > theirs or ours == theirs > 0:  # who is exact cannot be beaten
                    found.append(f"{name} {within} {measure}")
    return found


# --- tolerances -------------------------------------------------------------------------------------------------------


def absolute(limit: float) -> Tolerance:
    """The same everywhere."""
    return Tolerance(f"{limit:.0e}".replace("e-0", "e-"), lambda x, y, ulp: np.full_like(y, limit))


_EXP = Tolerance(
    "5e-5 for x <= 0, 1e-3 y above",
    lambda x, y, ulp: np.where(x <= 0, 5e-5, 1e-3 * y),
    lambda x, y: np.asarray(x > 0),
)
_SCALED = Tolerance(
    "max(1e-3 y, 2 ULP)",
    lambda x, y, ulp: np.maximum(1e-3 * np.abs(y), 2 * ulp),
    lambda x, y: np.abs(y) >= 2.0**-5,  # from about where 2 ULP of 16 bits are less
)


# --- points -----------------------------------------------------------------------------------------------------------

Draw = Callable[[np.random.Generator, int], Array]


def _on_grid(x: Array) -> Array:
    """The nearest float32 on the grid."""
    exact = x.astype(np.float32).astype(np.float64)
    return np.asarray(np.round(exact * 2.0**GRID_BITS) / 2.0**GRID_BITS)


def _normal(deviation: float, mean: float = 0.0) -> Draw:
    return lambda rng, n: rng.normal(mean, deviation, n)


def _uniform(low: float, high: float) -> Draw:
    return lambda rng, n: rng.uniform(low, high, n)


def _magnitudes(low: float, high: float) -> Draw:
    return lambda rng, n: np.exp(rng.uniform(np.log(low), np.log(high), n))


_TAILS = np.array([0.0, *(sign * size for size in (64.0, 100.0, 20_000.0) for sign in (1, -1))])


def _far(rng: np.random.Generator, n: int) -> Array:
    """Half of them uniform in +-40, the others of any magnitude up to 20,000, and the points of `_TAILS`."""
    near, rest = n // 2, n - n // 2 - _TAILS.size
    sign = rng.choice([-1.0, 1.0], rest)
    return np.concatenate([_uniform(-40, 40)(rng, near), _TAILS, sign * _magnitudes(2.0**-8, 20_000)(rng, rest)])


def _scores(rng: np.random.Generator, n: int) -> Array:
    """Rows of 64 uniform in +-30; every sixteenth row has one score throughout, the first of them 0."""
    rows = _uniform(-30, 30)(rng, n).reshape(-1, 64)
    rows[::16] = rows[::16, :1]
    rows[0] = 0
    return rows


_NEAR = _normal(2), "N(0, 2)"
_ALL = _far, "+-40, +-64, +-100, +-20,000 and 2^-8 to 20,000"
_UP_TO_100 = _magnitudes(0.01, 100), "0.01 to 100, log-uniform"
_OCTAVES = _magnitudes(2.0**-8, 2.0**20), "2^-8 to 2^20, log-uniform"


class _Applied(nn.Module):
    """A function of torch as a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def _with_gain(norm: nn.LayerNorm | nn.RMSNorm) -> nn.Module:
    """Gain N(1, 0.1) and bias N(0, 0.1), on the grid."""
    rng = np.random.default_rng(_SEED)
    with torch.no_grad():
        for name, parameter in norm.named_parameters():
            drawn = _normal(0.1, 1.0 if name == "weight" else 0.0)(rng, parameter.numel())
            parameter.copy_(torch.from_numpy(_on_grid(drawn)))
    return norm


def functions(tiny: bool = False) -> list[Function]:
    """The table, in order; `tiny`: few points, only to see that everything works."""
    count, row = (TINY, TINY // 4) if tiny else (POINTS, _ROW)
    found = []

    def add(
        name: str,
        model: nn.Module | Callable[[torch.Tensor], torch.Tensor],
        tolerance: Tolerance,
        ordinary: tuple[Draw, str],
        wide: tuple[Draw, str],
        shapes: tuple[tuple[int, ...], ...] = ((-1, row), (-1, row)),
        operation: str = "",
        counts: tuple[int, int] = (count, count),
    ) -> None:
        points = {
            within: _on_grid(draw(np.random.default_rng(_SEED), n)).reshape(shape)
            for within, (draw, _), shape, n in zip(RANGES, (ordinary, wide), shapes, counts, strict=True)
        }
        module = model if isinstance(model, nn.Module) else _Applied(model)
        described = dict(zip(RANGES, (ordinary[1], wide[1]), strict=True))
        found.append(Function(name, operation or name, module.eval(), tolerance, points, described))

    def smooth(name: str, model: nn.Module | Callable[[torch.Tensor], torch.Tensor], operation: str = "") -> None:
        add(name, model, absolute(5e-4), _NEAR, _ALL, operation=operation)

    add("relu", nn.ReLU(), absolute(5e-4), _NEAR, (_normal(2000), "N(0, 2000)"))
    smooth("gelu (erf)", nn.GELU(), "gelu")
    smooth("gelu (tanh)", nn.GELU(approximate="tanh"), "gelu_tanh")
    smooth("silu", nn.SiLU())
    smooth("sigmoid", nn.Sigmoid())
    smooth("tanh", nn.Tanh())
    smooth("erf", torch.erf)
    add("exp", torch.exp, _EXP, (_uniform(-10, 0), "-10 to 0"), (_uniform(-60, 8), "-60 to 8"))
    near_one = _magnitudes(0.1, 100), "0.1 to 100, log-uniform"
    add("reciprocal", torch.reciprocal, _SCALED, near_one, _OCTAVES)
    add("rsqrt", torch.rsqrt, _SCALED, _UP_TO_100, _OCTAVES)
    heads, length, rows = (2, 8, 16) if tiny else (12, 128, 1_600)
    add(
        "softmax",
        nn.Softmax(-1),
        absolute(5e-4),
        (_normal(2), f"{heads}x{length}x{length}, N(0, 2)"),
        (_scores, "rows of 64, +-30, some of one score"),
        shapes=((heads, length, length), (rows, 64)),
        counts=(heads * length * length, rows * 64),
    )
    rows = 2 if tiny else 128
    norms = (_normal(1), f"{rows}x768, N(0, 1)"), (_normal(60, 5.0), f"{rows}x768, N(5, 60)")
    for name, norm in (("layernorm", nn.LayerNorm(768)), ("rmsnorm", nn.RMSNorm(768, eps=1e-5))):
        add(
            name,
            _with_gain(norm),
            absolute(2e-3),
            *norms,
            shapes=((rows, 768), (rows, 768)),
            counts=(rows * 768, rows * 768),
        )
    add("log", torch.log, absolute(5e-4), _UP_TO_100, _OCTAVES)
    add("sqrt", torch.sqrt, _SCALED, _UP_TO_100, _OCTAVES)
    smooth("softplus", nn.Softplus())
    smooth("hardswish", nn.Hardswish())
    smooth("elu", nn.ELU())
    smooth("mish", nn.Mish())
    return found
