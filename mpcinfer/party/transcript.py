"""What a party has seen opened in a run: one digest, compared with the others' before anything is released.

Whoever sends two parties different values in one opening (equivocation, with three parties or more) makes them see
different sums. Digests are compared as HMACs under a key that the dealer lacks: it knows all masks, and could confirm a
guess of what was opened.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from blake3 import blake3
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from mpcinfer.protocol.context import Opening
from mpcinfer.wire.frames import COMPARED

_SECRET = b"mpcinfer v1 transcripts of an epoch"
_SEAL = b"mpcinfer v1 transcript\0"


class Transcript:
    """The opened values of one run, in their order, and what they were openings of."""

    def __init__(self) -> None:
        self._digest = blake3()  # of much, in a fifth of the time that SHA-256 takes
        self.openings: Counter[str] = Counter()

    def add(self, openings: Sequence[Opening], values: Sequence[torch.Tensor]) -> None:
        """Take in what a round has opened: one pass over it."""
        for opening, value in zip(openings, values, strict=True):
            data = value.contiguous().numpy().reshape(-1).view("uint8").data
            self._digest.update(len(data).to_bytes(8, "little"))
            self._digest.update(data)
            self.openings[opening.label.rpartition(":")[2]] += 1

    def seal(self, secret: bytes, *names: bytes) -> bytes:
        """What is compared: it says nothing to whoever lacks the epoch's `secret`. names: of what ran, each hashed."""
        bound = b"".join(hashlib.sha256(name).digest() for name in names)
        return hmac.digest(secret, _SEAL + bound + self._digest.digest(), "sha256")


@dataclass(frozen=True)
class Evidence:
    """What a run leaves for its receipt: `seal` of its transcript, equal at all parties, and what it was made of."""

    epoch: bytes
    tape: bytes
    seal: bytes
    openings: Counter[str]
    manifest: bytes  # the digest of what all parties have signed of themselves


def secret_of(session: bytes, parts: Iterable[bytes]) -> bytes:
    """The secret of an epoch: from what each party has drawn and told the others, in the order of their indices."""
    return HKDF(SHA256(), COMPARED, session, _SECRET).derive(b"".join(parts))
