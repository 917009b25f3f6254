"""Corrections between the dealer and the last party: what protobuf would write of them (see dealer.proto), which copies
them twice at either end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grpc

from mpcinfer.wire.frames import content, field_head
from mpcinfer.wire.v1 import dealer_pb2, dealer_pb2_grpc

_METHOD = "/mpcinfer.v1.DealerService/Deal"


def chunk(parts: Sequence[memoryview], size: int) -> bytes:
    """A DealResponse with a chunk, which is of these parts and so large, and nothing else."""
    return b"".join([field_head(1, size), *parts])


def _write(message: bytes | dealer_pb2.DealResponse) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


def _read(message: bytes) -> memoryview | dealer_pb2.DealResponse:
    """The chunk, if there is nothing else."""
    found = content(1, memoryview(message))
    return dealer_pb2.DealResponse.FromString(message) if found is None else found


class Writing(grpc.ServerInterceptor):
    """Makes a dealer's server take what `chunk` has written."""

    def intercept_service(self, continuation: Callable[[Any], Any], details: grpc.HandlerCallDetails) -> Any:
        """See grpc."""
        handler = continuation(details)
        if handler is None or details.method != _METHOD:
            return handler
        return grpc.unary_stream_rpc_method_handler(handler.unary_stream, handler.request_deserializer, _write)


def stub(channel: grpc.Channel) -> dealer_pb2_grpc.DealerServiceStub:
    """A stub for a party: its answers to Deal are chunks, or messages where there is something else in them."""
    found = dealer_pb2_grpc.DealerServiceStub(channel)
    found.Deal = channel.unary_stream(_METHOD, dealer_pb2.DealRequest.SerializeToString, _read)
    return found
