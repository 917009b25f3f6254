"""Statements: only what a member of the cluster signed, for this purpose, with this text, is believed."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from mpcinfer.config import Cluster, Endpoint
from mpcinfer.errors import IdentityError, SignatureError
from mpcinfer.trust.signing import Keyring, Signed, Signer, open_signed
from mpcinfer.wire import identity
from mpcinfer.wire.identity import Identity, create_ca, create_request, key_pin, sign_request

CONTENT: dict[str, Any] = {"b": [1, 2.5, None], "a": "\u00e4"}


def issue(ca: tuple[bytes, bytes], name: str, role: str) -> Identity:
    key, request = create_request(name, role)
    return Identity.from_pem(key, sign_request(*ca, request, role=role))


@pytest.fixture(scope="module")
def ca() -> tuple[bytes, bytes]:
    return create_ca("local")


@pytest.fixture(scope="module")
def members(ca: tuple[bytes, bytes]) -> dict[str, Identity]:
    roles = ("party/0", "party/1", "dealer", "owner/olga", "client/carl")
    return {role: issue(ca, "local", role) for role in roles}


@pytest.fixture(scope="module")
def cluster(ca: tuple[bytes, bytes], members: dict[str, Identity]) -> Cluster:
    ends = [
        Endpoint(role, f"127.0.0.1:{7100 + i}", key_pin(members[role].cert_pem))
        for i, role in enumerate(("party/0", "party/1", "dealer"))
    ]
    return Cluster("local", ca[1], tuple(ends[:2]), ends[2])


@pytest.mark.parametrize("role", ["party/0", "owner/olga", "client/carl"])
def test_what_was_signed_comes_back(members: dict[str, Identity], cluster: Cluster, role: str) -> None:
    signed = Signer(members[role]).sign("grant", CONTENT)
    for again in (signed, Signed.of(signed.message()), Signed.from_json(json.loads(json.dumps(signed.to_json())))):
        found = open_signed(again, cluster, "grant")
        assert (found.role, found.content, found.pin) == (role, CONTENT, key_pin(members[role].cert_pem))


def test_a_role_has_one_signing_key(members: dict[str, Identity]) -> None:
    keys = [Signer(m).key for m in members.values()] + [Signer(members["party/0"]).key]
    assert keys[0] == keys[-1] and len(set(keys)) == len(members)


def test_any_other_purpose_is_refused(members: dict[str, Identity], cluster: Cluster) -> None:
    signed = Signer(members["owner/olga"]).sign("grant", CONTENT)
    with pytest.raises(SignatureError, match="'grant' was given where 'receipt'"):
        open_signed(signed, cluster, "receipt")
    with pytest.raises(SignatureError, match="does not hold"):
        open_signed(dataclasses.replace(signed, purpose="receipt"), cluster, "receipt")


def test_whose_a_key_is_is_checked_once(
    members: dict[str, Identity], cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, checked = Keyring(cluster), list[bytes]()
    monkeypatch.setattr(
        "mpcinfer.trust.signing.check_certificate",
        lambda certificate, *a, **k: checked.append(certificate) or identity.check_certificate(certificate, *a, **k),
    )
    signers = [Signer(members[role]) for role in ("party/0", "party/1")]
    for number in range(3):
        for signer in signers:
            found = keys.open(signer.sign("receipt", {"number": number}), "receipt")
            assert (found.role, found.content) == (signer.role, {"number": number})
    assert len(checked) == 2
    mixed = dataclasses.replace(signers[0].sign("receipt", CONTENT), certificate=members["party/1"].cert_pem)
    with pytest.raises(SignatureError, match="its key is not its own"):
        keys.open(mixed, "receipt")
    with pytest.raises(SignatureError, match="'grant' was given"):
        keys.open(signers[0].sign("grant", CONTENT), "receipt")


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")  # of odd certificates
@pytest.mark.parametrize("part", ["payload", "key", "binding", "signature", "certificate"])
@pytest.mark.parametrize("known", [False, True])
def test_no_byte_can_be_changed(members: dict[str, Identity], cluster: Cluster, part: str, known: bool) -> None:
    signed = Signer(members["party/1"]).sign("receipt", CONTENT)
    good, keys = getattr(signed, part), Keyring(cluster)
    if known:
        assert keys.open(signed, "receipt").content == CONTENT
    for at in range(len(good)):
        for bit in (1, 0x20):
            changed = bytearray(good)
            changed[at] ^= bit
            # a PEM's end may be written in several ways: the same certificate is no forgery
            try:
                found = keys.open(dataclasses.replace(signed, **{part: bytes(changed)}), "receipt")
            except IdentityError:
                continue
            assert part == "certificate" and (found.role, found.content) == ("party/1", CONTENT)


def test_another_members_certificate_does_not_fit(members: dict[str, Identity], cluster: Cluster) -> None:
    mine, other = (Signer(members[r]).sign("grant", CONTENT) for r in ("client/carl", "owner/olga"))
    with pytest.raises(SignatureError):
        open_signed(dataclasses.replace(mine, certificate=other.certificate), cluster, "grant")
    with pytest.raises(SignatureError):
        open_signed(dataclasses.replace(mine, certificate=other.certificate, binding=other.binding), cluster, "grant")


def test_another_ca_and_another_key_of_a_party(cluster: Cluster, ca: tuple[bytes, bytes]) -> None:
    foreign = create_ca("local")
    with pytest.raises(IdentityError, match="not issued by the CA"):
        open_signed(Signer(issue(foreign, "local", "owner/olga")).sign("grant", CONTENT), cluster, "grant")
    with pytest.raises(IdentityError, match="not the one the cluster file pins"):
        open_signed(Signer(issue(ca, "local", "party/0")).sign("receipt", CONTENT), cluster, "receipt")


def test_a_certificate_that_has_expired(
    members: dict[str, Identity], cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = Signer(members["owner/olga"]).sign("grant", CONTENT)
    now = identity._now()
    monkeypatch.setattr(identity, "_now", lambda: now.replace(year=now.year + 2))
    with pytest.raises(IdentityError, match="expired"):
        open_signed(signed, cluster, "grant")
    assert open_signed(signed, cluster, "grant", past=True).content == CONTENT


@pytest.mark.parametrize("payload", [b"[]", b'{"a": 1}', b'{"b":1,"a":2}', b"{", b'{"a":NaN}', b"\xff"])
def test_only_canonical_objects_are_statements(
    members: dict[str, Identity], cluster: Cluster, payload: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpcinfer.trust.signing.canonical", lambda content: payload)
    signed = Signer(members["owner/olga"]).sign("grant", {})
    monkeypatch.undo()
    with pytest.raises(SignatureError):
        open_signed(signed, cluster, "grant")


@pytest.mark.parametrize("data", [None, [], {}, {"purpose": 1}, {"payload": "x"}])
def test_files_that_hold_no_statement(data: Any) -> None:
    with pytest.raises(SignatureError, match="no signed statement"):
        Signed.from_json(data)


def test_nothing_secret_is_shown(members: dict[str, Identity]) -> None:
    signer = Signer(members["party/0"])
    signed = signer.sign("receipt", {"a": 1})
    assert repr(signer) == "Signer(party/0)"
    assert "BEGIN" not in repr(signed) and signed.signature.hex() not in repr(signed)
