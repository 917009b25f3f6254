"""What a party's figures say, beside what the same calls told their callers, and that they name nobody."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from mpcinfer.config import Limits
from mpcinfer.errors import AbortedError, BusyError, ConfigError
from mpcinfer.party.metrics import PartyMetrics
from mpcinfer.party.part import Phase
from mpcinfer.party.server import Party
from mpcinfer.wire.mesh import CONTROL, Account
from tests.inprocess import Caller, InProcess, Keys, free_ports, kinds, mlp, random_weights
from tests.scrapes import Figures, documented, families, strange_labels

PROGRAM = mlp()
WEIGHTS = random_weights(PROGRAM)
X = torch.linspace(-2, 2, 12).reshape(3, 4)
PREFIX = "mpcinfer_party"
NAME = "zebra"  # of a model


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids="n={}".format)
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    with InProcess(tmp_path_factory.mktemp("metrics"), request.param, Limits(pool_mb=0)) as running:
        yield running


@pytest.fixture
def caller(cluster: InProcess) -> Caller:
    caller = cluster.caller()
    assert kinds(caller.deploy(PROGRAM, WEIGHTS, NAME)) == ["DeployResponse"] * cluster.n
    return caller


def shown(cluster: InProcess) -> list[Figures]:
    """What each party shows. A call is counted before its answer goes."""
    texts = [party.metrics.figures.text().decode() for _, party in sorted(cluster.parties.items())]
    return [Figures(text, PREFIX) for text in texts]


def test_an_inference_counts_what_its_caller_is_told(cluster: InProcess, caller: Caller) -> None:
    before = shown(cluster)
    answers = [caller.infer(X, NAME) for _ in range(2)]
    after = shown(cluster)
    for i, (old, new) in enumerate(zip(before, after, strict=True)):

        def grown(*key: str, old: Figures = old, new: Figures = new) -> float:
            return new[key] - old.get(*key)

        online, offline = ([getattr(a[i], phase) for a in answers] for phase in ("online", "offline"))
        peers = [str(peer) for peer in range(cluster.n) if peer != i]
        assert grown("rounds_total", "infer") == sum(cost.rounds for cost in online) > 0
        sent = sum(grown("link_bytes_total", peer, "openings") for peer in peers)
        assert sent == sum(cost.bytes_sent for cost in online) > 0
        assert sum(grown("link_bytes_total", peer, "control") for peer in peers) > sum(c.bytes_sent for c in offline)
        assert grown("dealer_bytes_total", "infer") == sum(cost.bytes_from_dealer for cost in offline)
        assert grown("requests_total", "infer", "ok") == 2
        for phase, costs in (("online", online), ("offline", offline)):
            assert grown("request_seconds_count", "infer", phase) == 2
            seconds = sum(cost.seconds for cost in costs)
            assert grown("request_seconds_sum", "infer", phase) == pytest.approx(seconds, rel=1e-6)
        assert grown("request_seconds_sum", "infer", "total") > grown("request_seconds_sum", "infer", "online")
        assert 0 < grown("waiting_seconds_total", "infer", "openings") < sum(cost.seconds for cost in online)
        assert grown("waiting_seconds_total", "infer", "votes") > 0
        assert grown("waiting_seconds_total", "infer", "dealer") > 0
        assert grown("rounds_total", "deploy") == grown("rounds_total", "generate") == 0
        assert (new["ready"], new["waiting_requests"], new["sessions"], new["models"]) == (1, 0, 0, old["models"])
        assert new["rounds_total", "deploy"] >= 1 and new["requests_total", "deploy", "ok"] >= 1
        assert new["process_resident_memory_bytes"] > 1 << 20
    dealt = [figures["dealer_bytes_total", "infer"] for figures in after]
    assert dealt[-1] > 0 and not any(dealt[:-1])


def test_refusals_are_counted_by_their_class_and_nobody_is_named(cluster: InProcess, caller: Caller) -> None:
    before = shown(cluster)
    assert kinds(caller.infer(X, "giraffe")) == ["NotFoundError"] * cluster.n
    assert kinds(caller.infer(X[:, :2], NAME)) == ["ShapeError"] * cluster.n
    bob = cluster.caller("client/bob")
    assert kinds(bob.deploy(PROGRAM, WEIGHTS, NAME)) == ["ForbiddenError"] * cluster.n
    for old, new in zip(before, shown(cluster), strict=True):
        assert (
            new["requests_total", "infer", "NotFoundError"] == old.get("requests_total", "infer", "NotFoundError") + 1
        )
        assert new["requests_total", "infer", "ShapeError"] == old.get("requests_total", "infer", "ShapeError") + 1
        forbidden = ("requests_total", "deploy", "ForbiddenError")
        assert new[forbidden] == old.get(*forbidden) + 1
        assert new.get("request_seconds_count", "infer", "total") == new.get("requests_total", "infer", "ok")
        assert list(strange_labels(new.text)) == []
        for name in (NAME, "giraffe", "alice", "eve", "bob", "owner", "client", "local"):
            assert name not in new.text
    ids = [party.catalogue.models()[0].id.hex() for party in cluster.parties.values()]
    assert not any(i[:8] in figures.text for i in ids for figures in shown(cluster))


def test_figures_go_on_when_the_parties_begin_anew(cluster: InProcess, caller: Caller) -> None:
    caller.infer(X, NAME)
    before = shown(cluster)
    renewed = cluster.new_epoch()
    epoch = cluster.parties[0].former.current
    assert epoch is not None
    epoch.close()
    renewed()
    after = shown(cluster)
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        assert new["epochs_total"] == old["epochs_total"] + 1
        assert new["rounds_total", "infer"] == old["rounds_total", "infer"]
        for peer in range(cluster.n):
            if peer != i:
                openings, control = (
                    ("link_bytes_total", str(peer), "openings"),
                    ("link_bytes_total", str(peer), "control"),
                )
                assert new[openings] == old[openings] and new[control] > old[control]
    caller.infer(X, NAME)
    for old, new in zip(after, shown(cluster), strict=True):
        assert new["rounds_total", "infer"] > old["rounds_total", "infer"]


def test_a_party_that_is_not_connected_says_so(tmp_path: Path) -> None:
    keys = Keys(tmp_path, 2)
    port = free_ports(1)[0]
    party = Party(replace(keys.node("party/1"), metrics_listen=f"127.0.0.1:{port}"))
    party.start()
    try:
        text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        assert Figures(text, PREFIX)["ready"] == 0 and Figures(text, PREFIX)["epochs_total"] == 0
        # the port is taken, and what a party has opened before it finds out is closed again
        other = replace(keys.node("party/0"), metrics_listen=f"127.0.0.1:{port}")
        with pytest.raises(ConfigError, match="set another metrics_listen"):
            Party(other)
    finally:
        party.stop()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/metrics")
    Party(other).stop()


def test_a_party_without_metrics_listens_nowhere_more(cluster: InProcess) -> None:
    assert [party.server.metrics for party in cluster.parties.values()] == [None] * cluster.n


def test_the_page_for_operators_lists_all_figures(cluster: InProcess) -> None:
    text = cluster.parties[0].metrics.figures.text().decode()
    assert documented(PREFIX) == families(text, PREFIX)


# --- in isolation ----------------------------------------------------------------------------------------------------


def now(metrics: PartyMetrics) -> Figures:
    return Figures(metrics.figures.text().decode(), PREFIX)


def test_tokens_and_their_seconds() -> None:
    metrics, online, offline = PartyMetrics(), Phase(0.25, 10, 100), Phase(0.5, 0, 10)
    with metrics.call("generate", bool) as call:
        metrics.wrote(call, 32, False, online, offline)
        metrics.wrote(call, 40, True, online, offline)
        time.sleep(0.05)
        metrics.wrote(call, 40, True, online, offline)
    found = now(metrics)
    assert (found["tokens_total", "prompt"], found["tokens_total", "written"]) == (40, 2)
    assert 1 < found["tokens_per_second"] <= 20
    assert (found["token_seconds_count", "online"], found["token_seconds_sum", "online"]) == (2, 0.5)
    assert found["request_seconds_sum", "generate", "offline"] == 1.5
    assert found["request_seconds_count", "generate", "online"] == 1


@pytest.mark.parametrize(
    ("error", "result"), [(BusyError("x"), "BusyError"), (queue.Empty(), "internal"), (GeneratorExit(), "cancelled")]
)
def test_calls_that_fail(error: BaseException, result: str) -> None:
    metrics = PartyMetrics()
    with pytest.raises(type(error)), metrics.call("infer", bool) as call:
        metrics.step(call, Phase(1.0, 1, 1), Phase(1.0, 1, 1))
        raise error
    found = now(metrics)
    assert found["requests_total", "infer", result] == 1 and found.sum("request_seconds_count") == 0


@pytest.mark.parametrize(("written", "result"), [(0, "cancelled"), (1, "ok")])
@pytest.mark.parametrize("error", [AbortedError("the caller has gone"), GeneratorExit()], ids=["waiting", "sending"])
def test_a_caller_hangs_up_on_the_last_token_it_wants(error: BaseException, written: int, result: str) -> None:
    metrics = PartyMetrics()
    with pytest.raises(type(error)), metrics.call("generate", lambda: True) as call:
        metrics.wrote(call, 3, bool(written), Phase(1.0, 1, 1), Phase(1.0, 1, 1))
        raise error
    assert now(metrics)["requests_total", "generate", result] == 1
    assert now(metrics).get("request_seconds_count", "generate", "total") == written


def test_what_party_0_announces_becomes_no_label() -> None:
    metrics = PartyMetrics()
    metrics.account(NAME).rounds += 1
    assert NAME not in now(metrics).text and now(metrics).sum("rounds_total") == 0
    assert metrics.account("infer") is metrics.account("infer")


def test_a_pool_shows_its_depth() -> None:
    metrics, depths = PartyMetrics(), {"infer": 3}
    assert now(metrics).sum("pool_depth") == 0
    metrics.pool(lambda: depths)
    assert now(metrics)["pool_depth", "infer"] == 3
    depths["generate"] = 2
    assert now(metrics)["pool_depth", "generate"] == 2


def test_waiting_is_counted_even_if_it_ends_badly(cluster: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    epoch = cluster.parties[0].former.current
    assert epoch is not None
    mesh, account = epoch.mesh, Account()
    monkeypatch.setattr(mesh, "account", account)
    link = mesh.links[1]

    def receive(kind: int, most: int) -> Any:
        time.sleep(0.02)
        raise BusyError("no answer")

    monkeypatch.setattr(link, "receive", receive)
    monkeypatch.setattr(link, "send", lambda kind, payload: None)
    for other in mesh.links.values():
        monkeypatch.setattr(other, "send", lambda kind, payload: None)
    with pytest.raises(BusyError):
        mesh.exchange(b"", CONTROL)
    assert account.votes_seconds >= 0.02 and account.rounds == 0 and account.openings_seconds == 0
