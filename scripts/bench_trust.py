"""What trust costs: requests to three clusters in turn, and the CPU seconds that each process takes.

    python scripts/bench_trust.py [--requests 5] [--sides bare,usual,witnesses] [--json FILE]

`bare` has no grants and budgets, does not compare what was opened, and signs no receipts (bench_bare); `usual` is what
everybody runs; `witnesses` has one for each party. All processes share this machine's cores, so that wall time says
little of witnesses, whose hosts have their own; CPU seconds do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from pretrained import sentence_encoder
from torch import nn

from mpcinfer import Client, ModelOwner
from mpcinfer.client.examples import captured_model
from mpcinfer.client.local import LocalCluster
from mpcinfer.client.proof import Proof

_TICK = os.sysconf("SC_CLK_TCK")
# nothing is fetched while nobody asks: all that a request takes is counted with it
_LIMITS = {"pool_mb": 0}
_IDS = [101, *range(2000, 2030), 102]


_BARE = Path(__file__).parent / "bench_bare"
SIDES = ("bare", "usual", "witnesses")


class Side:
    """A cluster with both models deployed, and what its requests have taken."""

    def __init__(self, name: str) -> None:
        self.bare = name == "bare"
        self.cluster = LocalCluster(limits=_LIMITS, witnesses=name == "witnesses")
        paths = [*([str(_BARE)] if self.bare else []), *filter(None, [os.environ.get("PYTHONPATH")])]
        with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(paths)} if paths else {}):
            self.cluster.start()
        with ModelOwner.connect(self.cluster.cluster_path) as owner:
            small = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
            owner.deploy(small, torch.randn(1, 64), name="small")
            owner.upload(captured_model(sentence_encoder(), reveal="logits"), name="minilm")
        self.client = Client.connect(self.cluster.cluster_path)

    def close(self) -> None:
        """Stop all processes."""
        self.client.close()
        self.cluster.stop()

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far, by role."""
        found = {}
        for role in self.cluster.logs:
            fields = Path(f"/proc/{self.cluster.pid(role)}/stat").read_text().rpartition(")")[2].split()
            found[role] = (int(fields[11]) + int(fields[12])) / _TICK
        return found

    def run(self, request: Callable[[Client], Any], count: int) -> dict[str, float]:
        """What one of `count` requests takes on average: CPU seconds by role, and seconds until its answer."""
        before, began, online = self.cpu(), time.perf_counter(), 0.0
        with mock.patch.object(Proof, "check", lambda *_: None) if self.bare else nullcontext():
            for _ in range(count):
                request(self.client)
                assert self.client.last_cost is not None
                online += self.client.last_cost["online"]["seconds"]
        wall, after = time.perf_counter() - began, self.cpu()
        spent = {role: (after[role] - before[role]) / count for role in before}
        return {**spent, "CPU": sum(spent.values()), "wall": wall / count, "online": online / count}


def main() -> None:
    """Measure, print medians, and write them to a file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=5)
    parser.add_argument("--sides", default=",".join(SIDES), help="which of them")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    x, ids = torch.randn(8, 64), torch.tensor(_IDS)
    cases: dict[str, tuple[Callable[[Client], Any], int]] = {
        "small, 8 rows": (lambda client: client.infer("small", x, timeout=300), 20),
        "minilm, 32 tokens": (lambda client: client.infer("minilm", ids, timeout=300), 1),
    }
    sides = {name: Side(name) for name in options.sides.split(",")}
    try:
        report: dict[str, Any] = {}
        for case, (request, count) in cases.items():
            for side in sides.values():
                side.run(request, 1)  # masks are opened, plans traced
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
            for _ in range(options.requests):
                for name, side in sides.items():
                    runs[name].append(side.run(request, count))
            report[case] = {
                name: {what: statistics.median(run[what] for run in each) for what in each[0]}
                for name, each in runs.items()
            }
            if {"bare", "usual"} <= sides.keys():
                bare, usual = report[case]["bare"], report[case]["usual"]
                report[case]["usual to bare"] = {what: usual[what] / bare[what] for what in ("online", "wall", "CPU")}
    finally:
        for side in sides.values():
            side.close()
    print(json.dumps(report, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
