"""Running digests of what a pair has sent each other."""

from __future__ import annotations

import pytest

from mpcinfer.wire.traffic import Traffic


def ends() -> tuple[Traffic, Traffic]:
    return Traffic(0, [1, 2]), Traffic(1, [0, 2])


def agree(a: Traffic, b: Traffic) -> bool:
    return a.digests()["sent"]["1"] == b.digests()["received"]["0"]


def test_both_ends_agree_as_long_as_they_mean_the_same() -> None:
    a, b = ends()
    assert agree(a, b)
    for payload in (b"one", b"", b"two"):
        a.sent(3, payload)
        assert not agree(a, b)
        b.received(0, 3, payload)
        assert agree(a, b)
    assert a.digests()["sent"]["1"] != b.digests()["sent"]["0"]


@pytest.mark.parametrize(
    "received",
    [[(3, b"ab"), (3, b"c")], [(3, b"abc")], [(3, b"c"), (3, b"ab")], [(2, b"a"), (3, b"bc")], [(3, b"a")], []],
)
def test_order_boundaries_kinds_and_every_byte_count(received: list[tuple[int, bytes]]) -> None:
    a, b = ends()
    for kind, payload in [(3, b"a"), (3, b"bc")]:
        a.sent(kind, payload)
    for kind, payload in received:
        b.received(0, kind, payload)
    assert not agree(a, b)


def test_what_one_pair_says_is_not_another_pair_s() -> None:
    digests = Traffic(0, [1, 2]).digests()
    assert len({*digests["sent"].values(), *digests["received"].values()}) == 4
