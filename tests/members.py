"""A cluster that exists on paper: certificates and a cluster file's content, for what needs no process."""

from __future__ import annotations

from mpcinfer.config import Cluster, Endpoint
from mpcinfer.trust.signing import Signer
from mpcinfer.wire.identity import Identity, create_ca, create_request, key_pin, sign_request


class Members:
    """A CA and whom it vouches for."""

    def __init__(self, name: str = "local", parties: int = 2) -> None:
        self.name = name
        self._ca = create_ca(name)
        ends = []
        for i, role in enumerate([*(f"party/{i}" for i in range(parties)), "dealer"]):
            ends.append(Endpoint(role, f"127.0.0.1:{7100 + i}", key_pin(self.issue(role).cert_pem)))
        self.cluster = Cluster(name, self._ca[1], tuple(ends[:-1]), ends[-1])

    def issue(self, role: str) -> Identity:
        """A new key and certificate."""
        key, request = create_request(self.name, role)
        return Identity.from_pem(key, sign_request(*self._ca, request, role=role))

    def signer(self, role: str) -> Signer:
        """Somebody who signs, with a new key."""
        return Signer(self.issue(role))
