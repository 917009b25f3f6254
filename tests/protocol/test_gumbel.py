"""Gumbel noise in shares: the right logarithm, the right distribution, and nothing opened."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from mpcinfer.protocol import correlation
from mpcinfer.protocol import gumbel as module
from mpcinfer.protocol.correlation import Correlation, from_json, to_json
from mpcinfer.protocol.gumbel import Gumbel, gumbel, logarithm
from mpcinfer.protocol.local import LocalWorld
from mpcinfer.protocol.tracing import trace
from tests.openings import seed

DRAWS = 40_000
CELLS = 64


def drawn(parties: int = 2, *name: object) -> np.ndarray:
    """Draws from a world, as real numbers."""
    world = LocalWorld(parties, seed("gumbel", *name))

    async def protocol(ctx: object) -> object:
        return gumbel(ctx, (DRAWS,), 16)  # type: ignore[arg-type]

    return world.reveal(world.run(protocol)).double().numpy() / 65536


def fit(x: np.ndarray) -> float:
    """The smaller p of a Kolmogorov-Smirnov and of a chi-square test against the standard Gumbel distribution."""
    counts = np.bincount((stats.gumbel_r.cdf(x) * CELLS).astype(int).clip(0, CELLS - 1), minlength=CELLS)
    return float(min(stats.kstest(x, "gumbel_r").pvalue, stats.chisquare(counts).pvalue))


def test_the_logarithm_is_exact_enough() -> None:
    generator = np.random.default_rng(1)
    x = np.concatenate(
        [
            2.0 ** generator.uniform(-60, 60, 5000),
            1 - 2.0 ** generator.uniform(-52, -1, 5000),
            1 + 2.0 ** generator.uniform(-51, 0, 5000),
            [2.0**-53, 2.0**-52, 0.5, 1.0, 2.0, 1 - 2.0**-53, 0.7071067811865475, 0.7071067811865476, 37.0, 1e300],
        ]
    )
    expected = np.array([math.log(v) for v in x])
    zero = expected == 0
    assert (logarithm(x)[zero] == 0).all()
    assert np.abs(logarithm(x)[~zero] / expected[~zero] - 1).max() < 2.0**-47


def test_draws_are_of_the_standard_gumbel_distribution(parties: int) -> None:
    assert fit(drawn(parties)) > 1e-3


def test_draws_that_follow_each_other_are_independent() -> None:
    cells = (stats.gumbel_r.cdf(drawn(2, "pairs")) * 8).astype(int).clip(0, 7)
    counts = np.bincount(8 * cells[1::2] + cells[::2], minlength=64)
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: 1.06 * x,
        lambda x: x + 0.05,
        lambda x: -x,
        lambda x: np.random.default_rng(0).normal(0.577, 1.283, x.shape),  # the same mean and variance
        lambda x: np.round(x * 16) / 16,
    ],
    ids=["wide", "shifted", "turned round", "normal", "coarse"],
)
def test_another_distribution_shows(fault: Callable[[np.ndarray], np.ndarray]) -> None:
    assert fit(fault(drawn())) < 1e-6


def test_fewer_random_bits_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_UNIFORM_BITS", 5)
    correlation.fields_of.cache_clear()
    try:
        assert fit(drawn()) < 1e-6
    finally:
        correlation.fields_of.cache_clear()


@pytest.mark.parametrize("word", [0, 1, 2**51, 2**52 - 2, 2**52 - 1])
def test_every_word_makes_a_number(word: int) -> None:
    made = Gumbel((1,), 16).derive({"u": torch.tensor([word])}, {}.__getitem__)["g"]
    u = (word + 0.5) * 2.0**-52
    expected = -math.log(-math.log(u)) if word < 2**52 - 1 else math.log(2) * 53
    assert float(made) / 65536 == pytest.approx(expected, abs=2.0**-15) and abs(float(made)) / 65536 < 36.8


def test_costs_nothing_online_and_opens_nothing() -> None:
    async def protocol(ctx: object) -> object:
        return gumbel(ctx, (3, 5), 12)  # type: ignore[arg-type]

    world = LocalWorld(3, seed("cost"))
    world.run(protocol)
    seen = world.transcript
    assert (seen.rounds, seen.bytes_sent, seen.dealer_bytes, seen.openings) == (0, 0, 8 * 15, [])
    plan, cost, made = trace(protocol, parties=3)
    assert (cost.rounds, cost.bytes_sent, made.shape, made.frac_bits) == (0, 0, (3, 5), 12)
    assert plan.entries == (("#0", Gumbel((3, 5), 12)),) and from_json(to_json(plan.entries[0][1])) == Gumbel(
        (3, 5), 12
    )


def test_what_a_draw_is_made_of_cannot_be_opened_or_read() -> None:
    item = Gumbel((2,), 16)
    shares = {"u": torch.zeros(2, dtype=torch.int64), "g": torch.zeros(2, dtype=torch.int64)}
    correlation = Correlation(item, shares, "noise#0:Gumbel")
    assert correlation.masks() == []
    for read in (correlation.mask, correlation.__getitem__):
        with pytest.raises(KeyError):
            read("u")


def test_all_dealers_make_the_same_of_a_word() -> None:
    """Only operations that IEEE 754 rounds: bit for bit what a slow, separate computation says."""
    x = np.random.default_rng(2).uniform(0, 1, 200)
    for value, made in zip(x, logarithm(x), strict=True):
        mantissa, exponent = math.frexp(value)
        if mantissa < 0.7071067811865476:
            mantissa, exponent = 2 * mantissa, exponent - 1
        z = (mantissa - 1) / (mantissa + 1)
        series = 1.0 / 23
        for k in range(10, -1, -1):
            series = series * (z * z) + 1.0 / (2 * k + 1)
        assert exponent * 0.6931471805599453 + 2 * z * series == made
