"""Commitments to shares: equal for equal shares under one salt, and of no use to whoever lacks the salt.

A bare hash of a share would let another party confirm a guess of it. So a client draws 256 bits for each party and
request, and gives them to that party only.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Iterable

from mpcinfer.errors import InputError
from mpcinfer.wire.v1 import tensor_pb2

SALT_BYTES = 32
_HEAD = b"mpcinfer v1 commitment\0"


def commitment(salt: bytes, purpose: bytes, *parts: bytes) -> bytes:
    """HMAC-SHA256 of the purpose and the parts, each with its length, under a salt."""
    mac = hmac.new(salt, _HEAD, "sha256")
    for part in (purpose, *parts):
        mac.update(len(part).to_bytes(8, "little"))
        mac.update(part)
    return mac.digest()


def check_salt(salt: bytes) -> None:
    """InputError unless this can salt commitments."""
    if len(salt) != SALT_BYTES:
        raise InputError(f"a salt has {SALT_BYTES} bytes, drawn at random for each party and request")


def upload_commitment(salt: bytes, inputs: Iterable[tensor_pb2.Tensor]) -> bytes:
    """To the shares of inputs, as they travel."""
    return commitment(salt, b"upload", *_parts(inputs))


def output_commitment(salt: bytes, outputs: Iterable[tensor_pb2.Tensor], number: int = 0) -> bytes:
    """To the shares of an answer, the `number`th to a request, as they travel."""
    return commitment(salt, b"output", number.to_bytes(8, "little"), *_parts(outputs))


def answers_commitment(salt: bytes, before: bytes, outputs: Iterable[tensor_pb2.Tensor]) -> bytes:
    """To the shares of an answer, as they travel, and through `before` to all answers before it; nothing, for none."""
    return commitment(salt, b"answer", before, *_parts(outputs))


def salt_commitment(salt: bytes) -> bytes:
    """To the salt itself."""
    return commitment(salt, b"salt")


def _parts(tensors: Iterable[tensor_pb2.Tensor]) -> Iterable[bytes]:
    for tensor in tensors:
        yield json.dumps([list(tensor.shape), tensor.frac_bits, tensor.ring_bits or 64], separators=(",", ":")).encode()
        yield tensor.seed
        yield tensor.data
