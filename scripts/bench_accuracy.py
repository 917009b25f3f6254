"""`scripts/bench accuracy`: how exact each function is, of this system and of others, on the same points."""

from __future__ import annotations

import argparse
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_functions import PEER_SLACK, RANGES, Array, Function, behind, functions
from bench_ours import Ours, machine
from bench_peers.host import PEERS, Parties, PeerFailed
from bench_report import Row, said
from rich.console import Console

from mpcinfer.errors import MpcInferError, UnsupportedError

PEER_TIMEOUT, OUR_TIMEOUT = 900.0, 300.0  # seconds, for a function of a peer on one range, for one request of ours
_REQUEST = 25_000  # points in a request of ours, about
_DIGITS = 4  # what is kept of each figure


class Reused(Exception):
    """An earlier report whose results cannot stand in for new ones; the text says why."""


def run_accuracy(options: argparse.Namespace, say: Console, earlier: Row | None = None) -> Row:
    """All functions with each number of parties: the report.

    The peers' results are taken from `earlier`, if given; Reused, before anything is started, if that cannot be.
    """
    chosen = [f for f in functions(options.tiny) if not options.functions or f.operation in options.functions]
    settings = {"parties": options.parties, "peers": options.peers, "peer_slack": PEER_SLACK, "tiny": options.tiny}
    rows: list[Row] = [
        {"name": f.name, "tolerance": f.tolerance.text, "points": f.described, "parties": {}} for f in chosen
    ]
    known = {}
    if earlier is not None:
        if earlier["settings"]["tiny"] != options.tiny:
            raise Reused("it was made with other numbers of points")
        known = {(row["name"], n): reused(earlier, row, n, options.peers) for row in rows for n in options.parties}
    before = os.getloadavg()
    for n in options.parties:
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mpcinfer-bench-")))
            with say.status("starting a dealer and parties"):
                ours = Ours(n, stack)
            peers = [stack.enter_context(Parties(PEERS[name], n)) for name in options.peers if not known]
            for function, row in zip(chosen, rows, strict=True):
                with say.status(f"{function.name}, {n} parties"):
                    own = our_result(ours, function)
                    others = known.get((function.name, n), {})
                    others |= {peer.peer.name: peer_result(peer, function, directory) for peer in peers}
                row["parties"][str(n)] = {"systems": {"mpcinfer": own, **others}, "behind": behind(own, others)}
                verdicts = [f"{name} {said(result)}" for name, result in [("mpcinfer", own), *others.items()]]
                say.print(f"{function.name}, {n} parties: {', '.join(verdicts)}")
    return {"machine": machine(before, options.peers), "settings": settings, "functions": rows}


def our_result(ours: Ours, function: Function) -> Row:
    """Both ranges on one deployed model, if their rows have one shape; else a model each."""
    outputs, ulp = {}, 0.0
    try:
        for within in RANGES:
            x = function.points[within]
            alike = [p for p in function.points.values() if p.shape[1:] == x.shape[1:]]
            if within == RANGES[0] or len(alike) == 1:
                example = torch.from_numpy(np.concatenate(alike)).float()
                ours.owner.deploy(function.model, example, name="accuracy")
                ulp = 2.0 ** -ours.owner.models()[-1].outputs[0].frac_bits
            outputs[within] = _inferred(ours, x)
        ours.owner.remove("accuracy")
    except UnsupportedError as error:
        return {"refused": str(error).partition(". Supported:")[0]}
    except MpcInferError as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    return _both({within: function.judged(within, outputs[within], ulp) for within in RANGES})


def _inferred(ours: Ours, x: Array) -> Array:
    step = max(1, _REQUEST // int(np.prod(x.shape[1:])))
    parts = [ours.client.infer("accuracy", x[i : i + step], timeout=OUR_TIMEOUT) for i in range(0, len(x), step)]
    return np.concatenate(parts)


def peer_result(parties: Parties, function: Function, directory: Path) -> Row:
    """Each range on its own: a peer that fails on one may still be right on the other, but is not right then."""
    peer = parties.peer
    if function.operation in peer.lacks:
        return {"lacks": True}
    arrays, output = directory / "arrays.npz", directory / "output.npy"
    judged: dict[str, Row] = {}
    for within in RANGES:
        np.savez(arrays, **function.arrays(within))
        output.unlink(missing_ok=True)
        try:
            parties.call("evaluate", PEER_TIMEOUT, function=function.operation, arrays=str(arrays), output=str(output))
        except PeerFailed as error:
            return {"failed": f"{within}: {error}"}
        judged[within] = function.judged(within, np.load(output), 2.0**-peer.frac_bits, PEER_SLACK)
    return _both(judged)


def _both(judged: dict[str, Row]) -> Row:
    return {**_rounded(judged), "right": all(row["right"] for row in judged.values())}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def reused(earlier: Row, row: Row, parties: int, peers: list[str]) -> dict[str, Row]:
    """The peers' results in an earlier report of what `row` describes; Reused if it is not about that.

    Peers that were not run then, or not with so many parties, are `absent`.
    """
    found = next((r for r in earlier["functions"] if r["name"] == row["name"]), None)
    if found is None or found["points"] != row["points"] or found["tolerance"] != row["tolerance"]:
        raise Reused(f"it has no results of {row['name']} on these points")
    systems = found["parties"].get(str(parties), {}).get("systems", {})
    return {name: systems.get(name, {"absent": True}) for name in peers}
