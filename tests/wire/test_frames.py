"""The arithmetic of frames is what the wire counts."""

from __future__ import annotations

from queue import SimpleQueue
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpcinfer.wire.frames import CHUNK, GRPC_HEADER, HEADER, dealt_bytes, head, payload, round_bytes
from mpcinfer.wire.mesh import CONTROL, HELLO, OPENING, Link
from mpcinfer.wire.v1 import dealer_pb2, mesh_pb2

SIZES = [0, 1, 100, 115, 116, 127, 128, 16_370, 16_384, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 117]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wrap", [mesh_pb2.ConnectRequest, mesh_pb2.ConnectResponse])
def test_a_round(size: int, wrap: Any) -> None:
    link = Link(1, iter(()), SimpleQueue(), wrap, lambda: None)
    link.send(HELLO, b"hello")  # every stream begins with one, whose number 0 takes no bytes
    before = link.bytes_sent
    link.send(OPENING, bytes(size))
    assert link.bytes_sent - before == round_bytes(size)


@pytest.mark.parametrize("size", SIZES)
def test_corrections(size: int) -> None:
    chunks = [min(CHUNK, size - start) for start in range(0, size, CHUNK)]
    assert dealt_bytes(size) == sum(dealer_pb2.DealResponse(chunk=bytes(n)).ByteSize() + GRPC_HEADER for n in chunks)


@pytest.mark.parametrize(("size", "more"), [(size, False) for size in SIZES if size <= CHUNK] + [(CHUNK, True)])
@pytest.mark.parametrize("sequence", [1, 300, (1 << 64) - 1])
def test_frames_are_written_as_protobuf_writes_them(size: int, more: bool, sequence: int) -> None:
    content = bytes(i % 251 for i in range(size))
    frame = mesh_pb2.Frame(sequence=sequence, kind=OPENING, more=more, payload=content)  # type: ignore[arg-type]
    message = mesh_pb2.ConnectRequest(frame=frame).SerializeToString()
    assert head(sequence, OPENING, more, size) + content == HEADER.pack(0, len(message)) + message
    assert payload(memoryview(message), sequence, OPENING) == (content, more)


@given(st.binary(max_size=200), st.integers(0, 40), st.booleans())
def test_any_other_frame_is_refused(content: bytes, at: int, cut: bool) -> None:
    message = bytearray(head(7, OPENING, False, len(content))[GRPC_HEADER:] + content)
    first = len(message) - len(content)
    for sequence, kind in ((8, OPENING), (7, CONTROL)):
        with pytest.raises(ValueError, match="another frame"):
            payload(memoryview(message), sequence, kind)
    if cut:
        del message[: 1 + at % len(message)]
    else:
        message[at % first] ^= 1 << at % 8
    with pytest.raises(ValueError, match="another frame"):
        payload(memoryview(message), 7, OPENING)


@pytest.mark.parametrize("size", [0, 1, 127, CHUNK - 1])
def test_only_a_whole_chunk_is_followed_by_more(size: int) -> None:
    message = head(7, OPENING, True, size)[GRPC_HEADER:] + bytes(size)
    with pytest.raises(ValueError, match="another frame"):
        payload(memoryview(message), 7, OPENING)
