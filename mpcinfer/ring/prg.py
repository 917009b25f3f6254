"""Pseudo-random shares: AES-128-CTR streams under keys that HKDF derives from a secret and a structured name.

A stream is named, never counted: (tape, node, ordinal, field) says which randomness it is, so two ends that agree on
the name agree on the bytes, and nothing desynchronises. A name is used for one tensor only.
"""

from __future__ import annotations

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from mpcinfer.ring.domain import Ring

SEED_BYTES = 32
_CHUNK = 1 << 22
_ZEROS = bytes(_CHUNK)
_PIECE = 1 << 18  # of a stream that is only added to something: stays in the cache


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


class Stream:
    """The key stream of a seed (AES-128 key, then initial counter block), from its beginning on."""

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a seed has {SEED_BYTES} bytes, not {len(seed)}")
        self._cipher = Cipher(algorithms.AES(seed[:16]), modes.CTR(seed[16:])).encryptor()

    def fill(self, out: memoryview) -> None:
        """Write what comes next over `out`."""
        for start in range(0, len(out), _CHUNK):
            part = out[start : start + _CHUNK]
            self._cipher.update_into(_ZEROS[: len(part)] if len(part) < _CHUNK else _ZEROS, part)


def fill(seed: bytes, out: memoryview) -> None:
    """Write the key stream of `seed` over `out`."""
    Stream(seed).fill(out)


def expand(seed: bytes, shape: tuple[int, ...], ring: Ring) -> torch.Tensor:
    """A tensor of `shape`, uniform on `ring`, determined by `seed`."""
    out = torch.empty(shape, dtype=ring.dtype)
    fill(seed, out.numpy().reshape(-1).view("uint8").data)
    return out if ring.bits == ring.width else out.bitwise_and_((1 << ring.bits) - 1)


def add(seed: bytes, x: torch.Tensor, ring: Ring) -> torch.Tensor:
    """`ring.add(x, expand(seed, x.shape, ring))`, of what is large without the stream in memory; x is any number."""
    if x.numel() * x.itemsize <= _PIECE:
        return ring.add(ring.reduce(x), expand(seed, tuple(x.shape), ring))
    return _combined(seed, x, ring, np.bitwise_xor if ring.xor else np.add)


def sub(seed: bytes, x: torch.Tensor, ring: Ring) -> torch.Tensor:
    """`ring.sub(x, expand(seed, x.shape, ring))`, as `add`."""
    if x.numel() * x.itemsize <= _PIECE:
        return ring.sub(ring.reduce(x), expand(seed, tuple(x.shape), ring))
    return _combined(seed, x, ring, np.bitwise_xor if ring.xor else np.subtract)


def _combined(seed: bytes, x: torch.Tensor, ring: Ring, operation: np.ufunc) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=ring.dtype)
    into, own = out.numpy().reshape(-1), x.contiguous().numpy().reshape(-1)
    piece = np.empty(_PIECE // into.itemsize, into.dtype)
    stream, mask = Stream(seed), (1 << ring.bits) - 1
    for start in range(0, len(into), len(piece)):
        end = min(len(into), start + len(piece))
        part = piece[: end - start]
        stream.fill(part.view("uint8").data)
        operation(own[start:end], part, out=into[start:end])
        if ring.bits < ring.width:
            np.bitwise_and(into[start:end], mask, out=into[start:end])
    return out
