"""Making things ahead of whoever takes them: in order, with what goes wrong, no further than allowed."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from mpcinfer.dealer.ahead import ahead


def counted(most: int, made: list[int], until: threading.Event | None = None) -> Iterator[int]:
    for i in range(most):
        made.append(i)
        if until is not None and i == 2:
            until.set()
        yield i


@pytest.mark.parametrize("most", [1, 2, 100])
def test_all_items_in_order(most: int) -> None:
    assert list(ahead(counted(50, []), most)) == list(range(50))
    assert list(ahead(iter(()), most)) == []


def test_an_error_comes_after_the_items_before_it() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise KeyError("of the maker")

    items = ahead(failing(), 3)
    assert next(items) == 1
    with pytest.raises(KeyError, match="of the maker"):
        next(items)


def test_items_are_made_before_they_are_wanted_and_no_more_than_allowed() -> None:
    made: list[int] = []
    three = threading.Event()
    items = ahead(counted(100, made, three), 3)
    assert next(items) == 0
    assert three.wait(20) and len(made) <= 1 + 3  # one was taken
    items.close()
    assert len(made) <= 1 + 3 + 1  # and perhaps one was in the making


def test_closing_ends_the_thread() -> None:
    before = threading.active_count()
    items = ahead(counted(100, []), 1)
    next(items)
    assert threading.active_count() == before + 1
    items.close()
    assert threading.active_count() == before
