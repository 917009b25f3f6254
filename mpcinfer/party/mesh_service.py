"""Where parties with lower indices connect, or the party that a witness is of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc

from mpcinfer.config import Cluster
from mpcinfer.errors import ForbiddenError
from mpcinfer.party.epoch import Former
from mpcinfer.party.shadow import ShadowFormer
from mpcinfer.wire import channel
from mpcinfer.wire.identity import peer_of, require
from mpcinfer.wire.v1 import mesh_pb2, mesh_pb2_grpc


class MeshService(mesh_pb2_grpc.MeshServiceServicer):
    """See mesh.proto: takes in the streams of parties with lower indices; at a witness, of its own party alone."""

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
            if isinstance(self._former, ShadowFormer):
                require(peer, f"party/{self._index}")
            elif number >= self._index:
                raise ForbiddenError(
                    f"party {number} waits for party {self._index} to connect, not the other way round"
                )
            outgoing = self._former.accept(number, request_iterator, context)
        except Exception as error:
            channel.abort(context, error)
        yield from outgoing

    def Corrections(
        self, request_iterator: Iterator[Any], context: grpc.ServicerContext
    ) -> mesh_pb2.CorrectionsResponse:
        """See mesh.proto."""
        try:
            require(peer_of(context, self._cluster), f"party/{self._index}")
            if not isinstance(self._former, ShadowFormer):
                raise ForbiddenError("corrections are passed on to witnesses only")
            self._former.delivered(request_iterator, context)
            return mesh_pb2.CorrectionsResponse()
        except Exception as error:
            channel.abort(context, error)
