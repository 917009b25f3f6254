"""The dealer process."""

from __future__ import annotations

import logging

import torch

from mpcinfer.config import Node
from mpcinfer.dealer.dealing import Dealer
from mpcinfer.dealer.service import DealerService
from mpcinfer.errors import ConfigError
from mpcinfer.protocol.warm import warm_up
from mpcinfer.trust.signing import Signer
from mpcinfer.wire.dealt import Writing
from mpcinfer.wire.identity import Identity
from mpcinfer.wire.memory import guard_memory, one_heap, settle
from mpcinfer.wire.server import Server, configure_logging, stop_signal
from mpcinfer.wire.v1 import dealer_pb2_grpc

_log = logging.getLogger(__name__)


def build(node: Node) -> tuple[Dealer, Server]:
    """The dealer and its server, which has its port but does not run yet."""
    if node.role != "dealer":
        raise ConfigError(f"this configuration is for {node.role}; start it with `mpcinfer party`")
    identity = Identity.load(node.key_path, node.certificate_path)
    last = node.cluster.witness(node.cluster.n - 1)
    dealer = Dealer(node.cluster.n, node.cluster.digest(), Signer(identity), witnessed=last is not None)
    service = DealerService(node.cluster, dealer, node.limits)
    # every party may be joining and dealing at once, plus status and health checks; and what is large is sent while it
    # is used, at one time for each of the requests that share a step
    server = Server(
        node,
        identity,
        4 * len(node.cluster.holders) + 8 + node.limits.max_batch,
        lambda s: dealer_pb2_grpc.add_DealerServiceServicer_to_server(service, s),
        service.metrics.figures,
        [Writing()],
    )
    return dealer, server


def serve(node: Node) -> None:
    """Run until SIGTERM or SIGINT."""
    configure_logging(node.log_level)
    guard_memory()
    one_heap()
    stopped = stop_signal()
    torch.set_num_threads(1)
    _, server = build(node)
    warm_up()
    settle()
    server.start()
    server.set_serving(True)
    _log.info("dealer of cluster %s listens on %s", node.cluster.name, node.listen)
    _log.info("%s: stopping", stopped())
    server.stop()
