"""This party's part of the manifest: what it says of itself, to the other parties and to whoever connects."""

from __future__ import annotations

import threading

from mpcinfer.config import Node
from mpcinfer.errors import InputError, ProtocolError, SignatureError
from mpcinfer.party.epoch import Epoch
from mpcinfer.party.vouching import both, packed
from mpcinfer.trust import evidence, facts
from mpcinfer.trust.facts import Facts
from mpcinfer.trust.manifest import NONCE_BYTES, introduce, introduced, state
from mpcinfer.trust.signing import Signed, Signer
from mpcinfer.wire.identity import Identity
from mpcinfer.wire.mesh import read_json


class PartyManifest:
    """What one party signs of itself, and of all parties once an epoch stands."""

    def __init__(self, node: Node, identity: Identity) -> None:
        """ConfigError if there is no such kind of evidence."""
        evidence.find(node.evidence)
        self._cluster = node.cluster
        self._signer = Signer(identity)
        self.facts = Facts.of(self._signer, node.cluster, operator=node.operator, evidence=node.evidence)
        self._digest = b""
        self._producing = threading.Lock()

    def agree(self, epoch: Epoch) -> bytes:
        """Exchange facts with all of an epoch that is beginning: the digest of the manifest.

        SignatureError or ManifestError, which end the epoch, if what somebody shows is not his word.
        """
        own = packed([introduce(self._signer, self.facts, epoch.binding)])
        known = {}
        for index, message in epoch.mesh.consult(own, both).items():
            witness = self._cluster.witness(index)
            roles = [f"party/{index}", *([witness.role] if witness is not None else [])]
            try:
                shown = [Signed.from_json(each) for each in read_json(message, f"party {index}")]
                for role, signed in zip(roles, shown, strict=True):
                    known[role] = introduced(signed, self._cluster, role, epoch.binding)
            except (ValueError, TypeError, ProtocolError) as error:
                raise SignatureError(f"not all of {', '.join(roles)} show signed facts; run one release") from error
        self._digest = facts.digest([known[endpoint.role] for endpoint in self._cluster.holders])
        return self._digest

    def state(self, nonce: bytes) -> Signed:
        """The statement for whoever has drawn `nonce`; only once an epoch stands."""
        if len(nonce) != NONCE_BYTES:
            raise InputError(f"the nonce of a manifest has {NONCE_BYTES} bytes")
        with self._producing:  # a host makes one quote at a time
            return state(self._signer, self.facts, self._digest, nonce)
