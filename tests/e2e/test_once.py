"""Nothing that masks anything is used twice by real processes, whoever of them restarts in the middle of a request.

The values drawn are compared in one process in tests/party/test_lane.py; here a hook in the parties writes down every
F = W + B that they open.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from mpcinfer import Client, ModelOwner
from mpcinfer.client.local import LocalCluster
from mpcinfer.client.status import party_status
from mpcinfer.errors import MpcInferError
from mpcinfer.wire.identity import Identity
from tests.e2e.clusters import HOOKS
from tests.inprocess import wait_for

X = torch.linspace(-3, 3, 16).reshape(2, 8)

pytestmark = pytest.mark.timeout(300)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)).eval()


@pytest.fixture
def opened(tmp_path: Path) -> Path:
    """Where the parties note their F."""
    directory = tmp_path / "opened"
    directory.mkdir()
    return directory


@pytest.fixture(params=[2, pytest.param(3, marks=pytest.mark.slow)], ids="n={}".format)
def local(request: pytest.FixtureRequest, tmp_path: Path, opened: Path) -> Iterator[LocalCluster]:
    """A cluster whose parties have the hook, those that are started again too."""
    paths = [str(HOOKS), *filter(None, [os.environ.get("PYTHONPATH")])]
    hook = {"MPCINFER_TEST_OPENED": str(opened), "PYTHONPATH": os.pathsep.join(paths)}
    with mock.patch.dict(os.environ, hook), LocalCluster(tmp_path / "local", parties=request.param) as cluster:
        yield cluster


def take(opened: Path) -> dict[str, list[np.ndarray]]:
    """Every F noted since the last time, by weight."""
    found: dict[str, list[np.ndarray]] = {}
    for path in sorted(opened.iterdir()):
        found.setdefault(path.name.split(" ", 2)[2], []).append(np.fromfile(path, dtype=np.int64))
        path.unlink()
    found.pop("w", None)  # of the rehearsal with which a party starts
    return found


def epochs(local: LocalCluster) -> list[str]:
    """The digests of the nonces of all epochs that party 0 has logged."""
    return re.findall(r"epoch ([0-9a-f]{8}): all", local.logs["party/0"].read_text())


@pytest.mark.slow
def test_masks_change_with_every_restart_in_the_middle_of_a_request(local: LocalCluster, opened: Path) -> None:
    n = local.cluster.n
    stem = local.identity("client/client")
    who = Identity.load(f"{stem}.key", f"{stem}.pem")
    with ModelOwner.connect(local.cluster_path) as owner, Client.connect(local.cluster_path) as client:
        owner.deploy(network(1), X, name="m")
        seen = [take(opened)]
        client.infer("m", X, version=1)
        assert not take(opened)  # F is opened once per epoch, at deploy or at the first request
        for role in ("party/1", "dealer"):
            os.kill(local.pid(role), signal.SIGSTOP)
            with ThreadPoolExecutor(1) as pool:
                running = pool.submit(client.infer, "m", X, version=1, timeout=8)
                first = local.cluster.parties[0]
                wait_for(lambda: party_status(local.cluster, who, first, timeout=5).requests_waiting)  # noqa: B023
                time.sleep(0.5)
                local.kill(role)
                with suppress(MpcInferError):
                    running.result(60)
            local.restart(role)
            with torch.no_grad():
                assert (client.infer("m", X) - network(1)(X)).abs().max() < 0.005
            seen.append(take(opened))
        # the same weights under the same name, and other weights
        owner.deploy(network(1), X, name="again")
        seen.append(take(opened))
        owner.deploy(network(2), X, name="m")
        seen.append(take(opened))

    masked: dict[str, list[np.ndarray]] = {}
    for opening in seen:
        assert len(opening) == 2  # weights
        for name, values in opening.items():
            # All parties have opened the same value, once each.
            assert len(values) == n and all((value == values[0]).all() for value in values)
            masked.setdefault(name, []).append(values[0])
    words = np.concatenate([value for values in masked.values() for value in values])
    assert len(np.unique(words)) == len(words) > 5 * 200
    # Under one mask, F' - F would be W' - W: small numbers.
    for values in masked.values():
        for i, one in enumerate(values):
            for other in values[i + 1 :]:
                difference = (one - other).view(np.int64)
                assert np.median(np.abs(difference.astype(np.float64))) > 2.0**55
    ids = epochs(local)
    assert len(ids) >= 3 and len(set(ids)) == len(ids)
