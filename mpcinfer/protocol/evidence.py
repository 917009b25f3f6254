"""What a dealer vouches for when it signs a tape: each party's key, and the corrections, batch by batch.

The corrections' digests are salted from the last party's keys, so that they confirm no guess, and those of products
with kept masks, which are never opened, from a key that is never opened either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch

from mpcinfer.protocol.batch import Batch
from mpcinfer.protocol.correlation import streams
from mpcinfer.protocol.session import TapeKeys
from mpcinfer.protocol.tracing import Plan
from mpcinfer.ring import prg


def commitment(key: bytes) -> str:
    """What a party's passing key is vouched for by: it hides the key, and there is no other one."""
    return hashlib.sha256(b"mpcinfer v1 key of a tape\0" + key).hexdigest()


class Digests:
    """The digests of a tape's corrections, in the order in which they are dealt."""

    def __init__(self, passing: bytes, kept: bytes | None = None) -> None:
        """The last party's keys; without the second one, digests of what depends on kept masks must be given."""
        self._salts = {False: prg.derive(passing, "salt"), True: kept and prg.derive(kept, "salt")}
        self.found: list[bytes] = []

    def add(self, batch: Batch, corrections: Iterable[bytes | memoryview]) -> None:
        """The next batch, from its corrections."""
        salt = self._salts[bool(batch.item.operand)]
        assert salt is not None
        digest = hashlib.sha256(salt)
        for part in corrections:
            digest.update(part)
        self.found.append(digest.digest())

    def root(self) -> str:
        """One digest of all."""
        return hashlib.sha256(b"mpcinfer v1 corrections\0" + b"".join(self.found)).hexdigest()


def statement(
    session: bytes, tape: bytes, digest: bytes, passing: Iterable[bytes], corrections: str = ""
) -> dict[str, Any]:
    """What the dealer signs of a tape: for whom it made which keys, and (to the last party) the corrections' root."""
    keys = [commitment(key) for key in passing]
    return {
        "session": session.hex(),
        "tape": tape.hex(),
        "plan": digest.hex(),
        "keys": keys,
        "corrections": corrections,
    }


class KeptMasks:
    """A party's shares of the masks that outlive a tape: expanded anew for each audit that needs them."""

    def __init__(self, keys: TapeKeys, plan: Plan, run: str = "", text: int | None = None) -> None:
        """run: with what the names begin, where the plan was dealt several times on one tape. text: of which, where a
        run is for several."""
        self._keys, self._plan, self._run, self._text = keys, plan, run, text

    def of(self, run: int) -> KeptMasks:
        """Those of one run of the plan."""
        return KeptMasks(self._keys, self._plan, f"{run}/")

    def of_text(self, text: int) -> KeptMasks:
        """Those of one of the texts that a run is for."""
        return KeptMasks(self._keys, self._plan, self._run, text)

    def share(self, operand: str) -> torch.Tensor:
        """This party's share of the mask B of a weight, or of the new rows of a cache."""
        name, item = self._plan.kept[operand]
        (share,) = streams(item, self._run + name, self._keys.kept, item.free()).values()
        return share if self._text is None else share[self._text]

    def __repr__(self) -> str:
        return f"KeptMasks({list(self._plan.kept)})"
