"""What `price` says beforehand is what a run counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mpcinfer.client.data import Client
from mpcinfer.client.owner import ModelOwner
from mpcinfer.client.price import price
from mpcinfer.graph.capture import capture
from tests.inprocess import InProcess


def cnn() -> nn.Module:
    """Convolutions, pools of both sorts and a softmax."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 5),
        nn.Softmax(-1),
    ).eval()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


@pytest.mark.parametrize("parties", [2, 3], ids="n={}".format)
def test_the_total_is_what_a_run_counts(parties: int, tmp_path: Path) -> None:
    """Also in messages of several frames: 1000 rows of 300 numbers take three."""
    cases = [("cnn", cnn(), (3, 1, 8, 8), "logits"), ("mlp", mlp(), (1000, 300), "argmax")]
    with InProcess(tmp_path, parties) as cluster:
        keys = cluster.keys
        with (
            ModelOwner.connect(keys.directory, keys.identity("owner/alice")) as owner,
            Client.connect(keys.directory, keys.identity("client/bob")) as client,
        ):
            for name, model, shape, reveal in cases:
                x = torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)
                expected = price(capture(model, [x], reveal=reveal).program, [shape], parties=parties)
                sent = link_bytes(cluster)
                owner.deploy(model, x, name=name, reveal=reveal)
                assert link_bytes(cluster) - sent >= expected.deployment.online_bytes
                client.infer(name, x)
                cost = client.last_cost
                assert cost is not None
                assert cost["online"]["rounds"] == expected.total.rounds
                assert cost["online"]["bytes_sent_per_party"] == expected.total.online_bytes
                assert cost["offline"]["bytes_sent_by_dealer"] == expected.total.offline_bytes
                assert cost["offline"]["rounds"] == 0
                assert cost["offline"]["bytes_sent_per_party"] < 200 * (parties - 1)


def link_bytes(cluster: InProcess) -> int:
    """What party 0 has sent."""
    epoch = cluster.parties[0].former.current
    assert epoch is not None
    return epoch.mesh.bytes_sent
