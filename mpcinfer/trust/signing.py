"""Signed statements: what a party, an owner or a client says, provably.

Each role signs with an Ed25519 key of its own, derived from its TLS key, which vouches for it (the *binding*). So
nobody has another secret to keep, and whoever trusts a pin in the cluster file, or the CA's certificate of an owner,
trusts the statements of that role and no others. A statement is canonical JSON; its *purpose* is signed with it, so
that none can stand in for one of another sort.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509 import load_pem_x509_certificate

from mpcinfer.canonical import canonical
from mpcinfer.config import Cluster
from mpcinfer.errors import SignatureError
from mpcinfer.wire.identity import Identity, Peer, check_certificate, key_pin
from mpcinfer.wire.v1 import trust_pb2

_KEY = b"mpcinfer v1 signing key"
_BINDING = b"mpcinfer v1 signing key of this certificate\0"
_STATEMENT = b"mpcinfer v1 statement\0"
_SECRET = b"mpcinfer v1 own secret\0"


@dataclass(frozen=True)
class Signed:
    """A statement, not checked yet: `open_signed` says whose it is and what it says."""

    purpose: str
    payload: bytes
    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)
    binding: bytes = field(repr=False)
    signature: bytes = field(repr=False)

    def message(self) -> trust_pb2.Signed:
        """As it travels."""
        return trust_pb2.Signed(**vars(self))

    @staticmethod
    def of(message: trust_pb2.Signed) -> Signed:
        """The inverse of `message`."""
        return Signed(
            message.purpose, message.payload, message.certificate, message.key, message.binding, message.signature
        )

    def to_json(self) -> dict[str, str]:
        """As it is written into files: bytes in hexadecimal, the statement and the certificate as text."""
        return {
            "purpose": self.purpose,
            "payload": self.payload.decode(),
            "certificate": self.certificate.decode(),
            "key": self.key.hex(),
            "binding": self.binding.hex(),
            "signature": self.signature.hex(),
        }

    @staticmethod
    def from_json(data: Any) -> Signed:
        """The inverse of `to_json`; SignatureError for anything else."""
        try:
            return Signed(
                data["purpose"],
                data["payload"].encode(),
                data["certificate"].encode(),
                *(bytes.fromhex(data[name]) for name in ("key", "binding", "signature")),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SignatureError("this is no signed statement: it is damaged, or not what was meant") from error


class Signer:
    """Signs as one role."""

    def __init__(self, identity: Identity) -> None:
        """Derive the signing key from the TLS key."""
        tls = serialization.load_pem_private_key(identity.key_pem, None)
        assert isinstance(tls, ec.EllipticCurvePrivateKey)  # Identity has checked it
        secret = tls.private_numbers().private_value.to_bytes(32, "big")
        context = _KEY + f"\0{identity.cluster}\0{identity.role}".encode()
        self._private = Ed25519PrivateKey.from_private_bytes(HKDF(SHA256(), 32, None, context).derive(secret))
        self.role = identity.role
        self.key = self._private.public_key().public_bytes_raw()
        self._certificate = identity.cert_pem
        self._binding = tls.sign(_BINDING + self.key, ec.ECDSA(SHA256()))

    def sign(self, purpose: str, content: dict[str, Any]) -> Signed:
        """State `content` (plain JSON data, without secrets)."""
        payload = canonical(content)
        signature = self._private.sign(_message(purpose, payload))
        return Signed(purpose, payload, self._certificate, self.key, self._binding, signature)

    def secret(self, purpose: str) -> bytes:
        """32 bytes for a purpose of one's own, which only this role can make, again and again."""
        return HKDF(SHA256(), 32, None, _SECRET + purpose.encode()).derive(self._private.private_bytes_raw())

    def __repr__(self) -> str:
        return f"Signer({self.role})"


@dataclass(frozen=True)
class Statement:
    """What `open_signed` has found to be true: the role said it, with this key."""

    role: str
    pin: str
    key: bytes
    content: dict[str, Any]


def open_signed(signed: Signed, cluster: Cluster, purpose: str, *, past: bool = False) -> Statement:
    """Check a statement of a member of `cluster`, made for `purpose`. SignatureError says what is wrong with it.

    past: whether its certificate may have expired since: for what is kept, such as receipts.
    """
    _check_purpose(signed, purpose)
    return _said(signed, _vouched_for(signed, cluster, past=past), purpose)


def open_pinned(signed: Signed, role: str, pin: str, key: bytes, purpose: str) -> Statement:
    """As `open_signed`, where both keys of the role are known: whatever the cluster file pins today, and whoever has
    issued the certificate. SignatureError for any other key."""
    _check_purpose(signed, purpose)
    try:
        own = signed.key == key and key_pin(signed.certificate) == pin
    except (UnsupportedAlgorithm, ValueError) as error:  # nobody's signature was looked at yet
        raise SignatureError(f"the certificate of {role} is damaged") from error
    if not own:
        raise SignatureError(f"the {purpose} of {role} was signed with another key than the one pinned for it then")
    _check_binding(signed, role)
    return _said(signed, Peer(role, pin), purpose)


class Keyring:
    """Checks statement after statement of a cluster's members: whose a key is, once for each."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._known: dict[str, tuple[tuple[bytes, bytes, bytes], Peer]] = {}  # by role, so that they stay few

    def open(self, signed: Signed, purpose: str) -> Statement:
        """As `open_signed`."""
        _check_purpose(signed, purpose)
        by = signed.certificate, signed.key, signed.binding
        peer = next((peer for known, peer in self._known.values() if known == by), None)
        if peer is None:
            peer = _vouched_for(signed, self._cluster, past=False)
            self._known[peer.role] = by, peer
        return _said(signed, peer, purpose)


def _vouched_for(signed: Signed, cluster: Cluster, *, past: bool) -> Peer:
    """Whose certificate vouches for the key that has signed."""
    peer = check_certificate(signed.certificate, cluster, past=past)
    _check_binding(signed, peer.role)
    return peer


def _check_binding(signed: Signed, role: str) -> None:
    """SignatureError unless the certificate's key has signed the signing key."""
    tls = load_pem_x509_certificate(signed.certificate).public_key()
    try:
        if not isinstance(tls, ec.EllipticCurvePublicKey):
            raise ValueError("not a key of this system")
        tls.verify(signed.binding, _BINDING + signed.key, ec.ECDSA(SHA256()))
    except (InvalidSignature, ValueError) as error:
        raise SignatureError(f"the signature of {role} does not hold: its key is not its own") from error


def _check_purpose(signed: Signed, purpose: str) -> None:
    """Before anything else of it is looked at: of no statement at all this says what is missing."""
    if signed.purpose != purpose:
        raise SignatureError(f"a statement signed as {signed.purpose!r} was given where {purpose!r} is needed")


def _said(signed: Signed, peer: Peer, purpose: str) -> Statement:
    """What the holder of a key that is vouched for has signed."""
    try:
        Ed25519PublicKey.from_public_bytes(signed.key).verify(signed.signature, _message(purpose, signed.payload))
        content = json.loads(signed.payload)
        if not isinstance(content, dict) or canonical(content) != signed.payload:
            raise ValueError("not canonical")
    except (InvalidSignature, ValueError, RecursionError) as error:
        raise SignatureError(f"the signature of {peer.role} does not hold: the {purpose} was changed") from error
    return Statement(peer.role, peer.pin, signed.key, content)


def _message(purpose: str, payload: bytes) -> bytes:
    name = purpose.encode()
    return _STATEMENT + len(name).to_bytes(2, "big") + name + payload
