"""Who calls: whom the TLS certificate names or, through a gateway, whom an identity provider's token (JWT) names.

A token counts only when it comes over a connection of a gateway that the node file names for its issuer. Parties are no
gateways, so that none can use at the others a token that it was sent. Every party verifies it for itself.
"""

from __future__ import annotations

import http.client
import math
import re
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import jwt

from mpcinfer.config import Cluster
from mpcinfer.config.issuer import Issuer
from mpcinfer.errors import ConfigError, ForbiddenError, IdentityError, SignatureError, UnavailableError
from mpcinfer.wire.identity import Peer, peer_of

METADATA = "mpcinfer-token"
_MOST = 16 << 10  # bytes of a token
_MOST_KEYS = 1 << 20
_SUBJECT = re.compile(r"[!-)+-~]{1,255}")
_FETCH_SECONDS = 10.0
_PATIENCE = 10.0  # between two looks for a key that is not there
_MOMENT = 1.0  # to wait while somebody else reads them
_FRESH = 600.0  # for how long keys are taken to be the issuer's


class KeySet:
    """The public keys of an issuer, from a file or an https URL, read again when they are old or one is missing."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._keys: dict[str, jwt.PyJWK] = {}
        self._read = self._tried = -math.inf
        self._reading = False
        self._changed = threading.Condition()

    def find(self, kid: str) -> jwt.PyJWK:
        """The key of that id; SignatureError if the issuer has none, UnavailableError if its keys cannot be read.

        One caller reads them, so that an issuer that does not answer holds up one worker, and others for a moment: not
        even that while they have keys, which are read again before they are too old.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._reading or self._usable(kid), _MOMENT)
            now = time.monotonic()
            young = self._usable(kid) and now - self._read < _FRESH / 2
            if young or self._reading or now - self._tried < _PATIENCE:
                return self._known(kid)
            self._reading, self._tried = True, now
        keys: dict[str, jwt.PyJWK] | None = None
        try:
            keys = self._parse(self._load())
        except (UnavailableError, ConfigError):
            if not self._usable(kid):
                raise
        finally:
            with self._changed:
                self._reading = False
                if keys is not None:
                    self._keys, self._read = keys, now
                self._changed.notify_all()
        with self._changed:
            return self._known(kid)

    def _usable(self, kid: str) -> bool:
        return kid in self._keys and time.monotonic() - self._read < _FRESH

    def _known(self, kid: str) -> jwt.PyJWK:
        if time.monotonic() - self._read >= _FRESH:
            raise self._unavailable()
        if kid not in self._keys:
            if self._reading or self._tried > self._read:  # it may be among those that are read, or could not be
                raise self._unavailable()
            raise SignatureError("the token was signed with a key that its issuer does not publish; get a new one")
        return self._keys[kid]

    def _unavailable(self) -> UnavailableError:
        return UnavailableError(f"the issuer's keys cannot be read from {self._source}; try again later")

    def _load(self) -> bytes:
        try:
            if not self._source.startswith("https://"):
                return Path(self._source).read_bytes()
            return download(self._source)
        except (OSError, http.client.HTTPException) as error:
            raise self._unavailable() from error

    def _parse(self, data: bytes) -> dict[str, jwt.PyJWK]:
        try:
            keys = jwt.PyJWKSet.from_json(data.decode()).keys
        except (jwt.PyJWTError, ValueError, AttributeError, TypeError) as error:
            raise ConfigError(f"{self._source} holds no key set (JWKS); correct the node file") from error
        # a symmetric key would let whoever can read it sign
        usable = [k for k in keys if k.key_type in ("RSA", "EC", "OKP") and k.public_key_use in (None, "sig")]
        return {k.key_id: k for k in usable if k.key_id}


class Accounts:
    """Says who the caller of an RPC is."""

    def __init__(self, cluster: Cluster, issuers: Sequence[Issuer]) -> None:
        self._cluster = cluster
        self._issuers = {issuer.issuer: (issuer, KeySet(issuer.jwks)) for issuer in issuers}

    def identify(self, context: grpc.ServicerContext, token: str = "") -> Peer:
        """The caller; with a token (in the request or the call's metadata) its subject, as jwt/ISSUER/SUBJECT.

        IdentityError, SignatureError or ForbiddenError say what is wrong with certificate or token.
        """
        peer = peer_of(context, self._cluster)
        if not token:
            metadata = context.invocation_metadata() or ()
            token = next((str(value) for name, value in metadata if name == METADATA), "")
        return Peer(self.subject(token, peer.role), peer.pin) if token else peer

    def subject(self, token: str, gateway: str) -> str:
        """The role of a token's subject, once the token is verified; see `identify`."""
        if not self._issuers:
            raise ForbiddenError("this party takes no tokens; it knows callers by their certificates")
        if len(token) > _MOST:
            raise IdentityError(f"a token has at most {_MOST >> 10} KiB")
        try:
            header = jwt.get_unverified_header(token)
            unverified = jwt.decode(token, options={"verify_signature": False})
        except (jwt.PyJWTError, ValueError, RecursionError):
            raise SignatureError("this is no token (JWT); get a new one") from None
        name = unverified.get("iss")
        if not isinstance(name, str) or name not in self._issuers:
            raise IdentityError("the token is of an issuer that this party does not know")
        issuer, keys = self._issuers[name]
        if gateway not in issuer.gateways:
            raise ForbiddenError(f"{gateway} may not bring tokens of {issuer.name}; its operator names gateways")
        return f"jwt/{issuer.name}/{_subject(_verified(token, header, issuer, keys))}"


def _verified(token: str, header: dict[str, Any], issuer: Issuer, keys: KeySet) -> dict[str, Any]:
    algorithm, kid = header.get("alg"), header.get("kid")
    if algorithm not in issuer.algorithms:
        raise SignatureError(f"tokens of {issuer.name} are signed with {', '.join(issuer.algorithms)}")
    if not isinstance(kid, str):
        raise SignatureError("the token does not say which key has signed it (kid)")
    key = keys.find(kid)
    try:
        claims: dict[str, Any] = jwt.decode(
            token,
            key.key,
            algorithms=[algorithm],
            audience=issuer.audience,
            issuer=issuer.issuer,
            leeway=issuer.leeway_s,
            options={"require": ["exp", "iat", "sub", "aud", "iss"]},
        )
    except jwt.ExpiredSignatureError:
        raise IdentityError("the token has expired; get a new one") from None
    except jwt.ImmatureSignatureError:
        raise IdentityError("the token is not valid yet; compare clocks") from None
    except (jwt.InvalidAudienceError, jwt.InvalidIssuerError, jwt.MissingRequiredClaimError) as error:
        raise IdentityError(
            f"the token was made for somebody else or lacks exp, iat, sub, aud or iss ({type(error).__name__})"
        ) from None
    except (jwt.PyJWTError, ValueError, TypeError):
        raise SignatureError("the token's signature does not hold, or a claim in it is none") from None
    return claims


def _subject(claims: dict[str, Any]) -> str:
    subject = claims["sub"]
    if not isinstance(subject, str) or not _SUBJECT.fullmatch(subject):
        raise IdentityError("the token's subject must be 1 to 255 printable characters without spaces and asterisks")
    return subject


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """None may lead to another place than the node file names."""


def download(url: str) -> bytes:
    """What is at an https URL, with the system's CAs."""
    opener = urllib.request.build_opener(_NoRedirects)
    with opener.open(url, timeout=_FETCH_SECONDS) as answer:
        data: bytes = answer.read(_MOST_KEYS)
    return data
