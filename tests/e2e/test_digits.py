"""The main job in small: a CNN trained here on real images, evaluated by real clusters, against plaintext."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from mpcinfer import Client, ModelOwner
from mpcinfer.client.local import LocalCluster
from mpcinfer.graph.capture import capture
from mpcinfer.graph.plan import plan_inference
from mpcinfer.protocol.tracing import Cost, Plan
from mpcinfer.wire.frames import COMPARED
from tests.e2e.clusters import local_cluster

IMAGES = 200
NEAR_TIE = 0.01
FRAME = 32  # bytes of headers around a message, and around each further MiB of it

pytestmark = pytest.mark.timeout(240)


@dataclass
class Trained:
    """A network, images it has not seen, their labels and the network's logits."""

    model: nn.Module
    images: torch.Tensor
    labels: torch.Tensor
    logits: torch.Tensor


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors on a busy machine: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(one_thread: None) -> Trained:
    """Trained in a few seconds, always the same."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(data.target)
    torch.manual_seed(1)
    order = torch.randperm(len(images))
    test, train = order[:IMAGES], order[IMAGES:]
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(8):
        for batch in train[torch.randperm(len(train))].split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimiser.step()
    model.eval().requires_grad_(False)
    return Trained(model, images[test], labels[test], model(images[test]))


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids=["2-parties", "3-parties"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with local_cluster(tmp_path_factory.mktemp("digits") / "cluster", request.param) as running:
        yield running


@pytest.fixture(scope="module")
def owner(cluster: LocalCluster) -> Iterator[ModelOwner]:
    with ModelOwner.connect(cluster.cluster_path) as connected:
        yield connected


@pytest.fixture(scope="module")
def client(cluster: LocalCluster, owner: ModelOwner, trained: Trained) -> Iterator[Client]:
    """A data owner's connection to a cluster that holds the digits network."""
    deployed = owner.deploy(trained.model, trained.images[:1], name="digits", timeout=60)
    assert (deployed.version, deployed.reveal) == (1, "logits")
    with Client.connect(cluster.cluster_path) as connected:
        yield connected


def near_ties(logits: torch.Tensor) -> torch.Tensor:
    """Which rows have their two largest entries too close to tell apart."""
    top = logits.topk(2).values
    return top[:, 0] - top[:, 1] <= NEAR_TIE


def traced(model: nn.Module, x: torch.Tensor, parties: int, **options: Any) -> tuple[Plan, Cost]:
    """What a request with this input must cost."""
    plan, cost, _ = plan_inference(capture(model, (x,), **options).program, [tuple(x.shape)], parties=parties)
    return plan, cost


def assert_cost(client: Client, plan: Plan, cost: Cost, parties: int) -> None:
    """The last request's reported cost is the traced one; headers may come on top."""
    assert client.last_cost is not None
    online, offline = client.last_cost["online"], client.last_cost["offline"]
    # with the comparison of what was opened, which is one round more
    headers = (parties - 1) * (FRAME * (1 + cost.rounds + (cost.bytes_sent >> 20)) + COMPARED)
    assert online["rounds"] == cost.rounds + 1
    assert cost.bytes_sent <= online["bytes_sent_per_party"] <= cost.bytes_sent + headers
    dealt = plan.correction_bytes()
    assert dealt <= offline["bytes_sent_by_dealer"] <= dealt + FRAME * (1 + (dealt >> 20))
    assert offline["rounds"] == 0
    assert online["seconds"] > 0 and offline["seconds"] > 0


def test_private_and_plaintext_classification_agree(client: Client, trained: Trained, cluster: LocalCluster) -> None:
    private = client.infer("digits", trained.images, timeout=90)
    assert private.dtype == torch.float32 and private.shape == (IMAGES, 10)
    assert (private - trained.logits).abs().max() <= 0.005
    differ = private.argmax(1) != trained.logits.argmax(1)
    assert not (differ & ~near_ties(trained.logits)).any()
    accuracy = (private.argmax(1) == trained.labels).double().mean()
    assert accuracy >= 0.95
    plan, cost = traced(trained.model, trained.images, cluster.cluster.n)
    assert_cost(client, plan, cost, cluster.cluster.n)


def test_one_image_as_numpy_and_as_torch(client: Client, trained: Trained, cluster: LocalCluster) -> None:
    one = trained.images[:1]
    for x in (one, one.double(), one.numpy(), one.double().numpy(), (one * 16).to(torch.uint8), one.half()):
        scaled = isinstance(x, torch.Tensor) and x.dtype == torch.uint8
        private = client.infer("digits", x, timeout=60)
        assert type(private) is type(x) and tuple(private.shape) == (1, 10)
        assert private.dtype in (torch.float32, np.float32)
        expected = trained.model(one * 16) if scaled else trained.logits[:1]
        assert np.abs(np.asarray(private) - expected.numpy()).max() <= 0.005 * (16 if scaled else 1)
    plan, cost = traced(trained.model, one, cluster.cluster.n)
    assert_cost(client, plan, cost, cluster.cluster.n)


def test_argmax_reveals_nothing_but_the_class(
    owner: ModelOwner, client: Client, trained: Trained, cluster: LocalCluster
) -> None:
    owner.deploy(trained.model, trained.images[:1], name="argmax", reveal="argmax", timeout=60)
    private = client.infer("argmax", trained.images.numpy(), timeout=90)
    assert isinstance(private, np.ndarray) and private.dtype == np.int64 and private.shape == (IMAGES,)
    differ = torch.from_numpy(private) != trained.logits.argmax(1)
    assert not (differ & ~near_ties(trained.logits)).any()
    plan, cost = traced(trained.model, trained.images, cluster.cluster.n, reveal="argmax")
    assert_cost(client, plan, cost, cluster.cluster.n)


def test_top_k_reveals_the_order_only(owner: ModelOwner, client: Client, trained: Trained) -> None:
    images = trained.images[:40]
    owner.deploy(trained.model, images[:1], name="top", reveal="top-k", k=3, timeout=60)
    private = client.infer("top", images, timeout=90)
    assert private.dtype == torch.int64 and private.shape == (40, 3)
    logits = trained.logits[:40]
    found, best = logits.gather(1, private), logits.topk(3).values
    assert (found - best).abs().max() <= NEAR_TIE


def test_probabilities(owner: ModelOwner, client: Client, trained: Trained) -> None:
    images = trained.images[:40]
    owner.deploy(trained.model, images[:1], name="probabilities", reveal="probabilities", timeout=60)
    private = client.infer("probabilities", images, timeout=90)
    expected = trained.logits[:40].softmax(1)
    assert private.dtype == torch.float32 and private.shape == (40, 10)
    assert (private - expected).abs().max() <= 0.005
    assert (private.sum(1) - 1).abs().max() <= 0.005


def test_a_linear_layer_costs_one_opening_of_its_input_and_one_truncation(
    owner: ModelOwner, client: Client, cluster: LocalCluster
) -> None:
    torch.manual_seed(0)
    parties, rows = cluster.cluster.n, 7
    for width in (10, 1000):  # a hundred times the weights, and not a byte more for them
        model = nn.Linear(64, width).eval().requires_grad_(False)
        x = torch.randn(rows, 64)
        plan, cost = traced(model, x, parties)
        assert (cost.rounds, sum(cost.openings.values())) == (2, 2)
        assert cost.bytes_sent == 8 * rows * (64 + width) * (parties - 1)
        owner.deploy(model, x, name=f"linear-{width}", timeout=60)
        assert (client.infer(f"linear-{width}", x, timeout=60) - model(x)).abs().max() <= 0.001
        assert_cost(client, plan, cost, parties)


def test_relu_takes_4_rounds_and_at_most_16_bytes_an_element(
    owner: ModelOwner, client: Client, cluster: LocalCluster
) -> None:
    parties = cluster.cluster.n
    x = torch.linspace(-3, 3, 10_000).reshape(10, 1000)
    owner.deploy(nn.ReLU().eval(), x, name="relu", timeout=60)
    assert (client.infer("relu", x, timeout=60) - x.relu()).abs().max() <= 2**-16
    plan, cost = traced(nn.ReLU().eval(), x, parties)
    assert_cost(client, plan, cost, parties)
    assert client.last_cost is not None
    assert client.last_cost["online"]["rounds"] == 4 + 1  # the comparison of what was opened
    assert client.last_cost["online"]["bytes_sent_per_party"] <= 16 * x.numel() * (parties - 1)
