"""Configuration files: the cluster everybody agrees on, and what one party or dealer process is started with.

A cluster file is public. It names every party and the dealer by address and by the pin of its public key, so that
whoever holds the CA can still impersonate nobody. All processes compare `Cluster.digest()` before they work together.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from mpcinfer.canonical import canonical
from mpcinfer.config.issuer import Issuer, read_issuer
from mpcinfer.config.reading import Table, check_name, read_file, split_address
from mpcinfer.errors import ConfigError

PROTOCOL_VERSION = 8
PEER_TRANSPORTS = ("tls", "grpc")
LOG_LEVELS = ("debug", "info", "warning", "error")

_PIN_PATTERN = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Endpoint:
    """Where one party, a witness or the dealer listens, and the key it must prove to hold.

    `role` is "party/I", "witness/I" or "dealer", `address` is "host:port", `key_pin` is "sha256:" and the 64 hex digits
    of the SHA-256 of the public key (DER SubjectPublicKeyInfo).
    """

    role: str
    address: str
    key_pin: str

    def __post_init__(self) -> None:
        if split_address(self.address)[1] == 0:
            raise ConfigError(f"{self.role}: the address {self.address} has port 0; others need a port to connect to")
        if not _PIN_PATTERN.fullmatch(self.key_pin):
            raise ConfigError(f"{self.role}: the key must be written sha256:<64 lower-case hex digits>")

    @property
    def index(self) -> int:
        """Of a party, or of the party that a witness is of."""
        return int(self.role.partition("/")[2])


@dataclass(frozen=True)
class Cluster:
    """Who takes part: a name, one CA certificate (PEM), two or more parties in order, one dealer, maybe witnesses.

    The witness of party I holds the same share under another operator, and vouches for what the party computes.
    """

    name: str
    ca_pem: bytes = field(repr=False)
    parties: tuple[Endpoint, ...]
    dealer: Endpoint
    witnesses: tuple[Endpoint, ...] = ()

    def __post_init__(self) -> None:
        check_name(self.name)
        self._ca()
        if self.n < 2:
            raise ConfigError(f"cluster {self.name!r} has {self.n} parties; secret sharing needs at least 2")
        everyone = self.members
        expected = [*(f"party/{i}" for i in range(self.n)), "dealer"]
        if [endpoint.role for endpoint in (*self.parties, self.dealer)] != expected:
            raise ConfigError(f"cluster {self.name!r}: the roles must be {', '.join(expected)}, in this order")
        watched = [endpoint.role for endpoint in self.witnesses]
        if watched != [f"witness/{i}" for i in range(self.n) if f"witness/{i}" in watched]:
            raise ConfigError(f"cluster {self.name!r}: witnesses are of one party each, in the order of the parties")
        # One key or one process in two roles would see two shares, or a share and the correlations that mask it.
        for what, values in (
            ("key", [endpoint.key_pin for endpoint in everyone]),
            ("address", [endpoint.address.lower() for endpoint in everyone]),
        ):
            if len(set(values)) != len(values):
                raise ConfigError(f"cluster {self.name!r}: every party and the dealer needs its own {what}")

    @property
    def members(self) -> tuple[Endpoint, ...]:
        """All whose keys are pinned."""
        return (*self.parties, self.dealer, *self.witnesses)

    @property
    def holders(self) -> tuple[Endpoint, ...]:
        """All who hold shares: the parties in order, then the witnesses."""
        return (*self.parties, *self.witnesses)

    def witness(self, index: int) -> Endpoint | None:
        """The witness of a party, if it has one."""
        return next((endpoint for endpoint in self.witnesses if endpoint.index == index), None)

    @property
    def n(self) -> int:
        """The number of parties."""
        return len(self.parties)

    def endpoint(self, role: str) -> Endpoint:
        """The endpoint of "party/I", "witness/I" or "dealer"; ConfigError if the cluster has no such role."""
        for endpoint in self.members:
            if endpoint.role == role:
                return endpoint
        others = ", ".join(["dealer", *(endpoint.role for endpoint in self.witnesses)])
        raise ConfigError(f"cluster {self.name!r} has no {role!r}; it has party/0 to party/{self.n - 1} and {others}")

    def digest(self) -> bytes:
        """32 bytes that are equal exactly when two cluster files say the same, whatever their layout."""
        content = {
            "name": self.name,
            "ca": self._ca().fingerprint(SHA256()).hex(),
            "endpoints": [[e.role, e.address, e.key_pin] for e in self.members],
        }
        return hashlib.sha256(canonical(content)).digest()

    def _ca(self) -> x509.Certificate:
        if b"PRIVATE KEY" in self.ca_pem:
            raise ConfigError(f"cluster {self.name!r}: the CA file holds a private key; give the certificate alone")
        try:
            certificates = x509.load_pem_x509_certificates(self.ca_pem)
        except ValueError:
            certificates = []
        if len(certificates) != 1:
            raise ConfigError(f"cluster {self.name!r}: the CA file must hold exactly one PEM certificate")
        return certificates[0]

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Cluster:
        """Read a cluster file (TOML; paths in it are relative to it). ConfigError names what is wrong."""
        file = Path(path)
        table = Table.read(file)
        name, ca = table.take("name", str), file.parent / table.take("ca", str)
        parties = tuple(
            _endpoint(Table(f"{file}, party {i}", entry), f"party/{i}")
            for i, entry in enumerate(table.take("party", list))
        )
        dealer = _endpoint(Table(f"{file}, dealer", table.take("dealer", dict)), "dealer")
        witnesses = []
        for i, entry in enumerate(table.take("witness", list, [])):
            witness = Table(f"{file}, witness {i}", entry)
            witnesses.append(_endpoint(witness, f"witness/{witness.take('of', int)}"))
        table.finish()
        return Cluster(name, read_file(ca), parties, dealer, tuple(witnesses))


def _endpoint(table: Table, role: str) -> Endpoint:
    endpoint = Endpoint(role, table.take("address", str), table.take("key", str))
    table.finish()
    return endpoint


@dataclass(frozen=True)
class Limits:
    """What one process admits and how long it waits; 0 only for what may be off. Sizes in MiB, times in seconds."""

    max_waiting_requests: int = 64
    max_message_mb: int = 256
    max_upload_mb: int = 8192
    step_timeout_s: float = 600.0
    connect_timeout_s: float = 10.0
    stop_grace_s: float = 10.0
    # of language models: how many at a time, how much memory for the rows of one text and its variants, and after
    # how many seconds without a request it is forgotten
    max_sessions: int = 64
    session_mb: int = 1024
    session_idle_s: float = 900.0
    # of these, and of the requests that wait, how many may be one client's, and of one owner's models, so that others
    # find room
    max_sessions_of_client: int = 32
    max_sessions_of_owner: int = 48
    max_waiting_of_client: int = 32
    # what a party may use for tapes that are ready before a request comes; 0: none are
    pool_mb: int = 1024
    # how many waiting requests are evaluated together, and the memory for the randomness of all of them
    max_batch: int = 8
    batch_mb: int = 1024
    # which share of what the dealer deals the parties open and check instead of using it; the same at all parties
    dealer_audit_rate: float = 0.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not 0 < value < float("inf") and not (item.name in ("pool_mb", "dealer_audit_rate") and value == 0):
                raise ConfigError(f"limits: {item.name} must be positive and finite")
        if self.dealer_audit_rate > 0.5:
            raise ConfigError("limits: dealer_audit_rate can be at most 0.5: what is audited is not used")
        if self.max_message_mb > 2047:
            raise ConfigError("limits: max_message_mb can be at most 2047, the most that gRPC carries in one message")


@dataclass(frozen=True)
class Node:
    """What one party, witness or dealer process is started with.

    `store` and `store_key` (the directory of model shares at rest and the file of the key they are encrypted with)
    are set for a party or witness and None for the dealer. `listen` may have port 0 (any free port). Parties send each
    other openings over TLS connections of their own to `peer_port` (0: any free one) of the host in `listen`, or, where
    `peer_transport` is "grpc" at either end or the port cannot be reached, through gRPC. `peer_advertised_port` is the
    port they are told to connect to, on the host of the cluster file, where something in between maps ports (0: no).
    `metrics_listen` ("" for nowhere) is where figures for Prometheus are shown to whoever asks, without TLS.
    `operator` says in words who runs a party, `evidence` which kind of evidence it shows for what it runs.
    `issuers` are identity providers whose tokens a party takes.
    """

    cluster: Cluster
    role: str
    key_path: Path
    certificate_path: Path
    listen: str
    store: Path | None = None
    store_key: Path | None = None
    limits: Limits = Limits()
    log_level: str = "info"
    peer_port: int = 0
    peer_transport: str = "tls"
    metrics_listen: str = ""
    peer_advertised_port: int = 0
    operator: str = ""
    evidence: str = "code-digest"
    issuers: tuple[Issuer, ...] = ()

    def __post_init__(self) -> None:
        self.cluster.endpoint(self.role)
        split_address(self.listen)
        if self.metrics_listen:
            split_address(self.metrics_listen)
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(f"log_level is {self.log_level!r}; use one of {', '.join(LOG_LEVELS)}")
        if self.peer_transport not in PEER_TRANSPORTS:
            raise ConfigError(f"peer_transport is {self.peer_transport!r}; use one of {', '.join(PEER_TRANSPORTS)}")
        if not 0 <= self.peer_port <= 65535:
            raise ConfigError(f"peer_port is {self.peer_port}; use a port from 1 to 65535, or 0 for any free one")
        if not 0 <= self.peer_advertised_port <= 65535:
            raise ConfigError(
                f"peer_advertised_port is {self.peer_advertised_port}; use a port from 1 to 65535, or 0 if none is "
                "mapped"
            )
        if len(self.operator) > 200 or not self.operator.isprintable():
            raise ConfigError("operator: say in one line of at most 200 characters who runs this party")
        if self.role == "dealer" and (self.store or self.store_key):
            raise ConfigError("a dealer keeps nothing at rest: remove store and store_key (and MPCINFER_STORE)")
        if self.role != "dealer" and not (self.store and self.store_key):
            raise ConfigError(f"{self.role} needs store (a directory) and store_key (a file outside of it)")
        if self.store and self.store_key and self.store_key.absolute().is_relative_to(self.store.absolute()):
            raise ConfigError("store_key lies inside store: a copy of the store would carry the key that opens it")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Node:
        """Read a node file (TOML; paths in it are relative to it). ConfigError names what is wrong.

        The environment variables MPCINFER_LISTEN, MPCINFER_STORE (relative to the working directory) and
        MPCINFER_LOG_LEVEL override the file when set and not empty.
        """
        file = Path(path)
        table = Table.read(file)
        here = file.parent
        cluster = Cluster.load(here / table.take("cluster", str))
        role = table.take("role", str)
        key, certificate = here / table.take("key", str), here / table.take("certificate", str)
        listen = table.take("listen", str, cluster.endpoint(role).address)
        store, store_key = table.take("store", str, ""), table.take("store_key", str, "")
        limits = _limits(Table(f"{file}, limits", table.take("limits", dict, {})))
        log_level = table.take("log_level", str, "info")
        peer_port, peer_transport = table.take("peer_port", int, 0), table.take("peer_transport", str, "tls")
        metrics_listen = table.take_address("metrics_listen")
        peer_advertised_port = table.take("peer_advertised_port", int, 0)
        operator, evidence = table.take("operator", str, ""), table.take("evidence", str, "code-digest")
        tables = [Table(f"{file}, issuer {i}", entry) for i, entry in enumerate(table.take("issuer", list, []))]
        table.finish()
        store_override = os.environ.get("MPCINFER_STORE")
        return Node(
            cluster=cluster,
            role=role,
            key_path=key,
            certificate_path=certificate,
            listen=os.environ.get("MPCINFER_LISTEN") or listen,
            store=Path(store_override) if store_override else (here / store if store else None),
            store_key=here / store_key if store_key else None,
            limits=limits,
            log_level=(os.environ.get("MPCINFER_LOG_LEVEL") or log_level).lower(),
            peer_port=peer_port,
            peer_transport=peer_transport,
            metrics_listen=metrics_listen,
            peer_advertised_port=peer_advertised_port,
            operator=operator,
            evidence=evidence,
            issuers=tuple(read_issuer(entry, here) for entry in tables),
        )


def _limits(table: Table) -> Limits:
    values = {item.name: table.take(item.name, type(item.default), item.default) for item in fields(Limits)}
    table.finish()
    return Limits(**values)
