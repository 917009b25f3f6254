"""No process but the owners' own ever holds a weight, an input, an intermediate value or an output in the clear.

Looked for in the memory of every party and of the dealer, in all their files and logs: while a model is uploaded,
while requests run (each process frozen at some moment), and afterwards. Every scan also looks for what must be
there, a party's own shares first of all, so that a scan that sees nothing fails.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from sys import executable

import grpc
import httpx
import pytest
import torch
from torch import nn
from torch.nn import functional

from mpcinfer import Client, ModelOwner, MpcInferError
from mpcinfer.client.local import LocalCluster
from mpcinfer.graph.capture import Captured, capture
from mpcinfer.ring.domain import Z64
from mpcinfer.ring.sharing import combine
from mpcinfer.wire.v1 import party_pb2
from tests.e2e.clusters import HOOKS, Call, Recording, local_cluster, shared, weight_shares
from tests.inprocess import free_ports
from tests.scanner import (
    Needles,
    canaries,
    children,
    command,
    files_below,
    frozen,
    open_files,
    parent,
    read_memory,
    scan_files,
    scan_memory,
)

SNAPSHOTS = 3
MARKER = os.urandom(64)  # in this process's memory before any other is started

pytestmark = pytest.mark.timeout(240)


def network() -> nn.Module:
    """Every parameter a canary."""
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 12)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(canaries(*parameter.shape))
    return model.requires_grad_(False)


def fixed(x: torch.Tensor) -> torch.Tensor:
    return torch.round(x.double() * 65536).to(torch.int64)


def secrets_of(model: nn.Module, x: torch.Tensor) -> Needles:
    """Weights, input, and what the layers make of it."""
    needles = Needles()
    needles.add_raw("this process's memory", MARKER)
    for name, parameter in model.named_parameters():
        needles.add_reals(f"weight {name}", parameter)
    needles.add_reals("input", x)
    layers = list(model.children())
    # exact in float64: below 2^53
    product = functional.conv2d(fixed(x).double(), fixed(layers[0].weight).double()).to(torch.int64)
    bias = fixed(layers[0].bias).reshape(-1, 1, 1)
    for label, y in (("product", product), ("product with bias", product + (bias << 16))):
        needles.add_integers(f"activation: {label}", y)
        needles.add_reals(f"activation: {label}", y.double() / 2.0**32, scales=(16,))
        needles.add_rounded(f"activation: {label} truncated", y >> 16)
    pooled = functional.max_pool2d(((product >> 16) + bias).clamp(min=0).double(), 2)
    needles.add_rounded("activation: pooled", pooled.to(torch.int64))
    return needles


@dataclass
class Scene:
    """A running cluster, the owners' ends of it, and the canaries."""

    cluster: LocalCluster
    directory: Path
    model: nn.Module
    x: torch.Tensor
    owner: ModelOwner
    client: Client
    deploying: Recording
    inferring: Recording
    secrets: Needles
    captured: Captured
    uploaded: Call = field(default_factory=lambda: Call("Deploy", []))
    version: int = 0
    during_upload: dict[str, Counter[str]] = field(default_factory=dict)
    metrics: dict[str, int] = field(default_factory=dict)

    @property
    def roles(self) -> list[str]:
        """All processes but this one."""
        return list(self.cluster.logs)

    @property
    def parties(self) -> int:
        """How many parties there are."""
        return self.cluster.cluster.n

    def pids(self) -> dict[str, int]:
        """Their process ids."""
        return {role: self.cluster.pid(role) for role in self.roles}

    def snapshot(self, needles: Callable[[], Needles], *, everything: bool = False) -> dict[str, Counter[str]]:
        """What is found of `needles()` in each process's memory and open files, each frozen while it is read.

        One after the other and not for long: they would take each other for dead. While one is, all wait for it.
        """
        found: dict[str, Counter[str]] = {}
        for role, pid in self.pids().items():
            with frozen(pid):
                wanted, blocks = needles(), list(read_memory(pid, everything=everything))
                found[role] = scan_files(open_files(pid), wanted)
            for block in blocks:
                found[role] += wanted.in_bytes(block)
        return found

    def infer(self) -> torch.Tensor:
        """One request."""
        result: torch.Tensor = self.client.infer("canary", self.x, version=self.version, timeout=60)
        return result


@contextmanager
def in_background(work: Callable[[], object]) -> Iterator[Future[int]]:
    """`work` over and over in a thread; its first error is raised at the end. The result is how often it was done."""
    stop = threading.Event()

    def repeat() -> int:
        count = 0
        while not stop.is_set():
            work()
            count += 1
        return count

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(repeat)
        try:
            yield future
        finally:
            stop.set()
        future.result(timeout=90)


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids=["2-parties", "3-parties"])
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("scan")
    for name in ("opened", "temporary"):
        (directory / name).mkdir()
    model, x = network(), canaries(1, 1, 8, 8).float()
    secrets, captured = secrets_of(model, x), capture(model, (x,))
    roles = ["dealer", *(f"party/{i}" for i in range(request.param))]
    metrics = dict(zip(roles, free_ports(len(roles)), strict=True))
    with local_cluster(
        directory / "cluster",
        request.param,
        opened=directory / "opened",
        temporary=directory / "temporary",
        metrics=metrics,
    ) as cluster:
        deploying = Recording.to(cluster.cluster_path, roles=("owner",))
        inferring = Recording.to(cluster.cluster_path)
        with ModelOwner(deploying) as owner, Client(inferring) as client:
            scene = Scene(cluster, directory, model, x, owner, client, deploying, inferring, secrets, captured)
            scene.metrics = metrics

            def scan_when_all_is_sent(sent: int, size: int) -> None:
                if sent == size and not scene.during_upload:
                    time.sleep(0.3)  # until it has been received
                    scene.during_upload = scene.snapshot(lambda: secrets)

            # Not asked to succeed: the parties may lose patience with each other while they are scanned.
            with suppress(MpcInferError):
                owner.deploy(model, x, name="canary", progress=scan_when_all_is_sent, timeout=60)
            scene.version = owner.deploy(model, x, name="canary", timeout=60).version
            scene.uploaded = deploying.last("Deploy")
            yield scene


def assert_clean(found: dict[str, Counter[str]]) -> None:
    """A party may hold its own shares and F, the dealer B: labels begin with the only role that may."""
    for role, counter in found.items():
        allowed = (role, "party/*") if role != "dealer" else ("dealer",)
        leaked = {label: count for label, count in counter.items() if not label.startswith(allowed)}
        assert not leaked, f"{role} holds {leaked}"


def input_shares(scene: Scene) -> Needles:
    """Each party's share of the latest request's input, however it was sent."""
    needles = Needles()
    call = scene.inferring.last("Infer")
    for index, (request,) in enumerate(call.sent):
        needles.add_integers(f"party/{index}'s share of the input", shared(request.inputs[0]))
        if request.inputs[0].seed:
            needles.add_raw(f"party/{index}'s seed of the input", request.inputs[0].seed)
    return needles


def outputs(scene: Scene) -> Needles:
    """What all requests so far have yielded, and the parties' shares of it."""
    needles = Needles()
    for call in scene.inferring.calls:
        if call.method == "Infer" and call.answers:
            shares = [shared(answer.outputs[0]) for answer in call.answers]
            needles.add_integers("output", combine(shares, Z64))
            for index, share in enumerate(shares):
                needles.add_integers(f"party/{index}'s share of the output", share)
    return needles


def test_all_processes_are_fresh_interpreters_of_their_own(scene: Scene) -> None:
    pids = scene.pids()
    assert len({*pids.values(), os.getpid()}) == len(pids) + 1
    for role, pid in pids.items():
        assert command(pid)[:5] == [executable, "-P", "-m", "mpcinfer", role.partition("/")[0]]
        assert parent(pid) == os.getpid()
        assert not children(pid)


def test_the_scanner_finds_it_all_in_the_process_that_may_hold_it(scene: Scene) -> None:
    found = scan_memory(os.getpid(), scene.secrets, everything=False)
    assert found["this process's memory"]
    for label in ("weight 0.weight as float32", "weight 4.weight as float32", "input as float32"):
        assert found[label]


def test_no_plaintext_while_a_model_is_uploaded(scene: Scene) -> None:
    assert set(scene.during_upload) == set(scene.roles)
    assert_clean(scene.during_upload)


@pytest.mark.slow
def test_no_plaintext_while_requests_run(scene: Scene) -> None:
    last = f"party/{scene.parties - 1}"
    in_flight = 0
    expected = scene.model(scene.x)
    assert (scene.infer() - expected).abs().max() <= 0.001 * expected.abs().max()
    with in_background(scene.infer) as done:
        for _ in range(SNAPSHOTS):
            time.sleep(0.2 + os.urandom(1)[0] / 2000)
            found = scene.snapshot(lambda: scene.secrets | input_shares(scene))
            assert_clean(found)
            in_flight += bool(found[last][f"{last}'s share of the input"])
    assert in_flight, "no snapshot caught a request at work"
    assert done.result() >= SNAPSHOTS


def opened_weights(scene: Scene) -> dict[str, torch.Tensor]:
    """F by weight, as the parties noted it; the same at all of them."""
    captured = scene.captured
    latest: dict[tuple[int, str], tuple[int, bytes]] = {}
    for path in (scene.directory / "opened").iterdir():
        pid, count, name = path.name.split(" ", 2)
        opened = int(count), path.read_bytes()
        latest[int(pid), name] = max(opened, latest.get((int(pid), name), opened))
    names = [p.name for p in captured.program.parameters if p.weight]
    parties = [pid for role, pid in scene.pids().items() if role != "dealer"]
    # There may be more: parties warm up on examples of their own.
    assert set(latest) >= {(pid, name) for pid in parties for name in names}
    for name in names:
        assert len({latest[pid, name][1] for pid in parties}) == 1, f"F of {name} is not the same at all parties"
    return {name: Z64.unpack(latest[parties[0], name][1], tuple(captured.weights[name].shape)) for name in names}


def held_in_secret(scene: Scene) -> Needles:
    """What each process may hold alone: shares and seeds of the weights, F, B."""
    needles = Needles()
    uploaded = scene.uploaded
    for index in range(scene.parties):
        for name, share in weight_shares(uploaded, index).items():
            needles.add_integers(f"party/{index}'s share of {name}", share)
        for weight in uploaded.sent[index][0].header.weights:
            needles.add_raw(f"party/{index}'s seed", weight.seed)
    for name, f in opened_weights(scene).items():
        needles.add_integers(f"party/*: F of {name}", f)
        needles.add_integers(f"dealer: B of {name}", f - scene.captured.weights[name])
    return needles


def test_shares_stay_where_they_belong_and_f_never_reaches_the_dealer(scene: Scene) -> None:
    scene.infer()
    found = scene.snapshot(lambda: held_in_secret(scene))
    assert_clean(found)
    masked = opened_weights(scene)
    for index in range(scene.parties):
        for name in weight_shares(scene.uploaded, index):
            assert found[f"party/{index}"][f"party/{index}'s share of {name}"], f"no share of {name} found"
        for name in masked:
            assert found[f"party/{index}"][f"party/*: F of {name}"], f"no F of {name} found"
    for name in masked:
        assert found["dealer"][f"dealer: B of {name}"], f"no B of {name} found"


def test_no_plaintext_after_a_request(scene: Scene) -> None:
    scene.infer()
    found = scene.snapshot(lambda: scene.secrets | outputs(scene), everything=True)
    assert_clean(found)
    assert any(found[f"party/{scene.parties - 1}"]), "not even a share of an output was found"


def failing_requests(scene: Scene) -> Iterator[tuple[str, list[party_pb2.InferRequest]]]:
    """Requests that are refused, each wrong in one way, their shares those of a good one."""
    good = [request for (request,) in scene.inferring.last("Infer").sent]

    def changed(change: Callable[[party_pb2.InferRequest, int], object]) -> list[party_pb2.InferRequest]:
        requests = []
        request_id = os.urandom(16)
        for index, request in enumerate(good):
            copy = party_pb2.InferRequest()
            copy.CopyFrom(request)
            copy.request_id = request_id
            change(copy, index)
            requests.append(copy)
        return requests

    def cut(request: party_pb2.InferRequest, _: int) -> None:
        tensor = request.inputs[0]
        if tensor.seed:
            tensor.seed = tensor.seed[:-1]
        else:
            tensor.data = tensor.data[:-8]

    def wider(request: party_pb2.InferRequest, _: int) -> None:
        request.inputs[0].shape[-1] += 1

    yield "short data", changed(cut)
    yield "another shape", changed(wider)
    yield "no content", changed(lambda r, _: r.inputs[0].ClearField("content"))
    yield "other fraction bits", changed(lambda r, _: setattr(r.inputs[0], "frac_bits", 12))
    yield "other ring", changed(lambda r, _: setattr(r.inputs[0], "ring_bits", 32))
    yield "two inputs", changed(lambda r, _: r.inputs.append(r.inputs[0]))
    yield "no inputs", changed(lambda r, _: r.ClearField("inputs"))
    yield "unknown model", changed(lambda r, _: setattr(r, "model", "no such"))
    yield "unknown version", changed(lambda r, _: setattr(r, "version", 99))
    yield "short id", changed(lambda r, _: setattr(r, "request_id", b"short"))
    yield "different ids", changed(lambda r, _: setattr(r, "request_id", os.urandom(16)))


def test_error_messages_say_no_values(scene: Scene) -> None:
    texts: list[str] = []

    def fails(what: str, work: Callable[[], object]) -> None:
        with pytest.raises((MpcInferError, grpc.RpcError)) as caught:
            work()
        error = caught.value
        texts.append(f"{what}: {error} {error!r} {vars(error)}")
        texts.extend(traceback.format_exception(error))
        while error.__cause__ or error.__context__:
            error = error.__cause__ or error.__context__  # type: ignore[assignment]
            texts.append(f"{error} {error!r}")
            if isinstance(error, grpc.Call):
                texts.append(f"{error.details()} {error.trailing_metadata()} {error.initial_metadata()}")

    scene.infer()
    for what, requests in failing_requests(scene):
        fails(what, lambda requests=requests: scene.inferring.call("Infer", requests, timeout=5))
    # As plain gRPC tells it, to any client in any language.
    stub = scene.inferring._open(10)[-1].stub
    for what, requests in failing_requests(scene):
        fails(f"{what}, raw", lambda requests=requests: stub.Infer(requests[-1], timeout=1))
    x, infer = scene.x, scene.client.infer
    for what, bad in (
        ("shape", x[..., :7]),
        ("empty", x[:0]),
        ("NaN", torch.where(x == x.max(), torch.nan, x)),
        ("infinity", torch.where(x == x.max(), torch.inf, x)),
        ("range", torch.where(x == x.max(), 1e12, x)),
        ("complex", x.to(torch.complex64)),
    ):
        fails(what, lambda bad=bad: infer("canary", bad, timeout=10))
    fails("list", lambda: infer("canary", x.tolist(), timeout=10))
    fails("time", lambda: infer("canary", x, version=scene.version, timeout=0.001))
    damaged = network()
    damaged[0].load_state_dict(scene.model[0].state_dict())  # type: ignore[index]
    damaged[4].weight[0, 0] = torch.nan  # type: ignore[index]
    unsupported = nn.Sequential(*scene.model, nn.RReLU()).eval()
    deploy = scene.owner.deploy
    fails("name", lambda: deploy(scene.model, x, name="no such/name", timeout=20))
    fails("NaN weight", lambda: deploy(damaged, x, name="damaged", timeout=20))
    fails("operator", lambda: deploy(unsupported, x, name="unsupported", timeout=20))
    uploads = scene.uploaded.sent
    for what, messages in (("no header", slice(1, None)), ("no data", slice(0, 1))):
        fails(what, lambda part=messages: scene.deploying.call("Deploy", [iter(u[part]) for u in uploads], timeout=5))

    needles = scene.secrets | held_in_secret(scene)
    for call in scene.inferring.calls:
        if call.method == "Infer":
            for (request,) in call.sent:
                for tensor in request.inputs:
                    needles.add_raw("share or seed of an input", tensor.data, step=8)
                    needles.add_raw("share or seed of an input", tensor.seed)
    assert len(texts) > 60
    for text in texts:
        assert not needles.in_text(text)


def test_what_the_sdk_prints_of_itself_shows_no_values(scene: Scene) -> None:
    things = [scene.client, scene.owner, scene.deploying, scene.inferring, scene.cluster, scene.captured]
    things += [c.identity for c in (scene.deploying, scene.inferring)]
    things += [scene.cluster.cluster, *scene.client.models(), *scene.client.status()]
    text = "\n".join(f"{thing!r}\n{thing}" for thing in things)
    assert not (scene.secrets | held_in_secret(scene) | outputs(scene)).in_text(text)
    for identity in (scene.deploying.identity, scene.inferring.identity):
        for line in identity.key_pem.decode().splitlines()[1:-1]:
            assert line not in text


def test_metrics_show_no_values(scene: Scene) -> None:
    """There are no traces besides: no process sends anything to a collector."""
    scene.infer()
    needles = scene.secrets | held_in_secret(scene) | outputs(scene) | input_shares(scene)
    for role, port in scene.metrics.items():
        text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        assert text.count("\n") > 20 and f"mpcinfer_{role.partition('/')[0]}_" in text
        assert not needles.in_text(text), role
        assert needles.in_text(f"{text}\nmpcinfer_x {scene.x[0, 0, 0, 0].item():.9g}")


def test_nothing_on_disk_or_in_a_log_at_the_end(scene: Scene) -> None:
    """Stores, logs at their most talkative, what was left in the temporary directory: no plaintext, no shares."""
    scene.infer()
    needles = scene.secrets | held_in_secret(scene) | outputs(scene) | input_shares(scene)
    files = files_below(scene.directory / "cluster") + files_below(scene.directory / "temporary")
    names = {path.name for path in files}
    assert names >= {*(path.name for path in scene.cluster.logs.values())}
    assert sum(path.suffix == ".mpc" for path in files) >= scene.parties
    assert not scan_files(files, needles)
    # A plant in each of these places would be seen.
    share = weight_shares(scene.uploaded, 0)
    plants = {
        scene.directory / "cluster" / "party-0-store" / "deployments" / "plant": fixed(scene.x).numpy().tobytes(),
        scene.directory / "temporary" / "plant": b"".join(s.numpy().tobytes() for s in share.values()),
        scene.directory / "cluster" / "logs" / "plant": f"DEBUG x = {scene.x}".encode(),
    }
    for path, data in plants.items():
        path.write_bytes(data)
        try:
            assert scan_files([path], needles)
        finally:
            path.unlink()


@pytest.mark.slow
def test_a_party_that_holds_plaintext_is_caught(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    plant = scene.directory / "plant"
    plant.write_bytes(scene.x.numpy().tobytes())
    monkeypatch.setenv("MPCINFER_TEST_PLANT", str(plant))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(HOOKS), os.environ.get("PYTHONPATH")])))
    scene.cluster.restart("party/1", ready_timeout=60)
    scene.infer()
    with pytest.raises(AssertionError, match="party/1 holds .*input as float32"):
        assert_clean(scene.snapshot(lambda: scene.secrets))
