"""Corrections are written and read as protobuf does it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpcinfer.wire import dealt
from mpcinfer.wire.frames import CHUNK
from mpcinfer.wire.v1 import dealer_pb2, trust_pb2


@pytest.mark.parametrize("size", [1, 127, 128, 16_383, 16_384, CHUNK - 1, CHUNK])
def test_a_chunk(size: int) -> None:
    content = bytes(i % 251 for i in range(size))
    cut = size // 3
    written = dealt.chunk([memoryview(content)[:cut], memoryview(content)[cut:]], size)
    assert written == dealer_pb2.DealResponse(chunk=content).SerializeToString() == dealt._write(written)
    assert dealt._read(written) == content


def test_what_is_no_chunk_alone_is_a_message() -> None:
    statement = dealer_pb2.DealResponse(statement=trust_pb2.Signed(payload=b"p"))
    both = dealer_pb2.DealResponse(chunk=b"c", statement=statement.statement)
    for message in (statement, both, dealer_pb2.DealResponse()):
        assert dealt._read(dealt._write(message)) == message
    assert dealt._read(b"\x0a\x81\x00c") == dealer_pb2.DealResponse(chunk=b"c")  # a length that is not the shortest


@given(st.binary(max_size=40))
def test_anything_is_read_as_protobuf_reads_it(message: bytes) -> None:
    try:
        expected = dealer_pb2.DealResponse.FromString(message)
    except Exception as error:
        with pytest.raises(type(error)):
            dealt._read(message)
        return
    found = dealt._read(message)
    if isinstance(found, memoryview):
        assert expected == dealer_pb2.DealResponse(chunk=bytes(found)) and found
    else:
        assert found == expected
