"""Tokens of an identity provider: whose they are, and all that is refused."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from mpcinfer.config.issuer import Issuer
from mpcinfer.errors import ConfigError, ForbiddenError, IdentityError, SignatureError, UnavailableError
from mpcinfer.party import accounts
from mpcinfer.party.accounts import Accounts
from tests.inprocess import wait_for
from tests.members import Members

GATEWAY = "client/gateway"
KEYS: dict[str, Any] = {
    "rsa": rsa.generate_private_key(65537, 2048),
    "ec": ec.generate_private_key(ec.SECP256R1()),
    "other": rsa.generate_private_key(65537, 2048),
}


def jwks(*names: str, **more: Any) -> str:
    algorithms = {"rsa": jwt.algorithms.RSAAlgorithm, "ec": jwt.algorithms.ECAlgorithm}
    listed = [
        {**json.loads(algorithms["ec" if n == "ec" else "rsa"].to_jwk(KEYS[n].public_key())), "kid": n} for n in names
    ]
    return json.dumps({"keys": [*listed, *more.get("keys", [])]})


def claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    content = {"iss": "https://idp.example", "aud": "mpcinfer", "sub": "ann", "iat": now, "exp": now + 600, **changes}
    return {name: value for name, value in content.items() if value is not None}


def token(key: str = "rsa", algorithm: str = "RS256", kid: str | None = None, **changes: Any) -> str:
    return jwt.encode(claims(**changes), KEYS[key], algorithm, headers={"kid": kid or key})


def unsigned(header: dict[str, Any], signature: bytes = b"", **changes: Any) -> str:
    parts = [json.dumps(header).encode(), json.dumps(claims(**changes)).encode(), signature]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


@pytest.fixture
def issuer(tmp_path: Path) -> Issuer:
    (tmp_path / "jwks.json").write_text(jwks("rsa", "ec"))
    return Issuer("corp", "https://idp.example", "mpcinfer", str(tmp_path / "jwks.json"), (GATEWAY,), leeway_s=5)


@pytest.fixture
def known(issuer: Issuer) -> Accounts:
    return Accounts(Members().cluster, [issuer])


def test_subjects_are_clients(known: Accounts) -> None:
    assert known.subject(token(), GATEWAY) == "jwt/corp/ann"
    assert known.subject(token("ec", "ES256", sub="a@b.example|7"), GATEWAY) == "jwt/corp/a@b.example|7"
    assert known.subject(token(aud=["x", "mpcinfer"], exp=int(time.time()) - 3), GATEWAY) == "jwt/corp/ann"


def public_pem() -> bytes:
    public: Any = KEYS["rsa"].public_key()
    found: bytes = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return found


def swapped(one: str, other: str) -> str:
    """A token with another's claims."""
    parts = one.split(".")
    return ".".join([parts[0], other.split(".")[1], parts[2]])


def hs256() -> str:
    """Signed with the issuer's public key as the secret of an HMAC."""
    text = unsigned({"alg": "HS256", "typ": "JWT", "kid": "rsa"}).rstrip(".")
    mac = hmac.new(public_pem(), text.encode(), hashlib.sha256).digest()
    return f"{text}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"


BAD: list[tuple[str, Any, type[Exception]]] = [
    ("none", lambda: unsigned({"alg": "none", "kid": "rsa"}), SignatureError),
    ("None", lambda: unsigned({"alg": "None", "kid": "rsa"}), SignatureError),
    ("no-alg", lambda: unsigned({"kid": "rsa"}), SignatureError),
    ("hs256", hs256, SignatureError),
    ("not-pinned", lambda: token("rsa", "RS512"), SignatureError),
    ("other-kind", lambda: token("ec", "ES256", kid="rsa"), SignatureError),
    ("other-key", lambda: token("other", kid="rsa"), SignatureError),
    ("unknown-kid", lambda: token("other"), SignatureError),
    ("no-kid", lambda: jwt.encode(claims(), KEYS["rsa"], "RS256"), SignatureError),
    ("cut", lambda: token()[:-9], SignatureError),
    (
        "changed",
        lambda: ".".join([token().split(".")[0], token(sub="eve").split(".")[1], token().split(".")[2]]),
        SignatureError,
    ),
    ("junk", lambda: "a.b.c", SignatureError),
    ("dots", lambda: "..", SignatureError),
    ("long", lambda: token(x="y" * 20000), IdentityError),
    ("audience", lambda: token(aud="other"), IdentityError),
    ("no-audience", lambda: token(aud=None), IdentityError),
    ("issuer", lambda: token(iss="https://evil.example"), IdentityError),
    ("no-issuer", lambda: token(iss=None), IdentityError),
    ("expired", lambda: token(exp=int(time.time()) - 60), IdentityError),
    ("no-expiry", lambda: token(exp=None), IdentityError),
    ("no-iat", lambda: token(iat=None), IdentityError),
    ("future", lambda: token(iat=int(time.time()) + 600), IdentityError),
    ("not-before", lambda: token(nbf=int(time.time()) + 600), IdentityError),
    ("no-subject", lambda: token(sub=None), IdentityError),
    ("star", lambda: token(sub="*"), IdentityError),
    ("space", lambda: token(sub="a b"), IdentityError),
    ("long-subject", lambda: token(sub="a" * 256), IdentityError),
]


@pytest.mark.filterwarnings("ignore::jwt.warnings.InsecureKeyLengthWarning")
@pytest.mark.parametrize(("make", "error"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_what_is_refused(known: Accounts, make: Any, error: type[Exception]) -> None:
    text = make()
    with pytest.raises(IdentityError) as caught:
        known.subject(text, GATEWAY)
    assert type(caught.value) is error and text not in str(caught.value)


def test_the_checks_are_what_refuses(known: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: a library that reads tokens and verifies nothing."""
    real = jwt.decode
    unverified = {"verify_signature": False}
    monkeypatch.setattr(accounts.jwt, "decode", lambda text, *_, **__: real(text, options=unverified))
    for bad in (token(aud="other"), token(exp=1), token("other", kid="rsa")):
        assert known.subject(bad, GATEWAY) == "jwt/corp/ann"


def test_only_gateways_bring_tokens(known: Accounts) -> None:
    for role in ("client/bob", "party/1", "owner/alice"):
        with pytest.raises(ForbiddenError, match="may not bring tokens"):
            known.subject(token(), role)
    with pytest.raises(ForbiddenError, match="takes no tokens"):
        Accounts(Members().cluster, []).subject(token(), GATEWAY)


def test_keys_are_looked_up_again(known: Accounts, issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(accounts.time, "monotonic", lambda: clock[0])
    assert known.subject(token(), GATEWAY)
    Path(issuer.jwks).write_text(jwks("other"))
    with pytest.raises(SignatureError, match="does not publish"):
        known.subject(token("other"), GATEWAY)  # just looked
    clock[0] += 11
    assert known.subject(token("other"), GATEWAY)
    with pytest.raises(SignatureError, match="does not publish"):
        known.subject(token(), GATEWAY)  # withdrawn
    Path(issuer.jwks).write_text("[]")
    clock[0] += 601
    with pytest.raises(ConfigError, match="no key set"):
        known.subject(token("other"), GATEWAY)
    Path(issuer.jwks).unlink()
    with pytest.raises(UnavailableError):
        known.subject(token("other"), GATEWAY)


def test_an_issuer_that_does_not_answer_holds_up_one_caller(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, goes_on = list[float](), threading.Event()

    def download(url: str) -> bytes:
        asked.append(time.monotonic())
        assert goes_on.wait(30)
        raise http.client.BadStatusLine("nothing")

    monkeypatch.setattr(accounts, "download", download)
    monkeypatch.setattr(accounts, "_MOMENT", 0.05)
    known = Accounts(Members().cluster, [replace(issuer, jwks="https://idp.example/keys")])
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(known.subject, token(), GATEWAY)
        wait_for(lambda: bool(asked))
        others = [pool.submit(known.subject, token(), GATEWAY) for _ in range(8)]
        assert {type(each.exception(10)) for each in others} == {UnavailableError} and not first.done()
        goes_on.set()
        assert isinstance(first.exception(10), UnavailableError)
    with pytest.raises(UnavailableError, match="idp.example"):
        known.subject(token(), GATEWAY)  # just tried
    assert len(asked) == 1


def test_keys_are_read_again_before_they_are_too_old(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, goes_on = list[str](), threading.Event()

    def download(url: str) -> bytes:
        asked.append(url)
        if len(asked) > 1:
            assert goes_on.wait(30)
            raise http.client.BadStatusLine("nothing")
        return jwks("rsa").encode()

    monkeypatch.setattr(accounts, "download", download)
    known = Accounts(Members().cluster, [replace(issuer, jwks="https://idp.example/keys")])
    assert known.subject(token(), GATEWAY) == "jwt/corp/ann"
    [(_, keys)] = known._issuers.values()
    keys._read = keys._tried = keys._read - accounts._FRESH * 0.6
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(known.subject, token(), GATEWAY)
        wait_for(lambda: len(asked) == 2)
        assert known.subject(token(), GATEWAY) == "jwt/corp/ann"  # while somebody reads
        monkeypatch.setattr(accounts, "_MOMENT", 0.05)
        with pytest.raises(UnavailableError):  # a key that may be among those that are being read
            known.subject(token("ec", "ES256"), GATEWAY)
        goes_on.set()
        assert reader.result(10) == "jwt/corp/ann"
    with pytest.raises(UnavailableError):  # nobody knows whether the issuer has it
        known.subject(token("ec", "ES256"), GATEWAY)
    keys._read -= accounts._FRESH * 0.5
    with pytest.raises(UnavailableError):
        known.subject(token(), GATEWAY)
    assert len(asked) == 2


def test_keys_from_a_url(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    symmetric = {"kty": "oct", "k": base64.urlsafe_b64encode(b"s" * 32).decode(), "kid": "s", "alg": "HS256"}
    monkeypatch.setattr(accounts, "download", lambda url: jwks("rsa", keys=[symmetric]).encode())
    known = Accounts(Members().cluster, [replace(issuer, jwks="https://idp.example/keys")])
    assert known.subject(token(), GATEWAY) == "jwt/corp/ann"
    with pytest.raises(SignatureError):
        known.subject(jwt.encode(claims(), b"s" * 32, "HS256", headers={"kid": "s"}), GATEWAY)
    assert accounts._NoRedirects().redirect_request() is None


@pytest.mark.parametrize(
    "change",
    [
        {"jwks": "http://idp.example/keys"},
        {"jwks": ""},
        {"audience": ""},
        {"algorithms": ("HS256",)},
        {"algorithms": ("none",)},
        {"algorithms": ()},
        {"gateways": ()},
        {"gateways": ("party/0",)},
        {"gateways": ("client/*",)},
        {"leeway_s": 301},
        {"name": "A b"},
    ],
)
def test_issuers_that_cannot_be(issuer: Issuer, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(issuer, **change)
