"""`scripts/bench ops`: what single operations cost on this machine, beside other systems, in one run.

Definitions are in docs/benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_ours import Ours, machine
from bench_peers.host import PEERS, Parties, PeerFailed
from bench_report import Row, brief
from rich.console import Console
from torch import nn
from torch.nn import functional

from mpcinfer.errors import MpcInferError

TOLERANCE = 0.005  # the largest absolute error that counts as right
PREPARE_TIMEOUT, RUN_TIMEOUT = 300.0, 180.0  # seconds, for one case of a peer or one request of ours

Arrays = dict[str, np.ndarray[Any, Any]]


# --- workloads --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """One operation on fixed arrays: x, the client's, and where there are weights w, the model owner's; float64."""

    name: str
    operation: str  # as the peers' runners know it
    arrays: Arrays
    model: nn.Module  # float32, as a user would deploy it
    reference: np.ndarray[Any, Any]
    reveal: str = "logits"

    def error(self, got: np.ndarray[Any, Any]) -> float:
        """The largest absolute error; of an argmax, by how much the value chosen is below the maximum."""
        if got.size != self.reference.size:
            return float("inf")
        if self.operation == "argmax":
            x, index = self.arrays["x"][0], int(got.reshape(()))
            return float(x.max() - x[index]) if 0 <= index < x.size else float("inf")
        error = np.abs(got.reshape(self.reference.shape) - self.reference).max()
        return float(error) if np.isfinite(error) else float("inf")


def workloads(tiny: bool) -> list[Workload]:
    """The fixed list; `tiny`: the same operations on sizes that only show that everything works."""
    sizes: tuple[tuple[int, int, int], ...] = ((16, 768, 3072), (128, 768, 768))
    channels, image, elements, pooled, classes = 64, 56, 100_000, (64, 112), 1000
    if tiny:
        sizes, channels, image, elements, pooled, classes = ((4, 32, 16), (8, 16, 16)), 3, 8, 100, (2, 8), 10
    draw = np.random.default_rng(1).normal
    found = []
    for m, k, n in sizes:
        x, w = draw(0, 1, (m, k)), draw(0, 0.04, (k, n))
        linear = nn.Linear(k, n, bias=False)
        _set(linear, w.T)
        found.append(Workload(f"matmul {m}x{k} @ {k}x{n}", "matmul", {"x": x, "w": w}, linear, x @ w))
    x, w = draw(0, 1, (1, channels, image, image)), draw(0, 0.04, (channels, channels, 3, 3))
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    _set(conv, w)
    expected = functional.conv2d(torch.from_numpy(x), torch.from_numpy(w), padding=1).numpy()
    name = f"conv 3x3 {channels}->{channels} on {image}x{image}"
    found.append(Workload(name, "conv", {"x": x, "w": w}, conv, expected))
    x = draw(0, 2, (1, elements))
    found.append(Workload(f"ReLU {elements:,}", "relu", {"x": x}, nn.ReLU(), np.maximum(x, 0)))
    depth, side = pooled
    x = draw(0, 2, (1, depth, side, side))
    expected = x.reshape(1, depth, side // 2, 2, side // 2, 2).max((3, 5))
    found.append(Workload(f"max pool 2x2 {depth}x{side}x{side}", "maxpool", {"x": x}, nn.MaxPool2d(2), expected))
    x = draw(0, 4, (1, classes))
    found.append(Workload(f"argmax {classes:,}", "argmax", {"x": x}, nn.Identity(), x.argmax(-1), reveal="argmax"))
    return found


def _set(module: nn.Linear | nn.Conv2d, weight: np.ndarray[Any, Any]) -> None:
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight)))


# --- ours -------------------------------------------------------------------------------------------------------------


class OurCase:
    """A workload, deployed."""

    def __init__(self, ours: Ours, workload: Workload) -> None:
        self.ours, self.workload = ours, workload
        self.x = workload.arrays["x"]
        self.samples: list[Row] = []
        self.output = np.empty(0)
        for role in ours.roles:
            Path(f"/proc/{ours.cluster.pid(role)}/clear_refs").write_text("5")
        began = time.perf_counter()
        example = torch.from_numpy(self.x).float()
        ours.owner.deploy(workload.model.eval(), example, name="bench", reveal=workload.reveal)
        self.deploy_seconds = time.perf_counter() - began
        self.first_seconds = self._request()["client"]

    def run(self) -> None:
        """One measured request."""
        self.samples.append(self._request())

    def _request(self) -> Row:
        began = time.perf_counter()
        self.output = self.ours.client.infer("bench", self.x, timeout=RUN_TIMEOUT)
        seconds = time.perf_counter() - began
        cost = self.ours.client.last_cost
        assert cost is not None
        return {"client": seconds, **cost}

    def finish(self) -> Row:
        """The figures; the model is removed."""
        peak = {role: _peak(self.ours.cluster.pid(role)) for role in self.ours.roles}
        self.ours.owner.remove("bench")
        online = [s["online"]["seconds"] for s in self.samples]
        total = [s["online"]["seconds"] + s["offline"]["seconds"] for s in self.samples]

        def median(phase: str, key: str) -> float:
            return statistics.median(s[phase][key] for s in self.samples)

        return {
            "online": {key: median("online", key) for key in ("seconds", "rounds", "bytes_sent_per_party")},
            "offline": {key: median("offline", key) for key in ("seconds", "bytes_sent_by_dealer")},
            "total": {
                "seconds": statistics.median(total),
                "client_seconds": statistics.median(s["client"] for s in self.samples),
            },
            "deploy_seconds": self.deploy_seconds,
            "first_request_seconds": self.first_seconds,
            "peak_rss_bytes": {
                "party": max(size for role, size in peak.items() if role != "dealer"),
                "dealer": peak["dealer"],
            },
            "samples": {"online": online, "total": total},
            **_judged(self.workload.error(self.output)),
        }


def _peak(pid: int) -> int:
    """The largest resident size of a process since its clear_refs was written to, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def _judged(error: float) -> Row:
    # JSON knows no infinity
    return {"max_abs_error": error if error < float("inf") else None, "right": error <= TOLERANCE}


# --- peers ------------------------------------------------------------------------------------------------------------


@dataclass
class PeerCase:
    """A workload at a peer, done in one of the ways the peer offers."""

    parties: Parties
    workload: Workload
    directory: Path
    variant: str
    samples: list[float] = field(default_factory=list)
    prepared: list[Row] = field(default_factory=list)
    failed: str = ""

    def prepare(self) -> None:
        """Share the inputs, compile, warm up."""
        arrays = self.directory / "arrays.npz"
        operation = self.workload.operation
        self._call("prepare", PREPARE_TIMEOUT, operation=operation, arrays=str(arrays), variant=self.variant)

    def run(self) -> None:
        """One measured run: the slowest party's time."""
        answers = self._call("run", RUN_TIMEOUT)
        if answers:
            self.samples.append(max(answer["seconds"] for answer in answers))

    def finish(self) -> Row:
        """The figures, or why there are none."""
        output = self.directory / "output.npy"
        output.unlink(missing_ok=True)
        answers = self._call("finish", RUN_TIMEOUT, output=str(output))
        if self.failed:
            return {"failed": self.failed, "variant": self.variant}
        return {
            "seconds": statistics.median(self.samples),
            "variant": self.variant,
            "bytes_sent_per_party": max(answer["bytes_sent"] for answer in self.prepared),
            "rounds": max(answer["rounds"] for answer in self.prepared),
            "first_run_seconds": max(answer["first_run_seconds"] for answer in self.prepared),
            "peak_rss_bytes": {"party": max(answer["peak_rss_bytes"] for answer in answers)},
            "samples": self.samples,
            **_judged(self.workload.error(np.load(output))),
        }

    def _call(self, do: str, timeout: float, **arguments: str) -> list[Row]:
        if self.failed:
            return []
        try:
            answers = self.parties.call(do, timeout, case=f"{self.workload.name} {self.variant}", **arguments)
        except PeerFailed as error:
            self.failed = str(error)
            return []
        if do == "prepare":
            self.prepared = answers
        return answers


def best(rows: list[Row]) -> Row:
    """The fastest of a peer's variants, one that is right if there is one; the other variants' times go with it."""
    chosen = min(rows, key=lambda row: ("failed" in row, not row.get("right"), row.get("seconds", 0.0)))
    others = {row["variant"]: row.get("seconds", row.get("failed")) for row in rows if row is not chosen}
    return {**chosen, "other_variants": others}


# --- the run ----------------------------------------------------------------------------------------------------------


def run_ops(options: argparse.Namespace, say: Console) -> Row:
    """All workloads, ours and the peers' alternately: the report."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mpcinfer-bench-")))
        peers = {name: stack.enter_context(Parties(PEERS[name], options.parties)) for name in options.peers}
        for name, parties in peers.items():
            with say.status(f"installing {name}, if it is not there yet"):
                try:
                    parties.install()
                except PeerFailed as error:
                    say.print(f"[yellow]{name}: {error}[/]")
        before = os.getloadavg()
        with say.status("starting a dealer and parties"):
            ours = Ours(options.parties, stack)
        rows = []
        for workload in workloads(options.tiny):
            with say.status(workload.name) as status:
                rows.append(measure(workload, ours, peers, directory, options.repeat, status.update))
            say.print(f"{workload.name}: {brief(rows[-1])}")
    settings = {"parties": options.parties, "repeat": options.repeat, "tiny": options.tiny, "tolerance": TOLERANCE}
    return {"machine": machine(before, options.peers), "settings": settings, "ops": rows}


def measure(
    workload: Workload,
    ours: Ours,
    peers: dict[str, Parties],
    directory: Path,
    repeat: int,
    tell: Callable[[str], None],
) -> Row:
    """One workload: everybody prepares and warms up, then all run in turn, `repeat` times."""
    np.savez(directory / "arrays.npz", **workload.arrays)
    cases = {
        name: [PeerCase(parties, workload, directory, variant) for variant in PEERS[name].ways(workload.operation)]
        for name, parties in peers.items()
    }
    own: OurCase | None = None
    failed = ""
    for turn in range(-1, repeat):
        tell(f"{workload.name}: {f'run {turn + 1} of {repeat}' if turn >= 0 else 'preparing'}")
        try:
            if own is None and not failed:
                own = OurCase(ours, workload)
            elif own is not None:
                own.run()
        except MpcInferError as error:
            own, failed = None, f"{type(error).__name__}: {error}"
        for case in (case for several in cases.values() for case in several):
            case.prepare() if turn < 0 else case.run()
    row: Row = {"name": workload.name, "ours": own.finish() if own is not None else {"failed": failed}}
    row["peers"] = {name: best([case.finish() for case in several]) for name, several in cases.items()}
    row["ratios"] = {
        f"{phase}_vs_{name}_total": peer["seconds"] / row["ours"][phase]["seconds"]
        for name, peer in row["peers"].items()
        for phase in ("online", "total")
        if "failed" not in peer and "failed" not in row["ours"]
    }
    return row
