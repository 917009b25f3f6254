"""`scripts/bench ops`, `models` and `peers`: workloads over networks, in one run."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from bench_cases import Workload, measure
from bench_functions import PEER_SLACK
from bench_network import visited
from bench_ours import Ours, report
from bench_peers.host import PEERS, Parties, PeerFailed
from bench_report import Row, brief
from rich.console import Console


def run_timed(options: argparse.Namespace, say: Console, workloads: Mapping[str, Callable[[], Workload]]) -> Row:
    """The workloads over every network, ours and the peers' alternately: the report."""
    rows: list[Row] = []
    networks: dict[str, Row | None] = {}
    for name in options.peers:
        with say.status(f"installing {name}, if it is not there yet"):
            try:
                Parties(PEERS[name], options.parties).install()
            except PeerFailed as error:
                say.print(f"[yellow]{name}: {error}[/]")
    before = os.getloadavg()
    for place, network in visited(options.networks, networks):
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mpcinfer-bench-")))
            peers = {
                name: stack.enter_context(Parties(PEERS[name], options.parties, network)) for name in options.peers
            }
            with say.status(f"{place}: starting a dealer and parties"):
                ours = Ours(options.parties, stack, network)
            for name, make in workloads.items():
                with say.status(f"{place}: {name}") as status:
                    row = measure(make(), ours, peers, directory, options.repeat, status.update)
                rows.append({"network": place, **row})
                say.print(f"{place}, {row['name']}: {brief(row)}")
                if options.json:  # what there is, should the rest be broken off
                    options.json.write_text(json.dumps(_report(options, before, networks, rows), indent=1) + "\n")
    return _report(options, before, networks, rows)


def _report(options: argparse.Namespace, before: tuple[float, float, float], networks: Row, rows: list[Row]) -> Row:
    settings = {
        "parties": options.parties,
        "repeat": options.repeat,
        "tiny": options.tiny,
        "peers": options.peers,
        "peer_slack": PEER_SLACK,
    }
    return report(options, before, options.peers, settings, networks, rows)
