"""Clients that share no code with the package, in Python and in Node, get the answers that the SDK gets."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mpcinfer import Budget, Client, ModelOwner, Terms
from mpcinfer.client.local import LocalCluster

ROOT = Path(__file__).parents[2]
PYTHON_CLIENT = ROOT / "examples" / "standalone_client.py"
NODE_CLIENT = ROOT / "examples" / "node_client"
pytestmark = pytest.mark.timeout(300)  # starts a cluster
ERROR = 0.005  # what fixed point and truncation may cost


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)).eval()


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids=lambda n: f"n={n}")
def cluster(request: pytest.FixtureRequest, model: nn.Module) -> Iterator[LocalCluster]:
    """A running cluster with two models: "mlp" reveals the outputs, "class" their argmax."""
    with LocalCluster(parties=request.param, clients=["bob"]) as local:
        with ModelOwner.connect(local.cluster_path) as owner:
            for name, reveal in (("mlp", "logits"), ("class", "argmax")):
                owner.deploy(model, torch.zeros(1, 8), name=name, reveal=reveal)
        yield local


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    """A batch with negative numbers, halves of the last bit, and zeros."""
    torch.manual_seed(2)
    batch = torch.randn(6, 8)
    batch[0] = 0
    batch[1] = torch.tensor([1.0, -1.0, 2.5, -2.5, 0.5, -0.5, 1.5, -1.5]) * 2**-16
    return batch.numpy()


def expected(model: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(x)).numpy()


def sdk(cluster: LocalCluster, name: str, x: np.ndarray) -> np.ndarray:
    with Client.connect(cluster.cluster_path, "client/bob") as client:
        answer = client.infer(name, x)
    assert isinstance(answer, np.ndarray)
    return answer


def check(cluster: LocalCluster, model: nn.Module, x: np.ndarray, logits: np.ndarray, best: np.ndarray) -> None:
    """Compare a client's answers with plaintext and the SDK's."""
    plain = expected(model, x)
    assert logits.shape == plain.shape
    assert np.abs(logits - plain).max() < ERROR
    assert np.abs(logits - sdk(cluster, "mlp", x)).max() < 2 * ERROR
    top = np.sort(plain)
    clear = top[:, -1] - top[:, -2] > 2 * ERROR
    assert clear.sum() >= 4
    assert (best[clear] == plain.argmax(1)[clear]).all()
    assert (best[clear] == sdk(cluster, "class", x)[clear]).all()


def other_pins(cluster: LocalCluster, directory: Path) -> Path:
    """The cluster file with one digit of the last party's pin changed."""
    text = cluster.cluster_path.read_text()
    pins = re.findall("sha256:[0-9a-f]{64}", text)
    pin = pins[cluster.cluster.n - 1]
    path = directory / "cluster.toml"
    path.write_text(text.replace(pin, pin[:-1] + ("1" if pin[-1] == "0" else "0")))
    shutil.copy(cluster.directory / "ca.pem", directory)
    return path


# --- Python ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment with this interpreter's packages, but without mpcinfer, however that is installed."""
    site = tmp_path_factory.mktemp("site")
    for source in {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}:
        for entry in source.iterdir():
            if not entry.name.startswith(("mpcinfer", "__editable__")) and entry.suffix != ".pth":
                (site / entry.name).symlink_to(entry)
    return {"PYTHONPATH": str(site), "PATH": os.environ["PATH"]}


def python(bare: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    # -S: no .pth files, by which a checkout may be installed; -P: not the working directory either.
    command = [sys.executable, "-S", "-P", *map(str, arguments)]
    return subprocess.run(command, env=bare, capture_output=True, text=True, timeout=100)


def standalone(
    bare: dict[str, str], cluster: LocalCluster, cluster_file: Path, name: str, *files: Path
) -> subprocess.CompletedProcess[str]:
    stem = cluster.identity("client/bob")
    return python(bare, PYTHON_CLIENT, cluster_file, f"{stem}.key", f"{stem}.pem", name, *files)


def test_the_python_client_is_small_and_imports_nothing_of_ours() -> None:
    source = PYTHON_CLIENT.read_text()
    assert len(source.splitlines()) <= 150
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"cryptography", "grpc", "grpc_tools", "numpy"}


def test_the_python_client_gets_the_same_answers(
    cluster: LocalCluster, model: nn.Module, bare: dict[str, str], x: np.ndarray, tmp_path: Path
) -> None:
    absent = python(bare, "-c", "import mpcinfer")
    assert absent.returncode == 1 and "ModuleNotFoundError" in absent.stderr
    np.save(tmp_path / "x.npy", x)
    answers = []
    for name in ("mlp", "class"):
        done = standalone(bare, cluster, cluster.cluster_path, name, tmp_path / "x.npy")
        assert (done.returncode, done.stderr) == (0, "")
        (line,) = done.stdout.splitlines()
        answers.append(np.array(json.loads(line)))
    assert answers[1].dtype.kind == "i"
    check(cluster, model, x, *answers)


def test_the_python_client_refuses_a_party_with_another_key(
    cluster: LocalCluster, bare: dict[str, str], x: np.ndarray, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", x)
    done = standalone(bare, cluster, other_pins(cluster, tmp_path), "mlp", tmp_path / "x.npy")
    assert done.returncode == 1
    assert f"party/{cluster.cluster.n - 1} at " in done.stderr and "does not hold the key" in done.stderr


def test_the_python_client_says_what_is_wrong(
    cluster: LocalCluster, model: nn.Module, bare: dict[str, str], x: np.ndarray, tmp_path: Path
) -> None:
    with ModelOwner.connect(cluster.cluster_path, cluster.identity("owner/owner")) as owner:
        owner.deploy(model, torch.zeros(1, 8), name="few", grant=Terms(budgets=(Budget("queries", 1, 60),)))
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "narrow.npy", x[:, :3])
    np.save(tmp_path / "nan.npy", x * np.nan)
    for name, file, message in (
        ("none", "x", "do not all hold the same model 'none'"),
        ("mlp", "narrow", "has shape [6, 3], the model takes [-1, 8]"),
        ("mlp", "nan", "contains NaN"),
    ):
        done = standalone(bare, cluster, cluster.cluster_path, name, tmp_path / f"{file}.npy")
        assert done.returncode == 1 and message in done.stderr
    # A party's own words, with the class of the error from the trailing metadata.
    done = standalone(bare, cluster, cluster.cluster_path, "few", tmp_path / "x.npy")
    assert done.returncode == 1
    assert done.stderr.startswith("BudgetError: client/") and "has 1 left of 1 queries per minute" in done.stderr


# --- Node --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def node_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Node client with its packages installed."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("NODE IS MISSING: the Node client is NOT tested; install node and npm 18 or newer")
    directory = tmp_path_factory.mktemp("node")
    for name in ("package.json", "client.js"):
        shutil.copy(NODE_CLIENT / name, directory)
    install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(install, cwd=directory, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return directory / "client.js"


def node(
    client: Path, cluster: LocalCluster, cluster_file: Path, name: str, file: Path
) -> subprocess.CompletedProcess[str]:
    stem = cluster.identity("client/bob")
    command = ["node", client, cluster_file, f"{stem}.key", f"{stem}.pem", name, file]
    environment = {"PATH": os.environ["PATH"], "PROTOS": str(ROOT / "protos")}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=100)


@pytest.mark.slow
@pytest.mark.net
def test_the_node_client_gets_the_same_answers(
    cluster: LocalCluster, model: nn.Module, node_client: Path, x: np.ndarray, tmp_path: Path
) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps(x.tolist()))
    answers = []
    for name in ("mlp", "class"):
        done = node(node_client, cluster, cluster.cluster_path, name, file)
        assert (done.returncode, done.stderr) == (0, "")
        (line,) = done.stdout.splitlines()
        answers.append(np.array(json.loads(line)))
    check(cluster, model, x, *answers)

    refused = node(node_client, cluster, other_pins(cluster, tmp_path), "mlp", file)
    assert refused.returncode == 1 and "does not hold the key" in refused.stderr
    unknown = node(node_client, cluster, cluster.cluster_path, "none", file)
    assert unknown.returncode == 1 and "do not all hold the same model" in unknown.stderr
