"""Who is who: keys, certificates, roles and pins.

A role is a URI in the certificate, `spiffe://CLUSTER/party/0`, next to one DNS name, `party-0.mpcinfer`, that TLS
libraries can check. Keys are ECDSA P-256 and are made on the host that uses them; only a request travels to the CA.
The CA vouches for owners and clients. For parties and the dealer its signature is not enough: their keys are pinned
in the cluster file, so a stolen CA impersonates none of them.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mpcinfer.config import Cluster
from mpcinfer.config.reading import check_name, check_role
from mpcinfer.errors import ConfigError, ForbiddenError, IdentityError

_SCHEME = "spiffe://"
_CLOCK_SKEW = datetime.timedelta(hours=1)  # hosts' clocks differ: a certificate is valid a little before it is made


def role_uri(cluster: str, role: str) -> str:
    """The URI that stands for `role` in certificates of the cluster named `cluster`."""
    return f"{_SCHEME}{check_name(cluster)}/{check_role(role)}"


def dns_name(role: str) -> str:
    """The DNS name in the certificate of `role`, the same in every cluster: "party/0" has "party-0.mpcinfer"."""
    return f"{check_role(role).replace('/', '-')}.mpcinfer"


def create_ca(cluster_name: str, days: int = 3650) -> tuple[bytes, bytes]:
    """A new certificate authority for one cluster: (private key PEM, certificate PEM)."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(f"mpcinfer CA {check_name(cluster_name)}")
    certificate = (
        _certificate(subject, subject, key.public_key(), key.public_key(), _now() + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(sign_certificates=True), critical=True)
        .add_extension(_alternative_names(_SCHEME + cluster_name), critical=False)
        .sign(key, SHA256())
    )
    return _key_pem(key), certificate.public_bytes(serialization.Encoding.PEM)


def create_request(cluster_name: str, role: str) -> tuple[bytes, bytes]:
    """A new key for `role` and the request for its certificate: (private key PEM, request PEM).

    Runs on the host that uses the key. The request is public; the key stays.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(_name(role))
        .add_extension(_alternative_names(role_uri(cluster_name, role), dns_name(role)), critical=False)
        .sign(key, SHA256())
    )
    return _key_pem(key), request.public_bytes(serialization.Encoding.PEM)


def sign_request(ca_key_pem: bytes, ca_cert_pem: bytes, csr_pem: bytes, *, role: str, days: int = 365) -> bytes:
    """The certificate (PEM) for a request, valid `days` days but not longer than the CA's own.

    The CA's operator says which role he means to grant; IdentityError if the request asks for anything else, is not
    signed by the key in it, or comes from another cluster.
    """
    ca, ca_key, request = _load_certificate(ca_cert_pem), _load_key(ca_key_pem), _load_request(csr_pem)
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey) or _pin(ca_key.public_key()) != _pin(ca.public_key()):
        raise IdentityError("the CA's key and certificate do not belong together; sign with the files made by one init")
    _check_validity(ca, "the CA's certificate", "make a new CA and sign everyone anew")
    cluster = _ca_cluster(ca)
    if not request.is_signature_valid:
        raise IdentityError("the request is damaged: it is not signed by the key it holds; make it again")
    public = request.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
        raise IdentityError(
            "the request's key is not an ECDSA P-256 key; make the request with `mpcinfer certs request`"
        )
    claimed = _claimed_role(request)
    if claimed != (cluster, role):
        raise IdentityError(
            f"the request asks for {role_uri(*claimed)}, not for {role_uri(cluster, role)}; "
            "sign it for what it asks only if you trust its sender with that role"
        )
    not_after = min(_now() + datetime.timedelta(days=days), ca.not_valid_after_utc)
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        _certificate(_name(role), ca.subject, public, ca_key.public_key(), not_after)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(_alternative_names(role_uri(cluster, role), dns_name(role)), critical=False)
        .sign(ca_key, SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_pin(cert_or_csr_pem: bytes) -> str:
    """The pin of the public key in a certificate or request: "sha256:" and 64 hex digits."""
    return _pin(_load_either(cert_or_csr_pem).public_key())


def claimed_role(cert_or_csr_pem: bytes) -> tuple[str, str]:
    """(cluster, role) named in a certificate or request; a claim until somebody has checked the signature."""
    return _claimed_role(_load_either(cert_or_csr_pem))


@dataclass(frozen=True)
class Identity:
    """One's own key and certificate; neither is checked against a cluster yet, see `check`."""

    role: str
    cluster: str
    key_pem: bytes = field(repr=False)
    cert_pem: bytes = field(repr=False)

    @staticmethod
    def load(key_path: str | os.PathLike[str], cert_path: str | os.PathLike[str]) -> Identity:
        """Read a key (not accessible to other users) and its certificate; IdentityError says what is wrong."""
        try:
            key_pem, cert_pem = Path(key_path).read_bytes(), Path(cert_path).read_bytes()
            mode = stat.S_IMODE(os.stat(key_path).st_mode)
        except OSError as error:
            raise IdentityError(f"cannot read {error.filename}: {error.strerror}") from error
        if mode & 0o007:
            raise IdentityError(f"the key {key_path} is open to every user of this host; run: chmod 600 {key_path}")
        try:
            return Identity.from_pem(key_pem, cert_pem)
        except IdentityError as error:
            raise IdentityError(f"{cert_path}: {error}") from error

    @staticmethod
    def from_pem(key_pem: bytes, cert_pem: bytes) -> Identity:
        """Check that key and certificate belong together, name a role and are valid now, else IdentityError."""
        certificate = _load_certificate(cert_pem)
        cluster, role = _claimed_role(certificate)
        if _pin(_load_key(key_pem).public_key()) != _pin(certificate.public_key()):
            raise IdentityError(f"the key is not the one that the certificate of {role} was made for")
        identity = Identity(role, cluster, key_pem, cert_pem)
        identity.check_validity()
        return identity

    def check_validity(self) -> None:
        """IdentityError naming the dates if the certificate has expired since it was loaded."""
        _check_validity(_load_certificate(self.cert_pem), f"the certificate of {self.role}", _RENEW)

    def check(self, cluster: Cluster) -> None:
        """IdentityError if the members of `cluster` would refuse this identity, with the reason.

        It must be of this cluster, issued by its CA, valid now and, unless of an owner or client, hold the pinned key.
        """
        self.check_validity()
        certificate = _load_certificate(self.cert_pem)
        _check_issuer(certificate, self.role, cluster)
        _check_member(self.cluster, self.role, _pin(certificate.public_key()), cluster)


@dataclass(frozen=True)
class Peer:
    """Who is at the other end of a connection, as the TLS layer proved it."""

    role: str
    pin: str


def peer_of(context: grpc.ServicerContext, cluster: Cluster) -> Peer:
    """The caller of an RPC on a server that uses `channel.server_credentials`.

    IdentityError if there is no certificate, it is of another cluster, it expired while the connection was open, or
    it claims to be a party or the dealer without holding the key pinned for it.
    """
    # A mapping to iterables of bytes, as grpc documents; its type stubs say bytes.
    auth = cast(Mapping[str, Iterable[bytes]], context.auth_context())
    presented = list(auth.get("x509_pem_cert", ()))
    if len(presented) != 1:
        raise IdentityError("the caller showed no certificate; connect with mutual TLS")
    return peer_from_certificate(presented[0], cluster)


def peer_from_certificate(cert_pem: bytes, cluster: Cluster) -> Peer:
    """The peer that a certificate stands for, once TLS has checked that the CA signed it; errors as in `peer_of`."""
    certificate = _load_certificate(cert_pem)
    cluster_name, role = _claimed_role(certificate)
    _check_validity(certificate, f"the certificate of {role}", _RENEW)
    pin = _pin(certificate.public_key())
    _check_member(cluster_name, role, pin, cluster)
    return Peer(role, pin)


def check_certificate(cert_pem: bytes, cluster: Cluster, *, past: bool = False) -> Peer:
    """Whom a certificate stands for that did not come through TLS; errors as in `Identity.check`.

    past: whether it may have expired since.
    """
    certificate = _load_certificate(cert_pem)
    cluster_name, role = _claimed_role(certificate)
    if not past:
        _check_validity(certificate, f"the certificate of {role}", _RENEW)
    _check_issuer(certificate, role, cluster)
    pin = _pin(certificate.public_key())
    _check_member(cluster_name, role, pin, cluster)
    return Peer(role, pin)


def require(peer: Peer, *role_prefixes: str) -> None:
    """ForbiddenError unless the peer has one of the roles; "party/" means any party, "dealer" exactly that."""
    if not any(peer.role.startswith(p) if p.endswith("/") else peer.role == p for p in role_prefixes):
        allowed = " or ".join(f"{p}*" if p.endswith("/") else p for p in role_prefixes)
        raise ForbiddenError(f"{peer.role} may not do this; it takes a certificate of {allowed}")


_RENEW = "have its request signed again by the CA (the key and its pin stay the same)"


def _check_issuer(certificate: x509.Certificate, role: str, cluster: Cluster) -> None:
    try:
        certificate.verify_directly_issued_by(_load_certificate(cluster.ca_pem))
    except (ValueError, TypeError, InvalidSignature) as error:
        raise IdentityError(
            f"the certificate of {role} was not issued by the CA of cluster {cluster.name!r}; "
            "have it signed by that CA, or use the cluster file it belongs to"
        ) from error


def _check_member(cluster_name: str, role: str, pin: str, cluster: Cluster) -> None:
    if cluster_name != cluster.name:
        raise IdentityError(
            f"the certificate of {role} is of cluster {cluster_name!r}, this is cluster {cluster.name!r}; "
            "use the identity made for this cluster"
        )
    if role == "dealer" or role.startswith(("party/", "witness/")):
        try:
            endpoint = cluster.endpoint(role)
        except ConfigError as error:
            raise IdentityError(f"the certificate claims a role that does not exist: {error}") from error
        if pin != endpoint.key_pin:
            raise IdentityError(
                f"the certificate claims to be {role} but its key is not the one the cluster file pins for {role}; "
                f"if {role} has a new key, everyone needs the new cluster file, else somebody impersonates it"
            )


def _check_validity(certificate: x509.Certificate, what: str, remedy: str) -> None:
    start, end, now = certificate.not_valid_before_utc, certificate.not_valid_after_utc, _now()
    if now > end:
        raise IdentityError(f"{what} expired on {end:%Y-%m-%d %H:%M} UTC (now {now:%Y-%m-%d %H:%M}); {remedy}")
    if now < start:
        raise IdentityError(
            f"{what} is not valid before {start:%Y-%m-%d %H:%M} UTC (now {now:%Y-%m-%d %H:%M}); check this host's clock"
        )


def _claimed_role(holder: x509.Certificate | x509.CertificateSigningRequest) -> tuple[str, str]:
    uris, names = _subject_names(holder)
    cluster, slash, role = uris[0].removeprefix(_SCHEME).partition("/") if len(uris) == 1 else ("", "", "")
    try:
        if not slash or uris != [role_uri(cluster, role)] or names != [dns_name(role)]:
            raise ConfigError("not a role")
    except ConfigError as error:
        raise IdentityError(
            "the certificate or request names no mpcinfer role; make it with `mpcinfer certs request` and `certs sign`"
        ) from error
    return cluster, role


def _ca_cluster(ca: x509.Certificate) -> str:
    uris, _ = _subject_names(ca)
    try:
        name = check_name(uris[0].removeprefix(_SCHEME) if len(uris) == 1 else "")
    except ConfigError as error:  # also for the certificate of a role, whose URI has a path
        raise IdentityError(
            "this is not the certificate of an mpcinfer CA; make one with `mpcinfer certs init`"
        ) from error
    return name


def _subject_names(holder: x509.Certificate | x509.CertificateSigningRequest) -> tuple[list[str], list[str]]:
    """(URIs, DNS names) of the subject; a name of any other kind makes both empty, so that it is refused."""
    try:
        names = holder.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        return [], []
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    hosts = names.get_values_for_type(x509.DNSName)
    return (uris, hosts) if len(uris) + len(hosts) == len(list(names)) else ([], [])


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    issuer_public: ec.EllipticCurvePublicKey,
    not_after: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - _CLOCK_SKEW)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_public), critical=False)
    )


def _key_usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_names(uri: str, host: str | None = None) -> x509.SubjectAlternativeName:
    hosts = [] if host is None else [x509.DNSName(host)]
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri), *hosts])


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _pin(public: object) -> str:
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise IdentityError("the key is not an ECDSA key; make it with `mpcinfer certs request`")
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return f"sha256:{hashlib.sha256(der).hexdigest()}"


def _load_certificate(pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except (ValueError, x509.InvalidVersion) as error:
        raise IdentityError("not a PEM certificate; the file is damaged or another one") from error


def _load_request(pem: bytes) -> x509.CertificateSigningRequest:
    try:
        return x509.load_pem_x509_csr(pem)
    except (ValueError, x509.InvalidVersion) as error:
        raise IdentityError("not a PEM certificate request; the file is damaged or another one") from error


def _load_either(pem: bytes) -> x509.Certificate | x509.CertificateSigningRequest:
    return _load_request(pem) if b"CERTIFICATE REQUEST" in pem else _load_certificate(pem)


def _load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        key = None  # the library's message is dropped: nothing about a key's content may travel
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError("not an unencrypted ECDSA private key in PEM; the file is damaged or another one")
    return key


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
