"""What parties and dealer, as processes, show to Prometheus, beside what a client is told that its answers cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from torch import nn

from mpcinfer import Client, ModelOwner
from mpcinfer.client.local import LocalCluster
from tests.decoders_local import captured_decoder, tiny_decoder, token_ids
from tests.inprocess import free_ports, wait_for
from tests.scrapes import Figures, strange_labels

X = torch.linspace(-3, 3, 16).reshape(2, 8)
PEOPLE = ("owner/penguin", "client/ocelot")

pytestmark = pytest.mark.timeout(300)


@dataclass
class Scene:
    """A running cluster with the models "giraffe" and "zebra", and the port of each process's metrics."""

    cluster: LocalCluster
    ports: dict[str, int]

    def scraped(self, role: str) -> Figures:
        answer = httpx.get(f"http://127.0.0.1:{self.ports[role]}/metrics")
        assert answer.status_code == 200
        return Figures(answer.text, f"mpcinfer_{role.partition('/')[0]}")

    def parties(self) -> list[Figures]:
        return [self.scraped(f"party/{i}") for i in range(2)]

    def client(self) -> Client:
        return Client.connect(self.cluster.cluster_path, self.cluster.identity(PEOPLE[1]))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    cluster = LocalCluster(
        tmp_path_factory.mktemp("metrics") / "local",
        parties=2,
        owners=["penguin"],
        clients=["ocelot"],
        # nothing is dealt ahead, so that what is counted is what the callers are told
        limits={"pool_mb": 0},
    )
    roles = ["party/0", "party/1", "dealer"]
    ports = dict(zip(roles, free_ports(3), strict=True))
    for role, port in ports.items():
        file: Path = cluster.directory / f"{role.replace('/', '-')}.toml"
        file.write_text(f"metrics_listen = {port}\n{file.read_text()}")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    try:
        cluster.start(timeout=120)
        with ModelOwner.connect(cluster.cluster_path, cluster.identity(PEOPLE[0])) as owner:
            owner.deploy(model, X, name="giraffe")
            owner.upload(captured_decoder(tiny_decoder()), name="zebra")
        yield Scene(cluster, ports)
    finally:
        cluster.stop()


def test_inferences(scene: Scene) -> None:
    before, dealer = scene.parties(), scene.scraped("dealer")
    with scene.client() as client:
        client.infer("giraffe", X)
        cost = client.last_cost
    assert cost is not None
    for i, (old, new) in enumerate(zip(before, scene.parties(), strict=True)):
        peer = str(1 - i)
        assert new["rounds_total", "infer"] - old["rounds_total", "infer"] == cost["online"]["rounds"]
        openings = new["link_bytes_total", peer, "openings"] - old["link_bytes_total", peer, "openings"]
        assert openings == cost["online"]["bytes_sent_per_party"]
        assert new["requests_total", "infer", "ok"] == 1 and new["requests_total", "deploy", "ok"] == 2
        assert new["request_seconds_sum", "infer", "online"] <= cost["online"]["seconds"] + 1e-9
        assert new["waiting_seconds_total", "infer", "openings"] > 0
        assert (new["ready"], new["models"], new["epochs_total"]) == (1, 2, 1)
    sent = scene.scraped("dealer")["sent_bytes_total"] - dealer["sent_bytes_total"]
    assert sent == cost["offline"]["bytes_sent_by_dealer"]
    assert sent == scene.scraped("party/1")["dealer_bytes_total", "infer"]
    assert scene.scraped("dealer")["tapes_total"] - dealer["tapes_total"] == 1


def test_texts(scene: Scene) -> None:
    before, dealer = scene.parties(), scene.scraped("dealer")
    with scene.client() as client:
        answer = client.generate("zebra", token_ids(40), max_new_tokens=4)
        pieces = list(answer)
        # the reader ends a text, and the parties count it a moment later
        wait_for(lambda: all(found.get("requests_total", "generate", "ok") == 1 for found in scene.parties()))
        after, dealt = scene.parties(), scene.scraped("dealer")
    costs = [answer.prompt_cost, *(piece.cost for piece in pieces)]
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        peer = str(1 - i)
        assert new["rounds_total", "generate"] == sum(cost.rounds for cost in costs)
        openings = new["link_bytes_total", peer, "openings"] - old["link_bytes_total", peer, "openings"]
        assert openings == sum(cost.bytes_sent_per_party for cost in costs)
        assert (new["tokens_total", "prompt"], new["tokens_total", "written"]) == (40, 4)
        assert new["token_seconds_count", "online"] == new["token_seconds_count", "offline"] == 4
        assert new["tokens_per_second"] > 0 and new["sessions"] == 1
    assert dealt["sent_bytes_total"] - dealer["sent_bytes_total"] == sum(c.bytes_sent_by_dealer for c in costs)
    assert dealt["slots"] == 1 and dealt["lag_seconds_count"] == dealt["tapes_total"]


def test_nobody_is_named_and_nothing_else_is_shown(scene: Scene) -> None:
    with scene.client() as client, pytest.raises(Exception, match="elephant"):
        client.infer("elephant", X)
    for role in scene.ports:
        text = scene.scraped(role).text
        assert list(strange_labels(text)) == []
        for name in ("giraffe", "zebra", "elephant", "penguin", "ocelot", "local"):
            assert name not in text
        assert httpx.get(f"http://127.0.0.1:{scene.ports[role]}/").status_code == 404
        assert f"metrics at http://127.0.0.1:{scene.ports[role]}/metrics" in scene.cluster.last_lines(role, 10_000)


@pytest.mark.slow
def test_a_process_that_stops_gives_its_port_back(scene: Scene) -> None:
    scene.cluster.restart("party/1")
    assert scene.scraped("party/1")["ready"] == 1 and scene.scraped("party/0")["epochs_total"] == 2
