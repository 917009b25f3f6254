"""The pool: what was asked for last is ready first, within the budget, and the same everywhere."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from mpcinfer.errors import BusyError
from mpcinfer.party import pool as pool_module
from mpcinfer.party import tape as tape_module
from mpcinfer.party.pool import READY, Pool
from mpcinfer.protocol.tracing import Plan
from mpcinfer.protocol.truncate import Truncation

MODEL: Any = SimpleNamespace(id=b"m")
OTHER: Any = SimpleNamespace(id=b"o")
# of 64 KiB and 128 KiB: r, high, wrap in 2 bytes; the fields' containers
SMALL = Plan((("a#0", Truncation((4096,), 16)),))
SIZE = SMALL.expanded_bytes


def tape(complete: bool = True) -> Any:
    return SimpleNamespace(complete=complete)


def asked(pool: Pool, *names: bytes, model: Any = MODEL) -> None:
    for name in names:
        pool.take(name, model, ((1, 4),), SMALL)


def filled(pool: Pool) -> list[tuple[bytes, list[bytes]]]:
    """Fill it as party 0 would; what that said."""
    said = []
    while (wanted := pool.wanted()) is not None:
        digest, drops = wanted
        said.append(wanted)
        pool.drop(drops)
        pool.check_room(digest)
        pool.put(digest, tape())
        assert len(said) < 100
    return said


def test_a_tape_takes_what_its_fields_take() -> None:
    assert SIZE == 4096 * (8 + 8 + 8)


def test_nothing_is_fetched_that_nobody_asked_for() -> None:
    assert Pool(100).wanted() is None


def test_what_was_asked_for_last_comes_first() -> None:
    pool = Pool(100)
    asked(pool, b"a", b"b", b"a")
    assert filled(pool) == [(b"a", []), (b"a", []), (b"b", []), (b"b", [])] and len(pool) == 2 * READY


def test_the_oldest_is_taken_and_replaced() -> None:
    pool, tapes = Pool(100), [tape(), tape()]
    asked(pool, b"a")
    for each in tapes:
        pool.put(b"a", each)
    assert [pool.take(b"a", MODEL, (), SMALL) for _ in range(3)] == [*tapes, None]
    assert filled(pool) == [(b"a", [])] * READY


def test_what_was_not_asked_for_since_makes_room() -> None:
    pool = Pool(3.5 * SIZE / (1 << 20))
    asked(pool, b"a", b"b")
    assert filled(pool) == [(b"b", []), (b"b", []), (b"a", [])]  # nothing that is newer goes for what is older
    asked(pool, b"c")
    assert filled(pool) == [(b"c", [b"a"]), (b"c", [b"b"])]
    assert {d: len(s.tapes) for d, s in pool.shelves().items()} == {b"a": 0, b"b": 1, b"c": 2}


def test_no_tape_that_is_larger_than_the_budget() -> None:
    for megabytes in (0, 0.5 * SIZE / (1 << 20)):
        pool = Pool(megabytes)
        asked(pool, b"a")
        assert pool.wanted() is None
        with pytest.raises(BusyError, match="pool_mb"):
            pool.check_room(b"a")


def test_of_what_is_large_there_is_what_the_dealer_sends_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape_module, "HELD_BYTES", SIZE - 1)
    monkeypatch.setattr(tape_module, "PORTION_BYTES", 100)
    pool = Pool(100)
    asked(pool, b"a")
    assert filled(pool) == [(b"a", [])] * READY
    assert pool.shelves()[b"a"].size == SMALL.correction_bytes() + 3 * 100 < SIZE


def test_what_has_not_come_is_not_ready() -> None:
    pool, coming = Pool(100), tape(complete=False)
    asked(pool, b"a")
    pool.put(b"a", coming)
    pool.put(b"a", tape())
    assert len(pool) == 1 and len(pool.shelves()[b"a"].tapes) == 2
    coming.complete = True
    assert len(pool) == 2


def test_what_is_put_off_is_wanted_later(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, coming = Pool(100), tape(complete=False)
    asked(pool, b"a")
    assert not pool.coming
    pool.put(b"a", coming)
    assert pool.coming
    monkeypatch.setattr(pool_module, "_LATER", 0.2)
    pool.wait()
    assert pool.wanted() is None
    time.sleep(0.25)
    assert pool.wanted() == (b"a", [])


def test_requests_that_came_together_are_expected_together() -> None:
    pool = Pool(100)
    pool.take(b"a", MODEL, ((1, 4),), SMALL, 4)
    pool.take(b"b", MODEL, ((1, 4),), SMALL)
    assert {d: s.count for d, s in pool.shelves().items()} == {b"a": 4, b"b": 1}


def test_what_another_party_refused_is_tried_again_once_something_was_taken() -> None:
    pool = Pool(100)
    asked(pool, b"a")
    pool.shelves()[b"a"].full = True
    assert pool.wanted() is None
    asked(pool, b"a")
    assert pool.wanted() == (b"a", [])


def test_models_and_epochs_end() -> None:
    pool = Pool(100)
    asked(pool, b"a")
    asked(pool, b"b", model=OTHER)
    filled(pool)
    pool.forget(b"m")
    assert list(pool.shelves()) == [b"b"] and len(pool) == READY
    pool.clear()
    assert not pool.shelves() and pool.wanted() is None


def test_only_so_many_shapes_are_remembered() -> None:
    pool = Pool(100)
    asked(pool, *(str(i).encode() for i in range(100)))
    assert len(pool.shelves()) == 64 and b"99" in pool.shelves() and b"0" not in pool.shelves()
