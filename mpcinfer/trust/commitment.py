"""Commitments to shares: equal for equal shares under one salt, and of no use to whoever lacks the salt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from mpcinfer.errors import InputError
from mpcinfer.wire.v1 import tensor_pb2

SALT_BYTES = 32
_HEAD = b"mpcinfer v1 commitment\0"


def commitment(salt: bytes, *parts: bytes) -> bytes:
    """SHA-256 of what was uploaded or answered, each part with its length, under 256 bits that only its owner,
    a party and that party's witness have: a bare hash of a share would let another party confirm a guess of it."""
    digest = hashlib.sha256(_HEAD)
    for part in (salt, *parts):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def check_salt(salt: bytes) -> None:
    """InputError unless a request brings what its commitments are salted with."""
    if len(salt) != SALT_BYTES:
        raise InputError(f"this cluster has witnesses: a request needs a salt of {SALT_BYTES} random bytes")


def upload_commitment(salt: bytes, inputs: Iterable[tensor_pb2.Tensor]) -> bytes:
    """To the shares of inputs, as they travel."""
    return commitment(salt, b"upload", *_parts(inputs))


def output_commitment(salt: bytes, outputs: Iterable[tensor_pb2.Tensor], number: int = 0) -> bytes:
    """To the shares of an answer, the `number`th to a request, as they travel."""
    return commitment(salt, b"output", number.to_bytes(8, "little"), *_parts(outputs))


def _parts(tensors: Iterable[tensor_pb2.Tensor]) -> Iterable[bytes]:
    for tensor in tensors:
        yield json.dumps([list(tensor.shape), tensor.frac_bits, tensor.ring_bits or 64]).encode()
        yield tensor.seed
        yield tensor.data
