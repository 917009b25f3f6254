"""What the dealer's figures say of calls over mutual TLS, and that they name nobody."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from mpcinfer.config import PROTOCOL_VERSION, Limits
from mpcinfer.dealer.server import build
from mpcinfer.errors import ConfigError
from mpcinfer.protocol.tracing import Plan
from mpcinfer.protocol.truncate import Truncation
from mpcinfer.wire import channel
from mpcinfer.wire.v1 import dealer_pb2, dealer_pb2_grpc
from tests.inprocess import Keys, wait_for
from tests.scrapes import Figures, documented, families, strange_labels

PLAN = Plan((("zebra#0", Truncation((300_000,), 16)),))
PREFIX = "mpcinfer_dealer"
LATE = 0.3


class Parties:
    """A running dealer that shows its figures, and all parties' calls to it."""

    def __init__(self, directory: Path, n: int) -> None:
        self.keys = Keys(directory, n, Limits(connect_timeout_s=10, step_timeout_s=10))
        self.dealer, self.server = build(replace(self.keys.node("dealer"), metrics_listen="127.0.0.1:0"))
        self.server.start()
        self.server.set_serving(True)
        cluster = self.keys.cluster
        self.channels = [
            channel.connect(cluster.dealer, cluster, self.keys.identity(f"party/{i}"), timeout=20) for i in range(n)
        ]
        self.stubs: list[Any] = [dealer_pb2_grpc.DealerServiceStub(c) for c in self.channels]
        self.n, self.session = n, b""

    @property
    def url(self) -> str:
        assert self.server.metrics is not None
        return f"http://127.0.0.1:{self.server.metrics.port}/metrics"

    def shown(self) -> Figures:
        return Figures(httpx.get(self.url).text, PREFIX)

    def join(self) -> None:
        self.session = secrets.token_bytes(16)

        def one(i: int) -> None:
            request = dealer_pb2.JoinRequest(
                session=self.session,
                index=i,
                nonce=secrets.token_bytes(32),
                public_key=X25519PrivateKey.generate().public_key().public_bytes_raw(),
                cluster_digest=self.keys.cluster.digest(),
                protocol_version=PROTOCOL_VERSION,
            )
            self.stubs[i].Join(request, timeout=20)

        with ThreadPoolExecutor(self.n) as pool:
            list(pool.map(one, range(self.n)))

    def ask(self, i: int, tape: bytes) -> Any:
        request = dealer_pb2.DealRequest(
            session=self.session, index=i, tape=tape, plan_digest=PLAN.digest(), plan=PLAN.to_bytes()
        )
        return self.stubs[i].Deal(request, timeout=30)

    def deal(self, tape: bytes) -> int:
        """All ask, the last of them late; how many bytes of frames the last one gets."""

        def one(i: int) -> int:
            if i == self.n - 1:
                time.sleep(LATE)
            return sum(part.ByteSize() + 5 for part in self.ask(i, tape))

        with ThreadPoolExecutor(self.n) as pool:
            return list(pool.map(one, range(self.n)))[-1]


@pytest.fixture(params=[2, 3], ids="n={}".format)
def parties(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Parties]:
    running = Parties(tmp_path, request.param)
    yield running
    for opened in running.channels:
        opened.close()
    running.server.stop()


def test_tapes_bytes_and_waiting(parties: Parties) -> None:
    found = parties.shown()
    assert (found["ready"], found["sessions_total"], found["tapes_total"]) == (0, 0, 0)
    parties.join()
    received = sum(parties.deal(bytes([i]) * 16) for i in range(2))
    wait_for(lambda: parties.shown().get("calls_total", "deal", "ok") == 2 * parties.n)
    found = parties.shown()
    assert (found["ready"], found["sessions_total"], found["tapes_total"]) == (1, 1, 2)
    assert found["sent_bytes_total"] == received > 2 * PLAN.correction_bytes()
    assert (found["lag_seconds_count"], found["open_tapes"], found["burnt_tapes_total"]) == (2, 0, 0)
    assert 0 < found["dealing_seconds_total"] <= found["lag_seconds_sum"] < 20
    for i in range(parties.n - 1):
        assert found["waiting_seconds_total", str(i)] > LATE  # twice, but threads begin late now and then
    assert found["waiting_seconds_total", str(parties.n - 1)] < LATE
    assert found["calls_total", "join", "ok"] == parties.n
    assert found["process_resident_memory_bytes"] > 1 << 20


def test_what_goes_wrong(parties: Parties) -> None:
    parties.join()
    waiting = parties.ask(0, b"u" * 16)
    wait_for(lambda: parties.shown()["open_tapes"] == 1)
    waiting.cancel()
    wait_for(lambda: parties.shown()["burnt_tapes_total"] == 1)
    with pytest.raises(grpc.RpcError):
        list(parties.ask(1, b"u" * 16))
    wait_for(lambda: parties.shown().get("calls_total", "deal", "ConflictError") == 1)
    found = parties.shown()
    assert (found["open_tapes"], found["tapes_total"], found["lag_seconds_count"]) == (0, 0, 0)
    assert list(strange_labels(found.text)) == []
    for name in ("zebra", "alice", "local", parties.session.hex()[:8], (b"u" * 16).hex()[:8]):
        assert name not in found.text


def test_the_page_for_operators_lists_all_figures(parties: Parties) -> None:
    assert documented(PREFIX) == families(parties.shown().text, PREFIX)


def test_the_port(parties: Parties, tmp_path: Path) -> None:
    assert parties.server.metrics is not None
    keys = Keys(tmp_path / "other", 2)
    node = replace(keys.node("dealer"), metrics_listen=f"127.0.0.1:{parties.server.metrics.port}")
    with pytest.raises(ConfigError, match="set another metrics_listen"):
        build(node)
    _, server = build(replace(node, metrics_listen=""))
    assert server.metrics is None
    server.stop()
