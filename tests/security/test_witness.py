"""Hosts that deviate, in a cluster with witnesses: each deviation is caught, and nothing leaves an honest host.

The adversary here is consistent: what it has altered it goes on computing with, so that only somebody who computes the
same on the same share can tell. With the comparison removed, each of these attacks succeeds and nobody notices.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import torch

import mpcinfer.party.stepping as stepping
from mpcinfer.client.cluster import Connection
from mpcinfer.client.data import Client
from mpcinfer.client.owner import ModelOwner
from mpcinfer.config import PROTOCOL_VERSION
from mpcinfer.errors import ForbiddenError, MpcInferError, TamperingError
from mpcinfer.graph.capture import capture
from mpcinfer.party.delivery import Delivery
from mpcinfer.party.passing import Passing
from mpcinfer.party.server import Party
from mpcinfer.party.stepping import Stepping
from mpcinfer.party.vouching import Vouching
from mpcinfer.protocol.context import Opening
from mpcinfer.wire import channel
from mpcinfer.wire.mesh import OPENING
from mpcinfer.wire.v1 import dealer_pb2, dealer_pb2_grpc, mesh_pb2, mesh_pb2_grpc
from tests.decoders_local import captured_decoder, plain_logits, tiny_decoder, token_ids
from tests.inprocess import Caller, InProcess, kinds, mlp, plain, random_weights, reveal, wait_for

PROGRAM = mlp()
WEIGHTS = random_weights(PROGRAM)
X = torch.linspace(-2, 2, 12).reshape(3, 4)
HIGH = 1 << 40  # what an addition of it does to an output, nobody can overlook

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    """Two parties, each with a witness, and a model "m"."""
    with InProcess(tmp_path_factory.mktemp("witnesses"), 2, witnesses=(0, 1)) as running:
        assert kinds(running.caller().deploy(PROGRAM, WEIGHTS)) == ["DeployResponse"] * 4
        yield running


@pytest.fixture(scope="module")
def caller(cluster: InProcess) -> Caller:
    return cluster.caller()


@pytest.fixture
def blind(cluster: InProcess) -> Iterator[None]:
    """The planted fault: nobody compares."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Vouching, "check", lambda *_: None)
        yield
    restart(cluster)  # what was sent in this epoch is not what it must have been


def restart(cluster: InProcess) -> None:
    """Have all begin a new epoch, and forget what was fetched ahead."""
    wait = cluster.new_epoch()
    epoch = cluster.parties[0].lane._epoch
    assert epoch is not None
    epoch.close()
    wait()


def right(answers: list[Any]) -> bool:
    return bool((reveal(answers) - plain(WEIGHTS, X)).abs().max() < 1e-3)


def altered(opening: Opening, value: int) -> None:
    """This party adds (or, to bits, XORs) something to one number of its share of an opening."""
    share = opening.masked.clone(memory_format=torch.contiguous_format)
    at = secrets.randbelow(share.numel())
    one = torch.tensor(value - (1 << 64) if value >> 63 else value)
    share.view(-1)[at] = opening.ring.add(share.view(-1)[at], one.to(share.dtype))
    opening.masked = share


class Deviation:
    """A host that does something else in one round of openings."""

    def __init__(self, monkeypatch: Patch, host: Party, do: Callable[[list[Opening]], None]) -> None:
        """do: told the openings of each round that opens anything."""
        original = stepping._exchange

        def exchange(epoch: Any, batch: list[Opening], *rest: Any) -> Any:
            if epoch is host.lane._epoch and batch:
                do(batch)
            return original(epoch, batch, *rest)

        monkeypatch.setattr(stepping, "_exchange", exchange)


def rounds_of_a_request(cluster: InProcess, caller: Caller) -> int:
    """In how many rounds of a request for X something is opened, once the masks of weights are."""
    assert right(caller.infer(X))
    answer = caller.infer(X)[0]
    return int(answer.online.rounds) - 1  # in the last one, what was opened is compared


def flip_one_bit(cluster: InProcess, caller: Caller, host: Party, rounds: int) -> list[Any]:
    """One trial: the host alters one bit, at a random step, on one request. The answers."""
    wait, at, seen = cluster.new_epoch(), secrets.randbelow(rounds), [0]

    def flip(batch: list[Opening]) -> None:
        if seen[0] == at and (opening := batch[secrets.randbelow(len(batch))]).masked.numel():
            altered(opening, 1 << secrets.randbelow(opening.ring.bits))
        seen[0] += 1

    with pytest.MonkeyPatch.context() as patch:
        Deviation(patch, host, flip)
        answers = caller.infer(X)
    assert seen[0] > at
    wait()
    return answers


def caught(answers: list[Any], *suspects: int) -> bool:
    """Whether nothing was released, and somebody was told whom to suspect."""
    said = [str(a) for a in answers if isinstance(a, TamperingError)]
    named = all(f"party {i}" in text.partition("Suspect")[2] for i in suspects for text in said)
    return all(isinstance(a, MpcInferError) for a in answers) and bool(said) and named


# --- honest ------------------------------------------------------------------------------------------------------


def test_with_witnesses_answers_are_right_and_each_is_vouched_for(cluster: InProcess, caller: Caller) -> None:
    answers = caller.infer(X)
    assert right(answers)
    assert [len(a.outputs) for a in answers] == [1, 1, 0, 0]
    assert [len(a.commitment) for a in answers] == [0, 0, 32, 32]


def test_owner_and_client_need_not_know_of_witnesses(cluster: InProcess) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)).eval()
    expected = model(X)
    keys = cluster.keys
    with Connection(keys.cluster, keys.identity("owner/alice")) as connection:
        ModelOwner(connection).upload(capture(model, (X,)), name="torch")
    with Connection(keys.cluster, keys.identity("client/bob")) as connection:
        client = Client(connection)
        assert (client.infer("torch", X) - expected).abs().max() < 1e-3
        assert [s.role for s in client.status()] == ["party/0", "party/1", "witness/0", "witness/1"]


@pytest.mark.parametrize("watched", [(1,), pytest.param((0, 2), marks=pytest.mark.slow)])
def test_some_parties_may_have_witnesses(tmp_path: Path, watched: tuple[int, ...]) -> None:
    with InProcess(tmp_path, max(watched) + 1, witnesses=watched) as running:
        caller = running.caller()
        caller.deploy(PROGRAM, WEIGHTS)
        assert right(caller.infer(X))


def test_a_language_model_writes_with_witnesses_and_a_spoilt_token_is_not_released(
    cluster: InProcess, monkeypatch: Patch
) -> None:
    model, text = language_model(cluster, "lm")
    with Connection(cluster.keys.cluster, cluster.keys.identity("client/bob")) as connection:
        client = Client(connection)
        assert len(client.generate("lm", text, max_new_tokens=3, stream=False).tokens) == 3
        wait, pieces = cluster.new_epoch(), []
        answer = client.generate("lm", text, max_new_tokens=8)

        def spoil(batch: list[Opening]) -> None:
            if len(pieces) == 2 and (found := next((o for o in batch if o.ring.bits == 64), None)) is not None:
                altered(found, HIGH)

        Deviation(monkeypatch, cluster.parties[0], spoil)
        with pytest.raises(TamperingError, match="Suspect: party 0"):
            for piece in answer:
                pieces.append(piece.token)
        # each leaves with the votes of the next step, which has begun when it is read
        assert 2 <= len(pieces) <= 3
        for k, token in enumerate(pieces):
            logits = plain_logits(model, [*text, *pieces[:k]])
            assert float(logits.max() - logits[token]) < 5e-3
        wait()


def test_without_the_comparison_a_spoilt_token_is_released(cluster: InProcess, blind: None, monkeypatch: Patch) -> None:
    _, text = language_model(cluster, "unseen-lm")
    with Connection(cluster.keys.cluster, cluster.keys.identity("client/bob")) as connection:
        client = Client(connection)

        def spoil(batch: list[Opening]) -> None:
            for opening in batch:
                if opening.ring.bits == 64:
                    altered(opening, HIGH)

        Deviation(monkeypatch, cluster.parties[0], spoil)
        with pytest.raises(
            TamperingError, match="has answered with another share than witness"
        ):  # the client looks too
            client.generate("unseen-lm", text, max_new_tokens=8, stream=False)


def language_model(cluster: InProcess, name: str) -> tuple[Any, list[int]]:
    """A tiny one, deployed, and the beginning of a text."""
    model = tiny_decoder(layers=1)
    captured = captured_decoder(model)
    assert kinds(cluster.caller().deploy(captured.program, dict(captured.weights), name)) == ["DeployResponse"] * 4
    return model, token_ids(6)


# --- parties that deviate ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("trials", [20, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_one_bit_of_one_opening(cluster: InProcess, caller: Caller, trials: int) -> None:
    rounds = rounds_of_a_request(cluster, caller)
    for trial in range(trials):
        culprit = trial % 2
        assert caught(flip_one_bit(cluster, caller, cluster.parties[culprit], rounds), culprit)
    assert right(caller.infer(X))


def test_without_the_comparison_one_bit_goes_unnoticed(cluster: InProcess, caller: Caller, blind: None) -> None:
    rounds = rounds_of_a_request(cluster, caller)
    with pytest.MonkeyPatch.context() as patch:
        seen = [0]

        def spoil(batch: list[Opening]) -> None:
            seen[0] += 1
            if seen[0] == rounds:
                altered(batch[0], 1 << batch[0].ring.bits - 1)

        Deviation(patch, cluster.parties[1], spoil)
        answers = caller.infer(X)
    assert kinds(answers) == ["InferResponse"] * 4 and not right(answers)


def tampered_weights(patch: Patch, cluster: InProcess) -> None:
    """Party 1 opens other masked weights: F is wrong everywhere, and stays so."""
    done: list[bool] = []

    def spoil(batch: list[Opening]) -> None:
        if not done:
            done.append(True)
            altered(batch[0], HIGH)

    Deviation(patch, cluster.parties[1], spoil)


def test_weights_opened_wrongly_at_deploy(cluster: InProcess, caller: Caller) -> None:
    wait, before = cluster.new_epoch(), cluster.files()
    with pytest.MonkeyPatch.context() as patch:
        tampered_weights(patch, cluster)
        assert caught(caller.deploy(PROGRAM, WEIGHTS, "spoilt"), 1)
    wait()
    assert cluster.files() == before
    assert kinds(caller.infer(X, "spoilt")) == ["NotFoundError"] * 4
    assert right(caller.infer(X))


def false_seed(patch: Patch, cluster: InProcess) -> None:
    """Party 0 expands other shares than those that the dealer counts on."""
    epoch = cluster.parties[0].lane._epoch
    assert epoch is not None
    patch.setattr(epoch.key, "_key", secrets.token_bytes(len(epoch.key._key)))


def altered_forwarding(patch: Patch, cluster: InProcess) -> None:
    """Party 0 tells its witness of another opening than it has received."""
    epoch = cluster.parties[0].lane._epoch
    assert epoch is not None
    link = epoch.mesh._witness  # type: ignore[attr-defined]
    send, done = link.send, list[bool]()

    def lie(kind: int, payload: bytes) -> None:
        if kind == OPENING and not done:
            done.append(True)
            payload = bytes([payload[0] ^ 1]) + payload[1:]
        send(kind, payload)

    patch.setattr(link, "send", lie)


def altered_corrections(patch: Patch, cluster: InProcess) -> None:
    """Party 1 uses other corrections than the dealer has sent, and passes the right ones on."""
    original = Delivery.take

    def take(self: Delivery, size: int) -> bytearray | memoryview:
        taken = original(self, size)
        if type(self) is not Delivery:  # not from the dealer, but from a party
            return taken
        return bytearray(byte ^ 1 for byte in taken)  # all: of the tables, only some entries are ever read

    patch.setattr(Delivery, "take", take)


def corrections_passed_on_altered(patch: Patch, cluster: InProcess) -> None:
    """Party 1 uses what the dealer has sent, and passes something else on."""
    original = Passing.add
    patch.setattr(Passing, "add", lambda self, chunk: original(self, bytes([chunk[0] ^ 1]) + chunk[1:]))


@pytest.mark.parametrize(
    ("attack", "suspect"),
    [(false_seed, 0), (altered_forwarding, 0), (altered_corrections, 1), (corrections_passed_on_altered, 1)],
)
def test_other_deviations(
    cluster: InProcess, caller: Caller, attack: Callable[[Patch, InProcess], None], suspect: int
) -> None:
    assert right(caller.infer(X, "m"))
    restart(cluster)
    wait = cluster.new_epoch()
    with pytest.MonkeyPatch.context() as patch:
        attack(patch, cluster)
        assert caught(caller.infer(X), suspect)
    wait()
    assert right(caller.infer(X))


@pytest.mark.parametrize("attack", [false_seed, altered_forwarding, altered_corrections, tampered_weights])
def test_without_the_comparison_they_go_unnoticed(
    cluster: InProcess, caller: Caller, attack: Callable[[Patch, InProcess], None], blind: None
) -> None:
    restart(cluster)
    with pytest.MonkeyPatch.context() as patch:
        attack(patch, cluster)
        if attack is tampered_weights:
            assert kinds(caller.deploy(PROGRAM, WEIGHTS, "unseen")) == ["DeployResponse"] * 4
            answers = caller.infer(X, "unseen")
        else:
            answers = caller.infer(X)
    assert kinds(answers) == ["InferResponse"] * 4
    assert right(answers) == (attack is altered_forwarding)  # a lie to the witness spoils no answer


@pytest.mark.parametrize("when", ["before all have vouched", "after"])
def test_another_output_share(cluster: InProcess, caller: Caller, when: str) -> None:
    """What party 1 answers is not what it has computed. Told early, the parties notice; else the client does."""
    original = Stepping.release

    async def release(self: Stepping, part: Any, job: Any, step: Any, outputs: Any = (), number: int = 0) -> bytes:
        mine = part.epoch is cluster.parties[1].lane._epoch and outputs
        if mine and when != "after":
            outputs[0].data = bytes(8) + outputs[0].data[8:]
        result = await original(self, part, job, step, outputs, number)
        if mine and when == "after":
            outputs[0].data = bytes(8) + outputs[0].data[8:]
        return result

    wait = cluster.new_epoch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepping, "release", release)
        if when != "after":
            assert caught(caller.infer(X), 1)
            wait()
            return
        assert kinds(caller.infer(X)) == ["InferResponse"] * 4  # whoever does not look does not see
        with (
            Connection(cluster.keys.cluster, cluster.keys.identity("client/bob")) as connection,
            pytest.raises(TamperingError, match="party/1 has answered with another share than witness/1 vouches for"),
        ):
            Client(connection).infer("m", X)


def test_different_values_for_different_parties(tmp_path: Path) -> None:
    with InProcess(tmp_path, 3, witnesses=(0, 1, 2)) as cluster:
        caller = cluster.caller()
        caller.deploy(PROGRAM, WEIGHTS)
        assert right(caller.infer(X))
        epoch = cluster.parties[1].lane._epoch
        assert epoch is not None
        link, wait = epoch.mesh.links[2], cluster.new_epoch()
        send, rounds = link.send, [0]

        def lie(kind: int, payload: bytes) -> None:
            rounds[0] += kind == OPENING
            if kind == OPENING and rounds[0] == 2:
                payload = bytes([payload[0] ^ 1]) + payload[1:]
            send(kind, payload)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(link, "send", lie)
            # the transcripts that the parties themselves compare are left out: witnesses need no help
            patch.setattr("mpcinfer.party.stepping.hmac", SimpleNamespace(compare_digest=lambda a, b: True))
            assert caught(caller.infer(X), 1)
        wait()
        assert right(caller.infer(X))


# --- owners and clients that deviate -----------------------------------------------------------------------------


def test_a_client_must_send_a_party_and_its_witness_the_same(cluster: InProcess, caller: Caller) -> None:
    epoch = cluster.parties[0].former.current
    requests = caller.inferences(X)
    requests[3].inputs[0].data = bytes(8) + requests[3].inputs[0].data[8:]
    answers = caller.at_all("Infer", requests)
    assert kinds(answers) == ["AgreementError"] * 4 and "different shares" in str(answers[0])
    assert right(caller.infer(X))
    assert cluster.parties[0].former.current is epoch  # the hosts are honest: nothing is burnt


def test_an_owner_must_send_a_party_and_its_witness_the_same(cluster: InProcess, caller: Caller) -> None:
    before = cluster.files()
    uploads = caller.deploys(PROGRAM, WEIGHTS, "split")
    uploads[2][0].header.weights[0].seed = secrets.token_bytes(32)
    answers = caller.at_all("Deploy", [iter(u) for u in uploads])
    assert kinds(answers) == ["AgreementError"] * 4 and "different shares" in str(answers[0])
    assert cluster.files() == before


def test_shares_that_are_not_compared_go_unnoticed(cluster: InProcess, caller: Caller, blind: None) -> None:
    """The planted fault: without the commitments, and without comparing what was computed."""
    requests = caller.inferences(X)
    requests[3].inputs[0].data = bytes(8) + requests[3].inputs[0].data[8:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpcinfer.party.service.upload_commitment", lambda *_: b"")
        assert kinds(caller.at_all("Infer", requests)) == ["InferResponse"] * 4


def test_a_request_without_a_salt_is_refused(cluster: InProcess, caller: Caller) -> None:
    requests = caller.inferences(X)
    for request in requests:
        request.salt = b""
    assert kinds(caller.at_all("Infer", requests)) == ["InputError"] * 4


# --- who is who --------------------------------------------------------------------------------------------------


def test_without_its_witness_a_party_does_not_work(tmp_path: Path) -> None:
    with InProcess(tmp_path, 2, witnesses=(1,)) as cluster:
        caller = cluster.caller()
        caller.deploy(PROGRAM, WEIGHTS)
        cluster.witnesses.pop(1).stop()
        wait_for(lambda: cluster.parties[0].lane.state == "connecting")
        wait_for(lambda: "witness/1" in cluster.parties[1].lane.detail)
        cluster.start_witness(1)
        cluster.wait_ready()
        assert right(caller.infer(X))


def test_only_a_witness_is_given_a_key_and_only_its_own(cluster: InProcess) -> None:
    keys, epoch = cluster.keys, cluster.parties[0].former.current
    assert epoch is not None
    request = dealer_pb2.WitnessRequest(
        session=epoch.id, index=0, cluster_digest=keys.cluster.digest(), protocol_version=PROTOCOL_VERSION
    )
    for role in ("party/0", "party/1", "witness/1", "owner/alice", "client/bob"):
        with channel.connect(keys.cluster.dealer, keys.cluster, keys.identity(role), timeout=10) as opened:
            stub = dealer_pb2_grpc.DealerServiceStub(opened)
            with pytest.raises(grpc.RpcError) as refused:
                stub.Witness(request, timeout=10)
            assert isinstance(channel.from_rpc_error(refused.value, "dealer"), ForbiddenError)
    with channel.connect(keys.cluster.dealer, keys.cluster, keys.identity("witness/0"), timeout=10) as opened:
        stub = dealer_pb2_grpc.DealerServiceStub(opened)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Witness(request, timeout=10)  # it has it already
        assert not isinstance(channel.from_rpc_error(refused.value, "dealer"), ForbiddenError)


@pytest.mark.parametrize("role", ["party/1", "witness/1", "owner/alice", "client/bob"])
def test_a_witness_listens_to_its_own_party_only(cluster: InProcess, role: str) -> None:
    keys = cluster.keys
    with channel.connect(keys.cluster.endpoint("witness/0"), keys.cluster, keys.identity(role), timeout=10) as opened:
        stub = mesh_pb2_grpc.MeshServiceStub(opened)
        calls: list[Callable[[], Any]] = [
            lambda: next(stub.Connect(iter([mesh_pb2.ConnectRequest()]), timeout=10)),
            lambda: stub.Corrections(iter([mesh_pb2.CorrectionsRequest()]), timeout=10),
        ]
        for call in calls:
            with pytest.raises(grpc.RpcError) as refused:
                call()
            assert isinstance(channel.from_rpc_error(refused.value, "witness/0"), ForbiddenError)
