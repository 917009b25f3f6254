"""Keys of correlated randomness: who can derive which share, and from what that is fresh every time.

K_i is a secret of party i and the dealer alone (ephemeral Diffie-Hellman inside an authenticated channel). The salt
holds fresh nonces of all parties and the dealer, so any restart of any of them changes every stream; nonces alone are
no key. Below a session a tape (one request) has its own key, bound to the plan it is dealt for, and the session's key
moves on with every tape: whoever seizes the dealer later finds nothing that opens a recorded request.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from mpcinfer.ring import prg


@dataclass(frozen=True)
class TapeKeys:
    """One party's two keys of a tape: none can be derived from the other.

    passing: of all that masks something in one run. kept: of masks that outlive the tape, those of weights and of rows
    of caches. So a tape can be opened for an audit, and what it gave to keep stays closed.
    """

    passing: bytes = field(repr=False)
    kept: bytes = field(repr=False)

    def of(self, kept: bool) -> bytes:
        """The key of a correlation whose masks are kept, or of another one."""
        return self.kept if kept else self.passing


@dataclass
class KeyChain:
    """The key of one party and the dealer for one session, at the place of the next tape."""

    _key: bytes = field(repr=False)

    def next(self, tape: bytes, plan_digest: bytes) -> TapeKeys:
        """The keys under which this tape's streams are named; both ends take tapes in the same order.

        Another plan for the same tape would have another key. The chain forgets what it was: keys of earlier tapes
        cannot be derived from it.
        """
        passing, kept = (prg.derive(self._key, name, tape, plan_digest) for name in ("tape", "kept"))
        self._key = prg.derive(self._key, "next")
        return TapeKeys(passing, kept)

    def export(self) -> bytes:
        """What it goes on from: for the witness of its party alone."""
        return self._key


def session_keys(
    secret: bytes,
    *,
    index: int,
    session: bytes,
    cluster: bytes,
    public_keys: Sequence[bytes],
    party_nonces: Sequence[bytes],
    dealer_nonce: bytes,
) -> KeyChain:
    """The keys of party `index` for one session, from the secret K_i it shares with the dealer.

    public_keys: the party's and the dealer's, of the exchange that made K_i.
    """
    salt = hashlib.sha256()
    for part in (session, cluster, *public_keys, dealer_nonce, *party_nonces):
        salt.update(len(part).to_bytes(4, "little") + part)
    return KeyChain(prg.extract(secret, salt.digest(), b"session/" + str(index).encode()))


def epoch_binding(session: bytes, dealer_nonce: bytes, party_nonces: Sequence[bytes]) -> bytes:
    """What statements name an epoch by: of all nonces, so that none of them is true in another one."""
    parts = (session, dealer_nonce, *party_nonces)
    return hashlib.sha256(b"epoch" + b"".join(len(p).to_bytes(4, "little") + p for p in parts)).digest()
