"""The arithmetic of frames is what the wire counts."""

from __future__ import annotations

from queue import SimpleQueue
from typing import Any

import pytest

from mpcinfer.wire.frames import CHUNK, GRPC_HEADER, dealt_bytes, round_bytes
from mpcinfer.wire.mesh import HELLO, OPENING, Link
from mpcinfer.wire.v1 import dealer_pb2, mesh_pb2

SIZES = [0, 1, 100, 115, 116, 127, 128, 16_370, 16_384, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 117]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wrap", [mesh_pb2.ConnectRequest, mesh_pb2.ConnectResponse])
def test_a_round(size: int, wrap: Any) -> None:
    link = Link(1, iter(()), SimpleQueue(), (wrap, wrap), lambda: None)
    link.send(HELLO, b"hello")  # every stream begins with one, whose number 0 takes no bytes
    before = link.bytes_sent
    link.send(OPENING, bytes(size))
    assert link.bytes_sent - before == round_bytes(size)


@pytest.mark.parametrize("size", SIZES)
def test_corrections(size: int) -> None:
    chunks = [min(CHUNK, size - start) for start in range(0, size, CHUNK)]
    assert dealt_bytes(size) == sum(dealer_pb2.DealResponse(chunk=bytes(n)).ByteSize() + GRPC_HEADER for n in chunks)
