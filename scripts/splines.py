"""Fit the piecewise cubics of mpcinfer/protocol/splines.json. Run by scripts/splines.

A function is an asymptote on either side, which changes at one knot, plus a residual that vanishes outside the knots
and is a cubic between them. Knots are placed greedily, each piece as long as its error allows, and the error is the
smallest for which the thresholds suffice. Coefficients are fitted after rounding: the leading one first, to the few
bits that its scale leaves it, then the others around it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

Array = npt.NDArray[np.float64]
Function = Callable[[Array], Array]

DEGREE = 3
ARGUMENT_BITS = 16
# what is truncated must stay below 2^62, so the residual decides how many fraction bits its cubics have
ROOM_BITS = 61.9
REACH = 32.0  # no residual goes further


@dataclass(frozen=True)
class Target:
    """A function, its asymptotes (slope, offset) to the left and to the right, and how many thresholds it may have.

    knots: where it has them, if it is a piecewise cubic itself.
    """

    function: Function
    left: tuple[int, int]
    right: tuple[int, int]
    thresholds: int
    knots: tuple[float, ...] = ()


def of_torch(function: Callable[[torch.Tensor], torch.Tensor]) -> Function:
    """A torch function on float64 arrays."""
    return lambda x: function(torch.from_numpy(np.asarray(x, np.float64))).numpy()


TARGETS = {
    "gelu": Target(of_torch(functional.gelu), (0, 0), (1, 0), 8),
    "gelu_tanh": Target(of_torch(lambda x: functional.gelu(x, approximate="tanh")), (0, 0), (1, 0), 8),
    "silu": Target(of_torch(functional.silu), (0, 0), (1, 0), 10),
    "sigmoid": Target(of_torch(torch.sigmoid), (0, 0), (0, 1), 10),
    "tanh": Target(of_torch(torch.tanh), (0, -1), (0, 1), 10),
    "erf": Target(of_torch(torch.erf), (0, -1), (0, 1), 10),
    "softplus": Target(of_torch(functional.softplus), (0, 0), (1, 0), 10),
    "elu": Target(of_torch(functional.elu), (0, -1), (1, 0), 9),
    "hardswish": Target(of_torch(functional.hardswish), (0, 0), (1, 0), 3, knots=(-3, 0, 3)),
    "mish": Target(of_torch(functional.mish), (0, 0), (1, 0), 11),
}


def minimax(function: Function, low: float, high: float, degree: int) -> Array:
    """Coefficients in (x - middle) of the polynomial with the smallest largest error (Remez exchange)."""
    middle, half = (low + high) / 2, (high - low) / 2
    signs = (-1.0) ** np.arange(degree + 2)
    at = middle - half * np.cos(np.pi * np.arange(degree + 2) / (degree + 1))
    grid = middle - half * np.cos(np.linspace(0, np.pi, 160))
    for _ in range(6):
        u = (at - middle) / half
        solved = np.linalg.solve(np.stack([*(u**i for i in range(degree + 1)), signs], 1), function(at))
        scaled = solved[:-1] / half ** np.arange(degree + 1)
        error = function(grid) - np.polynomial.polynomial.polyval(grid - middle, scaled)
        turns = [0, *(np.flatnonzero(np.diff(np.sign(np.diff(error)))) + 1), len(grid) - 1]
        chosen: list[int] = []
        for i in turns:
            if chosen and np.sign(error[i]) == np.sign(error[chosen[-1]]):
                if abs(error[i]) > abs(error[chosen[-1]]):
                    chosen[-1] = i
            else:
                chosen.append(i)
        while len(chosen) > degree + 2:
            chosen.pop(0 if abs(error[chosen[0]]) < abs(error[chosen[-1]]) else -1)
        if len(chosen) < degree + 2:
            break
        at = grid[chosen]
    return scaled


def fit(function: Function, low: float, high: float, frac_bits: int) -> tuple[int, list[int], float]:
    """Middle and coefficients, integers at their scales, of a cubic, and its largest error after rounding."""
    at = round((low + high) / 2 * 2**ARGUMENT_BITS)
    middle = at / 2**ARGUMENT_BITS
    rounded: list[int] = []
    taken: list[float] = []

    def rest(x: Array) -> Array:
        return function(x) - sum(a * (x - middle) ** (DEGREE - i) for i, a in enumerate(taken))

    for power in range(DEGREE, -1, -1):
        scale = 2.0 ** (frac_bits - power * ARGUMENT_BITS)
        rounded.append(round(float(_shifted(minimax(rest, low, high, power), low, high, middle)[power]) * scale))
        taken.append(rounded[-1] / scale)
    grid = np.linspace(low, high, 200)
    return at, rounded[::-1], float(np.abs(rest(grid)).max())


def _shifted(coefficients: Array, low: float, high: float, middle: float) -> Array:
    """The same polynomial in powers of x - middle, which is hardly elsewhere than the interval's own middle."""
    by = middle - (low + high) / 2
    terms = list(enumerate(coefficients))
    return np.array([sum(a * math.comb(j, i) * by ** (j - i) for j, a in terms[i:]) for i in range(len(terms))])


def knots(target: Target, error: float, frac_bits: int) -> list[float]:
    """Where pieces end whose errors reach `error`; beyond the outer ones the asymptotes are that close."""
    x = np.linspace(-REACH, REACH, 1 << 16)
    far_left = np.abs(target.function(x) - target.left[0] * x - target.left[1]) > error
    far_right = np.abs(target.function(x) - target.right[0] * x - target.right[1]) > error
    # where the right asymptote is the function itself (ELU), pieces end where that begins
    last = x[np.flatnonzero(far_right)[-1] + 1] if far_right.any() else REACH
    found = [float(x[np.flatnonzero(far_left)[0] - 1])]
    while found[-1] < last:
        if fit(target.function, found[-1], last, frac_bits)[2] <= error:
            found.append(float(last))
            break
        good, bad = found[-1], float(last)
        for _ in range(16):
            middle = (good + bad) / 2
            if middle - found[-1] > 1e-3 and fit(target.function, found[-1], middle, frac_bits)[2] > error:
                bad = middle
            else:
                good = middle
        found.append(good)
        if len(found) > target.thresholds:
            break
    return found


def best_knots(target: Target, frac_bits: int) -> tuple[float, ...]:
    """The knots with the smallest error for which the thresholds suffice, to 2 per cent."""
    low, high = 1e-7, 1e-2
    while high / low > 1.02:
        error = math.sqrt(low * high)
        if len(knots(target, error, frac_bits)) <= target.thresholds:
            high = error
        else:
            low = error
    return tuple(knots(target, high, frac_bits))


def spline(target: Target) -> dict[str, object]:
    """The fitted function as plain data."""
    for frac_bits in (63, 62, 61, 60):
        at = [round(k * 2**ARGUMENT_BITS) for k in target.knots or best_knots(target, frac_bits)]
        ends = [k / 2**ARGUMENT_BITS for k in at]
        spans = list(zip(ends, ends[1:], strict=False))
        switch = _switch(target, spans)
        pieces, size = [], 0.0
        for i, (a, b) in enumerate(spans):
            slope, offset = target.left if i < switch else target.right
            residual = lambda x, s=slope, o=offset: target.function(x) - s * x - o  # noqa: E731
            size = max(size, float(np.abs(residual(np.linspace(a, b, 200))).max()))
            pieces.append(fit(residual, a, b, frac_bits))
        if size * 2.0**frac_bits < 2.0**ROOM_BITS:
            break
    else:
        raise ValueError("the residual is too large")
    return {
        "frac_bits": frac_bits,
        "knots": at,
        "left": target.left,
        "right": target.right,
        "switch": switch,
        "middles": [p[0] for p in pieces],
        "coefficients": [p[1] for p in pieces],
    }


def _switch(target: Target, spans: list[tuple[float, float]]) -> int:
    """The piece from which on the right asymptote is taken: so that the residual stays smallest."""

    def size(switch: int) -> float:
        worst = 0.0
        for i, (a, b) in enumerate(spans):
            x = np.linspace(a, b, 50)
            slope, offset = target.left if i < switch else target.right
            worst = max(worst, float(np.abs(target.function(x) - slope * x - offset).max()))
        return worst

    return min(range(len(spans) + 1), key=size)


def main() -> int:
    """Write the file; the names of functions on the command line are fitted, all if none is given."""
    path = Path(__file__).parent.parent / "mpcinfer" / "protocol" / "splines.json"
    fitted = json.loads(path.read_text()) if path.exists() else {}
    for name in sys.argv[1:] or TARGETS:
        fitted[name] = spline(TARGETS[name])
        print(name, f"{len(fitted[name]['knots'])} thresholds at scale {fitted[name]['frac_bits']}", flush=True)
    rows = [f" {json.dumps(name)}: {json.dumps(fitted[name])}" for name in sorted(fitted)]
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
