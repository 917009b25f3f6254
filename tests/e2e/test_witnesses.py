"""A witness for each of two parties, all processes of their own over mutual TLS, used from the command line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpcinfer.client.local import LocalCluster
from mpcinfer.models.load import load
from tests.cli.conftest import Shell
from tests.decoders_local import plain_logits
from tests.e2e.clusters import local_cluster
from tests.e2e.texts import letters, written
from tests.scanner import command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

RECIPE = """
import torch

def build():
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)).eval(), torch.ones(2, 8)
"""
PROMPT = "grey geese go south"
TOKENS = 6


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with local_cluster(tmp_path_factory.mktemp("witnessed") / "cluster", 2, witnesses=True) as running:
        yield running


@pytest.fixture
def shell(
    cluster: LocalCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Shell:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPCINFER_CLUSTER", str(cluster.cluster_path))
    return Shell(capsys, monkeypatch)


def cpu(cluster: LocalCluster) -> dict[str, float]:
    """CPU seconds that each process has taken so far."""
    found = {}
    for role in cluster.logs:
        fields = Path(f"/proc/{cluster.pid(role)}/stat").read_text().rpartition(")")[2].split()
        found[role] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def spent(what: str, before: dict[str, float], after: dict[str, float], capsys: pytest.CaptureFixture[str]) -> None:
    """Print what each process has taken for something, and see that all have worked."""
    taken = {role: round(after[role] - before[role], 2) for role in before}
    with capsys.disabled():
        print(f"\n{what}, CPU seconds: {taken}")  # noqa: T201
    assert all(seconds > 0 for seconds in taken.values()), taken


def greedy(directory: Path, text: str, count: int) -> list[int]:
    """What the model itself continues a text with."""
    model: Any = load(directory).module
    ids = [letters_of(text)[i] for i in range(len(text))]
    for _ in range(count):
        ids.append(int(plain_logits(model, ids).argmax()))
    return ids[len(text) :]


def letters_of(text: str) -> list[int]:
    import tokenizers

    ids: list[int] = tokenizers.Tokenizer.from_str(letters().tokenizer).encode(text).ids
    return ids


def test_from_the_command_line(
    cluster: LocalCluster, shell: Shell, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(2):
        assert command(cluster.pid(f"witness/{index}"))[4:7] == ["party", "--witness-of", str(index)]
    roles = [each["role"] for each in shell("status", "--json").json["parties"]]
    assert roles == ["party/0", "party/1", "witness/0", "witness/1"]

    Path("recipe.py").write_text(RECIPE)
    assert shell("deploy", "recipe.py:build", "--name", "small").code == 0
    names: dict[str, Any] = {}
    exec(RECIPE, names)
    x = torch.linspace(-1, 1, 16).reshape(2, 8)
    np.save("x.npy", x.numpy())
    before = cpu(cluster)
    done = shell("infer", "small", "x.npy", "--json")
    assert done.code == 0, done.err
    assert (torch.tensor(done.json["outputs"][0]) - names["build"]()[0](x)).abs().max() < 1e-3
    spent("an inference of 2 rows", before, cpu(cluster), capsys)

    directory = written(tmp_path / "tiny", seed=5)
    done = shell("deploy", directory, "--name", "tiny", "--reveal", "tokens")
    assert done.code == 0, done.err
    expected = greedy(directory, PROMPT, TOKENS)
    for what in ("with its masks", "again"):
        before = cpu(cluster)
        done = shell("generate", "tiny", PROMPT, "--max-new-tokens", TOKENS, "--json")
        assert done.code == 0 and done.json["tokens"] == expected, done.err
        spent(f"{len(PROMPT)} tokens in and {TOKENS} out, {what}", before, cpu(cluster), capsys)

    assert shell("refresh", "tiny", "--json").json["refreshed"] == 1
    assert shell("generate", "tiny", PROMPT, "--max-new-tokens", TOKENS, "--json").json["tokens"] == expected


def test_nothing_is_answered_without_a_witness(cluster: LocalCluster, shell: Shell) -> None:
    Path("recipe.py").write_text(RECIPE)
    assert shell("deploy", "recipe.py:build", "--name", "left").code == 0
    np.save("x.npy", np.ones((1, 8), np.float32))
    cluster.kill("witness/1")
    done = shell("infer", "left", "x.npy", "--timeout", 5, "--json")
    assert done.code != 0 and done.json["error"]["type"] in ("UnavailableError", "AbortedError", "DeadlineError")
    cluster.restart("witness/1")
    assert shell("infer", "left", "x.npy").code == 0
