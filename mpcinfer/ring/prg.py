"""Pseudo-random shares: AES-128-CTR streams under keys that HKDF derives from a secret and a structured name.

A stream is named, never counted: (tape, node, ordinal, field) says which randomness it is, so two ends that agree on
the name agree on the bytes, and nothing desynchronises. A name is used for one tensor only.
"""

from __future__ import annotations

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from mpcinfer.ring.domain import Ring

SEED_BYTES = 32
_CHUNK = 1 << 22
_ZEROS = bytes(_CHUNK)


def extract(secret: bytes, salt: bytes, purpose: bytes) -> bytes:
    """A 32-byte key from a secret (HKDF-SHA256); `salt` carries the fresh nonces of everybody concerned."""
    if len(secret) < 16:
        raise ValueError("a secret of at least 16 bytes is needed: nonces alone are no key")
    return HKDF(SHA256(), SEED_BYTES, salt, b"mpcinfer/v1/" + purpose).derive(secret)


def derive(key: bytes, *name: str | int | bytes) -> bytes:
    """The 32-byte seed of the stream `name` under `key` (HKDF-Expand; its parts are length-prefixed: no collisions)."""
    info = b"mpcinfer/v1/stream"
    for part in name:
        tag, raw = (
            (b"s", part.encode())
            if isinstance(part, str)
            else (b"i", part.to_bytes(8, "little"))
            if isinstance(part, int)
            else (b"b", part)
        )
        info += tag + len(raw).to_bytes(4, "little") + raw
    return HKDFExpand(SHA256(), SEED_BYTES, info).derive(key)


def fill(seed: bytes, out: memoryview) -> None:
    """Write the key stream of `seed` (AES-128 key, then initial counter block) over `out`."""
    if len(seed) != SEED_BYTES:
        raise ValueError(f"a seed has {SEED_BYTES} bytes, not {len(seed)}")
    stream = Cipher(algorithms.AES(seed[:16]), modes.CTR(seed[16:])).encryptor()
    for start in range(0, len(out), _CHUNK):
        part = out[start : start + _CHUNK]
        stream.update_into(_ZEROS[: len(part)] if len(part) < _CHUNK else _ZEROS, part)


def expand(seed: bytes, shape: tuple[int, ...], ring: Ring) -> torch.Tensor:
    """A tensor of `shape`, uniform on `ring`, determined by `seed`."""
    out = torch.empty(shape, dtype=ring.dtype)
    fill(seed, out.numpy().reshape(-1).view("uint8").data)
    return out if ring.bits == ring.width else out.bitwise_and_((1 << ring.bits) - 1)
