"""scripts/splines.py: what it fits is what is committed, as near to the best as it says."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from typing import Any

import numpy as np
import pytest
import splines

COMMITTED = json.loads(resources.files("mpcinfer.protocol").joinpath("splines.json").read_text(encoding="utf-8"))
REACH = 8 << splines.ARGUMENT_BITS


def residual(fitted: dict[str, Any], x: np.ndarray) -> np.ndarray:
    """What its pieces add to the asymptotes at x / 2^16."""
    at = np.searchsorted(fitted["knots"], x, side="right")
    total = np.zeros(len(x))
    for i, (middle, coefficients) in enumerate(zip(fitted["middles"], fitted["coefficients"], strict=True)):
        u = (x[at == i + 1] - middle) / 2.0**splines.ARGUMENT_BITS
        scales = [2.0 ** (splines.ARGUMENT_BITS * j - fitted["frac_bits"]) for j in range(len(coefficients))]
        total[at == i + 1] = sum(a * s * u**j for j, (a, s) in enumerate(zip(coefficients, scales, strict=True)))
    return total


def assert_is_committed(name: str, target: splines.Target) -> None:
    """Up to what another host's floating point makes of it: a bisection may end at the next number."""
    fitted, committed = json.loads(json.dumps(splines.spline(target))), COMMITTED[name]
    for part in ("frac_bits", "switch", "left", "right"):
        assert fitted[part] == committed[part]
    assert len(fitted["knots"]) == len(committed["knots"]) <= target.thresholds
    assert np.abs(np.subtract(fitted["knots"], committed["knots"])).max() <= 4
    x = np.arange(-REACH, REACH, 97)
    assert np.abs(residual(fitted, x) - residual(committed, x)).max() <= 1e-6


@pytest.mark.parametrize("name", sorted(splines.TARGETS))
def test_coefficients_are_those_of_the_committed_knots(name: str) -> None:
    knots = tuple(k / 2.0**splines.ARGUMENT_BITS for k in COMMITTED[name]["knots"])
    assert_is_committed(name, replace(splines.TARGETS[name], knots=knots))


def test_hardswish_has_its_own_knots() -> None:
    assert_is_committed("hardswish", splines.TARGETS["hardswish"])
    assert COMMITTED["hardswish"]["knots"] == [k << splines.ARGUMENT_BITS for k in (-3, 0, 3)]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(splines.TARGETS))
def test_all_is_what_is_committed(name: str) -> None:
    assert_is_committed(name, splines.TARGETS[name])


def test_another_fit_is_noticed() -> None:
    committed = COMMITTED["elu"]["knots"]
    knots = tuple(k / 2.0**splines.ARGUMENT_BITS for k in committed[:4] + [committed[4] + 400] + committed[5:])
    with pytest.raises(AssertionError):
        assert_is_committed("elu", replace(splines.TARGETS["elu"], knots=knots))


def test_a_cubic_is_fitted_exactly() -> None:
    middle, coefficients, error = splines.fit(lambda x: 1 + 2 * x - x**2 / 4 + x**3 / 8, 0.0, 2.0, 60)
    at_middle = [1 + 2 - 1 / 4 + 1 / 8, 2 - 1 / 2 + 3 / 8, -1 / 4 + 3 / 8, 1 / 8]  # in powers of x - 1
    assert middle == 1 << 16 and error < 1e-14
    assert np.allclose([c / 2.0 ** (60 - 16 * i) for i, c in enumerate(coefficients)], at_middle, atol=1e-12)


def test_the_fit_is_the_best_one() -> None:
    """Chebyshev: x^4 less its best cubic on [-1, 1] is T_4 / 8."""
    best = splines.minimax(lambda x: x**4, -1.0, 1.0, 3)
    assert np.allclose(best, [-1 / 8, 0, 1, 0], atol=2e-4)  # on a grid of 160 points


def test_coefficients_are_fitted_after_rounding() -> None:
    """A leading coefficient of few bits: the others make up for most of its error."""
    function = lambda x: x**3 / 3  # noqa: E731
    _, coefficients, error = splines.fit(function, 0.0, 1.0, 50)
    rounded = coefficients[3] / 2.0**2
    assert rounded == 0.25 and error < 1.1 * (1 / 3 - rounded) / 32  # T_3 on [0, 1] has the leading coefficient 32


@pytest.mark.slow
def test_knots_are_as_far_apart_as_the_error_allows() -> None:
    target = splines.TARGETS["tanh"]
    few, many = (splines.knots(target, error, 61) for error in (2e-3, 2e-4))
    assert len(few) < len(many) <= target.thresholds
    for low, high in zip(few, few[1:-1], strict=False):
        assert (
            splines.fit(target.function, low, high, 61)[2]
            <= 2e-3
            < splines.fit(target.function, low, high + 0.01, 61)[2]
        )
