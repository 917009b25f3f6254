"""`scripts/bench together`: requests for one model one after the other, and as many at the same time, over networks."""

from __future__ import annotations

import argparse
import os
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from bench_cases import OurCase, figures
from bench_models import WORKLOADS
from bench_network import visited
from bench_ours import Ours, report
from bench_report import Row
from rich.console import Console

TIMEOUT = 3600.0  # seconds, for a request


def run_together(options: argparse.Namespace, say: Console) -> Row:
    """Each workload over every network, alone and at the same time: the report."""
    before = os.getloadavg()
    rows: list[Row] = []
    networks: dict[str, Row | None] = {}
    for place, network in visited(options.networks, networks):
        for name in options.workloads:
            with ExitStack() as stack, say.status(f"{place}: {name}"):
                rows += [
                    {"network": place, "peers": {}, "ratios": {}, **row}
                    for row in _measured(Ours(options.parties, stack, network), name, options)
                ]
            alone, together = (row["ours"]["requests_per_second"] for row in rows[-2:])
            say.print(f"{place}, {name}: {options.together} at a time {together / alone:.2f} x as many a second")
    settings = {"parties": options.parties, "repeat": options.repeat, "together": options.together}
    return report(options, before, [], settings | {"tiny": options.tiny}, networks, rows)


def _measured(ours: Ours, name: str, options: argparse.Namespace) -> list[Row]:
    """Two rows: `repeat` requests one after the other, and `repeat` times as many at the same time as are asked for."""
    workload = WORKLOADS["models"][name](options.tiny)
    case = OurCase(ours, workload)
    rows = []
    for count in (1, options.together):
        _batch(case, count)  # plans for so many, and what else is slow the first time
        samples: list[Row] = []
        began, used = time.perf_counter(), _cpu_seconds(ours)
        for _ in range(options.repeat):
            samples += _batch(case, count)
        seconds, used = time.perf_counter() - began, _cpu_seconds(ours) - used
        own = figures(ours, samples) | {
            "requests_per_second": len(samples) / seconds,
            "cpu_seconds_per_request": used / len(samples),
            "deploy_seconds": case.deploy_seconds,
            **workload.judged(samples[-1]["output"], case.frac_bits),
        }
        own["right"] = all(workload.judged(sample["output"], case.frac_bits)["right"] for sample in samples)
        said = workload.name if count == 1 else f"{workload.name}, {count} requests at a time"
        rows.append({"name": said, "right": workload.required(), "ours": own})
    ours.owner.remove("bench")
    return rows


def _batch(case: OurCase, count: int) -> list[Row]:
    """So many requests at the same time, each by a client of its own."""
    samples: list[Row] = []

    def ask() -> None:
        with case.ours.connect() as client:
            began = time.perf_counter()
            output = client.infer("bench", case.workload.arrays["x"], timeout=TIMEOUT)
            seconds = time.perf_counter() - began
            assert client.last_cost is not None
            samples.append({"client": seconds, "output": output, **client.last_cost})

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(samples) < count:
        raise RuntimeError("a request has failed; see above")
    return samples


def _cpu_seconds(ours: Ours) -> float:
    """What all parties and the dealer have used so far."""
    ticks = 0
    for role in ours.roles:
        fields = Path(f"/proc/{ours.cluster.pid(role)}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
