"""Keys of a session: fresh with every nonce, bound to plan and tape, and of no use backwards."""

from __future__ import annotations

from typing import Any

import pytest

from mpcinfer.protocol.session import KeyChain, TapeKeys, session_keys

FACTS: dict[str, Any] = {
    "index": 0,
    "session": b"s" * 16,
    "cluster": b"c" * 32,
    "public_keys": (b"p" * 32, b"d" * 32),
    "party_nonces": [b"0" * 32, b"1" * 32],
    "dealer_nonce": b"n" * 32,
}
SECRET, TAPE, DIGEST = b"k" * 32, b"t" * 16, b"x" * 32


def first(**changed: Any) -> TapeKeys:
    facts = FACTS | changed
    return session_keys(facts.pop("secret", SECRET), **facts).next(TAPE, DIGEST)


def test_both_ends_derive_the_same() -> None:
    assert first() == first()


@pytest.mark.parametrize(
    "change",
    [
        {"secret": b"K" * 32},
        {"index": 1},
        {"session": b"S" * 16},
        {"cluster": b"C" * 32},
        {"public_keys": (b"P" * 32, b"d" * 32)},
        {"public_keys": (b"p" * 32, b"D" * 32)},
        {"party_nonces": [b"0" * 32, b"2" * 32]},
        {"party_nonces": [b"1" * 32, b"0" * 32]},
        {"dealer_nonce": b"N" * 32},
    ],
    ids=str,
)
def test_everything_fresh_changes_the_keys(change: dict[str, Any]) -> None:
    one, other = first(**change), first()
    assert len({one.passing, one.kept, other.passing, other.kept}) == 4


def test_nonces_alone_are_no_key() -> None:
    with pytest.raises(ValueError, match="no key"):
        first(secret=b"")


def test_tapes_and_plans_have_keys_of_their_own() -> None:
    keys = [KeyChain(SECRET).next(t, d) for t in (TAPE, b"T" * 16) for d in (DIGEST, b"X" * 32)]
    assert len({key for each in keys for key in (each.passing, each.kept)}) == 8
    assert all(key.hex() not in repr(each) for each in keys for key in (each.passing, each.kept))


def test_a_chain_forgets() -> None:
    chain = KeyChain(SECRET)
    earlier = chain.next(TAPE, DIGEST)
    assert chain.next(TAPE, DIGEST) != earlier  # even under the same name: what it was is gone
    assert SECRET.hex() not in repr(chain) and chain != KeyChain(SECRET)
