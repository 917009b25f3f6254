"""Where parties with lower indices connect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc

from mpcinfer.config import Cluster
from mpcinfer.errors import ForbiddenError
from mpcinfer.party.epoch import Former
from mpcinfer.wire import channel
from mpcinfer.wire.identity import peer_of, require
from mpcinfer.wire.v1 import mesh_pb2_grpc


class MeshService(mesh_pb2_grpc.MeshServiceServicer):
    """See mesh.proto: takes in the streams of parties with lower indices."""

    def __init__(self, cluster: Cluster, index: int, former: Former) -> None:
        self._cluster = cluster
        self._index = index
        self._former = former

    def Connect(self, request_iterator: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        """See mesh.proto."""
        try:
            peer = peer_of(context, self._cluster)
            require(peer, "party/")
            number = int(peer.role.partition("/")[2])
            if number >= self._index:
                raise ForbiddenError(
                    f"party {number} waits for party {self._index} to connect, not the other way round"
                )
            outgoing = self._former.accept(number, request_iterator, context)
        except Exception as error:
            channel.abort(context, error)
        yield from outgoing
