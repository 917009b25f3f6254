"""Bringing numbers over many octaves to one small interval: exact, in the clear and on shares."""

from __future__ import annotations

import decimal
from collections.abc import Callable
from fractions import Fraction
from functools import partial

import pytest
import torch

from mpcinfer.protocol import inverse, logarithm, root
from mpcinfer.protocol import octaves as octaves_
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.local import LocalWorld
from mpcinfer.protocol.octaves import (
    ARGUMENT_BITS,
    BOUND,
    DEGREE,
    VALUE_BITS,
    Octaves,
    interpolated,
    normalise,
    octaves,
    spread,
    tail_of,
)
from mpcinfer.protocol.types import Shared
from tests.openings import assert_hides
from tests.protocol.conftest import Ran

# fraction bits, low, high: the default of most functions, the ends of what is allowed, and ranges of one octave
RANGES = [(16, -8, 20), (8, -8, 20), (24, -24, 31), (16, -16, 39), (24, 0, 7), (8, -8, -7), (8, 6, 7), (16, -16, -15)]
TAILS = {
    "reciprocal": (inverse._tail, (0, -159363242267, 34350011608, 2176945, 133)),
    "rsqrt": (partial(root._tail, -1), (0, -39000174366, 12882718296, 674909, 36)),
    "sqrt": (partial(root._tail, 1), (0, 4291079384, -4294770506, -133227, -5)),
    "log": (logarithm._tail, (0, 31533303389, -17178263180, -714873, -33)),
}


def refined(frac_bits: int, low: int, high: int) -> tuple[int, Octaves]:
    """x's fraction bits after `spread`, and its pieces."""
    bits = spread(Shared(torch.zeros(1, dtype=torch.int64), frac_bits), high).frac_bits
    return bits, octaves(bits, low, high)


def around(pieces: Octaves, bits: int, low: int, high: int) -> list[int]:
    """Numbers near every threshold and within every piece."""
    inner = [t + t // 7 for t in pieces.thresholds]
    found = {t + i for t in (*pieces.thresholds, *inner) for i in (-2, -1, 0, 1, 2)}
    return sorted(x for x in found if 1 << (bits + low) <= x <= 1 << (bits + high))


def piece_of(pieces: Octaves, x: int) -> int:
    return sum(x >= t for t in pieces.thresholds)


def h_of(pieces: Octaves, x: int) -> int:
    i = piece_of(pieces, x)
    return pieces.slopes[i] * x + pieces.offsets[i]


@pytest.mark.parametrize("limits", RANGES, ids=str)
def test_every_number_comes_near_one(limits: tuple[int, int, int]) -> None:
    bits, pieces = refined(*limits)
    assert Fraction(11, 64) == BOUND
    for x in around(pieces, bits, *limits[1:]):
        h = Fraction(h_of(pieces, x), 1 << pieces.frac_bits)
        assert h == 1 - pieces.real(piece_of(pieces, x)) * Fraction(x, 1 << bits) and abs(h) <= BOUND
    assert 0 < pieces.frac_bits - ARGUMENT_BITS < 62 and pieces.frac_bits < VALUE_BITS


@pytest.mark.parametrize("limits", RANGES, ids=str)
def test_outside_the_nearer_end_counts(limits: tuple[int, int, int]) -> None:
    bits, pieces = refined(*limits)
    low, high = (1 << (bits + end) for end in limits[1:])
    for x in (low - 1, 0, -1, -(2**62)):
        assert h_of(pieces, x) == h_of(pieces, low) and pieces.real(0) == pieces.real(piece_of(pieces, low))
    for x in (high + 1, 2**62):
        assert h_of(pieces, x) == h_of(pieces, high)
    assert pieces.gains[-1] == pieces.gains[-2]


@pytest.mark.parametrize("limits", [(16, -8, 20), (24, -24, 31), (8, -8, -7)], ids=str)
def test_shares(world: Callable[..., LocalWorld], parties: int, limits: tuple[int, int, int]) -> None:
    bits, pieces = refined(*limits)
    x = [*around(pieces, bits, *limits[1:]), 0, 1, -1, 2**62, -(2**62), 2**62 + 5]
    table = tuple(3 * i * i - 100 for i in range(len(pieces.gains)))
    used = world(parties)
    found = used.run(lambda ctx, s: normalise(ctx, s, pieces, table), used.share(torch.tensor(x), bits))
    h, entry = (used.reveal(part) for part in zip(*found, strict=True))
    assert h.tolist() == [h_of(pieces, v) for v in x]
    assert entry.tolist() == [table[piece_of(pieces, v)] for v in x]


@pytest.fixture(params=[octaves_.FEW, 0], ids=["few", "many"])
def few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether numbers are few enough to be compared in one round."""
    monkeypatch.setattr(octaves_, "FEW", request.param)
    return bool(request.param)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("d", [1, 8, 20])
def test_shares_of_what_is_truncated(world: Callable[..., LocalWorld], parties: int, d: int) -> None:
    pieces = octaves(16, -8, 20)
    inner = [t + i for t in pieces.thresholds for i in (-2, -1, 0, 1, t // 7)]
    x = [(v << d) + part for v in (*inner, 0, 1, -1) for part in (0, 1, (1 << d) - 1)]
    x += [2**62 - 1, -(2**62), 2**62 - (1 << d)]
    table = tuple(3 * i * i - 100 for i in range(len(pieces.gains)))
    used = world(parties)
    found = used.run(lambda ctx, s: normalise(ctx, s, pieces, table, d), used.share(torch.tensor(x), 16 + d))
    h, entry = (used.reveal(part).tolist() for part in zip(*found, strict=True))
    for v, got, at in zip(x, h, entry, strict=True):
        # floor or one more, and exactly what that one has
        rounded = [v >> d, (v >> d) + 1] if v % (1 << d) else [v >> d]
        assert (got, at) in [(h_of(pieces, r), table[piece_of(pieces, r)]) for r in rounded]


def costs(few: bool, thresholds: int) -> tuple[float, int]:
    """Bytes sent and bits dealt for an element, its opening and what depends on d left out."""
    if few:
        return thresholds * 13 / 8, 7 * 512 + 1 + thresholds * (177 + 2 * 64)
    return thresholds * 35 / 8, 16 * 15 + 1 + thresholds * (4 * 22 + 15 + 2 * 64)


def test_truncating_costs_no_round(run: Callable[..., Ran], few: bool) -> None:
    pieces = octaves(16, -2, 2)
    x = torch.arange(64).reshape(8, 8) << 8
    ran = run(lambda ctx, s: normalise(ctx, s, pieces, pieces.gains, 8), (x, 24))
    sent, dealt = costs(few, 9)
    ran.costs(4 - few, int(64 * (8 + sent)), 8 * (dealt + 64 + 8 + 9 * 8))
    assert ran.opened()[0] == ("TruncatedComparison.r", 64)
    assert ran.frac_bits == [pieces.frac_bits, 0]


def test_costs(run: Callable[..., Ran], few: bool) -> None:
    pieces = octaves(16, -2, 2)
    ran = run(lambda ctx, s: normalise(ctx, s, pieces, pieces.gains), (torch.arange(64).reshape(8, 8), 16))
    sent, dealt = costs(few, 9)
    ran.costs(4 - few, int(64 * (8 + sent)), 8 * dealt)
    words = [("leaf", 12)] if few else [("leaf", 7), ("top", 6)]
    assert ran.opened() == [(f"TruncatedComparison.{name}", bits) for name, bits in [("r", 64), *words, ("beta", 1)]]
    assert ran.frac_bits == [pieces.frac_bits, 0]


def test_one_more_is_too_many(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = octaves(16, 0, 1)
    monkeypatch.setattr(octaves_, "FEW", 5)
    for count, rounds in ((5, 3), (6, 4)):
        x = torch.arange(count)
        assert run(lambda ctx, s: normalise(ctx, s, pieces, pieces.gains), (x, 16)).transcript.rounds == rounds


def test_openings_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(octaves_, "FEW", 1 << 20)

    async def protocol(ctx: Context, x: Shared) -> Shared:
        return await inverse.reciprocal(ctx, Shared(x.share, 16), low=-1, high=1)

    assert_hides(monkeypatch, protocol, torch.arange(14_000) << 2, torch.zeros(14_000, dtype=torch.int64))


def test_interpolation_meets_polynomials() -> None:
    assert interpolated(lambda h: 1 - 2 * h + Fraction(1, 3) * h**DEGREE) == [1, -2, 0, 0, Fraction(1, 3)]
    tail = tail_of([1 + Fraction(1, 8), -Fraction(1, 2), 3, 0, Fraction(1, 2)], Fraction(-1))
    assert tail == (1 << 60, 1 << 48, 3 << 35, 0, 1 << 6)


@pytest.mark.parametrize("name", TAILS)
def test_tails_are_the_same_on_every_host(name: str) -> None:
    """Parties multiply by these numbers; neither a machine's arithmetic nor a process's settings may change them."""
    tail, expected = TAILS[name]
    assert tail() == expected


@pytest.mark.parametrize("rounding", [decimal.ROUND_UP, decimal.ROUND_FLOOR])
def test_decimal_settings_change_nothing(rounding: str) -> None:
    x = Fraction(12345, 678)
    expected = logarithm._exact(x)
    with decimal.localcontext(prec=7, rounding=rounding):
        assert logarithm._exact(x) == expected
