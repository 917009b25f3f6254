"""Grants: what an owner signs is what parties read, and nothing else is a grant."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpcinfer.canonical import canonical
from mpcinfer.errors import GrantError, IdentityError, InputError, MpcInferError, SignatureError
from mpcinfer.trust.grant import PURPOSE, Budget, Commitment, Grant, Terms, open_grant
from mpcinfer.trust.signing import Signer
from tests.members import Members


@cache
def members() -> Members:
    return Members()


@cache
def owner() -> Signer:
    return members().signer("owner/olga")


EVERYBODY = Terms()


def first(terms: Terms = EVERYBODY, **changes: Any) -> Grant:
    grant = Grant.first(
        "m", program=b"p" * 32, entry_point="generate", reveals="tokens", cluster=members().cluster, terms=terms
    )
    return dataclasses.replace(grant, model="ab" * 32, **changes)


def content(grant: Grant) -> Any:
    return json.loads(grant.sign(owner()).payload)


names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
clients = st.one_of(
    st.just("*"),
    st.just("client/*"),
    names.map("client/{}".format),
    names.map("owner/{}".format),
    st.tuples(names, st.text(st.characters(min_codepoint=0x30, max_codepoint=0x7E), min_size=1, max_size=9)).map(
        lambda p: f"jwt/{p[0]}/{p[1]}"
    ),
)
numbers = st.integers(0, 1 << 53)
budgets = st.builds(
    Budget, st.sampled_from(["queries", "tokens"]), numbers, st.integers(1, 366 * 24 * 60).map(lambda m: 60 * m)
)
terms = st.builds(
    lambda listed, limits, rate, times: Terms(tuple(listed), tuple(limits), rate, *times),
    st.lists(clients, max_size=4),
    st.lists(budgets, max_size=3),
    numbers,
    st.tuples(numbers, numbers).map(lambda t: (t[0], t[1] if t[1] > t[0] else 0)),
)


@settings(max_examples=60, deadline=None)
@given(terms, st.integers(1, 1 << 53), st.booleans())
def test_what_is_signed_is_what_is_read(granted: Terms, serial: int, revoked: bool) -> None:
    grant = first(granted, serial=serial, revoked=revoked)
    assert open_grant(grant.sign(owner()), members().cluster, "owner/olga") == grant
    assert granted.words()


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_anything_else_is_refused_with_a_grant_error(data: st.DataObject) -> None:
    """One field, anywhere, replaced by something else, missing or added: a GrantError or an equal grant."""
    good = content(first(Terms(budgets=(Budget("queries", 3, 3600),))))
    table = data.draw(st.sampled_from([good, good["terms"]]))
    name = data.draw(st.sampled_from([*table, "more"]))
    if data.draw(st.booleans()):
        table[name] = data.draw(junk)
    else:
        table.pop(name, None)
    before = canonical(good)
    try:
        grant = Grant.of(good)
    except GrantError:
        return
    assert canonical(content(grant)) == before


@settings(max_examples=50, deadline=None)
@given(junk)
def test_what_is_no_grant_at_all(value: Any) -> None:
    with pytest.raises(GrantError):
        Grant.of(value)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("serial", 0),
        ("serial", True),
        ("serial", 1.0),
        ("serial", 1 << 60),
        ("revoked", 0),
        ("name", "../x"),
        ("program", "zz"),
        ("parties", []),
        ("parties", ["sha256:00"]),
        ("entry_points", []),
        ("reveals", "LOGITS"),
        ("format", 2),
        ("terms", []),
    ],
)
def test_numbers_and_names_have_ranges(where: str, value: Any) -> None:
    with pytest.raises(GrantError):
        Grant.of({**content(first()), where: value})


@pytest.mark.parametrize(
    "change",
    [
        {"budgets": [["queries", -1, 60]]},
        {"budgets": [["queries", 1, 61]]},
        {"budgets": [["queries", 1, 0]]},
        {"budgets": [["queries", True, 60]]},
        {"budgets": [["words", 1, 60]]},
        {"budgets": [["queries", 1]]},
        {"budgets": [["queries", 1, 60]] * 1001},
        {"clients": ["party/0"]},
        {"clients": ["client/A"]},
        {"clients": ["jwt/x/a*"]},
        {"rate": -1},
        {"not_before": 5, "not_after": 5},
        {"not_after": float(2**40)},
    ],
)
def test_terms_have_ranges(change: dict[str, Any]) -> None:
    good = content(first())
    with pytest.raises(GrantError):
        Grant.of({**good, "terms": {**good["terms"], **change}})


def test_only_the_owner_for_this_cluster() -> None:
    grant, cluster = first(), members().cluster
    with pytest.raises(GrantError, match="signed by client/carl"):
        open_grant(grant.sign(members().signer("client/carl")), cluster, "owner/olga")
    with pytest.raises(IdentityError, match="not issued by the CA"):
        open_grant(grant.sign(Members().signer("owner/olga")), cluster, "owner/olga")
    with pytest.raises(SignatureError, match="where 'grant' is needed"):
        open_grant(owner().sign("receipt", content(grant)), cluster, "owner/olga")
    signed = grant.sign(owner())
    forged = dataclasses.replace(signed, payload=signed.payload.replace(b'"serial":1', b'"serial":2'))
    with pytest.raises(SignatureError, match="does not hold"):
        open_grant(forged, cluster, "owner/olga")
    for change in ({"cluster": "ab" * 32}, {"parties": grant.parties[::-1]}, {"parties": grant.parties[:1]}):
        with pytest.raises(GrantError, match="another set of parties"):
            open_grant(dataclasses.replace(grant, **change).sign(owner()), cluster, "owner/olga")
    with pytest.raises(GrantError, match="fields are missing"):
        open_grant(owner().sign(PURPOSE, {"format": 1}), cluster, "owner/olga")


def test_a_grant_for_others_can_be_looked_at_and_given_to_these() -> None:
    before = dataclasses.replace(first(), cluster="00", parties=first().parties[::-1])
    assert open_grant(before.sign(owner()), members().cluster, "owner/olga", elsewhere=True) == before
    assert not before.holds_for(members().cluster)
    given = before.replaced().given_to(members().cluster)
    assert given.holds_for(members().cluster) and given.serial == before.serial + 1 and given.terms == before.terms
    assert open_grant(given.sign(owner()), members().cluster, "owner/olga") == given
    with pytest.raises(GrantError, match="olga's"):
        open_grant(before.sign(members().signer("client/carl")), members().cluster, "owner/olga", elsewhere=True)


def test_a_grant_is_for_one_model_and_replaced_by_newer_ones_only() -> None:
    grant = first()
    grant.check_target("m", b"p" * 32, "tokens", "generate")
    for other in (
        ("n", b"p" * 32, "tokens", "generate"),
        ("m", b"q" * 32, "tokens", "generate"),
        ("m", b"p" * 32, "logits", "generate"),
        ("m", b"p" * 32, "tokens", "infer"),
    ):
        with pytest.raises(GrantError):
            grant.check_target(*other)
    later = grant.replaced(revoked=True)
    grant.check_successor(later)
    for wrong in (grant, dataclasses.replace(later, model="cd" * 32), dataclasses.replace(later, name="n")):
        with pytest.raises(GrantError):
            grant.check_successor(wrong)
    with pytest.raises(GrantError):
        later.check_successor(grant)


def test_who_is_covered() -> None:
    def covered(listed: str) -> list[bool]:
        granted = Terms(tuple(listed.split()))
        return [granted.cover(r) for r in ("client/a", "client/ab", "owner/a", "jwt/x/a", "jwt/y/a", "party/0")]

    assert covered("*") == [True, True, False, True, True, False]
    assert covered("client/*") == [True, True, False, False, False, False]
    assert covered("client/a owner/a") == [True, False, True, False, False, False]
    assert covered("jwt/x/*") == [False, False, False, True, False, False]
    assert covered("jwt/y/a") == [False, False, False, False, True, False]
    assert covered("") == [False] * 6


def test_budgets_as_text() -> None:
    assert Budget.parse("queries", "100/day") == Budget("queries", 100, 86400)
    assert str(Budget.parse("tokens", "10000/2hour")) == "10000 tokens per 2 hours"
    assert str(Budget("queries", 5, 86400)) == "5 queries per day"
    assert str(Budget("queries", 5, 90 * 60)) == "5 queries per 90 minutes"
    for bad in ("", "100", "100/", "x/day", "-1/day", "1/0day", "1/90s", "1/400day", "1/day/day"):
        with pytest.raises(InputError):
            Budget.parse("queries", bad)


def test_token_budgets_are_for_models_that_write_tokens() -> None:
    grant = first(Terms(budgets=(Budget("tokens", 5, 3600),)), entry_points=("infer",))
    with pytest.raises(MpcInferError, match="budget of queries"):
        grant.check_target("m", b"p" * 32, "tokens", "infer")


def test_a_commitment_is_of_these_weights_under_this_salt() -> None:
    def commit(salt: bytes, *weights: tuple[str, bytes]) -> str:
        found = Commitment(salt)
        for name, data in weights:
            found.add(name, memoryview(data))
        return found.hex()

    one = commit(b"s" * 32, ("a", b"xy"), ("b", b"z"))
    assert one == commit(b"s" * 32, ("a", b"xy"), ("b", b"z")) and len(one) == 64
    others = [
        commit(b"t" * 32, ("a", b"xy"), ("b", b"z")),
        commit(b"s" * 32, ("a", b"x"), ("b", b"yz")),
        commit(b"s" * 32, ("ax", b"y"), ("b", b"z")),
        commit(b"s" * 32, ("b", b"z"), ("a", b"xy")),
    ]
    assert len({one, *others}) == 5
    grant = first()
    assert grant.salt(owner()) == grant.replaced(revoked=True).salt(owner())
    assert grant.salt(owner()) not in (first().salt(owner()), grant.salt(members().signer("owner/olga")))
