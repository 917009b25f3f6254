"""Keys of correlated randomness: who can derive which share, and from what that is fresh every time.

K_i is a secret of party i and the dealer alone (ephemeral Diffie-Hellman inside an authenticated channel). The salt
holds fresh nonces of all parties and the dealer, so any restart of any of them changes every stream; nonces alone are
no key. Below a session a tape (one request) has its own key, bound to the plan it is dealt for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from mpcinfer.ring import prg


def session_key(
    secret: bytes, *, index: int, session: bytes, cluster: bytes, party_nonces: Sequence[bytes], dealer_nonce: bytes
) -> bytes:
    """The key of party `index` for one session, from the secret K_i it shares with the dealer."""
    salt = hashlib.sha256()
    for part in (session, cluster, dealer_nonce, *party_nonces):
        salt.update(len(part).to_bytes(4, "little") + part)
    return prg.extract(secret, salt.digest(), b"session/" + str(index).encode())


def tape_key(session: bytes, tape: bytes, plan_digest: bytes) -> bytes:
    """The key under which one tape's streams are named; another plan for the same tape would have another key."""
    return prg.derive(session, "tape", tape, plan_digest)
