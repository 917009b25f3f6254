"""Keys, certificates, roles and pins."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path
from typing import cast

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256

from mpcinfer.config import Cluster, Endpoint
from mpcinfer.errors import ConfigError, ForbiddenError, IdentityError
from mpcinfer.wire import identity
from mpcinfer.wire.identity import Identity, Peer

CA_KEY, CA = identity.create_ca("local")


def issue(role: str, days: int = 365) -> tuple[bytes, bytes]:
    key, csr = identity.create_request("local", role)
    return key, identity.sign_request(CA_KEY, CA, csr, role=role, days=days)


MEMBERS = {role: issue(role) for role in ("party/0", "party/1", "dealer")}
ENDPOINTS = [Endpoint(role, f"127.0.0.1:{i + 1}", identity.key_pin(MEMBERS[role][1])) for i, role in enumerate(MEMBERS)]
CLUSTER = Cluster("local", CA, (ENDPOINTS[0], ENDPOINTS[1]), ENDPOINTS[2])


def at(monkeypatch: pytest.MonkeyPatch, days: float) -> None:
    """Move the package's clock."""
    now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    monkeypatch.setattr(identity, "_now", lambda: now)


class Context:
    """The part of a servicer's context that `peer_of` reads."""

    def __init__(self, *certificates: bytes) -> None:
        self.certificates = certificates

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_pem_cert": list(self.certificates)} if self.certificates else {}


def peer_of(*certificates: bytes) -> Peer:
    return identity.peer_of(cast(grpc.ServicerContext, Context(*certificates)), CLUSTER)


def signed_by_hand(uris: list[str], hosts: list[str], *more: x509.GeneralName) -> bytes:
    """A request that our own code would not write."""
    names = [*map(x509.UniformResourceIdentifier, uris), *map(x509.DNSName, hosts), *more]
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(ec.generate_private_key(ec.SECP256R1()), SHA256()).public_bytes(serialization.Encoding.PEM)


def test_names() -> None:
    assert identity.role_uri("local", "party/0") == "spiffe://local/party/0"
    assert identity.dns_name("owner/alice") == "owner-alice.mpcinfer"
    with pytest.raises(ConfigError, match="not a role"):
        identity.role_uri("local", "admin/x")


@pytest.mark.parametrize("role", ["party/0", "dealer", "owner/alice", "client/bob-7"])
def test_request_and_sign(role: str) -> None:
    key, csr = identity.create_request("local", role)
    certificate = identity.sign_request(CA_KEY, CA, csr, role=role)
    assert identity.claimed_role(csr) == identity.claimed_role(certificate) == ("local", role)
    assert identity.key_pin(csr) == identity.key_pin(certificate)
    mine = Identity.from_pem(key, certificate)
    assert (mine.role, mine.cluster) == (role, "local")
    parsed = x509.load_pem_x509_certificate(certificate)
    parsed.verify_directly_issued_by(x509.load_pem_x509_certificate(CA))
    assert not parsed.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert parsed.not_valid_after_utc - parsed.not_valid_before_utc < datetime.timedelta(days=366)


def test_pin_is_the_hash_of_the_public_key_as_openssl_prints_it() -> None:
    der = x509.load_pem_x509_certificate(CA).public_key()
    spki = der.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    digest = subprocess.run(["sha256sum"], input=spki, capture_output=True, check=True).stdout.split()[0].decode()
    assert identity.key_pin(CA) == f"sha256:{digest}"


def test_sign_grants_only_the_role_that_the_operator_names() -> None:
    _, csr = identity.create_request("local", "party/0")
    with pytest.raises(IdentityError, match="asks for spiffe://local/party/0, not for spiffe://local/client/a"):
        identity.sign_request(CA_KEY, CA, csr, role="client/a")
    _, csr = identity.create_request("elsewhere", "party/0")
    with pytest.raises(IdentityError, match="asks for spiffe://elsewhere/party/0"):
        identity.sign_request(CA_KEY, CA, csr, role="party/0")


def test_sign_refuses_requests_it_would_not_have_made() -> None:
    party, host = "spiffe://local/party/0", "party-0.mpcinfer"
    for uris, hosts in (
        ([], []),
        ([party], []),
        ([party], ["party-1.mpcinfer"]),
        ([party, "spiffe://local/dealer"], [host]),
        ([party], [host, "dealer.mpcinfer"]),
        (["https://local/party/0"], [host]),
        (["spiffe://local/party/00"], ["party-00.mpcinfer"]),
        (["spiffe://local"], []),
    ):
        with pytest.raises(IdentityError, match="names no mpcinfer role"):
            identity.sign_request(CA_KEY, CA, signed_by_hand(uris, hosts), role="party/0")
    with pytest.raises(IdentityError, match="names no mpcinfer role"):
        identity.sign_request(CA_KEY, CA, signed_by_hand([party], [host], x509.RFC822Name("a@b.c")), role="party/0")
    identity.sign_request(CA_KEY, CA, signed_by_hand([party], [host]), role="party/0")


def test_sign_refuses_a_tampered_request_and_weak_keys() -> None:
    _, csr = identity.create_request("local", "party/0")
    der = bytearray(x509.load_pem_x509_csr(csr).public_bytes(serialization.Encoding.DER))
    der[der.index(b"party/0") + 6] = ord("1")
    der[der.index(b"party-0.mpcinfer") + 6] = ord("1")
    tampered = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(IdentityError, match="damaged"):
        identity.sign_request(CA_KEY, CA, tampered, role="party/1")
    weak = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(rsa.generate_private_key(65537, 1024), SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    with pytest.raises(IdentityError, match="P-256"):
        identity.sign_request(CA_KEY, CA, weak, role="party/0")


def test_sign_needs_a_matching_valid_ca(monkeypatch: pytest.MonkeyPatch) -> None:
    _, csr = identity.create_request("local", "party/0")
    with pytest.raises(IdentityError, match="do not belong together"):
        identity.sign_request(identity.create_ca("local")[0], CA, csr, role="party/0")
    key, certificate = MEMBERS["party/0"]
    with pytest.raises(IdentityError, match="not the certificate of an mpcinfer CA"):
        identity.sign_request(key, certificate, csr, role="party/0")
    at(monkeypatch, 3640)
    certificate = issue("client/a", days=365)[1]
    ends = [x509.load_pem_x509_certificate(pem).not_valid_after_utc for pem in (certificate, CA)]
    assert ends[0] == ends[1]
    at(monkeypatch, 3651)
    with pytest.raises(IdentityError, match="CA's certificate expired"):
        identity.sign_request(CA_KEY, CA, csr, role="party/0")


def test_load(tmp_path: Path) -> None:
    key, cert = tmp_path / "a.key", tmp_path / "a.pem"
    pair = issue("client/a")
    key.touch(mode=0o600)
    key.write_bytes(pair[0])
    cert.write_bytes(pair[1])
    mine = Identity.load(key, cert)
    assert mine == Identity("client/a", "local", *pair)
    assert "BEGIN" not in repr(mine)
    with pytest.raises(IdentityError, match="cannot read .*b.pem: No such file"):
        Identity.load(key, tmp_path / "b.pem")
    cert.write_bytes(MEMBERS["dealer"][1])
    with pytest.raises(IdentityError, match="not the one that the certificate of dealer"):
        Identity.load(key, cert)
    cert.write_bytes(b"garbage")
    with pytest.raises(IdentityError, match="not a PEM certificate"):
        Identity.load(key, cert)
    cert.write_bytes(pair[1])
    key.write_bytes(b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n")
    with pytest.raises(IdentityError, match="not an unencrypted ECDSA private key") as caught:
        Identity.load(key, cert)
    assert "c2VjcmV0" not in str(caught.value)
    key.write_bytes(pair[0])
    key.chmod(0o644)
    with pytest.raises(IdentityError, match="chmod 600"):
        Identity.load(key, cert)


def test_validity_names_the_dates(monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = issue("client/a", days=10)
    mine = Identity.from_pem(key, certificate)
    end = x509.load_pem_x509_certificate(certificate).not_valid_after_utc
    at(monkeypatch, 11)
    for check in (mine.check_validity, lambda: Identity.from_pem(key, certificate), lambda: mine.check(CLUSTER)):
        with pytest.raises(IdentityError, match=f"client/a expired on {end:%Y-%m-%d %H:%M} UTC"):
            check()
    with pytest.raises(IdentityError, match="expired"):
        peer_of(certificate)
    at(monkeypatch, -1)
    with pytest.raises(IdentityError, match="not valid before .*clock"):
        Identity.from_pem(key, certificate)


def test_check_against_a_cluster() -> None:
    for role, pair in MEMBERS.items():
        mine = Identity.from_pem(*pair)
        mine.check(CLUSTER)
        assert mine.role == role
    with pytest.raises(IdentityError, match="not the one the cluster file pins"):
        Identity.from_pem(*issue("party/0")).check(CLUSTER)
    other_key, other_ca = identity.create_ca("local")
    key, csr = identity.create_request("local", "client/a")
    with pytest.raises(IdentityError, match="not issued by the CA"):
        Identity.from_pem(key, identity.sign_request(other_key, other_ca, csr, role="client/a")).check(CLUSTER)


def test_peer_of() -> None:
    assert peer_of(MEMBERS["party/1"][1]) == Peer("party/1", ENDPOINTS[1].key_pin)
    client = issue("client/x")[1]
    assert peer_of(client) == Peer("client/x", identity.key_pin(client))
    with pytest.raises(IdentityError, match="showed no certificate"):
        peer_of()
    with pytest.raises(IdentityError, match="not the one the cluster file pins for dealer"):
        peer_of(issue("dealer")[1])
    with pytest.raises(IdentityError, match="role that does not exist"):
        peer_of(issue("party/2")[1])
    with pytest.raises(IdentityError, match="names no mpcinfer role"):
        peer_of(CA)
    key, ca = identity.create_ca("elsewhere")
    _, csr = identity.create_request("elsewhere", "client/x")
    with pytest.raises(IdentityError, match="of cluster 'elsewhere', this is cluster 'local'"):
        peer_of(identity.sign_request(key, ca, csr, role="client/x"))


def test_require() -> None:
    identity.require(Peer("party/1", ""), "dealer", "party/")
    identity.require(Peer("dealer", ""), "dealer")
    with pytest.raises(ForbiddenError, match=r"client/x may not do this; .* party/\* or dealer"):
        identity.require(Peer("client/x", ""), "party/", "dealer")
    with pytest.raises(ForbiddenError):
        identity.require(Peer("owner/dealer", ""), "dealer", "client/")
