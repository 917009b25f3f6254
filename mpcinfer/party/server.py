"""The party process."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack, suppress

import grpc
import torch

from mpcinfer import __version__, nn
from mpcinfer.config import Node
from mpcinfer.errors import ConfigError, StoreError, UnavailableError
from mpcinfer.party.accounts import Accounts
from mpcinfer.party.audit import Audit
from mpcinfer.party.catalogue import Catalogue
from mpcinfer.party.epoch import Former
from mpcinfer.party.grants import Grants
from mpcinfer.party.inbox import Inbox
from mpcinfer.party.lane import Lane
from mpcinfer.party.ledger import Ledger
from mpcinfer.party.manifest import PartyManifest
from mpcinfer.party.mesh_service import MeshService
from mpcinfer.party.metrics import PartyMetrics
from mpcinfer.party.policy import Policy
from mpcinfer.party.receipts import Receipts
from mpcinfer.party.service import PartyService
from mpcinfer.party.session import Sessions
from mpcinfer.party.shadow import ShadowFormer
from mpcinfer.party.store import Store
from mpcinfer.party.uploads import Uploads
from mpcinfer.party.vouching import Vouching
from mpcinfer.protocol.warm import warm_up
from mpcinfer.trust.signing import Signer
from mpcinfer.wire.identity import Identity
from mpcinfer.wire.memory import guard_memory, one_heap, settle
from mpcinfer.wire.server import Server, configure_logging, stop_signal
from mpcinfer.wire.v1 import mesh_pb2_grpc, party_pb2_grpc

_log = logging.getLogger(__name__)


class Party:
    """The parts of one party, put together."""

    def __init__(self, node: Node) -> None:
        """Open the store and take the port; ConfigError, IdentityError, StoreError or ConflictError if that fails."""
        kind, cluster = node.role.partition("/")[0], node.cluster
        if kind not in ("party", "witness") or node.store is None or node.store_key is None:
            raise ConfigError(
                f"a party or witness needs the role party/I or witness/I, a store and a store_key; this configuration "
                f"is for {node.role}"
            )
        self.role, self.index, self._limits = node.role, cluster.endpoint(node.role).index, node.limits
        shadow = kind == "witness"
        identity = Identity.load(node.key_path, node.certificate_path)
        self.store = Store.open(node.store, node.store_key)
        with ExitStack() as undo:
            undo.callback(self.store.close)
            self.audit = Audit(node.store, node.role, cluster.digest())
            undo.callback(self.audit.close)
            self.ledger = Ledger(node.store / "budgets.sqlite")
            undo.callback(self.ledger.close)
            grants, policy = Grants(node.store / "grants", cluster), Policy(self.ledger)
            self.catalogue = Catalogue(self.store, grants)
            self.inbox = Inbox(node.limits.max_waiting_requests)
            self.former = (ShadowFormer if shadow else Former)(node, identity, self.inbox.wake)
            undo.callback(self.former.close)
            limits = node.limits
            self.sessions = Sessions(
                limits.max_sessions,
                limits.session_mb,
                limits.session_idle_s,
                limits.max_sessions_of_client,
                limits.max_sessions_of_owner,
            )
            self.metrics = PartyMetrics()
            self.manifest = PartyManifest(node, identity)
            vouching = Vouching(cluster, Signer(identity)) if cluster.witnesses else None
            self.lane = Lane(
                self.index,
                self.former,
                self.inbox,
                self.catalogue,
                self.sessions,
                policy,
                limits,
                self.metrics,
                self.manifest,
                self.audit,
                vouching,
                shadow=shadow,
            )
            self._show_state()
            uploads = Uploads(self.store, self.inbox, grants, limits, watched=bool(cluster.witnesses))
            service = PartyService(
                cluster,
                self.lane,
                self.inbox,
                self.catalogue,
                self.sessions,
                uploads,
                policy,
                Accounts(cluster, node.issuers),
                limits,
                self.metrics,
                self.manifest,
                Receipts(identity, cluster, self.audit),
                shadow=shadow,
            )
            mesh = MeshService(cluster, self.index, self.former)

            def add(server: grpc.Server) -> None:
                party_pb2_grpc.add_PartyServiceServicer_to_server(service, server)
                mesh_pb2_grpc.add_MeshServiceServicer_to_server(mesh, server)

            # Waiting requests and peer streams each hold a worker; health and status checks must never wait for one.
            workers = node.limits.max_waiting_requests + 4 * cluster.n + 16
            self.server = Server(node, identity, workers, add, self.metrics.figures)
            undo.pop_all()

    def _show_state(self) -> None:
        gauge = self.metrics.figures.gauge
        gauge(
            "ready", "Whether this party is connected to all others and the dealer.", lambda: self.lane.state == "ready"
        )
        gauge("waiting_requests", "Requests that have not been answered.", lambda: len(self.inbox))
        gauge("sessions", "Texts whose keys and values are kept.", lambda: len(self.sessions))
        self.metrics.pool(lambda: {"infer": len(self.lane.pool), "generate": self.sessions.ahead()})
        gauge("models", "Models that all parties hold.", lambda: len(self.catalogue.models()))

    def start(self) -> None:
        """Accept calls, and begin to look for the other parties."""
        self.audit.write("start", package=__version__)
        self.server.start()
        self.lane.start()
        self.server.set_serving(True)

    def stop(self) -> None:
        """Finish what is being computed and answered, as far as the grace period allows; refuse what waits."""
        self.server.set_serving(False)
        self.lane.stop(self._limits.stop_grace_s)
        self.inbox.close(UnavailableError(f"{self.role} is stopping"))
        self.server.stop()
        self.former.close()
        self.ledger.close()
        with suppress(StoreError):  # on a full disk it stops too
            self.audit.write("stop")
        self.audit.close()
        self.store.close()


def serve(node: Node) -> None:
    """Run until SIGTERM or SIGINT."""
    configure_logging(node.log_level)
    guard_memory()
    one_heap()
    stopped = stop_signal()
    # the lane needs the interpreter back in every round, also while another thread expands what is fetched ahead
    sys.setswitchinterval(0.0005)
    torch.set_num_threads(1)  # one lane computes at a time, and parties of one machine share its cores
    party = Party(node)
    try:
        warm_up()
        settle()
        party.start()
        _log.info(
            "%s of cluster %s listens on %s (%d operators)",
            party.role,
            node.cluster.name,
            node.listen,
            len(nn.supported()),
        )
        _log.info("%s: stopping", stopped())
    finally:
        party.stop()
