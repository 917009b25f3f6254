"""`scripts/bench together`: requests for one model one after the other, and as many at the same time, over networks.

First without a pause between them, so that what the dealer sends counts. Then each once the parties have fetched ahead
what they may and nothing is under way: as many requests as come at once are then answered as fast as the parties can.
"""

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

from mpcinfer.client.data import Client

TIMEOUT = 3600.0  # seconds, for a request
POOL_MB = 4096  # what may be fetched ahead, at each party
_QUIET, _SHARE = 2.0, 0.05  # seconds in which the processes use less of a core than this share: nothing is under way


def run_together(options: argparse.Namespace, say: Console) -> Row:
    """Each workload over every network, alone and at the same time: the report."""
    before = os.getloadavg()
    rows: list[Row] = []
    networks: dict[str, Row | None] = {}
    limits = {"max_batch": options.together, "pool_mb": POOL_MB}
    for place, network in visited(options.networks, networks):
        for name in options.workloads:
            with ExitStack() as stack, say.status(f"{place}: {name}"):
                found = _measured(Ours(options.parties, stack, network, limits), name, options)
                rows += [{"network": place, "peers": {}, "ratios": {}, **row} for row in found]
            rates = [row["ours"]["requests_per_second"] for row in found]
            for alone, together, said in ((*rates[:2], "without a pause"), (*rates[2:], "fetched ahead")):
                say.print(
                    f"{place}, {name}, {said}: {options.together} at a time {together / alone:.2f} x as many a second"
                )
    settings = {"parties": options.parties, "repeat": options.repeat, "together": options.together, **limits}
    return report(options, before, [], settings | {"tiny": options.tiny}, networks, rows)


def _measured(ours: Ours, name: str, options: argparse.Namespace) -> list[Row]:
    """Four rows: `repeat` requests one after the other, and `repeat` times as many at the same time as are asked for;
    both without a pause, and both with all that is fetched ahead there before.
    """
    workload = WORKLOADS["models"][name](options.tiny)
    case = OurCase(ours, workload)
    rows = []
    with ExitStack() as stack:
        clients = [stack.enter_context(ours.connect()) for _ in range(options.together)]
        for ahead in (False, True):
            for count in (1, options.together):
                _batch(case, clients[:count])  # plans for so many, and what else is slow the first time
                _settle(ours)
                samples: list[Row] = []
                seconds, used, requests = 0.0, _cpu_seconds(ours), count * (options.repeat + (not ahead))
                if not ahead:  # takes what was fetched ahead, and is not timed
                    _batch(case, clients[:count])
                for _ in range(options.repeat):
                    if ahead:
                        _settle(ours)
                    began = time.perf_counter()
                    samples += _batch(case, clients[:count])
                    seconds += time.perf_counter() - began
                _settle(ours)  # what was fetched ahead before is there again: it is counted
                own = figures(ours, samples) | {
                    "requests_per_second": len(samples) / seconds,
                    "cpu_seconds_per_request": (_cpu_seconds(ours) - used) / requests,
                    "deploy_seconds": case.deploy_seconds,
                    **workload.judged(samples[-1]["output"], case.frac_bits),
                }
                own["right"] = all(workload.judged(sample["output"], case.frac_bits)["right"] for sample in samples)
                said = [workload.name]
                said += [f"{count} requests at a time"] * (count > 1) + ["fetched ahead"] * ahead
                rows.append({"name": ", ".join(said), "right": workload.required(), "ours": own})
    ours.owner.remove("bench")
    return rows


def _batch(case: OurCase, clients: list[Client]) -> list[Row]:
    """A request of each client, all at the same time."""
    samples: list[Row] = []

    def ask(client: Client) -> None:
        began = time.perf_counter()
        output = client.infer("bench", case.workload.arrays["x"], timeout=TIMEOUT)
        seconds = time.perf_counter() - began
        assert client.last_cost is not None
        samples.append({"client": seconds, "output": output, **client.last_cost})

    threads = [threading.Thread(target=ask, args=[client]) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(samples) < len(clients):
        raise RuntimeError("a request has failed; see above")
    return samples


def _settle(ours: Ours) -> None:
    """Wait until nothing is under way: no party fetches anything more ahead."""
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        before = _cpu_seconds(ours)
        time.sleep(_QUIET)
        if _cpu_seconds(ours) - before < _QUIET * _SHARE:
            return
    raise RuntimeError("the parties did not come to rest")


def _cpu_seconds(ours: Ours) -> float:
    """What all parties and the dealer have used so far."""
    ticks = 0
    for role in ours.roles:
        fields = Path(f"/proc/{ours.cluster.pid(role)}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
