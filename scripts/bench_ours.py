"""Our side of a benchmark: a cluster on this machine, used through the SDK, and what this machine is."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

from bench_network import Relay
from bench_peers.host import PEERS
from bench_report import Row

from mpcinfer import Client, ModelOwner
from mpcinfer.client.local import LocalCluster
from mpcinfer.graph.explain import Network

LIMITS = {"step_timeout_s": 3600.0}  # a slow network is no failure


class Ours:
    """A local cluster, parties and dealer as separate processes over mTLS gRPC, used through the SDK."""

    def __init__(
        self,
        parties: int,
        stack: ExitStack,
        network: Network | None = None,
        limits: Mapping[str, float] | None = None,
    ) -> None:
        """`network`: between all processes, the client included; else the loopback device. limits: of node files, where
        they are not the usual ones.
        """
        relay = stack.enter_context(Relay(network)) if network else None
        via = relay.route if relay else None
        self.cluster = stack.enter_context(LocalCluster(parties=parties, via=via, limits=LIMITS | dict(limits or {})))
        path = self.cluster.cluster_path
        self.owner = stack.enter_context(ModelOwner.connect(path, self.cluster.identity("owner/owner")))
        self.client = stack.enter_context(self.connect())
        self.roles = ["dealer", *(endpoint.role for endpoint in self.cluster.cluster.parties)]

    def connect(self) -> Client:
        """Another client, to be closed."""
        return Client.connect(self.cluster.cluster_path, self.cluster.identity("client/client"))


def report(
    options: argparse.Namespace,
    before: tuple[float, float, float],
    peers: Iterable[str],
    settings: Row,
    networks: Row,
    rows: list[Row],
) -> Row:
    """What --json writes. before: the load average before the first run."""
    return {
        "command": options.command,
        "machine": machine(before, peers),
        "settings": settings,
        "networks": networks,
        "rows": rows,
    }


def machine(load_before: tuple[float, float, float], peers: Iterable[str]) -> Row:
    """What this ran on, and how busy it was."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [s for s in cpuinfo.read_text().splitlines() if s.startswith("model name")] if cpuinfo.exists() else []
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("mpcinfer", "torch", "grpcio")}
        | {PEERS[name].package: PEERS[name].version for name in peers},
        "load_before": round(load_before[0], 2),
        "load_after": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d"),
    }
