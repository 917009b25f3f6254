"""What a party answers to calls that should not be, at the level of messages: typed errors, and nothing half-done."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mpcinfer.config import Limits
from mpcinfer.errors import BusyError, MpcInferError, ShapeError
from mpcinfer.graph.program import Input, Program, Value
from mpcinfer.party import messages
from mpcinfer.party.messages import share
from mpcinfer.party.uploads import Uploads
from mpcinfer.wire import channel
from mpcinfer.wire.v1 import party_pb2, party_pb2_grpc, tensor_pb2
from tests.inprocess import Caller, InProcess, kinds, mlp, plain, random_weights, reveal, wait_for
from tests.party.test_lane import Gate, later

PROGRAM = mlp()
WEIGHTS = random_weights(PROGRAM)
X = torch.linspace(-2, 2, 8).reshape(2, 4)
# nothing is dealt ahead, so that what is spent can be counted
LIMITS = Limits(
    max_waiting_requests=4, max_upload_mb=1, max_message_mb=4, connect_timeout_s=5, step_timeout_s=60, pool_mb=0
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    with InProcess(tmp_path_factory.mktemp("service"), 2, LIMITS) as running:
        assert kinds(running.caller().deploy(PROGRAM, WEIGHTS)) == ["DeployResponse"] * 2
        yield running


@pytest.fixture
def caller(cluster: InProcess) -> Iterator[Caller]:
    """Alice; afterwards nothing of what she did may be left but what succeeded."""
    models = [[m.id for m in p.catalogue.models()] for p in cluster.parties.values()]
    caller, files, epoch = cluster.caller(), cluster.files(), cluster.parties[0].former.current
    spent = cluster.dealer and cluster.dealer.tapes_dealt
    yield caller
    wait_for(lambda: not any(len(p.inbox) for p in cluster.parties.values()))
    wait_for(lambda: not [f for f in cluster.files() if f.endswith(".part")])
    assert cluster.files() == files
    assert [[m.id for m in p.catalogue.models()] for p in cluster.parties.values()] == models
    assert cluster.parties[0].former.current is epoch
    assert cluster.dealer and cluster.dealer.tapes_dealt == spent
    assert (reveal(caller.infer(X)) - plain(WEIGHTS, X)).abs().max() < 1e-3


# --- infer -----------------------------------------------------------------------------------------------------------


def bad(caller: Caller, **changes: Any) -> Any:
    """What party 0 answers to a request whose tensor is changed."""
    request = caller.inferences(X)[0]
    tensor = request.inputs[0]
    for name, value in changes.items():
        if name == "shape":
            tensor.shape[:] = value
        else:
            setattr(tensor, name, value)
    return caller.at_all("Infer", [request, None], timeout=20)[0]


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"shape": [2, 5]}, "ShapeError", "takes [batch, 4]"),
        ({"shape": [8]}, "ShapeError", "takes [batch, 4]"),
        ({"shape": []}, "ShapeError", "takes [batch, 4]"),
        ({"shape": [0, 4]}, "ShapeError", "at least 1"),
        ({"shape": [-1, 4]}, "ShapeError", "at least 1"),
        ({"shape": [1 << 40, 4]}, "ShapeError", "smaller batches"),
        ({"shape": [1 << 62, 4]}, "ShapeError", "smaller batches"),
        ({"frac_bits": 0}, "InputError", "16 fraction bits"),
        ({"frac_bits": 15}, "InputError", "16 fraction bits"),
        ({"ring_bits": 32}, "InputError", "64 bits"),
        ({"seed": b"short"}, "InputError", "32 bytes"),
        ({"data": b""}, "InputError", "64"),
        ({"data": bytes(63)}, "InputError", "64"),
        ({"data": bytes(72)}, "InputError", "64"),
    ],
    ids=lambda p: str(p)[:30] if isinstance(p, dict) else None,
)
def test_tensors_that_do_not_fit(caller: Caller, changes: dict[str, Any], kind: str, text: str) -> None:
    answer = bad(caller, **changes)
    assert type(answer).__name__ == kind and text in str(answer)


def test_a_seed_stands_for_no_more_than_could_be_sent(caller: Caller, cluster: InProcess) -> None:
    answer = bad(caller, shape=[1 << 18, 4])  # 8 MiB
    assert type(answer).__name__ == "ShapeError"


@pytest.mark.parametrize("inputs", [0, 2])
def test_the_number_of_inputs(caller: Caller, inputs: int) -> None:
    requests = caller.inferences(X)
    for request in requests:
        tensors = list(request.inputs) * 2
        del request.inputs[:]
        request.inputs.extend(tensors[:inputs])
    assert kinds(caller.at_all("Infer", requests)) == ["InputError"] * 2


@pytest.mark.parametrize(("name", "version"), [("x", 0), ("m", 2), ("", 0), ("m" * 1000, 0)])
def test_unknown_models(caller: Caller, name: str, version: int) -> None:
    answers = caller.infer(X, name, version)
    assert kinds(answers) == ["NotFoundError"] * 2 and "deployed: m" in str(answers[0])


@pytest.mark.parametrize("id_", [b"", bytes(15), bytes(17)])
def test_request_ids_have_16_bytes(caller: Caller, id_: bytes) -> None:
    requests = caller.inferences(X)
    for request in requests:
        request.request_id = id_
    assert kinds(caller.at_all("Infer", requests)) == ["InputError"] * 2


def test_a_request_id_in_use_is_refused(cluster: InProcess) -> None:
    caller = cluster.caller()
    gate = Gate(cluster.parties[1].lane)
    requests = caller.inferences(X)
    running = later(lambda: caller.at_all("Infer", requests))
    assert gate.reached.wait(30)
    assert kinds(caller.at_all("Infer", requests)) == ["ConflictError"] * 2
    gate.open.set()
    assert (reveal(running.result(30)) - plain(WEIGHTS, X)).abs().max() < 1e-3
    # an id that is free again may be used again: nothing is derived from it
    assert (reveal(caller.at_all("Infer", requests)) - plain(WEIGHTS, X)).abs().max() < 1e-3


def test_batches_of_one_and_many(cluster: InProcess) -> None:
    caller = cluster.caller()
    for batch in (1, 1000):
        x = torch.randn(batch, 4)
        assert (reveal(caller.infer(x)) - plain(WEIGHTS, x)).abs().max() < 1e-3


def test_a_deadline_that_is_too_short(cluster: InProcess) -> None:
    caller, epoch = cluster.caller(), cluster.parties[0].former.current
    answers = caller.infer(X, timeout=0.001)
    assert kinds(answers) == ["DeadlineError"] * 2
    wait_for(lambda: not any(len(p.inbox) for p in cluster.parties.values()))
    assert (reveal(caller.infer(X)) - plain(WEIGHTS, X)).abs().max() < 1e-3
    assert cluster.parties[0].former.current is epoch


# --- who may ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "role"),
    [
        ("Infer", "party/0"),
        ("Infer", "dealer"),
        ("Deploy", "client/bob"),
        ("Deploy", "party/0"),
        ("Deploy", "dealer"),
        ("RemoveModel", "client/bob"),
        ("RemoveModel", "dealer"),
        ("RefreshModel", "client/bob"),
        ("RefreshModel", "dealer"),
        ("ListModels", "dealer"),
    ],
)
def test_roles(cluster: InProcess, caller: Caller, method: str, role: str) -> None:
    other = cluster.caller(role)
    requests: dict[str, list[Any]] = {
        "Infer": list(caller.inferences(X)),
        "Deploy": [iter(u) for u in caller.deploys(PROGRAM, WEIGHTS)],
        "RemoveModel": [party_pb2.RemoveModelRequest(request_id=bytes(16), name="m")] * 2,
        "RefreshModel": [party_pb2.RefreshModelRequest(request_id=bytes(16), name="m")] * 2,
        "ListModels": [party_pb2.ListModelsRequest()] * 2,
    }
    answers = other.at_all(method, requests[method])
    assert kinds(answers) == ["ForbiddenError"] * 2 and role in str(answers[0])


@pytest.mark.parametrize("role", ["party/0", "dealer"])
def test_a_key_that_is_not_the_pinned_one(cluster: InProcess, caller: Caller, role: str) -> None:
    """Signed by the right CA for the right role, and yet nobody."""
    impostor = cluster.keys.issue(role, f"impostor-{secrets.token_hex(4)}")
    endpoint, parties = cluster.keys.cluster.parties[1], cluster.keys.cluster
    with pytest.raises(MpcInferError) as caught:
        with channel.connect(endpoint, parties, impostor, timeout=20) as opened:
            stub = party_pb2_grpc.PartyServiceStub(opened)
            try:
                stub.Status(party_pb2.StatusRequest(), timeout=20)
            except grpc.RpcError as error:
                raise channel.from_rpc_error(error, "party/1") from error
    assert (
        type(caught.value).__name__ == "IdentityError" and "pinned" in str(caught.value) or "key" in str(caught.value)
    )


# --- deploy ----------------------------------------------------------------------------------------------------------


def upload(caller: Caller, change: Any, program: Program = PROGRAM) -> Any:
    """What the last party answers to an upload whose messages are changed."""
    changed = change(caller.deploys(program, random_weights(program))[-1])
    return caller.at_all("Deploy", [None, iter(changed)], timeout=20)[1]


def edited(messages: list[party_pb2.DeployRequest], **fields: Any) -> list[party_pb2.DeployRequest]:
    for name, value in fields.items():
        setattr(messages[0].header, name, value)
    return messages


def renamed_weight(messages: list[party_pb2.DeployRequest]) -> list[party_pb2.DeployRequest]:
    messages[0].header.weights[0].name = "other"
    return messages


def negative_shape(messages: list[party_pb2.DeployRequest]) -> list[party_pb2.DeployRequest]:
    messages[0].header.weights[0].shape[0] = -4
    return messages


def flipped(messages: list[party_pb2.DeployRequest]) -> list[party_pb2.DeployRequest]:
    chunk = bytearray(messages[1].chunk)
    chunk[5] ^= 1
    messages[1].chunk = bytes(chunk)
    return messages


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda m: m[:1], "UploadError"),
        (lambda m: [], "UploadError"),
        (lambda m: m[1:], "UploadError"),
        (lambda m: [m[0], party_pb2.DeployRequest(chunk=m[1].chunk[:-8])], "UploadError"),
        (lambda m: [*m, party_pb2.DeployRequest(chunk=b"more")], "UploadError"),
        (flipped, "UploadError"),
        (lambda m: edited(m, digest=bytes(32)), "UploadError"),
        (lambda m: edited(m, size=1), "UploadError"),
        (lambda m: edited(m, size=1 << 40), "UploadError"),
        (negative_shape, "UploadError"),
        (lambda m: edited(m, program=b"{}"), "InputError"),
        (lambda m: edited(m, program=b"\xff"), "InputError"),
        (lambda m: edited(m, program=mlp((4, 5, 2)).to_bytes()), "InputError"),
        (renamed_weight, "InputError"),
        (lambda m: edited(m, name=""), "InputError"),
        (lambda m: edited(m, name="../x"), "InputError"),
        (lambda m: edited(m, name="x" * 65), "InputError"),
        (lambda m: edited(m, request_id=b""), "InputError"),
    ],
    ids=[
        *("no-chunks", "nothing", "no-header", "truncated", "longer", "corrupted", "digest", "size", "too-large"),
        *("negative", "no-program", "no-text", "other-program", "renamed", "no-name", "path", "long-name", "no-id"),
    ],
)
def test_uploads_that_do_not_fit(caller: Caller, change: Any, kind: str) -> None:
    assert type(upload(caller, change)).__name__ == kind


def test_one_owner_does_not_take_all_the_room_for_uploads() -> None:
    """By uploads that begin and never go on."""
    uploads: Any = Uploads(*[None] * 3, LIMITS)  # type: ignore[arg-type]
    uploads._enter("owner/eve", 0)
    uploads._enter("owner/eve", 0)
    with pytest.raises(BusyError):
        uploads._enter("owner/eve", 0)
    for _ in range(2):
        uploads._enter("owner/alice", 0)
    with pytest.raises(BusyError):
        uploads._enter("owner/bob", 0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(uploads._enter, "owner/bob", 20)
        uploads._leave("owner/eve")
        waiting.result(20)


def test_a_request_without_a_deadline_is_answered(cluster: InProcess) -> None:
    caller = cluster.caller()
    answers = caller.at_all("Infer", caller.inferences(X), timeout=None)
    assert (reveal(answers) - plain(WEIGHTS, X)).abs().max() < 1e-3


@pytest.mark.parametrize("shape", [(1, -3), (-1, -4), (-1, 4)])
@pytest.mark.parametrize("content", [{"seed": bytes(32)}, {"data": b""}, {"data": bytes(32)}])
def test_negative_sizes_are_refused(shape: tuple[int, ...], content: dict[str, bytes]) -> None:
    with pytest.raises(ShapeError):
        share(tensor_pb2.Tensor(shape=shape, frac_bits=16, **content), PROGRAM.inputs[0], 1 << 20)


def test_what_one_party_refuses_no_party_deploys(caller: Caller) -> None:
    uploads = caller.deploys(PROGRAM, WEIGHTS)
    uploads[-1] = flipped(uploads[-1])
    assert kinds(caller.at_all("Deploy", [iter(u) for u in uploads])) == ["UnavailableError", "UploadError"]


def test_an_upload_larger_than_allowed_is_refused_before_it_is_sent(caller: Caller) -> None:
    big = mlp((400, 400))
    answer = upload(caller, lambda m: m, big)
    assert type(answer).__name__ == "UploadError" and "1 MiB" in str(answer)


def test_an_upload_that_is_cut_off(cluster: InProcess, caller: Caller) -> None:
    uploads = caller.deploys(PROGRAM, WEIGHTS)

    def half() -> Iterator[party_pb2.DeployRequest]:
        yield uploads[-1][0]
        wait_for(lambda: [f for f in cluster.files() if f.endswith(".part")])
        raise RuntimeError("the owner's machine fails")

    with pytest.raises(grpc.RpcError):
        caller.stubs[-1].Deploy(half(), timeout=20)
    wait_for(lambda: not [f for f in cluster.files() if f.endswith(".part")])


def test_programs_that_differ_between_parties_are_refused(caller: Caller) -> None:
    """Each upload is good by itself."""
    raw = PROGRAM.to_bytes().replace(b'"limit":0.0', b'"limit":16.0')
    uploads, other = caller.deploys(PROGRAM, WEIGHTS), caller.deploys(Program.from_bytes(raw), WEIGHTS)
    other[0][0].header.request_id = uploads[0][0].header.request_id
    uploads[0] = other[0]
    assert kinds(caller.at_all("Deploy", [iter(u) for u in uploads])) == ["AgreementError"] * 2


def test_a_name_that_differs_between_parties_is_refused(caller: Caller) -> None:
    uploads, other = caller.deploys(PROGRAM, WEIGHTS), caller.deploys(PROGRAM, WEIGHTS, "n")
    other[0][0].header.request_id = uploads[0][0].header.request_id
    uploads[0] = other[0]
    assert kinds(caller.at_all("Deploy", [iter(u) for u in uploads])) == ["AgreementError"] * 2


# --- how many --------------------------------------------------------------------------------------------------------


def test_beyond_the_limit_requests_are_refused_and_health_is_still_answered(cluster: InProcess) -> None:
    caller = cluster.caller()
    gate = Gate(cluster.parties[1].lane)
    running: list[Future[Any]] = [later(lambda: caller.infer(X)) for _ in range(4)]
    try:
        assert gate.reached.wait(30)
        wait_for(lambda: all(len(p.inbox) == 4 for p in cluster.parties.values()))
        for answers in (caller.infer(X), caller.deploy(PROGRAM, WEIGHTS)):
            assert kinds(answers) == ["BusyError"] * 2 and "later" in str(answers[0])
        with ThreadPoolExecutor(60) as pool:
            flood = [a for answers in pool.map(lambda _: caller.infer(X), range(60)) for a in answers]
        assert set(kinds(flood)) == {"BusyError"}
        for index in range(2):
            status = caller.stubs[index].Status(party_pb2.StatusRequest(), timeout=20)
            assert (status.state, status.requests_waiting) == ("ready", 4)
            with channel.connect(
                cluster.keys.cluster.parties[index],
                cluster.keys.cluster,
                cluster.keys.identity("client/bob"),
                timeout=20,
            ) as opened:
                health = health_pb2_grpc.HealthStub(opened).Check(health_pb2.HealthCheckRequest(), timeout=20)
                assert health.status == health_pb2.HealthCheckResponse.SERVING
    finally:
        gate.open.set()
    for one in running:
        assert (reveal(one.result(60)) - plain(WEIGHTS, X)).abs().max() < 1e-3
    assert (reveal(caller.infer(X)) - plain(WEIGHTS, X)).abs().max() < 1e-3


def test_callers_who_go_make_room(cluster: InProcess) -> None:
    caller = cluster.caller()
    gate = Gate(cluster.parties[1].lane)
    running = later(lambda: caller.infer(X))
    try:
        assert gate.reached.wait(30)
        for _ in range(3):
            calls = [
                stub.Infer.future(r, timeout=60) for stub, r in zip(caller.stubs, caller.inferences(X), strict=True)
            ]
            wait_for(lambda: all(len(p.inbox) == 2 for p in cluster.parties.values()))
            for call in calls:
                call.cancel()
            wait_for(lambda: all(len(p.inbox) == 1 for p in cluster.parties.values()))
    finally:
        gate.open.set()
    assert (reveal(running.result(60)) - plain(WEIGHTS, X)).abs().max() < 1e-3


def test_requests_wait_for_the_parties_to_connect_but_not_for_ever(tmp_path: Path) -> None:
    with InProcess(tmp_path, 2, Limits(max_waiting_requests=4, connect_timeout_s=2)) as cluster:
        caller = cluster.caller()
        caller.deploy(PROGRAM, WEIGHTS)
        cluster.stop_dealer()
        wait_for(lambda: all(p.lane.state == "connecting" for p in cluster.parties.values()))
        began = time.monotonic()
        answers = caller.infer(X)
        assert kinds(answers) == ["UnavailableError"] * 2 and "dealer" in str(answers[0])
        assert time.monotonic() - began < 30
        threading.Timer(0.3, cluster.start_dealer).start()
        for _ in range(20):  # those who come early wait
            answers = caller.infer(X)
            if not any(isinstance(a, MpcInferError) for a in answers):
                break
        assert (reveal(answers) - plain(WEIGHTS, X)).abs().max() < 1e-3


# --- what it says ----------------------------------------------------------------------------------------------------


def test_status_and_models(cluster: InProcess) -> None:
    caller = cluster.caller("client/bob")
    for index, stub in enumerate(caller.stubs):
        status = stub.Status(party_pb2.StatusRequest(), timeout=20)
        assert (status.index, status.parties, status.state, status.detail) == (index, 2, "ready", "")
        assert status.cluster_digest == cluster.keys.cluster.digest()
        (model,) = stub.ListModels(party_pb2.ListModelsRequest(), timeout=20).models
        assert list(status.models) == [model]
        assert (model.name, model.version, model.owner, model.reveal) == ("m", 1, "owner/alice", "logits")
        assert model.parameters == PROGRAM.size == 23
        (spec,) = model.inputs
        assert (list(spec.shape), spec.frac_bits, spec.ring_bits) == ([-1, 4], 16, 64) and spec.limit > 1


def test_the_limits_served_are_the_programs_or_else_the_encodings() -> None:
    assert messages.spec(Input("x", (-1, 3), 16, 2.0**20, True)).limit == 2.0**20
    assert messages.spec(Input("x", (-1, 3), 16)).limit == 2.0**30
    assert messages.spec(Value("y", (-1,), 0)).limit == 0


def test_answers_are_shares_and_not_the_output(cluster: InProcess) -> None:
    caller = cluster.caller()
    requests = [caller.infer(X) for _ in range(2)]
    first, second = ([bytes(a.outputs[0].data) for a in answers] for answers in requests)
    assert not set(first) & set(second)
    assert all(a.outputs[0].WhichOneof("content") == "data" for a in requests[0])
    assert isinstance(requests[0][0].outputs[0], tensor_pb2.Tensor)
