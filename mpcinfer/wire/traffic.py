"""What a party has sent to and received from each other one in an epoch, as running digests that witnesses compare."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

_HEAD = b"mpcinfer v1 traffic\0"


class Traffic:
    """One digest for each ordered pair that a party is in: of kind and length of each message, and what was in it."""

    def __init__(self, index: int, peers: Iterable[int]) -> None:
        self._sent = {peer: hashlib.sha256(_HEAD + bytes([index, peer])) for peer in peers}
        self._received = {peer: hashlib.sha256(_HEAD + bytes([peer, index])) for peer in self._sent}

    def sent(self, kind: int, payload: bytes) -> None:
        """A message to all peers."""
        line = _line(kind, payload)
        for digest in self._sent.values():
            digest.update(line)

    def received(self, peer: int, kind: int, payload: bytes) -> None:
        """A message from one of them."""
        self._received[peer].update(_line(kind, payload))

    def digests(self) -> dict[str, dict[str, str]]:
        """What to state: by direction and peer, in hexadecimal."""
        return {
            "sent": {str(peer): digest.hexdigest() for peer, digest in self._sent.items()},
            "received": {str(peer): digest.hexdigest() for peer, digest in self._received.items()},
        }


def _line(kind: int, payload: bytes) -> bytes:
    # hashed once, however many peers it goes to
    return bytes([kind]) + len(payload).to_bytes(8, "little") + hashlib.sha256(payload).digest()
