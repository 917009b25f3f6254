"""Run in a network namespace of its own: measures what a local cluster sends, by its own and by the system's account.

    unshare --user --map-root-user --net python -m tests.e2e.traffic PARTIES DIRECTORY

Writes one JSON object to stdout. The loopback interface then carries the cluster's traffic and nothing else.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import socket
import struct
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpcinfer import Client, ModelOwner
from mpcinfer.client.local import LocalCluster
from tests.e2e.clusters import Recording, local_cluster

FEATURES, ROWS = 4096, 256  # 8 MiB to open
REPEATS = 5
MESSAGES = 130  # to warm up: longer sequence numbers take a byte more


@dataclass
class Measured:
    """What one request cost: as each party reports it, as the client's messages weigh, as the system counted."""

    reported: list[dict[str, int]]
    client: int
    loopback: int
    between_parties: dict[str, int]


def main() -> None:
    """Measure."""
    parties, directory = int(sys.argv[1]), Path(sys.argv[2])
    _loopback_up()
    with local_cluster(directory, parties, limits={"pool_mb": 0}) as cluster:
        connection = Recording.to(cluster.cluster_path)
        with ModelOwner(Recording.to(cluster.cluster_path, roles=("owner",))) as owner, Client(connection) as client:
            runs = {"wide": _wide(cluster, owner, client, connection)} | _alike(cluster, owner, client, connection)
    json.dump({name: [asdict(run) for run in measured] for name, measured in runs.items()}, sys.stdout)


def _wide(cluster: LocalCluster, owner: ModelOwner, client: Client, connection: Recording) -> list[Measured]:
    """A linear layer with a wide input: its opening is nearly all that is sent."""
    model = nn.Linear(FEATURES, 2).eval()
    owner.deploy(model, torch.zeros(1, FEATURES), name="wide", timeout=60)
    x = torch.linspace(-1, 1, ROWS * FEATURES).reshape(ROWS, FEATURES)
    client.infer("wide", x[:1], timeout=60)
    return [_measure(cluster, client, connection, "wide", x) for _ in range(3)]


def _alike(
    cluster: LocalCluster, owner: ModelOwner, client: Client, connection: Recording
) -> dict[str, list[Measured]]:
    """Two inputs as different as can be, of one shape, in turn."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 10)).eval()
    owner.deploy(model, torch.zeros(1, 1, 8, 8), name="alike", reveal="argmax", timeout=60)
    inputs = {"zero": torch.zeros(8, 1, 8, 8), "maximal": torch.full((8, 1, 8, 8), 16000.0)}
    rounds = 0
    while rounds < MESSAGES:
        client.infer("alike", inputs["zero"], timeout=60)
        assert client.last_cost is not None
        rounds += int(client.last_cost["online"]["rounds"])
    measured: dict[str, list[Measured]] = {name: [] for name in inputs}
    for _ in range(REPEATS):
        for name, x in inputs.items():
            measured[name].append(_measure(cluster, client, connection, "alike", x))
    return measured


def _measure(cluster: LocalCluster, client: Client, connection: Recording, name: str, x: torch.Tensor) -> Measured:
    before, sent = _loopback_bytes(), _between_parties(cluster)
    client.infer(name, x, version=1, timeout=60)
    after, sent_after = _loopback_bytes(), _between_parties(cluster)
    call = connection.last("Infer")
    messages: list[Any] = [*(request for (request,) in call.sent), *call.answers]
    reported = [
        {
            "rounds": a.online.rounds,
            "online": a.online.bytes_sent,
            "offline": a.offline.bytes_sent,
            "dealer": a.offline.bytes_from_dealer,
        }
        for a in call.answers
    ]
    between = {role: sent_after[role] - sent[role] for role in sent}
    return Measured(reported, sum(m.ByteSize() for m in messages), after - before, between)


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        name, up, set_flags = b"lo", 0x1 | 0x40, 0x8914
        fcntl.ioctl(s, set_flags, struct.pack("16sH14x", name, up))


def _loopback_bytes() -> int:
    """Bytes sent over the loopback interface, with all headers."""
    (line,) = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split(":")[1].split()[8])


def _between_parties(cluster: LocalCluster) -> Counter[str]:
    """TCP payload that each party has sent to other parties, by the system's account; empty where `ss` is missing."""
    sent: Counter[str] = Counter()
    if shutil.which("ss") is None:
        return sent
    roles = {cluster.pid(e.role): e.role for e in cluster.cluster.parties}
    listed = subprocess.run(["ss", "-tinpHO"], capture_output=True, text=True, timeout=20, check=True).stdout
    ends: dict[tuple[str, str], tuple[str, int]] = {}
    for line in listed.splitlines():
        local, remote = line.split()[3:5]
        pid, payload = re.search(r"pid=(\d+)", line), re.search(r"bytes_sent:(\d+)", line)
        if pid and int(pid[1]) in roles:
            ends[local, remote] = roles[int(pid[1])], int(payload[1]) if payload else 0
    for (local, remote), (role, count) in ends.items():
        if (remote, local) in ends:
            sent[role] += count
    return sent


if __name__ == "__main__":
    main()
