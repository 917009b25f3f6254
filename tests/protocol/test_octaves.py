"""Bringing numbers over many octaves to one small interval: exact, in the clear and on shares."""

from __future__ import annotations

import decimal
import math
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
    Table,
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


def entry(gain: Fraction, bits: int) -> int:
    return round(3 * gain * (1 << bits))


def inverse_root(gain: Fraction, bits: int) -> int:
    return round((1 << bits) / float(gain) ** 0.5)


def octave_of(gain: Fraction, bits: int) -> int:
    return round(math.log2(gain) * (1 << bits))


# one that is multiplied like the gains, one like their inverse roots, which is 0 below all octaves, one that is added
ENTRIES = (
    Table(entry, 20, Fraction(1)),
    Table(inverse_root, 28, Fraction(-1, 2), empty=True),
    Table(octave_of, 20, None),
)


def normalised(
    used: LocalWorld, x: list[int], frac_bits: int, low: int, high: int, tables: tuple[Table, ...], d: int = 0
) -> tuple[list[int], list[list[int]], list[int]]:
    """h, each table's entries, and their fraction bits."""
    found = used.run(lambda ctx, s: normalise(ctx, s, low, high, tables, d), used.share(torch.tensor(x), frac_bits))
    h = used.reveal([part[0] for part in found]).tolist()
    entries = [used.reveal(list(part)).tolist() for part in zip(*(part[1] for part in found), strict=True)]
    return h, entries, [e.frac_bits for e in (found[0][0], *found[0][1])]


@pytest.mark.parametrize("limits", [(16, -8, 20), (24, -24, 31), (8, -8, -7)], ids=str)
def test_shares(world: Callable[..., LocalWorld], parties: int, limits: tuple[int, int, int]) -> None:
    bits, pieces = refined(*limits)
    x = [*around(pieces, bits, *limits[1:]), 0, 1, -1, 2**62, -(2**62), 2**62 + 5]
    h, entries, scales = normalised(world(parties), x, bits, *limits[1:], ENTRIES)
    assert h == [h_of(pieces, v) for v in x]
    for found, table in zip(entries, ENTRIES, strict=True):
        assert found == [
            0 if table.empty and not piece_of(pieces, v) else table.entry(pieces.real(piece_of(pieces, v)), table.bits)
            for v in x
        ]
    assert scales == [pieces.frac_bits, 20, 28, 20]


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """All numbers are too many to be compared in one round."""
    monkeypatch.setattr(octaves_, "FEW", 0)


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize("limits", RANGES, ids=str)
def test_shares_of_many(world: Callable[..., LocalWorld], limits: tuple[int, int, int]) -> None:
    """h and the entries are those of one gain, with which x comes as near to one as if all bits were compared."""
    bits, pieces = refined(*limits)
    low, high = (1 << (bits + end) for end in limits[1:])
    x = [*around(pieces, bits, *limits[1:]), low, high, low - 1, 0, 1, -1, high + 1, 2**62, -(2**62)]
    h, entries, scales = normalised(world(2), x, bits, *limits[1:], ENTRIES)
    assert scales == [pieces.frac_bits, 20, 28, 20]
    gains = {pieces.real(i) for i in range(len(pieces.gains))}
    shift = (limits[2] - limits[1] - 1) // octaves_.GROUP * octaves_.GROUP
    for v, near_one, *found in zip(x, h, *entries, strict=True):
        within = min(max(v, low), high)
        gain = (1 - Fraction(near_one, 1 << pieces.frac_bits)) / Fraction(within, 1 << bits)
        assert gain in gains
        assert abs(near_one) <= (BOUND + Fraction(1, 1 << 10)) * (1 << pieces.frac_bits)
        # of entries of several groups, which are powers of two times one, the smallest is rounded
        assert abs(found[0] - entry(gain, 20)) <= 2**shift
        assert abs(found[1] - (0 if v < low else inverse_root(gain, 28))) <= 2 ** (shift // 2)
        assert abs(found[2] - octave_of(gain, 20)) <= 1


@pytest.mark.parametrize("d", [1, 8, 20])
def test_shares_of_what_is_truncated(world: Callable[..., LocalWorld], parties: int, d: int) -> None:
    pieces = octaves(16, -8, 20)
    inner = [t + i for t in pieces.thresholds for i in (-2, -1, 0, 1, t // 7)]
    x = [(v << d) + part for v in (*inner, 0, 1, -1) for part in (0, 1, (1 << d) - 1)]
    x += [2**62 - 1, -(2**62), 2**62 - (1 << d)]
    h, (found,), _ = normalised(world(parties), x, 16 + d, -8, 20, ENTRIES[:1], d)
    for v, got, at in zip(x, h, found, strict=True):
        # floor or one more, and exactly what that one has
        rounded = [v >> d, (v >> d) + 1] if v % (1 << d) else [v >> d]
        assert (got, at) in [(h_of(pieces, r), entry(pieces.real(piece_of(pieces, r)), 20)) for r in rounded]


@pytest.mark.usefixtures("many")
def test_many_are_truncated_first(run: Callable[..., Ran]) -> None:
    ran = run(lambda ctx, s: _h(ctx, s, -2, 2, 8), (torch.arange(64).reshape(8, 8) << 8, 24))
    assert ran.transcript.rounds == 9 and ran.opened()[:2] == [("Truncation.r", 64), ("Comparison.r", 64)]


async def _h(ctx: Context, x: Shared, low: int, high: int, d: int = 0) -> Shared:
    return (await normalise(ctx, x, low, high, (inverse._gains(high),), d))[0]


def test_truncating_few_costs_no_round(run: Callable[..., Ran]) -> None:
    ran = run(lambda ctx, s: _h(ctx, s, -2, 2, 8), (torch.arange(64).reshape(8, 8) << 8, 24))
    ran.costs(3, int(64 * (8 + 9 * 13 / 8)), 8 * (7 * 512 + 1 + 9 * (177 + 2 * 64) + 64 + 8 + 9 * 8))
    assert ran.opened()[0] == ("TruncatedComparison.r", 64)


def test_costs(run: Callable[..., Ran]) -> None:
    ran = run(lambda ctx, s: _h(ctx, s, -2, 2), (torch.arange(64).reshape(8, 8), 16))
    ran.costs(3, int(64 * (8 + 9 * 13 / 8)), 8 * (7 * 512 + 1 + 9 * (177 + 2 * 64)))
    assert ran.opened() == [
        (f"TruncatedComparison.{name}", bits) for name, bits in [("r", 64), ("leaf", 12), ("beta", 1)]
    ]


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize(("tables", "products"), [(0, 8 + 8), (1, 8 + 16), (2, 8 + 8 + 16), (3, 8 + 8 + 16 + 16)])
def test_costs_of_many(run: Callable[..., Ran], tables: int, products: int) -> None:
    """No table, the gains', one that is added, ones that are multiplied."""
    chosen: list[tuple[Table, ...]] = [(), (inverse._gains(20),), (ENTRIES[0],), ENTRIES]
    protocol = lambda ctx, s: normalise(ctx, s, -8, 20, chosen[tables])  # noqa: E731
    shares = torch.arange(64).reshape(8, 8)

    async def first(ctx: Context, x: Shared) -> Shared:
        return (await protocol(ctx, x))[0]

    ran = run(first, (shares, 16))
    thresholds, within = 6, 11
    wide = 16 * 15 + 1 + thresholds * (4 * 22 + 15 + 2 * 64)
    narrow = 4 * 15 + 1 + within * (15 + 64)
    sent = 8 + thresholds * 35 / 8 + 37 / 8 + within * 7 / 8 + products
    results = (1, 2, 2, 3)[tables]
    ran.costs(8, int(64 * sent), 8 * (wide + narrow + 64 * results))


def test_one_more_is_too_many(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(octaves_, "FEW", 5)
    for count, rounds in ((5, 3), (6, 8)):
        assert run(lambda ctx, s: _h(ctx, s, 0, 1), (torch.arange(count), 16)).transcript.rounds == rounds


def test_openings_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(octaves_, "FEW", 1 << 20)

    async def protocol(ctx: Context, x: Shared) -> Shared:
        return await inverse.reciprocal(ctx, Shared(x.share, 16), low=-1, high=1)

    assert_hides(monkeypatch, protocol, torch.arange(14_000) << 2, torch.zeros(14_000, dtype=torch.int64))


@pytest.mark.usefixtures("many")
def test_openings_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    async def protocol(ctx: Context, x: Shared) -> object:
        return await normalise(ctx, Shared(x.share, 16), -4, 4, ENTRIES)

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
