"""The party process."""

from __future__ import annotations

import logging

import grpc
import torch

from mpcinfer import nn
from mpcinfer.config import Node
from mpcinfer.errors import ConfigError, UnavailableError
from mpcinfer.party.catalogue import Catalogue
from mpcinfer.party.epoch import Former
from mpcinfer.party.inbox import Inbox
from mpcinfer.party.lane import Lane
from mpcinfer.party.service import MeshService, PartyService
from mpcinfer.party.store import Store
from mpcinfer.protocol.warm import warm_up
from mpcinfer.wire.identity import Identity
from mpcinfer.wire.server import Server, configure_logging, stop_signal
from mpcinfer.wire.v1 import mesh_pb2_grpc, party_pb2_grpc

_log = logging.getLogger(__name__)


def serve(node: Node) -> None:
    """Run until SIGTERM or SIGINT."""
    configure_logging(node.log_level)
    stopped = stop_signal()
    if not node.role.startswith("party/") or node.store is None or node.store_key is None:
        raise ConfigError(
            f"a party needs the role party/I, a store and a store_key; this configuration is for {node.role}"
        )
    torch.set_num_threads(1)  # one lane computes at a time, and parties of one machine share its cores
    index, limits = int(node.role.partition("/")[2]), node.limits
    identity = Identity.load(node.key_path, node.certificate_path)
    with Store.open(node.store, node.store_key) as store:
        catalogue = Catalogue(store)
        inbox = Inbox(limits.max_waiting_requests)
        former = Former(node, identity, inbox.wake)
        lane = Lane(index, former, inbox, catalogue, limits)

        def add(server: grpc.Server) -> None:
            service = PartyService(node.cluster, lane, inbox, catalogue, store, limits)
            party_pb2_grpc.add_PartyServiceServicer_to_server(service, server)
            mesh_pb2_grpc.add_MeshServiceServicer_to_server(MeshService(node.cluster, index, former), server)

        # Waiting requests and peer streams each hold a worker; health and status checks must never wait for one.
        server = Server(node, identity, limits.max_waiting_requests + 4 * node.cluster.n + 16, add)
        warm_up()
        server.start()
        lane.start()
        server.set_serving(True)
        _log.info(
            "party %d of cluster %s listens on %s (%d operators)",
            index,
            node.cluster.name,
            node.listen,
            len(nn.supported()),
        )
        _log.info("%s: stopping", stopped())
        server.set_serving(False)
        lane.stop(limits.stop_grace_s)
        inbox.close(UnavailableError(f"party {index} is stopping"))
        server.stop()
