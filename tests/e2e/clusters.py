"""Running clusters for tests, and connections that keep what went over them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from mpcinfer.client.cluster import Connection
from mpcinfer.client.local import LocalCluster
from mpcinfer.ring import prg
from mpcinfer.ring.domain import Z64
from mpcinfer.wire.v1 import party_pb2, tensor_pb2

HOOKS = Path(__file__).parent / "hooks"


@contextmanager
def local_cluster(
    directory: Path,
    parties: int,
    *,
    opened: Path | None = None,
    temporary: Path | None = None,
    limits: Mapping[str, float] | None = None,
    metrics: Mapping[str, int] | None = None,
    witnesses: bool = False,
) -> Iterator[LocalCluster]:
    """A local cluster that logs everything.

    `opened`: where its parties note their F; `temporary`: their TMPDIR; `limits`: other ones than the default;
    `metrics`: the port of each role's metrics; `witnesses`: one for each party.
    """
    extra = {}
    if opened is not None:
        paths = [str(HOOKS), *filter(None, [os.environ.get("PYTHONPATH")])]
        extra |= {"MPCINFER_TEST_OPENED": str(opened), "PYTHONPATH": os.pathsep.join(paths)}
    if temporary is not None:
        extra["TMPDIR"] = str(temporary)
    cluster = LocalCluster(directory, parties=parties, limits=limits, log_level="debug", witnesses=witnesses)
    for role, port in (metrics or {}).items():
        file = cluster.directory / f"{role.replace('/', '-')}.toml"
        file.write_text(f"metrics_listen = {port}\n{file.read_text()}")
    try:
        with mock.patch.dict(os.environ, extra):
            cluster.start(timeout=120)
        yield cluster
    finally:
        cluster.stop()


@dataclass
class Call:
    """One call at all parties: what each was sent and what each answered."""

    method: str
    sent: list[list[Any]]
    answers: list[Any] = field(default_factory=list)


class Recording(Connection):
    """A connection that keeps its calls."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls: list[Call] = []
        super().__init__(*args, **kwargs)

    def call(self, method: str, requests: Sequence[Any], *, timeout: float) -> list[Any]:
        """As `Connection.call`."""
        call = Call(method, [[] for _ in requests])
        kept = [_kept(request, sent) for request, sent in zip(requests, call.sent, strict=True)]
        self.calls.append(call)
        call.answers = super().call(method, kept, timeout=timeout)
        return call.answers

    def last(self, method: str) -> Call:
        """The latest call of a method."""
        return next(call for call in reversed(self.calls) if call.method == method)


def _kept(request: Any, into: list[Any]) -> Any:
    if not isinstance(request, Iterator):
        into.append(request)
        return request

    def stream() -> Iterator[Any]:
        for message in request:
            into.append(message)
            yield message

    return stream()


def weight_shares(deploy: Call, party: int) -> dict[str, torch.Tensor]:
    """A party's share of each weight, as it was uploaded."""
    header: party_pb2.DeployHeader = deploy.sent[party][0].header
    data = memoryview(b"".join(message.chunk for message in deploy.sent[party][1:]))
    shares = {}
    for weight in header.weights:
        shape = tuple(weight.shape)
        if weight.seed:
            shares[weight.name] = prg.expand(weight.seed, shape, Z64)
        else:
            size = 8 * torch.Size(shape).numel()
            shares[weight.name] = Z64.unpack(data[:size], shape)
            data = data[size:]
    return shares


def shared(tensor: tensor_pb2.Tensor) -> torch.Tensor:
    """The share in a message."""
    shape = tuple(tensor.shape)
    return prg.expand(tensor.seed, shape, Z64) if tensor.seed else Z64.unpack(tensor.data, shape)
