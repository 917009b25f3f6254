"""After all that clusters are used for: nothing of it in the clear in any memory, file, log or figure.

A network and a language model, uploaded, used by the SDK, the command line and the proxy, audited, refreshed, with
witnesses; requests that are refused, given up, and broken off by a party that dies. Then every process but this one is
searched, and everything that was written; each place is also searched with a plant in it, which must be found.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tokenizers
import torch
from torch import nn

from mpcinfer import Client, ModelOwner, MpcInferError
from mpcinfer.client.audit import Audit
from mpcinfer.client.local import LocalCluster
from mpcinfer.graph.capture import capture
from mpcinfer.models.decoder import Decoder
from mpcinfer.models.load import load
from mpcinfer.trust import canaries as canary_sets
from tests.e2e.clusters import HOOKS, Recording, local_cluster, weight_shares
from tests.e2e.test_scans import fixed, in_background, network
from tests.e2e.texts import letters, proxy, written
from tests.inprocess import free_ports, wait_for
from tests.scanner import Needles, canaries, files_below, frozen, open_files, read_memory, scan_files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROMPT = "the zebra crossing at 4711 Quince Street"
MESSAGE = "my password is xylophone-quartz-7341"
CANARY = "an owner's canary: sphinx of black quartz"[: len(PROMPT)]
LONGEST = 20
MANY = 4  # pairs of a small tensor's numbers, of which one lies about by chance
TOGETHER = 6  # ids of tokens in a row: fewer small numbers lie about by chance


class Texts:
    """Prompts and answers, as letters and as the ids of tokens in every width."""

    def __init__(self) -> None:
        self.needles = Needles()
        self.sequences: dict[bytes, str] = {}
        self._known = tokenizers.Tokenizer.from_str(letters().tokenizer)

    def add(self, label: str, text: str) -> None:
        """Something that was said, or answered."""
        self.needles.add_raw(f"{label} in letters", text.encode())
        self.add_ids(label, self._known.encode(text).ids)

    def add_ids(self, label: str, ids: Sequence[int]) -> None:
        """Its tokens."""
        self.needles.add_raw(f"{label} as int16", np.array(ids, "<i2").tobytes(), step=2)
        for start in range(0, len(ids) - TOGETHER + 1, 2 * TOGETHER):
            part = ids[start : start + TOGETHER]
            if len(set(part)) >= TOGETHER - 1:
                self.sequences |= {np.array(part, kind).tobytes(): f"{label} as {kind}" for kind in ("<i4", "<i8")}

    def in_row(self, data: bytes) -> Counter[str]:
        """Which texts are there as wider numbers: a needle holds too few of them, and dealt bytes lie about as such."""
        return Counter(label for sequence, label in self.sequences.items() if sequence in data)


@dataclass
class Scene:
    """The cluster, after everything, and what must not be found."""

    cluster: LocalCluster
    directory: Path
    metrics: dict[str, int]
    plain: Needles
    texts: Texts
    shares: list[Needles]
    during: dict[str, Counter[str]] = field(default_factory=dict)
    proxy_log: Path = Path()
    written_by_clients: list[Path] = field(default_factory=list)
    kept: list[object] = field(default_factory=list)  # so that this process has in memory what it looks for

    def pids(self) -> dict[str, int]:
        return {role: self.cluster.pid(role) for role in self.cluster.logs}

    def secrets(self) -> Needles:
        return self.plain | self.texts.needles

    def files(self) -> list[Path]:
        """Stores, logs, the temporary directory, and what clients keep that may be shown."""
        found = files_below(self.directory / "cluster") + files_below(self.directory / "temporary")
        return [*found, *self.written_by_clients, self.proxy_log]

    def memory(self) -> dict[str, Counter[str]]:
        """What is found in the memory and open files of each process, frozen while it is read."""
        found: dict[str, Counter[str]] = {}
        wanted = self.secrets()
        for role, pid in self.pids().items():
            with frozen(pid):
                blocks = list(read_memory(pid, everything=False))
                found[role] = scan_files(open_files(pid), wanted)
            for block in blocks:
                here = wanted.in_bytes(block)
                small = [label for label, count in here.items() if "language model as int" in label and count < MANY]
                found[role] += here + self.texts.in_row(block.tobytes()) - Counter({label: MANY for label in small})
        return found

    def written(self, path: Path, wanted: Needles) -> Counter[str]:
        """What is found in a file."""
        return scan_files([path], wanted) + self.texts.in_row(path.read_bytes())


def use(scene: Scene, module: nn.Module, x: torch.Tensor, directory: Path) -> None:
    """All that a cluster is used for, as far as one test can."""
    cluster, texts = scene.cluster, scene.texts
    decoder: Any = load(directory).module
    assert isinstance(decoder, Decoder)
    scene.kept += [module, x, decoder]
    for name, parameter in decoder.named_parameters():
        scene.plain.add_reals(f"weight {name} of the language model", parameter)
    uploading = Recording.to(cluster.cluster_path, roles=("owner",))
    with ModelOwner(uploading) as owner:
        owner.upload(capture(module, (x,)), name="canary")
        for index in range(2):
            for name, share in weight_shares(uploading.last("Deploy"), index).items():
                scene.shares[index].add_integers(f"party {index}'s share of {name}", share)
        run("deploy", str(directory), "--name", "tiny", "--reveal", "tokens", cluster=cluster)
        ids = texts._known.encode(CANARY).ids
        signed = owner.canaries("tiny", decoder, [ids], max_new_tokens=LONGEST)
        texts.add("the owner's canary", CANARY)
        with Client.connect(cluster.cluster_path) as client:
            y = client.infer("canary", x)
            scene.plain.add_reals("output", y)
            audit = Audit(0.5, canary_sets.opened(signed, cluster.cluster))
            answers = [
                client.generate("tiny", PROMPT, max_new_tokens=LONGEST, stream=False),
                client.generate("tiny", PROMPT, max_new_tokens=4, stream=False, audit=audit),
            ]
            talk = [{"role": "user", "content": MESSAGE}]
            answers.append(client.generate("tiny", talk, max_new_tokens=LONGEST, stream=False))
            with in_background(lambda: client.generate("tiny", PROMPT, max_new_tokens=30, stream=False)):
                scene.during = scene.memory()
            refused(client, x)
            broken_off(client, cluster)
            assert owner.refresh("tiny") == 1
            answers.append(client.generate("tiny", PROMPT, max_new_tokens=LONGEST, stream=False))
            assert answers[-1].tokens == answers[0].tokens
        scene.kept += answers
        for answer in answers:
            texts.add("an answer", answer.text)
            texts.add_ids("an answer", answer.tokens)
    receipt = scene.directory / "receipt.json"
    said = run("generate", "tiny", PROMPT, "--max-new-tokens", "8", "--receipt", str(receipt), cluster=cluster)
    assert said.startswith(answers[0].text[:4]) and receipt.exists()
    scene.written_by_clients.append(receipt)
    with proxy(cluster, scene.proxy_log) as (url, pid):
        body = {"model": "tiny", "messages": talk, "max_tokens": LONGEST, "temperature": 0}
        answered = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).json()
        assert answered["choices"][0]["message"]["content"] == answers[2].text
        assert not scene.secrets().in_text(httpx.get(f"{url}/metrics").text)
        for block in read_memory(pid, everything=False):  # a data owner's: it knows the texts, and no weight
            assert not scene.plain.in_bytes(block)
    with Client.connect(cluster.cluster_path) as client:  # so that all have their shares in memory
        assert (client.infer("canary", x) - module(x)).abs().max() < 0.01 * module(x).abs().max()
    assert run("audit", "verify", str(cluster.directory / "party-0-store" / "audit.log"), cluster=cluster)


def refused(client: Client, x: torch.Tensor) -> None:
    """Requests that are not answered."""
    for wrong in (
        lambda: client.infer("canary", x[..., :7]),
        lambda: client.infer("canary", x * 1e9),
        lambda: client.infer("none", x),
        lambda: client.generate("tiny", PROMPT * 9, max_new_tokens=4, stream=False),
        lambda: client.generate("canary", PROMPT, max_new_tokens=4, stream=False),
        lambda: client.generate("tiny", PROMPT, max_new_tokens=4, stream=False, timeout=0.001),
    ):
        with pytest.raises(MpcInferError):
            wrong()
    for i, _ in enumerate(client.generate("tiny", PROMPT, max_new_tokens=60)):
        if i == 2:
            break  # leaving is cancelling


def broken_off(client: Client, cluster: LocalCluster) -> None:
    """A party dies while it writes."""
    with suppress(MpcInferError):
        for i, _ in enumerate(client.generate("tiny", PROMPT, max_new_tokens=60)):
            if i == 2:
                cluster.kill("party/1")
    cluster.restart("party/1")
    wait_for(lambda: all(each.state == "ready" for each in client.status()))


def run(*arguments: str, cluster: LocalCluster) -> str:
    """A command in a process of its own: what it prints."""
    environment = os.environ | {"MPCINFER_CLUSTER": str(cluster.cluster_path)}
    command = [sys.executable, "-P", "-m", "mpcinfer", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("afterwards")
    (directory / "temporary").mkdir()
    module, x = network(), canaries(1, 1, 8, 8).float()
    plain, texts = Needles(), Texts()
    for name, parameter in module.named_parameters():
        plain.add_reals(f"weight {name}", parameter)
    plain.add_reals("input", x)
    texts.add("the prompt", PROMPT)
    texts.add("the message", MESSAGE)
    roles = ["dealer", *(f"{kind}/{i}" for kind in ("party", "witness") for i in range(2))]
    metrics = dict(zip(roles, free_ports(len(roles)), strict=True))
    with local_cluster(
        directory / "cluster", 2, temporary=directory / "temporary", metrics=metrics, witnesses=True
    ) as cluster:
        scene = Scene(cluster, directory, metrics, plain, texts, [Needles(), Needles()])
        scene.proxy_log = directory / "proxy.log"
        use(scene, module, x, written(tmp_path_factory.mktemp("models") / "tiny", seed=5))
        yield scene


def test_who_looks_finds(scene: Scene) -> None:
    """In this process, which may hold it all."""
    found: Counter[str] = Counter()
    for block in read_memory(os.getpid(), everything=False):
        found += scene.secrets().in_bytes(block)
    labels = ["weight 0.weight as float32", "input as float32", "the prompt in letters"]
    labels += [
        "weight embedding.weight of the language model as float32",
        "the message in letters",
        "an answer in letters",
    ]
    assert not [label for label in labels if not found[label]], sorted(found)


@pytest.mark.parametrize("when", ["while a text was written", "at the end"])
def test_memory(scene: Scene, when: str) -> None:
    found = scene.memory() if when == "at the end" else scene.during
    assert set(found) == {"dealer", "party/0", "party/1", "witness/0", "witness/1"}
    assert not {role: leaked for role, leaked in found.items() if leaked}


def test_whose_shares_are_where(scene: Scene) -> None:
    """A party's in its memory and its witness's, and nowhere else."""
    for index, needles in enumerate(scene.shares):
        for role, pid in scene.pids().items():
            found = sum((needles.in_bytes(block) for block in read_memory(pid, everything=False)), Counter[str]())
            assert bool(found) == role.endswith(f"/{index}"), (role, found)


def test_files_logs_and_receipts(scene: Scene) -> None:
    wanted = scene.secrets() | scene.shares[0] | scene.shares[1]
    files = scene.files()
    logs = {path.name for path in scene.cluster.logs.values()}
    assert {path.name for path in files} >= {*logs, "proxy.log", "receipt.json", "audit.log"}
    assert sum(path.suffix == ".mpc" for path in files) == 2 * 4
    for path in files:
        assert not scene.written(path, wanted), path


def test_figures_and_states(scene: Scene) -> None:
    wanted = scene.secrets() | scene.shares[0] | scene.shares[1]
    for role, port in scene.metrics.items():
        text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        assert text.count("\n") > 20 and not wanted.in_text(text), role
    with Client.connect(scene.cluster.cluster_path) as client:
        assert not wanted.in_text(f"{client.status()} {client.models()} {client.manifest}")


@pytest.mark.parametrize("where", ["cluster/logs", "cluster/party-0-store", "temporary"])
def test_a_plant_in_a_file_is_found(scene: Scene, where: str) -> None:
    plant, ids = scene.directory / where / "plant", scene.texts._known.encode(PROMPT).ids
    weights = torch.tensor([value for value, _ in scene.plain._reals[:4]])
    for content in (
        f"DEBUG asked: {PROMPT}".encode(),
        f"DEBUG {weights.tolist()}".encode(),
        np.array(ids, "<i8").tobytes(),
        np.array(ids, "<i4").tobytes(),
        weights.numpy().tobytes(),
        fixed(weights).numpy().tobytes(),
    ):
        plant.write_bytes(content)
        try:
            assert plant in scene.files() and scene.written(plant, scene.secrets())
        finally:
            plant.unlink()


def test_a_plant_in_a_figure_is_found(scene: Scene) -> None:
    for said in (f'mpcinfer_x{{model="{PROMPT}"}} 1', f"mpcinfer_x {scene.plain._reals[0][0]:.9g}"):
        assert scene.secrets().in_text(said)


def test_a_witness_that_holds_a_prompt_is_found(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    plant = scene.directory / "planted"
    plant.write_bytes(PROMPT.encode())
    monkeypatch.setenv("MPCINFER_TEST_PLANT", str(plant))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(HOOKS), os.environ.get("PYTHONPATH")])))
    scene.cluster.restart("witness/1")
    found = scene.memory()
    assert [role for role, leaked in found.items() if leaked] == ["witness/1"]
    assert found["witness/1"]["the prompt in letters"]
